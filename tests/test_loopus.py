"""The model against independent computations: transformers' logits, the paper's equations in numpy, exact properties."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import BACKBONES, GOLDEN, small, write_backbone
from load_weights import load
from loopus import InputError, Linear, LoopUSConfig, Gate


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("split", [(1, 1), (2, 1)])
def test_logits_equal_transformers(tmp_path, name, split):
    if sum(split) >= BACKBONES[name]["num_hidden_layers"]:
        split = (1, 1)
    golden = load_file(GOLDEN / "logits.safetensors")
    write_backbone(tmp_path, name)
    model, _ = load(tmp_path, split=split)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_pretrained(golden[f"{name}.ids"]),
            golden[f"{name}.logits"],
            rtol=0,
            atol=2e-5,
        )
        if split[0] == 1:  # transformers' hidden state after one layer is h⁰ of this split
            torch.testing.assert_close(
                model.encode(golden[f"{name}.ids"]), golden[f"{name}.layer1"], rtol=0, atol=2e-5
            )


def test_open_gate_is_the_pretrained_model_exactly_and_shut_gate_no_loop():
    model, ids = small(dtype=torch.float32), torch.randint(0, 50, (2, 9))
    model.reasoning.gate.A_log.data.fill_(-torch.inf)
    assert torch.equal(model(ids, loops=1), model.forward_pretrained(ids))
    model.reasoning.gate.A_log.data.fill_(30.0)
    h = model.encode(ids)
    assert torch.equal(model.loop(h)[0], h)


@pytest.mark.parametrize("outputs", [1, 7, 24, 64])
def test_a_single_tokens_product_in_parts_is_the_matrixs(outputs):
    layer = Linear(10, outputs, bias=False)
    weight = layer.weight.detach().double().numpy()
    for x in (
        torch.randn(10),
        torch.randn(1, 10),
        torch.randn(1, 1, 10),
        torch.randn(1, 10, 2)[..., 0],
        torch.randn(2, 3, 10),
    ):
        x.requires_grad_()
        y = layer(x)
        np.testing.assert_allclose(
            y.detach().numpy(), x.detach().double().numpy() @ weight.T, atol=1e-6
        )
        np.testing.assert_allclose(
            torch.autograd.grad(y.sum(), x)[0].numpy(),
            np.broadcast_to(weight.sum(0), x.shape),
            atol=2e-6,
        )


def test_recurrence_equals_numpy_on_the_papers_equations():
    model, ids = small(), torch.randint(0, 50, (3, 7))
    state = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    h = model.encode(ids)
    for _ in range(5):
        m = model.reasoning.layers(h, model._span(7)).detach().numpy()
        old = h.detach().numpy()
        delta = m - old
        pre = (
            delta
            @ state["reasoning.gate.dt_input_proj.weight"].T
            @ state["reasoning.gate.delta_proj.weight"].T
            + state["reasoning.gate.delta_proj.bias"]
        )
        alpha = np.exp(np.log1p(np.exp(pre)) * -np.exp(state["reasoning.gate.A_log"]))
        assert 0.05 < alpha.mean() < 0.95
        last = delta[:, -1]
        normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
        q = (normed * state["q_head.0.weight"] + state["q_head.0.bias"]) @ state[
            "q_head.1.weight"
        ].T + state["q_head.1.bias"]
        h, q_logit = model.loop(h)
        np.testing.assert_allclose(h.detach().numpy(), alpha * m + (1 - alpha) * old, atol=1e-12)
        np.testing.assert_allclose(q_logit.detach().numpy(), q[:, 0], atol=1e-12)
    torch.testing.assert_close(model(ids, loops=5), model.decode(h))


def test_causal_at_any_number_of_loops():
    model, ids = small(), torch.randint(0, 50, (1, 12))
    other = ids.clone()
    other[0, 8:] = (ids[0, 8:] + 7) % 50
    for loops in (1, 6):
        a, b = model(ids, loops), model(other, loops)
        assert torch.equal(a[:, :8], b[:, :8]) and not torch.allclose(a[:, 8:], b[:, 8:])


def test_gate_initialisations():
    config = LoopUSConfig(hidden_size=576, num_attention_heads=9, num_hidden_layers=3)
    torch.manual_seed(0)
    gate = Gate(config)
    assert gate(torch.zeros(1, 1, 576)).mean().item() == pytest.approx(
        0.25, abs=0.03
    )  # the paper's: 0.25 at D = 576
    steps = torch.nn.functional.softplus(gate.delta_proj.bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 1e-1 * 1.01
    assert torch.allclose(gate.A_log.exp(), torch.arange(1.0, 577))
    assert (
        gate.delta_proj.weight.abs().max() <= 36**-0.5
        and gate.delta_proj.weight.std() > 0.9 * 36**-0.5 / 3**0.5
    )
    gate.reset_parameters("open")
    assert torch.allclose(gate(torch.randn(2, 3, 576) * 100), torch.tensor(0.9), atol=1e-5)
    with pytest.raises(InputError, match="paper or open"):
        gate.reset_parameters("shut")


def test_published_names():
    assert [name for name in small().state_dict() if "layers" not in name] == [
        "encoder.embed_tokens.weight",
        "reasoning.gate.A_log",
        "reasoning.gate.dt_input_proj.weight",
        "reasoning.gate.delta_proj.weight",
        "reasoning.gate.delta_proj.bias",
        "decoder.norm.weight",
        "decoder.lm_head.weight",
        "q_head.0.weight",
        "q_head.0.bias",
        "q_head.1.weight",
        "q_head.1.bias",
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"encoder_layers": 3}, "split 3,1 of 4"),
        ({"decoder_layers": 0}, "split"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "odd"),
    ],
)
def test_impossible_configs(changes, words):
    with pytest.raises(InputError, match=words):
        small(**changes)


def test_bf16_model_keeps_gate_and_head_in_fp32(tmp_path):
    write_backbone(tmp_path, "qwen3", torch.bfloat16)
    model, _ = load(tmp_path)
    assert model.encoder.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in (*model.reasoning.gate.parameters(), *model.q_head.parameters())} == {
        torch.float32
    }
    h, q = model.loop(model.encode(torch.tensor([[1, 2, 3]])))
    assert h.dtype == torch.bfloat16 and q.dtype == torch.float32

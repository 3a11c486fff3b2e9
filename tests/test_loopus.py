"""The model against independent computations: transformers' logits, the paper's equations in numpy.

What generation does with the model is in tests/test_generate.py.
"""

import numpy as np
import pytest
import torch
from conftest import BACKBONES, GOLDEN, small, write_backbone
from safetensors.torch import load_file

from appendix.fast import SplitLinear
from load_weights import load
from loopus import Gate, InputError, LoopUSConfig

# The tensors that are in no transformer layer, in the order and under the names of the published
# LoopUS checkpoints.
PUBLISHED = [
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


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("split", [(1, 1), (2, 1)])
def test_logits_equal_transformers(tmp_path, name, split):
    if sum(split) >= BACKBONES[name]["num_hidden_layers"]:
        split = (1, 1)
    golden = load_file(GOLDEN / "logits.safetensors")
    ids, logits, layer1 = (golden[f"{name}.{what}"] for what in ("ids", "logits", "layer1"))
    write_backbone(tmp_path, name)
    model, _ = load(tmp_path, split=split)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_pretrained(ids), logits, rtol=0, atol=2e-5)
        if split[0] == 1:  # transformers' hidden state after one layer is h⁰ of this split
            torch.testing.assert_close(model.encode(ids), layer1, rtol=0, atol=2e-5)


def test_open_gate_is_the_pretrained_model_exactly_and_shut_gate_no_loop():
    model = small(dtype=torch.float32)
    A_log = model.reasoning.gate.A_log
    ids = torch.randint(0, 50, (2, 9))

    A_log.data.fill_(-torch.inf)  # α = 1
    assert torch.equal(model(ids, loops=1), model.forward_pretrained(ids))

    A_log.data.fill_(30.0)  # α = 0
    h = model.encode(ids)
    assert torch.equal(model.loop(h)[0], h)


@pytest.mark.parametrize("outputs", [1, 7, 24, 64])
def test_a_single_tokens_product_in_parts_is_the_matrixs(outputs):
    layer = SplitLinear(10, outputs, bias=False)
    weight = layer.weight.detach().double().numpy()
    inputs = [
        torch.randn(10),
        torch.randn(1, 10),
        torch.randn(1, 1, 10),
        torch.randn(1, 10, 2)[..., 0],  # its numbers are not side by side in memory
        torch.randn(2, 3, 10),  # several tokens
    ]
    for x in inputs:
        product = x.double().numpy() @ weight.T
        gradient_of_sum = np.broadcast_to(weight.sum(0), x.shape)
        y = layer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y.sum(), x)
        np.testing.assert_allclose(y.detach().numpy(), product, atol=1e-6)
        np.testing.assert_allclose(gradient.numpy(), gradient_of_sum, atol=2e-6)


def loop_in_numpy(state, old, proposal):
    """The paper's equations 2 to 5 and 9, written out.

    state: the model's tensors by name. old: hᵇ (N, T, D). proposal: M(hᵇ) (N, T, D).
    -> hᵇ⁺¹ (N, T, D), α (N, T, D) and the confidence's logit (N,).
    """
    delta = proposal - old
    low_rank = delta @ state["reasoning.gate.dt_input_proj.weight"].T
    before_softplus = low_rank @ state["reasoning.gate.delta_proj.weight"].T
    before_softplus += state["reasoning.gate.delta_proj.bias"]
    step = np.log1p(np.exp(before_softplus))
    alpha = np.exp(-step * np.exp(state["reasoning.gate.A_log"]))
    new = alpha * proposal + (1 - alpha) * old

    last = delta[:, -1]
    centred = last - last.mean(-1, keepdims=True)
    normed = centred / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    scaled = normed * state["q_head.0.weight"] + state["q_head.0.bias"]
    q_logit = scaled @ state["q_head.1.weight"][0] + state["q_head.1.bias"]
    return new, alpha, q_logit


def test_recurrence_equals_numpy_on_the_papers_equations():
    model = small()
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    ids = torch.randint(0, 50, (3, 7))
    h = model.encode(ids)
    for _ in range(5):
        proposal = model.pretrained_loop(h).detach().numpy()
        new, alpha, confidence = loop_in_numpy(state, h.detach().numpy(), proposal)
        assert 0.05 < alpha.mean() < 0.95  # else the gate would not be seen
        h, q_logit = model.loop(h)
        np.testing.assert_allclose(h.detach().numpy(), new, atol=1e-12)
        np.testing.assert_allclose(q_logit.detach().numpy(), confidence, atol=1e-12)
    torch.testing.assert_close(model(ids, loops=5), model.decode(h))


def test_causal_at_any_number_of_loops():
    model = small()
    ids = torch.randint(0, 50, (1, 12))
    other = ids.clone()
    other[0, 8:] = (ids[0, 8:] + 7) % 50  # another text from token 8 on
    for loops in (1, 6):
        logits, other_logits = model(ids, loops), model(other, loops)
        assert torch.equal(logits[:, :8], other_logits[:, :8])
        assert not torch.allclose(logits[:, 8:], other_logits[:, 8:])


def test_gate_initialisations():
    config = LoopUSConfig(hidden_size=576, num_attention_heads=9, num_hidden_layers=3)
    torch.manual_seed(0)
    gate = Gate(config)

    # The paper's: a gate that is mostly shut, α = 0.25 on average at D = 576.
    alpha = gate(torch.zeros(1, 1, 576))
    assert alpha.mean().item() == pytest.approx(0.25, abs=0.03)
    # It comes from Mamba's steps and rates, and a uniform matrix of rank 36.
    step = torch.nn.functional.softplus(gate.delta_proj.bias)
    assert step.min() >= 1e-3 * 0.99
    assert step.max() <= 1e-1 * 1.01
    assert torch.allclose(gate.A_log.exp(), torch.arange(1.0, 577))
    bound = 36**-0.5
    assert gate.delta_proj.weight.abs().max() <= bound
    assert gate.delta_proj.weight.std() > 0.9 * bound / 3**0.5

    gate.reset_parameters("open")
    alpha = gate(torch.randn(2, 3, 576) * 100)
    assert torch.allclose(alpha, torch.tensor(0.9), atol=1e-5)

    with pytest.raises(InputError, match="paper or open"):
        gate.reset_parameters("shut")


def test_published_names():
    assert [name for name in small().state_dict() if "layers" not in name] == PUBLISHED


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"encoder_layers": 3}, "split 3,1 of 4"),
        ({"decoder_layers": 0}, "split"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "pairs of channels"),
        ({"partial_rotary_factor": 1.5}, "15 of head_dim 10"),
    ],
)
def test_impossible_configs(changes, words):
    with pytest.raises(InputError, match=words):
        small(**changes)


def test_bf16_model_keeps_gate_and_head_in_fp32(tmp_path):
    write_backbone(tmp_path, "qwen3", torch.bfloat16)
    model, _ = load(tmp_path)
    assert model.encoder.embed_tokens.weight.dtype == torch.bfloat16
    added = [*model.reasoning.gate.parameters(), *model.q_head.parameters()]
    assert {p.dtype for p in added} == {torch.float32}

    h, q_logit = model.loop(model.encode(torch.tensor([[1, 2, 3]])))
    assert h.dtype == torch.bfloat16
    assert q_logit.dtype == torch.float32

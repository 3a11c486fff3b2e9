"""On a CUDA card: the same numbers as on the CPU, in fp32. Elsewhere these tests are skipped."""

import copy

import pytest
import torch
from conftest import ROOT, script, small, succeeded

import train
from appendix.fast import compile_decoding
from appendix.optim import fp32_masters, update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(scope="module")
def pair():
    """The same model on the CPU and on the card."""
    model = small(dtype=torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    return model, copy.deepcopy(model).cuda()


def prompts():
    return torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0)), [6, 3, 5]


def test_the_model_is_the_same(pair):
    cpu, cuda = pair
    ids, _ = prompts()
    expected, found = cpu(ids, loops=3), cuda(ids.cuda(), loops=3)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("halt", ["confidence", "cdf", "convergence", "argmax", "kl", "none"])
@pytest.mark.parametrize("kv", ["latest", "shared"])
def test_generation_is_the_same(pair, halt, kv):
    ids, lengths = prompts()
    options = {"lengths": lengths, "budget": 4, "halt": halt, "kv": kv, "temperature": 0}
    cpu, cuda = (
        list(model.generate(ids.to(device), 8, exit_threshold=0.5, **options))
        for model, device in zip(pair, ("cpu", "cuda"), strict=True)
    )
    for a, b in zip(cpu, cuda, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.loops.tolist() == b.loops.tolist()


def test_compiled_decoding_is_captured_and_its_graphs_are_used_again(pair, monkeypatch):
    """Several texts, shorter and longer: the same tokens, all captured, and no new memory."""
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)
    _, model = pair
    compiled = copy.deepcopy(model)
    compile_decoding(compiled)
    ids, _ = prompts()
    used = []
    for length in (6, 3, 5, 6):
        options = {"budget": 3, "halt": "none", "temperature": 0}
        expected, found = (
            torch.stack(
                [step.tokens for step in m.generate(ids[:1, :length].cuda(), 12, **options)]
            )
            for m in (model, compiled)
        )
        assert torch.equal(found, expected)
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1]


def test_a_training_step_is_the_same(pair):
    ids, _ = prompts()
    steps = []
    for model in pair:
        model = copy.deepcopy(model)
        pairs = fp32_masters(model, torch.float32)
        masters = [master for _, master in pairs.values()]
        optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0, fused=True)
        device = masters[0].device
        train.training_step(model, ids.to(device), 4, {0, 3}, horizon=2)
        update(pairs, optimizer, 1.0)
        steps.append({name: master.detach().cpu() for name, (_, master) in pairs.items()})
    for name, expected in steps[0].items():
        torch.testing.assert_close(steps[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_the_commands(tmp_path):
    succeeded(script("sample.py", "--budget", 4, cwd=tmp_path), "loops")
    recipe = ["--steps", 2, "--eval-every", 1, "--loops", 4, "--supervised", 2, "--batch-size", 8]
    done = script("train.py", *recipe, "--out", tmp_path / "run", cwd=ROOT, timeout=600)
    succeeded(done, "on cuda")

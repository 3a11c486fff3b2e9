"""No path that a GPU takes mixes tensors of two devices, and how many operations a token takes."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, small
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import loopus
from appendix.fast import KeptCaches


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_path_mixes_devices():
    command = [sys.executable, str(ROOT / "tests" / "fake_cuda.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 10, done.stdout


# ---- operations ----------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts operations that compute: on a GPU each is a kernel or more, and views are none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        returned = operator._schema.returns
        is_view = returned and any(r.alias_info and not r.alias_info.is_write for r in returned)
        if not is_view:
            self.names.append(str(operator))
        return result


def operations(shape=None, **options):
    """Operations of one token behind a prompt of four, in the middle of a text."""
    model = small(dtype=torch.float32, **shape or {})
    steps = model.generate(torch.ones(2, 4).long(), 6, temperature=0, **options)
    for _ in range(3):
        next(steps)
    with Count() as count:
        next(steps)
    return len(count.names)


def test_a_loop_costs_its_layers_and_little_else():
    """From one budget to the next: two layers, gate and head, and what `think` keeps of a loop."""
    one, two = (operations(budget=b, halt="none") for b in (1, 2))
    model = small(dtype=torch.float32)
    h = torch.zeros(2, 1, 32)
    with Count() as count, torch.inference_mode():
        span = model.span(1)
        before = len(count.names)
        new, delta = model.reasoning(h, span)
        model.q_logit(delta).sigmoid()
        layers = len(count.names) - before
    cache_writes = 2 * 2  # keys and values of two layers
    assert two - one <= layers + cache_writes + 1  # the count of loops


def test_stopping_adds_few_operations_to_a_loop():
    """A comparison, and which rows go on."""
    fixed, stopping = (
        operations(budget=6, halt=h, exit_threshold=1) for h in ("none", "confidence")
    )
    assert stopping - fixed <= 5 * 4


def test_what_surrounds_a_tokens_layers_is_small():
    """Embedding, positions, head, argmax and the tests of the result: no tables made again."""
    model = small(dtype=torch.float32)
    h = torch.zeros(2, 1, 32)
    with Count() as count, torch.inference_mode():
        span = model.span(1)
        before = len(count.names)
        model.encoder.layers(h, span)
        new, delta = model.reasoning(h, span)
        model.q_logit(delta).sigmoid()
        model.decoder.last(new, span)
        layers = len(count.names) - before
    cache_writes = 4 * 2
    assert operations(budget=1, halt="none") - layers - cache_writes <= 14


# ---- caches that are kept ------------------------------------------------------------------------


def address(cache):
    keys, _ = cache.block[0]
    return keys.data_ptr()


def test_a_cache_is_given_again_where_it_fits_and_nobody_uses_it():
    kept = KeptCaches(small(dtype=torch.float32))
    first = kept.new_cache(2, 10, 3)
    place = address(first)
    assert first.visible(4, 1, 64) == slice(0, 256)
    for layer_cache in first.layer_caches():
        layer_cache.keys.fill_(torch.nan)
    second = kept.new_cache(2, 10, 3)  # while the first is in use
    assert address(second) != place
    del first, second
    again = kept.new_cache(2, 200, 3)
    assert address(again) == place
    assert all((x.keys == 0).all() for x in again.layer_caches())
    del again
    assert kept.new_cache(1, 10, 3).shape == (1, 256, 3)


def test_texts_with_a_kept_cache_are_the_texts_without():
    """One after the other, and two at once."""
    model = small(dtype=torch.float32)
    options = {"budget": 3, "temperature": 0, "exit_threshold": 0.5, "lengths": [4, 2]}
    prompts = [
        torch.randint(0, 50, (2, 4), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    expected = [tokens_of(model.generate(ids, 6, **options)) for ids in prompts]
    model.new_cache = KeptCaches(model).new_cache
    assert [tokens_of(model.generate(ids, 6, **options)) for ids in prompts] == expected
    both = zip(*(model.generate(ids, 6, **options) for ids in prompts), strict=True)
    found = [[step.tokens.tolist() for step in steps] for steps in both]
    assert [list(tokens) for tokens in zip(*found, strict=True)] == expected


def tokens_of(steps):
    return [step.tokens.tolist() for step in steps]


# ---- kernels of attention ------------------------------------------------------------------------


def test_generation_leaves_cudnn_out_and_training_does_not():
    model = small(dtype=torch.float32)
    seen = []
    layer = model.reasoning.layers[0]
    layer.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    list(model.generate(torch.ones(1, 4).long(), 3, budget=1))
    assert seen and not any(seen)
    seen.clear()
    model(torch.ones(1, 4).long(), loops=1)
    assert all(seen)


@pytest.mark.parametrize("T", [1, 5])
def test_expanded_heads_are_grouped_heads(T):
    """What `attend` does on a GPU where no fused kernel takes grouped heads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, T, 8, generator=generator)
    k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in "kv")
    mask = torch.ones(T, 5, dtype=torch.bool).tril(5 - T)
    expected = loopus.attend(q, k, v, mask)
    with sdpa_kernel(loopus.GENERATING):
        found = loopus.attend(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), mask)
    torch.testing.assert_close(found, expected)

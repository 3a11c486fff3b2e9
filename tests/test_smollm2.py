"""A real pretrained model, where one is at hand: SmolLM2-135M-Instruct. Skipped without.

The environment variable LOOPUS_SMOLLM2 names its directory.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import SHARED

import train
from appendix import data
from load_weights import load

DEFAULT = "~/.cache/loopus/smollm2-135m-instruct"
DIRECTORY = Path(os.environ.get("LOOPUS_SMOLLM2", DEFAULT)).expanduser()
pytestmark = pytest.mark.skipif(
    not (DIRECTORY / "model.safetensors").exists(), reason="needs SmolLM2-135M-Instruct"
)


@pytest.fixture(scope="module")
def loaded():
    return load(DIRECTORY, split=(2, 1), dtype=torch.float32)


def mean_loss(model, h, targets):
    """Of D(h), h (N, T, D), in nats a token."""
    losses, _ = train.next_token_loss(model, h, targets)
    return losses.mean().item()


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs WikiText-2")
@torch.no_grad()
def test_the_open_gate_starts_within_two_percent_of_the_pretrained_loss(loaded):
    model, tokenizer = loaded
    ids = data.held_out(SHARED / "data" / "wikitext2_valid.txt", tokenizer, 256, 4)
    targets = train.next_tokens(ids)
    h = model.encode(ids)
    pretrained = mean_loss(model, model.pretrained_loop(h), targets)
    model.reasoning.gate.reset_parameters("open")
    opened = mean_loss(model, model.loop(h)[0], targets)
    torch.manual_seed(0)
    model.reasoning.gate.reset_parameters("paper")
    shut = mean_loss(model, model.loop(h)[0], targets)
    assert 2.5 < pretrained < 3.5
    assert opened < 1.02 * pretrained
    assert shut > 1.3 * pretrained


def greedy(model, ids, count, **options):
    """The next `count` tokens, a fixed number of loops each."""
    steps = model.generate(ids, count, halt="none", temperature=0, **options)
    return [step.tokens.item() for step in steps]


@pytest.mark.parametrize("count", [32, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_text_with_and_without_cache_is_the_same(loaded, count):
    model, tokenizer = loaded
    model.reasoning.gate.reset_parameters("open")
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    cached = greedy(model, ids, count, budget=2, use_cache=True)
    assert cached == greedy(model, ids, count, budget=2, use_cache=False)
    assert "Paris" in tokenizer.decode(greedy(model, ids, 8, budget=1))


@torch.no_grad()
def test_logits_equal_transformers(loaded):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode("Looped models run the same layers again.")])
    torch.testing.assert_close(
        model.forward_pretrained(ids), reference(ids).logits, rtol=0, atol=2e-4
    )

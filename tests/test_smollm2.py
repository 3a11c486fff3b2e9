"""A real pretrained model, where one is at hand: LOOPUS_SMOLLM2 names the directory of SmolLM2-135M-Instruct. Skipped without."""

import os
from pathlib import Path

import pytest
import torch

from appendix import data
import train
from conftest import SHARED
from load_weights import load

DIRECTORY = Path(
    os.environ.get("LOOPUS_SMOLLM2", "~/.cache/loopus/smollm2-135m-instruct")
).expanduser()
pytestmark = pytest.mark.skipif(
    not (DIRECTORY / "model.safetensors").exists(), reason="needs SmolLM2-135M-Instruct"
)


@pytest.fixture(scope="module")
def loaded():
    return load(DIRECTORY, split=(2, 1), dtype=torch.float32)


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs WikiText-2")
def test_the_open_gate_starts_within_two_percent_of_the_pretrained_loss(loaded):
    model, tokenizer = loaded
    rows = data.held_out(SHARED / "data" / "wikitext2_valid.txt", tokenizer, 256, 4)
    with torch.no_grad():
        h = model.encode(rows)
        pretrained = train.plain_loss(model, h, train.next_tokens(rows)).item()
        model.reasoning.gate.reset_parameters("open")
        looped = (
            train.next_token_loss(model, model.loop(h)[0], train.next_tokens(rows))[0].mean().item()
        )
        torch.manual_seed(0)
        model.reasoning.gate.reset_parameters("paper")
        shut = (
            train.next_token_loss(model, model.loop(h)[0], train.next_tokens(rows))[0].mean().item()
        )
    assert 2.5 < pretrained < 3.5 and looped < 1.02 * pretrained and shut > 1.3 * pretrained


@pytest.mark.parametrize("count", [32, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_text_with_and_without_cache_is_the_same(loaded, count):
    model, tokenizer = loaded
    model.reasoning.gate.reset_parameters("open")
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    tokens = [
        [
            s.tokens.item()
            for s in model.generate(
                ids, count, budget=2, halt="none", temperature=0, use_cache=cache
            )
        ]
        for cache in (True, False)
    ]
    assert tokens[0] == tokens[1] and "Paris" in tokenizer.decode(
        [s.tokens.item() for s in model.generate(ids, 8, budget=1, halt="none", temperature=0)]
    )


def test_logits_equal_transformers(loaded):
    reference = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        DIRECTORY, dtype=torch.float32
    )
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode("Looped models run the same layers again.")])
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_pretrained(ids), reference(ids).logits, rtol=0, atol=2e-4
        )

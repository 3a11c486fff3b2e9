"""evaluate.py: scores from the whole logits, and the harness' own model's numbers item by item.

What needs lm-evaluation-harness is skipped without it: pip install -r requirements-eval.txt.
"""

import argparse
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import SHARED, refused, script, small, succeeded, write_backbone_with_words

import evaluate
from load_weights import load
from loopus import InputError

SMOLLM2 = Path(os.environ.get("LOOPUS_SMOLLM2", "~/.cache/loopus/smollm2-135m-instruct"))
SMOLLM2 = SMOLLM2.expanduser()
NO_HARNESS = importlib.util.find_spec("lm_eval") is None
needs_harness = pytest.mark.skipif(NO_HARNESS, reason="needs lm-evaluation-harness")
NEVER = evaluate.Halt("none", 0.0)


def rows():
    """Contexts and continuations of many lengths."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (5, 3), (12, 1), (2, 9), (7, 7), (80, 4)]  # the last is longer than the model
    found = []
    for before, after in sizes:
        ids = torch.randint(0, 50, (before + after,), generator=generator).tolist()
        found.append((ids[:before], ids[before:]))
    return found


def plain_score(model, context, continuation, budget):
    """The same for one row, from logits of the whole text."""
    ids = torch.tensor([(context + continuation)[-65:]])
    if budget == "pretrained":
        logits = model.forward_pretrained(ids[:, :-1])
    else:
        logits = model(ids[:, :-1], loops=budget)
    log_p = logits[0].log_softmax(-1)[-len(continuation) :]
    target = torch.tensor(continuation)
    total = log_p.gather(1, target[:, None]).sum().item()
    return total, bool((log_p.argmax(-1) == target).all())


def test_scores_of_every_budget_are_those_of_the_whole_logits():
    model = small(3)
    budgets = ["pretrained", 1, 3]
    for (context, continuation), found in zip(
        rows(), evaluate.score(model, rows(), budgets, NEVER), strict=True
    ):
        for budget in budgets:
            total, greedy = plain_score(model, context, continuation, budget)
            assert found[budget].loglikelihood == pytest.approx(total, rel=1e-5)
            assert found[budget].greedy == greedy
            assert found[budget].loops == (1 if budget == "pretrained" else budget)


def test_the_likeliest_continuation_is_greedy():
    model = small(3)
    context = [3, 1, 4]
    made = [s.tokens.item() for s in model.generate(torch.tensor([context]), 4, budget=2,
                                                    halt="none", temperature=0)]  # fmt: skip
    (found,) = evaluate.score(model, [(context, made)], [2], NEVER)
    assert found[2].greedy
    (found,) = evaluate.score(model, [(context, [*made[:3], (made[3] + 1) % 50])], [2], NEVER)
    assert not found[2].greedy


@pytest.mark.parametrize("halt", ["confidence", "cdf", "convergence", "argmax", "kl"])
def test_a_text_takes_the_loops_that_generation_gives_its_context(halt):
    model = small(0)
    rule = evaluate.Halt(halt, {"convergence": 8.0, "kl": 0.3}.get(halt, 0.55))
    found = evaluate.score(model, rows()[:5], [2, 6], rule)
    loops = set()
    for (context, continuation), scores in zip(rows()[:5], found, strict=True):
        for budget in (2, 6):
            options = {"budget": budget, "halt": halt, "exit_threshold": rule.threshold}
            step = next(model.generate(torch.tensor([context]), 1, temperature=0, **options))
            assert scores[budget].loops == step.loops.item()
            fixed, _ = plain_score(model, context, continuation, step.loops.item())
            assert scores[budget].loglikelihood == pytest.approx(fixed, rel=1e-5)
            loops.add(step.loops.item())
    assert len(loops) > 1


def test_scores_are_remembered_and_half_a_line_is_not(tmp_path):
    model = small(3)
    path = tmp_path / "scores.jsonl"
    first = evaluate.Scorer(model, [1, 2], NEVER, 2, path).score(rows())
    whole = path.read_text()
    path.write_text(whole[:-20])  # as a run that is killed leaves it
    again = evaluate.Scorer(model, [1, 2], NEVER, 2, path)
    assert len(again.known) == 5
    for a, b in zip(again.score(rows()), first, strict=True):
        for budget in (1, 2):
            assert a[budget].loglikelihood == pytest.approx(b[budget].loglikelihood)
            assert a[budget].loops == b[budget].loops
    evaluate.Scorer(model, [1, 2], NEVER, 2, path).score(rows())
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert len(lines) == 6


def test_paired_differences(capsys):
    def record(index, values):
        return {"task": "a", "index": index, "budget": "8", "loglikelihoods": values, "gold": 0}

    own = [record(i, [0.0, -1.0]) for i in range(10)]
    other = [record(i, [0.0, -1.0 if i < 6 else 1.0]) for i in range(10)]
    other = {(r["task"], r["index"], r["budget"]): r for r in other}
    evaluate.print_difference(own, other, "other")
    assert "+40.00 ± " in capsys.readouterr().out


def test_the_sweep_is_drawn(tmp_path):
    def result(x):
        return {"acc": x, "acc_stderr": 0.1, "stderr": 0.1, "loops": 1.0, "items": 9}

    budgets = ["pretrained", 1, 2, 8]
    results = {
        "piqa": {str(b): result(0.1 * i) for i, b in enumerate(budgets)},
        "wikitext": {str(b): {"word_perplexity": 9.0 + i} for i, b in enumerate(budgets)},
    }
    evaluate.draw_sweep(results, budgets, "table1", tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").stat().st_size > 10_000
    assert evaluate.column_of(result(0.5), "table2") == ("acc", 50.0)
    other = {"exact_match,strict-match": 0.25, "loops": 2.0, "items": 4}
    assert evaluate.column_of(other, "gsm8k") == ("exact_match,strict-match", 25.0)


@pytest.mark.skipif(not NO_HARNESS, reason="the harness is here")
def test_without_the_harness_one_line_says_how_to_install_it(tmp_path):
    done = script("evaluate.py", "--out", tmp_path / "out", cwd=tmp_path)
    refused(done, "requirements-eval.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["", "0", "8,8", "many", "pretrained,1.5"])
def test_budgets_that_make_no_sense(budget, tmp_path):
    refused(script("evaluate.py", "--budget", budget, cwd=tmp_path), "--budget")


# ---- with the harness ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Items of every task of a folder, few."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("arc_easy", "openbookqa", "winogrande", "lambada_openai", "hellaswag", "piqa"):
        path = SHARED / "data" / f"{name}.jsonl"
        if not path.exists():
            pytest.skip("needs ../shared")
        lines = path.read_text(encoding="utf-8").splitlines()[:12]
        (folder / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = (SHARED / "data" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    (folder / "wikitext2_raw_test.txt").write_text("".join(text.splitlines(True)[:60]), "utf-8")
    return folder


def write_model(folder, kind="llama_gqa"):
    """A random backbone whose context is long enough for the items' longest continuation."""
    model = write_backbone_with_words(folder / "base", kind)
    # As this version of transformers wants; without a pad the harness adds one to the vocabulary.
    names = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return model


def compare_with_the_harness(model_directory, split, local, tmp_path):
    """`--budget pretrained` and the harness' own Hugging Face model, on every kind of request."""
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = evaluate.load_harness()
    model, tokenizer = load(model_directory, split=split, dtype=torch.float32)
    scorer = evaluate.Scorer(model, ["pretrained"], NEVER, 4, tmp_path / "scores.jsonl")
    ours = harness.Adapter(scorer, tokenizer, False, False)
    ours.budget = "pretrained"
    theirs = HFLM(str(model_directory), device="cpu", dtype="float32", batch_size=4)
    tasks = harness.tasks_by_name("table1", local)
    for name, task in tasks.items():
        ours.loops = {}
        found, expected = (
            lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
            for lm in (ours, theirs)
        )
        for a, b in zip(found["samples"][name], expected["samples"][name], strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(x, float):
                    assert x == pytest.approx(y, rel=1e-4), name
                else:
                    assert x[0] == pytest.approx(y[0], abs=1e-3), name
                    assert x[1] == y[1], name
    for asked in (
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": ["the", "a"], "max_gen_toks": 12, "do_sample": False},
    ):
        requests = [
            Instance("generate_until", {}, (text, dict(asked)), i)
            for i, text in enumerate(("Once upon a time", "The capital of France is"))
        ]
        assert ours.generate_until(requests) == theirs.generate_until(requests)


@needs_harness
@pytest.mark.parametrize("kind", ["llama_gqa", "qwen3"])
def test_the_pretrained_model_gets_the_harness_own_numbers(local, tmp_path, kind):
    model = write_model(tmp_path, kind)
    compare_with_the_harness(model, (1, 1), local, tmp_path)


@needs_harness
@pytest.mark.slow
def test_smollm2_gets_the_harness_own_numbers(local, tmp_path):
    if not SMOLLM2.exists():
        pytest.skip(f"needs SmolLM2 in {SMOLLM2}")
    model = SMOLLM2
    compare_with_the_harness(model, (2, 1), local, tmp_path)


@needs_harness
def test_the_command_prints_and_writes_and_goes_on(local, tmp_path):
    model = write_model(tmp_path)
    command = [
        "evaluate.py",
        "--model",
        model,
        "--split",
        "1,1",
        "--local",
        local,
        "--dtype",
        "float32",
    ]
    command += ["--tasks", "table2", "--budget", "pretrained,1,2"]
    done = script(*command, "--out", tmp_path / "out", cwd=tmp_path)
    succeeded(done, "mean of 5", "mean loops", "McLeish")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").open()]
    assert results.keys() == {"arc_easy", "openbookqa", "winogrande", "hellaswag", "piqa"}
    assert results["arc_easy"].keys() == {"pretrained", "1", "2"}
    assert results["arc_easy"]["2"].keys() >= {"acc", "acc_norm", "stderr", "loops"}
    assert results["arc_easy"]["2"]["loops"] == 2
    assert len(items) == 5 * 3 * 12
    for record in items:
        assert record.keys() == {"task", "index", "budget", "loglikelihoods", "gold", "loops"}
    for name, by_budget in results.items():
        for budget, result in by_budget.items():
            own = [r for r in items if (r["task"], r["budget"]) == (name, budget)]
            assert [r["index"] for r in own] == list(range(12))
            right = [evaluate.is_right(r) for r in own]
            assert result["acc"] == pytest.approx(sum(right) / len(right))

    again = script(*command, "--out", tmp_path / "out", "--against", tmp_path / "out", cwd=tmp_path)
    succeeded(again, "paired by item", "+0.00 ± 0.00")
    assert "to go" not in again.stderr  # all was known
    refused(script(*command, "--out", tmp_path / "out", "--halt", "kl", cwd=tmp_path), "--halt")


@needs_harness
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "arc_esay"], ["arc_esay", "arc_easy"]),
        (["--tasks", "arc_easy", "--local", "nowhere"], ["--local nowhere"]),
        (["--tasks", "piqa", "--local", "."], ["piqa.jsonl, line 1", '"choices"']),
        (["--tasks", "mmlu", "--local", "."], ["mmlu", "piqa"]),
        (["--against", "nowhere"], ["--against nowhere", "items.jsonl"]),
    ],
)
def test_bad_input(flags, words, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"query": "a", "choices": "b", "gold": 0}\n')
    refused(script("evaluate.py", *flags, cwd=tmp_path), *words)


@needs_harness
@pytest.mark.parametrize(
    "name, line, words",
    [
        ("piqa", '{"query": "a", "choices": ["b", ""], "gold": 0}', "a choice is ''"),
        ("piqa", '{"query": "a", "choices": [1, 2], "gold": 0}', "a choice is 1"),
        ("piqa", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2"),
        ("lambada_openai", '{"query": "a"}', '"target"'),
        ("piqa", "{", "not readable"),
        ("piqa", "", "no item"),
    ],
)
def test_items_of_another_shape_are_refused_by_line(name, line, words, tmp_path):
    harness = evaluate.load_harness()
    (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=re.escape(words)):
        harness.tasks_by_name(name, tmp_path)


def test_another_models_scores_are_not_taken_for_this_ones(tmp_path):
    """A run's folder stands for its newest checkpoint, so its name alone does not tell a model."""
    args = argparse.Namespace(out=tmp_path / "out")
    evaluate.open_folder(args, {"model": "a, model.safetensors 1"})
    evaluate.open_folder(args, {"model": "a, model.safetensors 1"})
    with pytest.raises(InputError, match="choose another folder"):
        evaluate.open_folder(args, {"model": "a, model.safetensors 2"})

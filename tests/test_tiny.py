"""The tiny world: its problems against a plain reader, its shipped models, and the commands with no argument."""

import json

import pytest
import torch

import tiny
from conftest import ROOT, script
from appendix.hub import PRESETS
from load_weights import load


def read(strip, place):
    """The value of a cell and the digits met on the way, by the rule as a person would follow it."""
    steps = 0
    while strip[place].isdigit():
        place, steps = place - int(strip[place]), steps + 1
    return strip[place], steps


def test_problems_are_what_the_rule_says():
    steps = torch.arange(tiny.ROWS).repeat(30)
    for rows, questions in ((tiny.ROWS, 4), (tiny.ROWS, 2)):
        ids, targets = tiny.problems(steps, questions, torch.Generator().manual_seed(3), rows)
        letters = "".join(tiny.SYMBOLS[i] for i in ids[:, :4].flatten())
        assert set(letters) == set("abcdefgh") and ids.shape[1] == rows * 4 + 2 * questions
        for row, target, wanted in zip(ids, targets, steps.tolist()):
            text = "".join(tiny.SYMBOLS[i] for i in row)
            asked = [place for place, goal in enumerate(target.tolist()) if goal >= 0]
            assert len(asked) == questions and text[rows * 4] == "?" and asked[-1] == len(text) - 1
            for place in asked:
                value, met = read(text, place)  # a question is one more digit
                assert value == tiny.SYMBOLS[target[place]] and met == wanted + 1
                assert place + 1 == len(text) or text[place + 1] == value


def test_batches_are_seeded_and_ask_one_to_four_questions():
    a, b, c = (tiny.batches(5, seed) for seed in (1, 1, 2))
    for questions in (1, 2, 3, 4, 1):
        (ids, targets), again, other = next(a), next(b), next(c)
        assert (
            torch.equal(ids, again[0])
            and torch.equal(targets, again[1])
            and not torch.equal(ids, other[0])
        )
        assert ((targets >= 0).sum(1) == questions).all()


def test_rank_correlation_is_spearmans():
    x, y = torch.tensor([1, 1, 2, 3, 3, 3, 7]), torch.tensor([2.0, 1, 1, 5, 4, 5, 5])
    rank = lambda v: torch.tensor([((v < a).sum() + ((v == a).sum() + 1) / 2).item() for a in v])
    assert tiny.rank_correlation(x, y) == pytest.approx(
        torch.corrcoef(torch.stack((rank(x), rank(y))))[0, 1].item(), abs=1e-6
    )
    assert tiny.rank_correlation(x, x.exp()) == pytest.approx(1)


def test_the_base_is_what_this_code_makes():
    done = script("tiny.py", "--check")
    assert done.returncode == 0 and "made by this code" in done.stdout, done.stderr
    assert sum(path.stat().st_size for path in (ROOT / "assets").rglob("*")) < 8e6


def test_check_finds_another_model(tmp_path):
    base, _ = load("tiny")
    for path in PRESETS["tiny"][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "pretraining.json").read_text())
    record["first_losses"][40] *= 1.05
    (tmp_path / "pretraining.json").write_text(json.dumps(record))
    done = script("tiny.py", "--check", "--out", tmp_path)
    assert done.returncode == 2 and "not what this code makes" in done.stderr


def test_the_shipped_model_solves_what_its_base_cannot():
    """The README's table again, and its claims; and `generate` gives what one block gives."""
    base, looped = load("tiny")[0], load("tiny-loopus")[0]
    written = {
        name: torch.tensor(share)
        for name, share in json.loads(
            (ROOT / "assets" / "tiny" / "accuracy.json").read_text()
        ).items()
    }
    found = {"base": tiny.right(base, None)[0], "8": tiny.right(looped, 8)[0]}
    found["exit"], _, correlation = tiny.right(looped, 8, looped.config.exit_threshold)
    for name, share in found.items():
        torch.testing.assert_close(share, written[name], rtol=0, atol=0.01)
    mean = tiny.hard(found | {"control": written["control"]})
    few = tiny.hard(
        {"base": found["base"]}
        | {budget: tiny.right(looped, budget, count=40)[0] for budget in (8, 32)}
    )
    assert (
        mean["8"] > mean["base"] + 0.2
        and mean["8"] > mean["control"] + 0.1
        and few[32] > few[8] - 0.04
    )
    assert mean["exit"] > mean["8"] - 0.01 and correlation > 0.5
    for seed in (1, 2):
        ids, targets = tiny.problems(
            torch.arange(tiny.ROWS), 4, torch.Generator().manual_seed(seed)
        )
        hits = (looped(ids, 8).argmax(-1) == targets) | (targets < 0)
        for row, target, all_right in zip(ids, targets, hits.all(1)):
            text, loops = tiny.answers(looped, row[: tiny.ROWS * 4], 8, halt="none")
            assert (
                loops == [8] * 4
                and (text == "".join(tiny.SYMBOLS[i] for i in target[target >= 0])) == all_right
            )


def test_right_stops_each_problem_where_it_is_alone():
    looped, _ = load("tiny-loopus")
    ids, _ = tiny.problems(torch.arange(tiny.ROWS), 4, torch.Generator().manual_seed(9))
    _, loops, _ = tiny.right(looped, 6, 0.8, count=1, seed=9)
    alone = [
        next(looped.generate(row[None], 1, budget=6, exit_threshold=0.8)).loops.item()
        for row in ids
    ]
    assert loops.tolist() == alone and len(set(alone)) > 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the command without arguments, but for a length."""
    directory = tmp_path_factory.mktemp("tiny")
    done = script(
        "train.py", "--steps", 3, "--batch-size", 8, "--loops", 4, "--supervised", 2, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_training_without_arguments_ends_with_the_table(trained):
    directory, out = trained
    table = out[out.index("problems with all four answers right") :]
    for name in (
        "base",
        "control",
        "1 loop",
        "2 loops",
        "4 loops",
        "8 loops",
        "16 loops",
        "32 loops",
        "exit, q >= 0.95",
        "rank correlation",
    ):
        assert name in table
    found = json.loads((directory / "out" / "tiny" / "accuracy.json").read_text())
    assert len(found["base"]) == len(found["loops"]) == 13 and found["base"] == pytest.approx(
        json.loads((PRESETS["tiny"][0] / "pretraining.json").read_text())["accuracy"]
    )
    saved, _ = load(str(directory / "out" / "tiny" / "step-000003"))
    assert saved.config.base_model == "tiny" and saved.config.exit_threshold == 0.95
    assert [round(x, 4) for x in tiny.right(saved, 4)[0].tolist()] == found["4"]
    control, _ = load(str(directory / "out" / "tiny" / "control" / "control-000003"))
    assert [round(x, 4) for x in tiny.right(control, None)[0].tolist()] == found["control"]


def test_sample_and_visualize_take_the_newest_tiny_run(trained):
    directory, _ = trained
    done = script("sample.py", "--budget", 3, cwd=directory)
    assert (
        done.returncode == 0
        and done.stdout.startswith("steps  strip")
        and len(done.stdout.splitlines()) == 8
    ), done.stderr
    done = script("visualize.py", cwd=directory)
    assert (
        done.returncode == 0 and (directory / "figures" / "accuracy.png").stat().st_size > 20_000
    ), done.stderr


def test_every_command_runs_without_arguments_or_a_run(tmp_path):
    done = script("sample.py", "--budget", 8, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 8, done.stderr
    for line in lines[1:]:
        cells = line.split()
        steps, strip, truth, one, _, many = int(cells[0]), "".join(cells[1:14]), *cells[14:18]
        assert (
            truth == "".join(read(strip, place)[0] for place in range(48, 52))
            and read(strip, 48)[1] == steps
        )
        assert line.count("✓") == (one == truth) + (many == truth)
    done = script("visualize.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {
        "accuracy.png",
        "trajectories.png",
        "profile.png",
    }
    assert script("train.py", "--data", "x.txt", cwd=tmp_path).returncode == 2


def test_a_tiny_problem_can_be_typed():
    done = script(
        "sample.py",
        "--model",
        "tiny-loopus",
        "--prompt",
        "abcd" * 12 + "4444" + "?5",
        "--max-new-tokens",
        1,
        "--temperature",
        0,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[0].endswith("?5a"), done.stderr

"""The tiny world: its problems against a plain reader, its shipped models, the bare commands.

First the language, then the base, then what the shipped model solves, then scripts without --model.
"""

import json

import pytest
import torch
from conftest import ROOT, flags, script

import tiny
from load_weights import load

WORLD = ROOT / "assets" / "tiny"
FIGURES = {"accuracy.png", "trajectories.png", "profile.png", "confidence.png", "next.png"}


# ---- the language --------------------------------------------------------------------------------


def text_of(ids):
    return "".join(tiny.SYMBOLS[i] for i in ids)


def read(text, place):
    """A cell's value and the number of digits met on the way, as a person would follow the rule."""
    digits = 0
    while text[place].isdigit():
        place -= int(text[place])
        digits += 1
    return text[place], digits


@pytest.mark.parametrize("questions", [4, 2])
def test_problems_are_what_the_rule_says(questions):
    steps = torch.arange(tiny.ROWS).repeat(30)
    ids, targets = tiny.problems(steps, questions, torch.Generator().manual_seed(3), tiny.ROWS)
    length = tiny.ROWS * 4
    assert set(text_of(ids[:, :4].flatten())) == set("abcdefgh")
    assert ids.shape[1] == length + 2 * questions
    for row, target, wanted in zip(ids, targets, steps.tolist(), strict=True):
        text = text_of(row)
        asked = [place for place, goal in enumerate(target.tolist()) if goal >= 0]
        assert len(asked) == questions
        assert text[length] == "?"
        assert asked[-1] == len(text) - 1
        for place in asked:
            value, digits = read(text, place)
            assert value == tiny.SYMBOLS[target[place]]
            assert digits == wanted + 1  # a question is one more digit
        for place in asked[:-1]:
            assert text[place + 1] == tiny.SYMBOLS[target[place]]


def test_the_example_in_the_docstring_follows_the_rule():
    (line,) = [line for line in tiny.__doc__.splitlines() if "?" in line]
    text = line.replace(" ", "")
    start = text.index("?") + 1
    assert len(text) == 3 * 4 + 1 + 2 * 4
    for place in range(start, len(text), 2):
        assert read(text, place) == (text[place + 1], 3)  # the question, and two steps


def test_batches_are_seeded_and_ask_one_to_four_questions():
    first = tiny.batches(5, 1)
    same = tiny.batches(5, 1)
    other = tiny.batches(5, 2)
    for questions in (1, 2, 3, 4, 1):
        ids, targets = next(first)
        same_ids, same_targets = next(same)
        other_ids, _ = next(other)
        assert torch.equal(ids, same_ids)
        assert torch.equal(targets, same_targets)
        assert not torch.equal(ids, other_ids)
        assert ((targets >= 0).sum(1) == questions).all()


def test_rank_correlation_is_spearmans():
    x = torch.tensor([1, 1, 2, 3, 3, 3, 7])
    y = torch.tensor([2.0, 1, 1, 5, 4, 5, 5])

    def ranks(values):
        """How many are smaller, and the middle of those that are equal."""
        found = [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]
        return torch.stack(found)

    pearson = torch.corrcoef(torch.stack((ranks(x), ranks(y))))[0, 1].item()
    assert tiny.rank_correlation(x, y) == pytest.approx(pearson, abs=1e-6)
    assert tiny.rank_correlation(x, x.exp()) == pytest.approx(1)


# ---- the base ------------------------------------------------------------------------------------


def test_the_base_is_what_this_code_makes():
    done = script("tiny.py", "--check")
    assert done.returncode == 0, done.stderr
    assert "made by this code" in done.stdout
    assert sum(path.stat().st_size for path in (ROOT / "assets").rglob("*")) < 8e6


def test_check_finds_another_model(tmp_path):
    for path in (WORLD / "base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "pretraining.json").read_text())
    record["first_losses"][40] *= 1.05
    (tmp_path / "pretraining.json").write_text(json.dumps(record))
    done = script("tiny.py", "--check", "--out", tmp_path)
    assert done.returncode == 2
    assert "not what this code makes" in done.stderr


# ---- the shipped model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looped():
    return load("tiny-loopus")[0]


@pytest.fixture(scope="module")
def shipped():
    """accuracy.json of the run that made the shipped model, as tensors."""
    found = json.loads((WORLD / "accuracy.json").read_text())
    return {name: torch.tensor(share) for name, share in found.items()}


@pytest.fixture(scope="module")
def counted(looped):
    """Shares solved by the shipped models, counted again, and the exit's rank correlation."""
    base, _ = load("tiny")
    shares = {"base": tiny.right(base, None)[0], "8": tiny.right(looped, 8)[0]}
    shares["exit"], _, correlation = tiny.right(looped, 8, looped.config.exit_threshold)
    return shares, correlation


def test_the_shipped_model_gives_the_readmes_table_again(counted, shipped):
    shares, _ = counted
    for name, share in shares.items():
        torch.testing.assert_close(share, shipped[name], rtol=0, atol=0.01)


def test_the_shipped_model_solves_what_its_base_cannot(looped, counted, shipped):
    """The README's claims."""
    shares, correlation = counted
    mean = tiny.hard(shares | {"control": shipped["control"]})
    assert mean["8"] > 0.9
    assert mean["8"] > mean["base"] + 0.7
    assert mean["8"] > mean["control"] + 0.7
    assert mean["exit"] > mean["8"] - 0.01
    assert correlation > 0.9

    few = {"base": shares["base"]}
    for budget in (8, 32):
        few[budget], _, _ = tiny.right(looped, budget, count=40)
    few = tiny.hard(few)
    assert few[32] > few[8] - 0.04


@pytest.mark.parametrize("seed", [1, 2])
def test_generate_answers_what_one_block_answers(looped, seed):
    steps = torch.arange(tiny.ROWS)
    ids, targets = tiny.problems(steps, 4, torch.Generator().manual_seed(seed))
    solved = ((looped(ids, 8).argmax(-1) == targets) | (targets < 0)).all(1)
    for row, target, all_right in zip(ids, targets, solved, strict=True):
        strip = row[: tiny.ROWS * 4]
        text, loops = tiny.answer_questions(looped, strip, 8, halt="none")
        assert loops == [8] * 4
        assert (text == text_of(target[target >= 0])) == all_right


def test_right_stops_each_problem_where_it_is_alone(looped):
    ids, _ = tiny.problems(torch.arange(tiny.ROWS), 4, torch.Generator().manual_seed(9))
    _, loops, _ = tiny.right(looped, 6, 0.8, count=1, seed=9)
    alone = []
    for row in ids:
        step = next(looped.generate(row[None], 1, budget=6, exit_threshold=0.8))
        alone.append(step.loops.item())
    assert loops.tolist() == alone
    assert len(set(alone)) > 1


def test_a_tiny_problem_can_be_typed():
    prompt = "abcd" * 12 + "4444" + "?5"
    options = flags("--model tiny-loopus --max-new-tokens 1 --temperature 0")
    done = script("sample.py", *options, "--prompt", prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("?5a")


# ---- commands without --model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the bare command, but for its length -> the folder it ran in, its output."""
    directory = tmp_path_factory.mktemp("tiny")
    length = flags("--steps 3 --batch-size 8 --loops 4 --supervised 2")
    done = script("train.py", *length, cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_training_without_arguments_ends_with_the_table(trained):
    directory, out = trained
    table = out[out.index("problems with all four answers right") :]
    budgets = ["1 loop", "2 loops", "4 loops", "8 loops", "16 loops", "32 loops"]
    for name in ("base", "control", *budgets, "exit, q >= ", "rank correlation"):
        assert name in table

    run = directory / "out" / "tiny"
    found = json.loads((run / "accuracy.json").read_text())
    record = json.loads((WORLD / "base" / "pretraining.json").read_text())
    assert len(found["base"]) == len(found["loops"]) == 13
    assert found["base"] == pytest.approx(record["accuracy"])

    saved, _ = load(str(run / "step-000003"))
    assert saved.config.base_model == "tiny"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert saved.config.exit_threshold == log[-1]["threshold"]
    assert [round(x, 4) for x in tiny.right(saved, 4)[0].tolist()] == found["4"]
    control, _ = load(str(run / "control" / "control-000003"))
    assert [round(x, 4) for x in tiny.right(control, None)[0].tolist()] == found["control"]


def test_sample_takes_the_newest_tiny_run(trained):
    directory, _ = trained
    done = script("sample.py", "--budget", 3, cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("steps  strip")
    assert len(done.stdout.splitlines()) == 8


def test_visualize_takes_the_newest_tiny_run_and_says_so(trained):
    directory, _ = trained
    done = script("visualize.py", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("--model ")
    assert done.stderr.strip().endswith("step-000003")
    assert (directory / "figures" / "accuracy.png").stat().st_size > 20_000


def test_visualize_draws_a_run_beside_its_control(trained):
    directory, _ = trained
    done = script("visualize.py", *flags("--runs out/tiny out/tiny/control"), cwd=directory)
    assert done.returncode == 0, done.stderr
    assert (directory / "figures" / "runs.png").stat().st_size > 20_000


def test_sample_shows_problems_without_arguments_or_a_run(tmp_path):
    done = script("sample.py", "--budget", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for line in lines[1:]:  # steps, 13 cells, right, at 1, its mark, at 8, its mark, loops
        cells = line.split()
        strip = "".join(cells[1:14])
        truth, one, many = cells[14], cells[15], cells[17]
        assert truth == "".join(read(strip, place)[0] for place in range(48, 52))
        assert read(strip, 48)[1] == int(cells[0])
        assert line.count("✓") == (one == truth) + (many == truth)


def test_visualize_draws_the_embedded_model_without_arguments_or_a_run(tmp_path):
    done = script("visualize.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "--model tiny-loopus\n"
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= FIGURES


def test_train_without_a_model_takes_no_data(tmp_path):
    assert script("train.py", "--data", "x.txt", cwd=tmp_path).returncode == 2

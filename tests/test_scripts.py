"""sample.py, visualize.py and bench.py, run as a user runs them; bad input is one line and exit code 2."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script, small

import visualize
from load_weights import load, save
from sample import SHADES, shade, summary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, backbone):
    """A LoopUS checkpoint whose gate is half open, below a folder like a run's."""
    directory = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)  # of the gate and the head
    model, tokenizer = load(backbone, split=(1, 1))
    save(model, tokenizer, directory / "out" / "toy" / "step-000003")
    records = [{"step": 0, "eval": {"pretrained": 5.0, "1": 6.0, "2": 7.0, "4": 8.0, "8": 9.0}}]
    records += [
        {
            "step": i,
            "tokens": 9 * i,
            "lr": 1e-3,
            "loss": 9.0 - i,
            "lm": 8.0 - i,
            "mono": 0.1,
            "q": 0.9,
            "tokens_per_s": 5.0,
        }
        for i in (1, 2, 3)
    ]
    records += [{"step": 3, "eval": {"pretrained": 5.0, "1": 5.5, "2": 5.6, "4": 5.7, "8": 5.8}}]
    (directory / "out" / "toy" / "log.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records)
    )
    return directory / "out" / "toy" / "step-000003"


def test_sample_prints_what_generate_gives(checkpoint):
    done = script(
        "sample.py",
        "--model",
        checkpoint,
        "--prompt",
        "the gate",
        "--max-new-tokens",
        12,
        "--temperature",
        0,
        "--budget",
        3,
        "--threshold",
        0.5,
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    model, tokenizer = load(checkpoint)
    prompt = tokenizer.encode("the gate")
    steps = list(
        model.generate(
            torch.tensor([prompt]),
            12,
            budget=3,
            exit_threshold=0.5,
            temperature=0,
            eos_id=tokenizer.eos_id,
        )
    )
    kept = [s.tokens.item() for s in steps if s.tokens.item() != tokenizer.eos_id]
    assert done.stdout.startswith(tokenizer.decode(prompt + kept)) and "\x1b" not in done.stdout
    loops = [s.loops.item() for s in steps]
    assert f"{len(steps)} tokens, mean {sum(loops) / len(loops):.2f} of 3 loops" in done.stdout
    for n in set(loops):
        assert f"{n} loop{' ' if n == 1 else 's'} {loops.count(n):5d} █" in done.stdout


def test_sample_takes_the_newest_checkpoint_and_compares(checkpoint, backbone):
    done = script(
        "sample.py",
        "--budget",
        8,
        "--max-new-tokens",
        5,
        "--temperature",
        0,
        "--compare",
        "--dtype",
        "float32",
        cwd=checkpoint.parents[2],
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(backbone, split=(1, 1))
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    for _ in range(5):
        ids = torch.cat((ids, model.forward_pretrained(ids)[:, -1:].argmax(-1)), 1)
    assert (
        done.stdout.rstrip("\n").endswith(tokenizer.decode(ids[0].tolist()).rstrip("\n"))
        and "pretrained (" in done.stdout
    )


def test_sample_warns_of_an_untrained_recast(backbone):
    done = script("sample.py", "--model", backbone, "--max-new-tokens", 2, "--split", "1,1")
    assert done.returncode == 0 and "untrained" in done.stderr


def test_shading_darkens_with_the_loops_and_keeps_the_text():
    assert (
        shade("a\nb", 1, 8)
        == "\x1b[48;5;231m\x1b[38;5;16ma\x1b[0m\n\x1b[48;5;231m\x1b[38;5;16mb\x1b[0m"
    )
    assert [f"48;5;{back}m" in shade("x", n + 1, 8) for n, (back, _) in enumerate(SHADES)] == [
        True
    ] * 8
    assert "48;5;231m" in shade("x", 1, 1) and summary([], [], 8) == "no token was generated"


def test_visualize_writes_every_figure(checkpoint, corpus, tmp_path):
    done = script(
        "visualize.py",
        "--model",
        checkpoint,
        "--prompt",
        "gate",
        "--prompt",
        "the state $h$",
        "--loops",
        6,
        "--data",
        corpus,
        "--out",
        tmp_path,
    )
    assert done.returncode == 0 and "proposed" in done.stdout, done.stderr
    for name in ("trajectories", "profile", "budget", "training"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (
            tmp_path / f"{name}.png"
        ).stat().st_size > 10000
    assert len(list(tmp_path.iterdir())) == 4


def test_what_the_figures_show():
    model, ids = small(1), torch.randint(0, 50, (1, 6))
    states, alphas = visualize.follow(model, ids, 3)
    h = model.encode(ids)
    for b in range(3):
        torch.testing.assert_close(states[b], h[0, -1].float())
        new, _ = model.loop(h)
        m = model.pretrained_loop(h)
        torch.testing.assert_close(
            alphas[b], ((new - h) / (m - h))[0, -1].float(), rtol=1e-3, atol=1e-4
        )  # eq. 5 solved for α
        h = new
    cosine, euclid = visualize.distances(states)
    assert euclid[0].item() == pytest.approx((states[1] - states[0]).norm().item(), rel=1e-5)
    assert cosine[0].item() == pytest.approx(
        1 - torch.cosine_similarity(states[0], states[1], dim=0).item(), abs=1e-6
    )
    points, share = visualize.pca(states)
    values = torch.linalg.eigvalsh(torch.cov(states.double().T, correction=0)).flip(0)
    assert share == pytest.approx((values[:2] / values.sum()).tolist()) and points.square().sum(
        0
    ).tolist() == pytest.approx((values[:2] * 4).tolist())
    layers = visualize.layer_states(model, [ids])
    assert layers.shape == (5, 6, 32)
    torch.testing.assert_close(layers[1], model.encode(ids)[0].float())
    losses = visualize.loss_by_budget(model, ids, 4)
    assert set(losses) == {"pretrained", 1, 2, 4}
    assert losses[2] == pytest.approx(
        torch.nn.functional.cross_entropy(model(ids, 2)[0, :-1], ids[0, 1:]).item()
    )


@pytest.mark.parametrize(
    "change, split",
    [
        ([0.98, 0.16, 0.04, 0.03, 0.04, 0.05, 0.25], (2, 1)),
        ([0.5, 0.1, 0.1, 0.1], (1, 1)),
        ([0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5], (3, 2)),
        ([0.1] * 5, (1, 1)),
        ([0.9, 0.1, 0.9], (1, 1)),
    ],
)
def test_proposed_split(change, split):
    assert visualize.propose_split(torch.tensor(change)) == split


# ---- bad flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, words",
    [
        (["sample.py", "--budget", 0], "--budget"),
        (["sample.py", "--threshold", 1.5], "--threshold"),
        (["sample.py", "--top-p", 0], "--top-p"),
        (["sample.py", "--temperature", -1], "--temperature"),
        (["sample.py", "--halt", "never"], "--halt"),
        (["sample.py", "--model", "tiny-loopus", "--compare"], "--prompt"),
        (["sample.py", "--prompt", ""], "--prompt"),
        (["sample.py", "--device", "cuda:77"], "--device cuda:77"),
        (["sample.py", "--device", "abacus"], "--device abacus"),
        (["sample.py", "--split", "1"], "--split"),
        (["sample.py", "--split", "9,9"], "split"),
        (["sample.py", "--max-new-tokens", 0], "--max-new-tokens"),
        (["visualize.py", "--loops", 0], "--loops"),
        (["visualize.py", "--prompt", ""], "--prompt"),
        (["visualize.py", "--data", "none.txt"], "none.txt"),
        (["train.py", "--seq-len", 32, "--data", "none.txt"], "none.txt"),
        (["train.py", "--seq-len", 4096, "--data", "none.txt"], "--seq-len 4096"),
        (["train.py", "--loops", 3, "--supervised", 4, "--data", "x"], "--supervised"),
        (["train.py"], "--data"),
        (["train.py", "--steps", "many"], "--steps"),
        (["train.py", "--gate-init", "shut"], "--gate-init"),
    ],
)
def test_bad_flags(checkpoint, command, words, tmp_path):
    done = script(*command, *["--model", checkpoint] * ("--model" not in command), cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_unwritable_out(checkpoint, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = script(
        "train.py",
        "--model",
        checkpoint,
        "--data",
        corpus,
        "--seq-len",
        32,
        "--steps",
        1,
        "--out",
        tmp_path / "file" / "run",
    )
    assert (
        done.returncode == 2
        and "--out" in done.stderr
        and "Traceback" not in done.stderr
        and (tmp_path / "file").read_text() == "mine"
    )
    done = script("visualize.py", "--model", checkpoint, "--loops", 2, "--out", tmp_path / "file")
    assert (
        done.returncode == 2
        and "--out" in done.stderr
        and (tmp_path / "file").read_text() == "mine"
    )


def test_a_text_longer_than_the_context_slides(checkpoint):
    done = script(
        "sample.py",
        "--model",
        checkpoint,
        "--prompt",
        "long " * 40,
        "--max-new-tokens",
        4,
        "--window",
        20,
        "--temperature",
        0,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    assert (
        done.returncode == 0 and "attends to the last 20" in done.stderr and "mean" in done.stdout
    ), done.stderr


def test_ctrl_c_keeps_what_was_generated_and_prints_the_summary(checkpoint):
    command = [
        sys.executable,
        "-u",
        str(ROOT / "sample.py"),
        "--model",
        str(checkpoint),
        "--prompt",
        "the gate",
        "--max-new-tokens",
        "1000000",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--halt",
        "none",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ) as running:
        first = running.stdout.read(60)  # some tokens are out
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=60)
    assert (
        running.returncode == 0
        and b"Traceback" not in errors
        and first.startswith(b"the gate")
        and "mean 8.00 of 8 loops" in rest.decode()
    ), errors


def test_bench_prints_its_table_and_visualize_draws_it(tmp_path):
    done = script(
        "bench.py",
        "--shape",
        "tiny",
        "--rounds",
        2,
        "--contexts",
        4,
        8,
        "--batches",
        1,
        2,
        "--out",
        tmp_path / "bench.json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (
        [row["context"] for row in found["contexts"]] == [4, 8]
        and found["read_rate"] > 1e8
        and found["eager 1"] > 0
    )
    assert "of the bound" in done.stdout and "x the line" in done.stdout
    drawn = script("visualize.py", "--bench", tmp_path / "bench.json", "--out", tmp_path)
    assert drawn.returncode == 0 and (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG", (
        drawn.stderr
    )

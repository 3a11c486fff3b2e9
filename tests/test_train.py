"""training_step against straight-line computations, and the command as a user runs it."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train
from appendix import chunks
from conftest import ROOT, script, small
from loopus import InputError


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def straight_line(model, ids, loops, supervised):
    """Eq. 10-13 written out with autograd: every loop run, every sequence by itself, nothing shared or reused."""
    total = 0
    for row in ids:
        h = model.encode(row[None]).detach()
        for b in range(loops):
            before = F.cross_entropy(model.decode(h)[0, :-1], row[1:]).detach()
            h, q = model.loop(h)
            if b in supervised:
                logits = model.decode(h)[0, :-1]
                lm = F.cross_entropy(logits, row[1:])
                hits = (logits.argmax(-1) == row[1:]).double().mean()
                step = lm - before
                total = (
                    total
                    + lm
                    + step * torch.sigmoid(step)
                    - (hits * torch.sigmoid(q[0]).log() + (1 - hits) * torch.sigmoid(-q[0]).log())
                )
            h = h.detach()
    return total / len(ids) / len(supervised)


@pytest.mark.parametrize("supervised", [{0}, {1, 2}, {0, 3}, {0, 1, 2, 3}])
def test_gradients_equal_the_straight_line(supervised):
    model, ids = small(2), torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(5))
    loss = straight_line(model, ids, 4, supervised)
    trained = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    expected = torch.autograd.grad(loss, trained)
    records = train.training_step(model, ids, 4, supervised, scale=0.5)
    for p, g in zip(trained, expected):
        torch.testing.assert_close(p.grad, 0.5 * g, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.encoder.parameters())
    assert [r["loop"] for r in records] == sorted(supervised)
    assert sum(r["lm"] + r["mono"] + r["q"] for r in records) / len(records) == pytest.approx(
        loss.item()
    )


def test_targets_say_where_loss_is_taken():
    """Targets of the next tokens are the default; with fewer, the loss of a sequence is the mean over those it has."""
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(8))
    plain, same, masked = small(2), small(2), small(2)
    train.training_step(plain, ids, 3, {0, 2})
    train.training_step(same, ids, 3, {0, 2}, targets=train.next_tokens(ids))
    assert all(torch.equal(g, gradients(same)[name]) for name, g in gradients(plain).items())
    targets = train.next_tokens(ids)
    targets[0, :6], targets[2, 3:] = -100, -100
    records = train.training_step(masked, ids, 1, {0}, targets=targets)
    with torch.no_grad():
        h = masked.encode(ids)
        logits, before = masked.decode(masked.loop(h)[0]), masked.decode(h)
    loss = lambda row, of: (
        sum(-of[row, i].log_softmax(-1)[t] for i, t in enumerate(targets[row]) if t >= 0)
        / (targets[row] >= 0).sum()
    )
    lm = torch.stack([loss(row, logits) for row in range(3)])
    step = lm - torch.stack([loss(row, before) for row in range(3)])
    assert records[0]["lm"] == pytest.approx(lm.mean().item()) and records[0][
        "mono"
    ] == pytest.approx((step * step.sigmoid()).mean().item())


def test_gradients_equal_finite_differences():
    model, ids = small(4), torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(6))
    train.training_step(model, ids, 1, {0})
    with torch.no_grad():
        base = train.next_token_loss(model, model.encode(ids), train.next_tokens(ids))[0]

    def loss():
        with torch.no_grad():
            h, q = model.loop(model.encode(ids))
            lm, share = train.next_token_loss(model, h, train.next_tokens(ids))
            return (
                (
                    lm
                    + F.silu(lm - base)
                    + F.binary_cross_entropy_with_logits(q, share.double(), reduction="none")
                )
                .mean()
                .item()
            )

    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.startswith("encoder."):
            continue
        i = torch.randint(p.numel(), (), generator=generator).item()
        flat, eps = (
            p.data.view(-1),
            1e-5,
        )  # `base` carries no gradient: it stays what it was at the unmoved weights
        flat[i] += eps
        up = loss()
        flat[i] -= 2 * eps
        down = loss()
        flat[i] += eps
        assert p.grad.view(-1)[i].item() == pytest.approx(
            (up - down) / (2 * eps), rel=1e-4, abs=1e-7
        ), name


def test_accumulation_two_times_one_equals_one_times_two():
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))
    whole, halves = small(2), small(2)
    train.training_step(whole, ids, 4, {0, 2})
    for row in ids:
        train.training_step(halves, row[None], 4, {0, 2}, scale=0.5)
    for name, g in gradients(whole).items():
        torch.testing.assert_close(gradients(halves)[name], g, rtol=1e-9, atol=1e-12)


def test_gradient_never_crosses_a_loop():
    """Two supervised loops give the sum of what each gives alone: nothing flows from the second through the first."""
    ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(5))
    a, b, both = small(2), small(2), small(2)
    train.training_step(a, ids, 2, {0})
    train.training_step(b, ids, 2, {1})
    train.training_step(both, ids, 2, {0, 1})
    for name, g in gradients(both).items():
        torch.testing.assert_close(
            g, (gradients(a)[name] + gradients(b)[name]) / 2, rtol=1e-9, atol=1e-12
        )


def test_supervised_loops_out_of_range():
    for supervised in (set(), {4}, {-1}):
        with pytest.raises(InputError, match="supervised"):
            train.training_step(small(), torch.ones(1, 4).long(), 4, supervised)


def test_fp32_masters_collect_the_gradients_of_a_bf16_model():
    exact, model = small(2, dtype=torch.float32), small(2, dtype=torch.float32)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))
    pairs = train.fp32_masters(model, torch.bfloat16)
    train.training_step(exact, ids, 4, {0, 2})
    train.training_step(model, ids, 4, {0, 2})
    names = [name for name, _ in exact.named_parameters() if not name.startswith("encoder.")]
    assert len(names) == len(pairs)
    assert list(pairs) == names
    for name, (p, master) in pairs.items():
        assert master.dtype == torch.float32 and master.grad.dtype == torch.float32
        assert (p is master) == name.startswith(("reasoning.gate", "q_head")) and (
            p is master or p.dtype == torch.bfloat16
        )
        wanted = dict(exact.named_parameters())[name].grad
        assert (master.grad - wanted).norm() < 0.1 * wanted.norm() + 1e-6, name
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_learning_rate_warms_up_and_follows_one_cosine():
    rates = [train.learning_rate(step, 1000, 2.0, 300) for step in range(1000)]
    assert (
        rates[0] == pytest.approx(0.02) and rates[99] == 2.0 and rates[100] == 2.0
    )  # 300 is cut to a tenth of the steps
    assert rates[550] == pytest.approx(1.0) and rates[999] == pytest.approx(0, abs=1e-5)
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert train.learning_rate(0, 1, 2.0, 300) == 2.0 and train.learning_rate(0, 100, 2.0, 0) == 2.0


KILLS = 6  # moments at which a run is killed; 20 were tried once
RECIPE = [
    "--steps",
    4,
    "--batch-size",
    2,
    "--accumulate",
    2,
    "--seq-len",
    32,
    "--lr",
    "1e-3",
    "--loops",
    4,
    "--supervised",
    2,
    "--eval-every",
    2,
    "--eval-sequences",
    3,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone, corpus):
    out = tmp_path_factory.mktemp("run")
    done = [
        script(
            "train.py",
            "--model",
            backbone,
            "--data",
            corpus,
            "--out",
            out / name,
            *RECIPE,
            "--dtype",
            dtype,
        )
        for name, dtype in (("a", "float32"), ("b", "float32"), ("half", "bfloat16"))
    ]
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr + done[2].stderr
    return out, done[0].stdout


def test_two_seeded_runs_are_equal(trained):
    out, _ = trained
    a, b = (load_file(out / name / "step-000004" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    strip = lambda name: [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
        for line in (out / name / "log.jsonl").read_text().splitlines()
    ]
    assert strip("a") == strip("b")


def test_a_run_trains_what_it_should_and_logs_it(trained, backbone):
    out, stdout = trained
    records = [json.loads(line) for line in (out / "a" / "log.jsonl").read_text().splitlines()]
    steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and [r["tokens"] for r in steps] == [
        128,
        256,
        384,
        512,
    ]
    assert all(
        set(r) >= {"lr", "loss", "lm", "mono", "q", "tokens_per_s"} and math.isfinite(r["loss"])
        for r in steps
    )
    assert all(r["loss"] == pytest.approx(r["lm"] + r["mono"] + r["q"]) for r in steps)
    assert [r["step"] for r in evals] == [0, 2, 4] and set(evals[0]["eval"]) == {
        "pretrained",
        "1",
        "2",
        "4",
        "8",
    }
    assert (
        len({r["eval"]["pretrained"] for r in evals}) == 1
        and evals[-1]["eval"]["8"] < evals[0]["eval"]["8"]
    )
    base, now = (
        load_file(backbone / "model.safetensors"),
        load_file(out / "a" / "step-000004" / "model.safetensors"),
    )
    assert torch.equal(base["model.embed_tokens.weight"], now["encoder.embed_tokens.weight"])
    assert torch.equal(
        base["model.layers.0.mlp.up_proj.weight"], now["encoder.layers.0.mlp.up_proj.weight"]
    )
    assert not torch.equal(
        base["model.layers.1.mlp.up_proj.weight"], now["reasoning.layers.0.mlp.up_proj.weight"]
    )
    assert not torch.equal(
        base["model.layers.3.mlp.up_proj.weight"], now["decoder.layers.0.mlp.up_proj.weight"]
    )
    assert "ETA" in stdout and "frozen" in stdout and (out / "a" / "step-000002").exists()
    half = load_file(out / "half" / "step-000004" / "model.safetensors")
    assert (
        half["reasoning.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
        and half["reasoning.gate.A_log"].dtype == torch.float32
    )


def test_the_logged_pretrained_loss_from_the_text_itself(trained, backbone, corpus):
    """Encode, pack, shift and take the cross-entropy by hand: the first three sequences, document after document."""
    from load_weights import load

    model, tokenizer = load(backbone)
    ids = []
    for line in corpus.read_text(encoding="utf-8").splitlines():
        ids += tokenizer.encode(json.loads(line)["text"]) + [tokenizer.eos_id]
    rows = torch.tensor(ids[:96]).view(3, 32)
    with torch.no_grad():
        loss = F.cross_entropy(
            model.forward_pretrained(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        ).item()
    logged = json.loads((trained[0] / "a" / "log.jsonl").read_text().splitlines()[0])["eval"][
        "pretrained"
    ]
    assert logged == pytest.approx(loss, rel=1e-5)


def test_training_goes_on_from_a_checkpoint_and_control_trains_plainly(trained, corpus, tmp_path):
    out, _ = trained
    more = script(
        "train.py",
        "--model",
        out / "a" / "step-000004",
        "--data",
        corpus,
        "--out",
        tmp_path / "more",
        *RECIPE,
    )
    assert more.returncode == 0, more.stderr
    control = script(
        "train.py",
        "--model",
        out / "a" / "step-000004",
        "--data",
        corpus,
        "--out",
        tmp_path / "control",
        "--control",
        *RECIPE,
    )
    assert control.returncode == 0, control.stderr
    evals = [
        json.loads(line)["eval"]
        for line in (tmp_path / "control" / "log.jsonl").read_text().splitlines()
        if "eval" in line
    ]
    assert (
        evals[0]["control"] == evals[0]["pretrained"] and evals[-1]["control"] < evals[0]["control"]
    )
    before, after = (
        load_file(d / "model.safetensors")
        for d in (out / "a" / "step-000004", tmp_path / "control" / "control-000004")
    )
    assert torch.equal(before["reasoning.gate.A_log"], after["reasoning.gate.A_log"])
    assert not torch.equal(before["decoder.lm_head.weight"], after["decoder.lm_head.weight"])


def test_a_run_is_never_overwritten(trained, backbone, corpus):
    out, _ = trained
    before = (out / "a" / "log.jsonl").read_bytes()
    for dtype in ("auto", "float32"):  # other flags; the same command again, whose run is finished
        again = script(
            "train.py",
            "--model",
            backbone,
            "--data",
            corpus,
            "--out",
            out / "a",
            *RECIPE,
            "--dtype",
            dtype,
        )
        assert (
            again.returncode == 2
            and "holds a run already" in again.stderr
            and (out / "a" / "log.jsonl").read_bytes() == before
        )
    (out / "mine" / "step-000001").mkdir(
        parents=True
    )  # a checkpoint whose log is gone is not rotated away either
    assert (
        script(
            "train.py", "--model", backbone, "--data", corpus, "--out", out / "mine", *RECIPE
        ).returncode
        == 2
    )


def test_a_full_disk_ends_a_run_with_one_line_and_what_it_had(backbone, corpus, tmp_path):
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(ROOT / "train.py"),
            *map(str, ["--model", backbone, "--data", corpus, "--out", tmp_path / "run", *RECIPE]),
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "could not be written" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def state_of(out, step=4):
    return {
        file: load_file(out / f"step-{step:06d}" / file)
        for file in ("model.safetensors", "trainer.safetensors")
    }


def equal(a, b):
    return all(
        set(a[file]) == set(b[file])
        and all(torch.equal(a[file][name], b[file][name]) for name in a[file])
        for file in a
    )


def losses(out):
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("name, dtype", [("a", "float32"), ("half", "bfloat16")])
def test_a_killed_run_goes_on_bit_for_bit(trained, backbone, corpus, tmp_path, name, dtype):
    """kill -9 at random moments, also in a save, --resume each time: weights, moments, masters and log are those of the undisturbed run."""
    out, _ = trained
    rng, command = (
        random.Random(dtype),
        [
            sys.executable,
            str(ROOT / "train.py"),
            *map(
                str,
                [
                    "--model",
                    backbone,
                    "--data",
                    corpus,
                    "--out",
                    tmp_path / "run",
                    *RECIPE,
                    "--dtype",
                    dtype,
                    "--resume",
                ],
            ),
        ],
    )
    same = lambda: (
        equal(state_of(out / name), state_of(tmp_path / "run"))
        and losses(out / name) == losses(tmp_path / "run")
    )
    for _ in range(KILLS):
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        ) as running:
            try:
                assert running.wait(timeout=rng.uniform(1.5, 2.8)) == 0, running.stderr.read()
            except subprocess.TimeoutExpired:
                running.kill()
        if (
            tmp_path / "run" / "step-000004"
        ).exists():  # that one came to its end: the next begins anew
            assert same()
            shutil.rmtree(tmp_path / "run")
    done = script("train.py", *command[2:])
    assert done.returncode == 0, done.stderr
    assert same() and not [path for path in (tmp_path / "run").iterdir() if "partial" in path.name]


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_point_of_a_save_goes_on_bit_for_bit(
    trained, backbone, corpus, tmp_path
):
    """kill -9 before the 1st, 2nd, 3rd … file that is opened to be written, renamed or removed in the run's folder, the same
    command each time, until one run gets by."""
    out, _ = trained
    code = (
        "import os, runpy, sys; out, left, sys.argv = sys.argv[1], [int(sys.argv[2])], sys.argv[3:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        "def hook(event, args):\n"
        "    if (event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir') or event == 'open' and args[1] in ('w', 'wb', 'a')) and out in str(args[0]):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0: print(event, *args, flush=True); os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(hook); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    points, whole = {"step-000002": [], "step-000004": []}, False
    for (
        step,
        killed,
    ) in points.items():  # from the start up to the first checkpoint, then from that one
        while not whole and not (step == "step-000002" and (tmp_path / "run" / step).exists()):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    code,
                    str(tmp_path),
                    str(len(killed) + 1),
                    str(ROOT / "train.py"),
                    *map(
                        str,
                        [
                            "--model",
                            backbone,
                            "--data",
                            corpus,
                            "--out",
                            tmp_path / "run",
                            *RECIPE,
                            "--dtype",
                            "float32",
                            "--keep",
                            1,
                            "--resume",
                        ],
                    ),
                ],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "2"},
            )
            whole = done.returncode == 0
            assert whole or done.returncode == -9, done.stderr
            killed.append(done.stdout.splitlines()[-1])
        assert sum(f".{step}.partial" in point for point in killed) > 12, killed
    assert equal(state_of(out / "a"), state_of(tmp_path / "run")) and losses(out / "a") == losses(
        tmp_path / "run"
    )


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(
    trained, backbone, corpus, tmp_path
):
    out, _ = trained
    shutil.copytree(out / "a", tmp_path / "run")
    broken = tmp_path / "run" / "step-000004" / "trainer.safetensors"
    with open(broken, "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x7f")  # one byte of a tensor: the file still opens
    again = script(
        "train.py",
        "--model",
        backbone,
        "--data",
        corpus,
        "--out",
        tmp_path / "run",
        *RECIPE,
        "--dtype",
        "float32",
        "--resume",
    )
    assert (
        again.returncode == 0 and "set aside" in again.stdout and "step-000002" in again.stdout
    ), again.stderr
    assert (
        (tmp_path / "run" / "broken-step-000004").exists()
        and equal(state_of(out / "a"), state_of(tmp_path / "run"))
        and losses(out / "a") == losses(tmp_path / "run")
    )


def test_resuming_with_other_flags_is_refused_and_changes_nothing(trained, backbone, corpus):
    out, _ = trained
    before = (out / "a" / "log.jsonl").read_bytes()
    again = script(
        "train.py",
        "--model",
        backbone,
        "--data",
        corpus,
        "--out",
        out / "a",
        *RECIPE,
        "--dtype",
        "float32",
        "--resume",
        "--lr",
        "5e-4",
    )
    assert (
        again.returncode == 2
        and "--lr 0.001, now it is 0.0005" in again.stderr
        and (out / "a" / "log.jsonl").read_bytes() == before
    )


def test_data_that_ends_in_an_error_keeps_what_was_trained(backbone, tmp_path):
    """A line behind the first 1024 sequences is broken: a checkpoint is written, and the same command goes on once it is mended."""
    lines, recipe = (
        [json.dumps({"text": f"line {i} of the text " * 40}) for i in range(120)],
        [
            "--batch-size",
            64,
            "--steps",
            18,
            "--accumulate",
            1,
            *RECIPE[6:],
            "--eval-every",
            100,
            "--dtype",
            "float32",
        ],
    )
    for name, last in (("good", lines[:1]), ("bad", ["{"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines + last))
    command = [
        "train.py",
        "--model",
        backbone,
        "--data",
        tmp_path / "bad.jsonl",
        "--out",
        tmp_path / "run",
        *recipe,
    ]
    done = script(*command)
    saved = [path.name for path in (tmp_path / "run").glob("step-*")]
    assert (
        done.returncode == 2
        and "line 121" in done.stderr
        and len(saved) == 1
        and saved[0] > "step-000003"
    ), done.stderr
    shutil.copy(tmp_path / "good.jsonl", tmp_path / "bad.jsonl")
    again = script(*command)
    assert (
        again.returncode == 0 and f"going on from {tmp_path / 'run' / saved[0]}" in again.stdout
    ), again.stderr
    assert (
        script(
            "train.py",
            "--model",
            backbone,
            "--data",
            tmp_path / "good.jsonl",
            "--out",
            tmp_path / "whole",
            *recipe,
        ).returncode
        == 0
    )
    assert equal(state_of(tmp_path / "run", 18), state_of(tmp_path / "whole", 18))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(trained, backbone, corpus, tmp_path, number):
    out, _ = trained
    command = [
        sys.executable,
        "-u",
        str(ROOT / "train.py"),
        *map(
            str,
            [
                "--model",
                backbone,
                "--data",
                corpus,
                "--out",
                tmp_path / "run",
                *RECIPE,
                "--dtype",
                "float32",
            ],
        ),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    ) as running:
        while not running.stdout.readline().startswith("     1 "):
            pass
        running.send_signal(number)
        rest, errors = running.communicate(timeout=100)
    assert (
        running.returncode == 130
        and "--resume" in rest
        and "saved" in rest
        and "Traceback" not in errors
    ), errors
    again = script(
        "train.py", *command[3:], *["--resume"] * (number == signal.SIGINT)
    )  # or the same command alone
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert equal(state_of(out / "a"), state_of(tmp_path / "run"))


@pytest.mark.parametrize(
    "more", [[], ["--shard", "--checkpoint-activations"]], ids=["whole", "sharded"]
)
def test_two_processes_train_as_one_on_the_whole_batch(trained, backbone, corpus, tmp_path, more):
    """torchrun with two processes of one sequence each and one process with two: the same batches of two, so the same weights but for rounding;
    as also after going on from a checkpoint; and each opens the other's."""
    recipe = [*RECIPE[:2], "--accumulate", 2, *RECIPE[6:], "--dtype", "float32", "--lr", "1e-3"]
    flags = lambda out: list(
        map(str, ["--model", backbone, "--data", corpus, "--out", tmp_path / out, *recipe])
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(random.Random().randint(20000, 60000)),
        str(ROOT / "train.py"),
        *more,
    ]
    run = lambda *command: subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    two = run(*torchrun, *flags("two"), "--batch-size", "1")
    assert two.returncode == 0, two.stderr
    one = script("train.py", *flags("one"), "--batch-size", 2)
    assert one.returncode == 0, one.stderr

    def same():
        for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
            assert (
                a == pytest.approx(b, rel=1e-5, abs=1e-6)
                if "loss" in a
                else a["eval"] == pytest.approx(b["eval"], rel=1e-5)
            )
        for file, tensors in state_of(tmp_path / "one").items():
            for name, x in tensors.items():
                if not name.endswith(".exp_avg_sq"):
                    torch.testing.assert_close(
                        state_of(tmp_path / "two")[file][name].float(),
                        x.float(),
                        rtol=1e-3,
                        atol=1e-4,
                        msg=name,
                    )

    same()
    for name, again in (
        ("two", lambda: run(*torchrun, *flags("two"), "--batch-size", "1", "--resume")),
        ("two", lambda: script("train.py", *flags("two"), "--batch-size", 1, "--resume")),
        ("one", lambda: run(*torchrun, *flags("one"), "--batch-size", "2", "--resume")),
    ):
        shutil.rmtree(tmp_path / name / "step-000004")
        done = again()  # the other number of processes opens it, and goes on
        assert (
            done.returncode == 0
            and "going on from" in done.stdout
            and [r["step"] for r in losses(tmp_path / name) if "loss" in r] == [1, 2, 3, 4]
        ), done.stderr
        if "4 steps of 2 x 1 x 2 " in done.stdout:
            same()


def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    """Two processes hold half of every layer each; gradients of a chunked, checkpointed step equal those of the whole batch in one process."""
    code = """
import torch, torch.distributed as dist, train
from appendix import chunks, fast, optim, parallel
from torch.distributed.tensor import DTensor
from conftest import small
parallel.join()
chunks.LOGITS = 4 * 7 * 50
ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))
one, two = small(2, dtype=torch.float32), small(2, dtype=torch.float32)
parallel.shard(two, torch.float32, torch.device("cpu"))
fast.checkpoint_activations(two)
pairs, alone = optim.fp32_masters(two, torch.float32), optim.fp32_masters(one, torch.float32)
for i in range(2):
    train.training_step(one, ids, 4, {0, 2}, 0.5)
    train.training_step(two, ids[dist.get_rank()][None], 4, {0, 2}, 0.5)
assert sum(p.to_local().numel() for p in two.parameters() if isinstance(p, DTensor)) * 2 == sum(p.numel() for p in two.parameters() if isinstance(p, DTensor))
assert sum(p.numel() for p in two.parameters() if not isinstance(p, DTensor)) < 0.02 * sum(p.numel() for p in one.parameters())
wanted = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
sgd = lambda pairs: torch.optim.SGD([master for _, master in pairs.values()], lr=1.0)
norms = optim.update(alone, sgd(alone), 0.1), optim.update(pairs, sgd(pairs), 0.1)
assert norms[0] > 0.1 and abs(norms[0] / norms[1] - 1) < 1e-5, norms
for name, p in small(2, dtype=torch.float32).named_parameters():
    now = dict(two.named_parameters())[name]
    now = now.full_tensor() if isinstance(now, DTensor) else now
    moved = wanted[name] * 0.1 / norms[0] if name in wanted else 0
    torch.testing.assert_close(now, p - moved, rtol=1e-5, atol=1e-6, msg=name)
parallel.leave(0)
"""
    (tmp_path / "check.py").write_text(code)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(random.Random().randint(20000, 60000)),
            str(tmp_path / "check.py"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("most", [0.01, 1e9])
def test_clipping_acts_on_the_mean_gradient_of_an_optimizer_step(most):
    """Two halves of a batch accumulated: the norm is that of the whole batch's mean gradient, and a step of plain descent is that gradient, cut to `most`."""
    ids, model = (
        torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5)),
        small(2, dtype=torch.float32),
    )
    trained = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    gradient = torch.autograd.grad(straight_line(model, ids, 4, {0, 2}), trained)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    wanted = [p.detach() - g * min(1, most / norm) for p, g in zip(trained, gradient)]
    pairs = train.fp32_masters(model, torch.float32)
    for row in ids:
        train.training_step(model, row[None], 4, {0, 2}, scale=0.5)
    found = train.update(
        pairs, torch.optim.SGD([master for _, master in pairs.values()], lr=1.0), most
    )
    assert found == pytest.approx(norm.item(), rel=1e-5)
    for p, w in zip(trained, wanted):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_logits_are_made_a_chunk_at_a_time_and_memory_does_not_grow_with_loops(monkeypatch):
    """Chunks of any size give the same gradients; the largest tensor that a step ever makes is a chunk of logits, whatever B."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(x, torch.Tensor)
            )
            return out

    ids = torch.randint(0, 5000, (4, 32), generator=torch.Generator().manual_seed(5))
    whole, parts = small(2, vocab_size=5000), small(2, vocab_size=5000)
    train.training_step(whole, ids, 4, {0, 2})
    monkeypatch.setattr(chunks, "LOGITS", 4 * 10 * 5000)
    sizes = []
    with Largest():
        train.training_step(parts, ids, 4, {0, 2})
    assert max(sizes) == 5000 * 32  # the head's own weight; all logits are 4 x 32 x 5000
    for name, g in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], g, rtol=1e-9, atol=1e-12)


def kept(change):
    """How many numbers autograd keeps for a supervised loop of a model that `change` was done to, and the gradients of a step."""
    model, ids = small(2), torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(5))
    change(model)
    size = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: size.setdefault(x.data_ptr(), x.numel()) and x, lambda x: x
    ):
        h, q = model.loop(model.encode(ids).detach())
    train.training_step(model, ids, 3, {1})
    return sum(size.values()), gradients(model)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_layers_save_less_and_give_the_same_gradients():
    (more, a), (less, b) = kept(lambda model: None), kept(train.compile_layers)
    assert less < 0.8 * more
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12, msg=name)


def test_activation_checkpointing_saves_less_and_changes_nothing(backbone, corpus, tmp_path):
    """The tensors that autograd keeps for a supervised loop, with and without; and the command gives the same run."""
    (more, a), (less, b) = kept(lambda model: None), kept(train.checkpoint_activations)
    assert less < 0.5 * more and all(torch.equal(a[name], b[name]) for name in a)
    done = [
        script(
            "train.py",
            "--model",
            backbone,
            "--data",
            corpus,
            "--out",
            tmp_path / name,
            *RECIPE,
            "--dtype",
            "float32",
            *flags,
        )
        for name, flags in (("plain", []), ("less", ["--checkpoint-activations"]))
    ]
    assert [d.returncode for d in done] == [0, 0], done[1].stderr
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")


def test_steps_without_a_finite_gradient_are_skipped_and_stop_the_run_in_time(
    backbone, corpus, tmp_path
):
    """Every weight of one layer is made infinite in a copy of the model: each step is skipped and shown, the fifth in a row is the last."""
    shutil.copytree(backbone, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"].fill_(float("inf"))
    save_file(weights, tmp_path / "model" / "model.safetensors")
    recipe = ["--steps", 9, *RECIPE[2:]]
    done = script(
        "train.py",
        "--model",
        tmp_path / "model",
        "--data",
        corpus,
        "--out",
        tmp_path / "run",
        *recipe,
        "--eval-every",
        100,
    )
    assert (
        done.returncode == 2
        and "step skipped, 5 so far" in done.stdout
        and "not finite 5 times in a row" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr

"""train.py as a user runs it: what a run logs and saves, and how it goes on after any kind of end.

The method itself is held against independent computations in tests/test_train.py.
"""

import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, environment, flags, refused, script, small, succeeded
from safetensors.torch import load_file

from appendix import resume
from appendix.optim import fp32_masters
from load_weights import load

TESTS = Path(__file__).resolve().parent
KILLS = 4  # moments at which a run is killed; 20 were tried once
RECIPE = flags(
    "--steps 4 --batch-size 2 --accumulate 2 --seq-len 32 --lr 1e-3 --loops 4 --supervised 2"
    " --eval-every 2 --eval-sequences 3"
)
FP32 = ["--dtype", "float32"]


def training(model, data, out, *more):
    """What follows `python` for a short run; of a flag that is given twice the last one counts."""
    return ["train.py", "--model", model, "--data", data, "--out", out, *RECIPE, *more]


# ---- what a run leaves ---------------------------------------------------------------------------


def records(out):
    """log.jsonl without what a clock gave."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in lines:
        record.pop("tokens_per_s", None)
    return lines


def evaluations(out):
    """The held-out losses by name, one an evaluation."""
    return [record["eval"] for record in records(out) if "eval" in record]


def state(out, step=4):
    """All tensors of a checkpoint: of the model, and of the trainer beside it."""
    directory = out / f"step-{step:06d}"
    tensors = {}
    for file in ("model.safetensors", "trainer-00001.safetensors"):
        for name, x in load_file(directory / file).items():
            tensors[file, name] = x
    return tensors


def assert_same_run(a, b):
    """Assert that two runs ended with the same log and, bit for bit, the same tensors."""
    assert records(a) == records(b)
    assert_same_state(a, b)


def assert_same_state(a, b, step=4):
    found, expected = state(a, step), state(b, step)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone, corpus):
    """A folder with three runs: `a` and `b` are one command, `half` computes in bf16."""
    out = tmp_path_factory.mktemp("run")
    for name, dtype in (("a", "float32"), ("b", "float32"), ("half", "bfloat16")):
        done = script(*training(backbone, corpus, out / name, "--dtype", dtype))
        (out / f"{name}.txt").write_text(succeeded(done), encoding="utf-8")
    return out


def test_two_seeded_runs_are_equal(trained):
    assert_same_run(trained / "a", trained / "b")


def test_a_run_logs_every_step_and_every_evaluation(trained):
    log = records(trained / "a")
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["tokens"] for record in steps] == [128, 256, 384, 512]
    for record in steps:
        assert record.keys() >= {"lr", "loss", "lm", "mono", "q"}
        assert math.isfinite(record["loss"])
        assert record["loss"] == pytest.approx(record["lm"] + record["mono"] + record["q"])
        lm = [losses[0] for losses in record["by_loop"].values()]
        assert min(lm) <= record["lm"] + 1e-6 and record["lm"] <= max(lm) + 1e-6
        assert 2 <= len(lm) <= 4  # supervised twice a step, of four loops
    first = json.loads((trained / "a" / "log.jsonl").read_text().splitlines()[1])
    assert first["tokens_per_s"] > 0

    assert [record["step"] for record in log if "eval" in record] == [0, 2, 4]
    evals = evaluations(trained / "a")
    assert evals[0].keys() == {"pretrained", "1", "2", "4", "8"}
    assert len({losses["pretrained"] for losses in evals}) == 1
    assert evals[-1]["8"] < evals[0]["8"]

    model, _ = load(trained / "a" / "step-000004")
    last = log[-1]
    assert model.config.exit_threshold == last["threshold"]
    assert 1 <= last["exit_loops"] <= 8
    by_loops = [last["eval"][name] for name in ("1", "2", "4", "8")]
    assert last["exit"] <= min(by_loops) + 0.05


def test_a_run_trains_what_it_should_and_logs_it(trained, backbone):
    """The encoder stays, block and decoder move; the folder and the screen show the run."""
    base = load_file(backbone / "model.safetensors")
    now = load_file(trained / "a" / "step-000004" / "model.safetensors")
    up = "mlp.up_proj.weight"
    assert torch.equal(base["model.embed_tokens.weight"], now["encoder.embed_tokens.weight"])
    assert torch.equal(base[f"model.layers.0.{up}"], now[f"encoder.layers.0.{up}"])
    assert not torch.equal(base[f"model.layers.1.{up}"], now[f"reasoning.layers.0.{up}"])
    assert not torch.equal(base[f"model.layers.3.{up}"], now[f"decoder.layers.0.{up}"])

    half = load_file(trained / "half" / "step-000004" / "model.safetensors")
    assert half[f"reasoning.layers.0.{up}"].dtype == torch.bfloat16
    assert half["reasoning.gate.A_log"].dtype == torch.float32

    assert (trained / "a" / "step-000002").exists()
    printed = (trained / "a.txt").read_text(encoding="utf-8")
    assert "ETA" in printed
    assert "frozen" in printed


def test_the_logged_pretrained_loss_from_the_text_itself(trained, backbone, corpus):
    """Encode, pack, shift and take the cross-entropy by hand: the text's first three sequences."""
    model, tokenizer = load(backbone)
    ids = []
    for line in corpus.read_text(encoding="utf-8").splitlines():
        ids += tokenizer.encode(json.loads(line)["text"]) + [tokenizer.eos_id]
    rows = torch.tensor(ids[:96]).view(3, 32)
    with torch.no_grad():
        logits = model.forward_pretrained(rows)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert evaluations(trained / "a")[0]["pretrained"] == pytest.approx(loss, rel=1e-5)


def test_training_goes_on_from_a_checkpoint_and_control_trains_plainly(trained, corpus, tmp_path):
    checkpoint = trained / "a" / "step-000004"
    succeeded(script(*training(checkpoint, corpus, tmp_path / "more")))
    succeeded(script(*training(checkpoint, corpus, tmp_path / "control", "--control")))

    first, *_, last = evaluations(tmp_path / "control")
    assert first["control"] == first["pretrained"]
    assert last["control"] < first["control"]

    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "control" / "control-000004" / "model.safetensors")
    assert torch.equal(before["reasoning.gate.A_log"], after["reasoning.gate.A_log"])
    assert not torch.equal(before["decoder.lm_head.weight"], after["decoder.lm_head.weight"])


def test_activation_checkpointing_changes_nothing(backbone, corpus, tmp_path):
    succeeded(script(*training(backbone, corpus, tmp_path / "plain", *FP32)))
    less = training(backbone, corpus, tmp_path / "less", *FP32, "--checkpoint-activations")
    succeeded(script(*less))
    assert records(tmp_path / "plain") == records(tmp_path / "less")


# ---- what is refused, and what ends a run --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32"], ids=["other flags", "finished"])
def test_a_run_is_never_overwritten(trained, backbone, corpus, dtype):
    log = trained / "a" / "log.jsonl"
    before = log.read_bytes()
    again = script(*training(backbone, corpus, trained / "a", "--dtype", dtype))
    refused(again, "holds a run already")
    assert log.read_bytes() == before


def test_a_checkpoint_whose_log_is_gone_is_not_rotated_away(backbone, corpus, tmp_path):
    (tmp_path / "step-000001").mkdir()
    refused(script(*training(backbone, corpus, tmp_path)), "holds a run already")
    assert list(tmp_path.iterdir()) == [tmp_path / "step-000001"]


def test_resuming_with_other_flags_is_refused_and_changes_nothing(trained, backbone, corpus):
    log = trained / "a" / "log.jsonl"
    before = log.read_bytes()
    other = ["--resume", "--lr", "5e-4"]
    again = script(*training(backbone, corpus, trained / "a", *FP32, *other))
    refused(again, "--lr 0.001, now it is 0.0005")
    assert log.read_bytes() == before


def test_a_full_disk_ends_a_run_with_one_line_and_what_it_had(backbone, corpus, tmp_path):
    command = command_line(*training(backbone, corpus, tmp_path / "run"))
    limited = [sys.executable, TESTS / "run_limited.py", "3000", *command[1:]]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment())
    refused(done, "could not be written")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_steps_without_a_finite_gradient_are_skipped_and_stop_the_run_in_time(
    backbone, corpus, tmp_path
):
    """The first step throws every weight far away; the next ones are skipped, five in all."""
    far = ["--lr", "1e30", "--warmup", 0, "--steps", 9, "--eval-every", 100]
    done = script(*training(backbone, corpus, tmp_path / "run", *far, *FP32))
    refused(done, "step 6", "not finite 5 times in a row")
    assert "step skipped, 5 so far" in done.stdout
    log = records(tmp_path / "run")
    assert [record.get("skipped") for record in log] == [None, 0, 1, 2, 3, 4, 5]


# ---- going on ------------------------------------------------------------------------------------


def read_to(running, beginning):
    """Read what a process prints up to the line that begins so."""
    for line in running.stdout:
        if line.startswith(beginning):
            return


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(trained, backbone, corpus, tmp_path, number):
    command = training(backbone, corpus, tmp_path / "run", *FP32)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command_line(*command), **pipes, env=environment()) as running:
        read_to(running, "     1 ")  # the first step's line
        running.send_signal(number)
        rest, errors = running.communicate(timeout=100)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert "saved" in rest
    assert "--resume" in rest

    how = ["--resume"] if number == signal.SIGINT else []  # the same command alone does it too
    succeeded(script(*command, *how), "going on from")
    assert_same_state(trained / "a", tmp_path / "run")


@pytest.mark.parametrize("name, dtype", [("a", "float32"), ("half", "bfloat16")])
def test_a_killed_run_goes_on_bit_for_bit(trained, backbone, corpus, tmp_path, name, dtype):
    """kill -9 at random moments, also in a save, and --resume each time, as if nothing had been."""
    run = tmp_path / "run"
    command = training(backbone, corpus, run, "--dtype", dtype, "--resume")
    generator = random.Random(dtype)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for _ in range(KILLS):
        with subprocess.Popen(command_line(*command), **pipes, env=environment()) as running:
            read_to(running, "  step ")  # the table's head: steps and saves are next
            try:
                code = running.wait(timeout=generator.uniform(0, 0.3))
                assert code == 0, running.stderr.read()
            except subprocess.TimeoutExpired:
                running.kill()
        if (run / "step-000004").exists():  # that one came to its end: the next begins anew
            assert_same_run(trained / name, run)
            shutil.rmtree(run)
    succeeded(script(*command))
    assert_same_run(trained / name, run)
    assert not [path for path in run.iterdir() if "partial" in path.name]


def test_the_trainers_tensors_go_through_several_files_and_never_all_through_memory(
    tmp_path, monkeypatch
):
    """For 8B parameters they are 90 GB; here a file takes some 4 KB."""
    monkeypatch.setattr(resume, "FILE", 4000)
    pairs, optimizer = moved_once(small(dtype=torch.float32))
    made = []

    def watched():
        for name, x in resume.trainer_state(pairs, optimizer):
            x = x.clone()
            made.append(weakref.ref(x))
            alive = [ref() for ref in made if ref() is not None]
            assert sum(x.nbytes for x in alive) < 4000 + 2 * 50 * 32 * 4  # and the largest twice
            yield name, x
            del x, alive

    progress = resume.Progress(step=1)
    resume.write_trainer_state(tmp_path, watched(), progress, {})
    assert len(list(tmp_path.glob("trainer-*.safetensors"))) > 10

    again, other = moved_once(small(dtype=torch.float32, seed=1))
    resume.restore(tmp_path, again, other)
    for name, (p, master) in pairs.items():
        q, restored = again[name]
        if master is not p:
            assert torch.equal(master, restored), name
        for kind, x in optimizer.state[master].items():
            assert torch.equal(x, other.state[restored][kind]), (name, kind)


def moved_once(model):
    """Masters and optimizer of a model, after one step on gradients of one."""
    pairs = fp32_masters(model, torch.bfloat16)
    masters = [master for _, master in pairs.values()]
    optimizer = torch.optim.AdamW(masters, weight_decay=0.0, fused=True)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    return pairs, optimizer


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_point_of_a_save_goes_on_bit_for_bit(
    trained, backbone, corpus, tmp_path
):
    """kill -9 before the 1st, 2nd, 3rd … change in the run's folder, until one run gets by.

    First up to the first checkpoint, from the start, then from that checkpoint to the second.
    """
    run = tmp_path / "run"
    command = command_line(*training(backbone, corpus, run, *FP32, "--keep", 1, "--resume"))

    def killed(n):
        """Run until the nth change: -> the exit code, and what it was about to do."""
        hooked = [sys.executable, str(TESTS / "run_killed.py"), str(tmp_path), str(n), *command[1:]]
        done = subprocess.run(hooked, capture_output=True, text=True, env=environment())
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode, done.stdout.splitlines()[-1]

    points = []
    while not (run / "step-000002").exists():
        points.append(killed(len(points) + 1)[1])
    assert sum(".step-000002.partial" in point for point in points) > 12, points

    points = []
    code = None
    while code != 0:
        code, point = killed(len(points) + 1)
        points.append(point)
    assert sum(".step-000004.partial" in point for point in points) > 12, points
    assert_same_run(trained / "a", run)


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(
    trained, backbone, corpus, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(trained / "a", run)
    with open(run / "step-000004" / "trainer-00001.safetensors", "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x7f")  # one byte of a tensor: the file still opens
    again = script(*training(backbone, corpus, run, *FP32, "--resume"))
    succeeded(again, "set aside", "step-000002")
    assert (run / "broken-step-000004").exists()
    assert_same_run(trained / "a", run)


def test_data_that_ends_in_an_error_keeps_what_was_trained(backbone, tmp_path):
    """A line behind the first 1024 sequences is broken; it is mended for the same command again."""
    lines = [json.dumps({"text": f"line {i} of the text " * 40}) for i in range(30)]
    good, data = tmp_path / "good.jsonl", tmp_path / "data.jsonl"
    good.write_text("\n".join([*lines, lines[0]]))
    data.write_text("\n".join([*lines, "{"]))
    long = flags(
        "--batch-size 64 --steps 18 --accumulate 1 --seq-len 8 --loops 1 --supervised 1"
        " --eval-every 100 --dtype float32"
    )

    command = training(backbone, data, tmp_path / "run", *long)
    refused(script(*command), "line 31")
    (saved,) = (tmp_path / "run").glob("step-*")
    assert saved.name > "step-000003"

    shutil.copy(good, data)
    succeeded(script(*command), f"going on from {saved}")
    succeeded(script(*training(backbone, good, tmp_path / "whole", *long)))
    assert_same_state(tmp_path / "run", tmp_path / "whole", step=18)


# ---- two processes -------------------------------------------------------------------------------


def torchrun(file, *args):
    """Run a file in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port]
    command = [sys.executable, *map(str, [*launcher, file, *args])]
    env = environment(PYTHONPATH=f"{TESTS.parent}:{TESTS}")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def assert_same_but_for_rounding(a, b):
    """Assert that two runs of four steps have nearly the same log and tensors."""
    for found, expected in zip(records(a), records(b), strict=True):
        if "eval" in expected:
            assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
        else:
            loops, expected_loops = found.pop("by_loop"), expected.pop("by_loop")
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert loops.keys() == expected_loops.keys()
            for loop, losses in expected_loops.items():
                assert loops[loop] == pytest.approx(losses, rel=1e-5, abs=1e-6)
    found = state(a)
    for (file, name), x in state(b).items():
        if not name.endswith(".exp_avg_sq"):
            y = found[file, name].float()
            torch.testing.assert_close(y, x.float(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "more", [[], ["--shard", "--checkpoint-activations"]], ids=["whole", "sharded"]
)
def test_two_processes_train_as_one_on_the_whole_batch(backbone, corpus, tmp_path, more):
    """Two processes of one sequence each, and one process of two: the same batches of two.

    So the same weights but for rounding, also after going on; and each opens the other's
    checkpoint.
    """
    one = training(backbone, corpus, tmp_path / "one", *FP32)
    two = training(backbone, corpus, tmp_path / "two", *FP32, "--batch-size", 1)
    train_py = TESTS.parent / "train.py"
    succeeded(script(*one))
    succeeded(torchrun(train_py, *more, *two[1:]))
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")

    def go_on(out, run, *command):
        """Take the last checkpoint away and let a command make it again."""
        shutil.rmtree(out / "step-000004")
        succeeded(run(*command, "--resume"), "going on from")
        steps = [record["step"] for record in records(out) if "loss" in record]
        assert steps == [1, 2, 3, 4]

    go_on(tmp_path / "two", torchrun, train_py, *more, *two[1:])
    assert_same_but_for_rounding(tmp_path / "two", tmp_path / "one")
    go_on(tmp_path / "two", script, *two)
    go_on(tmp_path / "one", torchrun, train_py, *more, *one[1:])


def test_sharded_gradients_equal_those_of_one_process():
    succeeded(torchrun(TESTS / "sharded_step.py"))

"""What must not go wrong, or not quietly: runs that come to nothing, readers that go away, numbers
that are not finite, several end tokens, a machine without a compiler."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script, small
from safetensors.torch import load_file, save_file

from appendix import resume
from loopus import InputError

RECIPE = [
    *("--steps", 6, "--batch-size", 2, "--accumulate", 1, "--seq-len", 32, "--dtype", "float32"),
    *("--loops", 2, "--supervised", 1, "--eval-every", 2, "--eval-sequences", 3),
]


def train(backbone, corpus, out, *flags):
    return script("train.py", "--model", backbone, "--data", corpus, "--out", out, *RECIPE, *flags)


def refused(done, *words):
    """One line, exit code 2, and these words in it."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, done.stderr


def test_a_model_that_has_come_to_nothing_is_never_saved(backbone, corpus, tmp_path):
    """A rate far too high: the held-out loss overflows, and the good checkpoints stay."""
    good = train(backbone, corpus, tmp_path / "run", "--keep", 1)
    assert good.returncode == 0, good.stderr
    done = train(backbone, corpus, tmp_path / "bad", "--lr", "1e30", "--keep", 1, "--warmup", 0)
    refused(done, "not finite", "--lr")
    for path in (tmp_path / "bad").glob("step-*"):
        tensors = load_file(path / "model.safetensors")
        assert all(x.isfinite().all() for x in tensors.values())
    saved = sorted(path.name for path in (tmp_path / "bad").glob("step-*"))
    if saved:
        assert f"the newest checkpoint is {tmp_path / 'bad' / saved[-1]}" in done.stderr
    else:
        assert "no checkpoint was saved" in done.stderr


def test_training_goes_on_when_its_reader_goes_away(backbone, corpus, tmp_path):
    """As with `train.py … | head -1`: the checkpoint is that of a run that is read to its end."""
    assert train(backbone, corpus, tmp_path / "whole").returncode == 0
    out = tmp_path / "run"
    flags = ["--model", backbone, "--data", corpus, "--out", out, *RECIPE]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as running:
        running.stdout.readline()
        running.stdout.close()
        errors = running.stderr.read()
        running.wait(timeout=200)
    assert "Traceback" not in errors and "Broken" not in errors
    assert running.returncode == 0, errors
    a, b = (load_file(d / "step-000006" / "model.safetensors") for d in (tmp_path / "whole", out))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_are_ordered_by_number_not_by_text(tmp_path):
    for step in (999_998, 1_000_000, 1_000_002, 7):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-old").mkdir()
    steps = [resume.step_of(path) for path in resume.checkpoints(tmp_path, "step")]
    assert steps == [7, 999_998, 1_000_000, 1_000_002]
    with resume.new_checkpoint(tmp_path / "step-1000004", keep=2) as directory:
        (directory / "model.safetensors").write_bytes(b"")
    steps = [resume.step_of(path) for path in resume.checkpoints(tmp_path, "step")]
    assert steps == [1_000_002, 1_000_004]
    assert (tmp_path / "step-old").exists()


def test_a_finished_run_says_how_it_is_trained_further(backbone, corpus, tmp_path):
    out = tmp_path / "run"
    assert train(backbone, corpus, out).returncode == 0
    newest = f"--model {out / 'step-000006'}"
    refused(train(backbone, corpus, out), "finished", newest)
    refused(train(backbone, corpus, out, "--steps", 9), "--steps 6, now it is 9", newest)
    further = script(
        *("train.py", "--model", out / "step-000006", "--data", corpus),
        *("--out", tmp_path / "further", *RECIPE, "--steps", 2),
    )
    assert further.returncode == 0, further.stderr


def test_several_end_tokens_end_a_row_each(backbone):
    """With every token an end token a row has one; of two it ends at the first of either."""
    model = small(3)
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(2))
    options = {"budget": 2, "halt": "none", "temperature": 0}
    free = [step.tokens for step in model.generate(ids, 12, **options)]
    assert len(list(model.generate(ids, 12, eos_id=list(range(50)), **options))) == 1

    ends = [free[6][0].item(), free[3][1].item()]
    found = [step.tokens for step in model.generate(ids, 12, eos_id=ends, **options)]
    for row in (0, 1):
        alone = [tokens[row].item() for tokens in free]
        last = next(i for i, token in enumerate(alone) if token in ends)
        expected = alone[: last + 1] + [alone[last]] * (len(found) - last - 1)
        assert [tokens[row].item() for tokens in found] == expected
    assert torch.equal(
        torch.stack(found),
        torch.stack(
            [s.tokens for s in model.generate(ids, 12, eos_id=ends, use_cache=False, **options)]
        ),
    )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(use_cache, temperature):
    model = small(3)
    model.decoder.norm.weight.data[3] = torch.nan
    ids = torch.ones(2, 3).long()
    steps = model.generate(ids, 4, temperature=temperature, use_cache=use_cache)
    with pytest.raises(InputError, match="not finite.*float64.*--dtype"):
        next(steps)


def test_a_checkpoint_with_nan_and_fp16_that_overflows_are_one_line(backbone, tmp_path):
    for file in backbone.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(backbone / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    flags = ["--prompt", "the", "--max-new-tokens", 3, "--halt", "none", "--budget", 2]
    refused(script("sample.py", "--model", tmp_path, *flags, "--dtype", "float32"), "finite")
    tensors = load_file(backbone / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e5  # its outputs pass float16's 65504
    save_file(tensors, tmp_path / "model.safetensors")
    wide = script("sample.py", "--model", tmp_path, *flags, "--dtype", "float32")
    assert wide.returncode == 0, wide.stderr
    half = script("sample.py", "--model", tmp_path, *flags, "--dtype", "float16")
    refused(half, "float16", "--dtype float32")


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_compiling_without_a_compiler_is_refused_before_anything_is_made(name, tmp_path):
    env = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    env.pop("CXX")
    command = [sys.executable, str(ROOT / name), "--compile", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    refused(done, "--compile", "C++ compiler")
    assert not list(tmp_path.iterdir())


def test_the_log_holds_json_and_nothing_else(tmp_path):
    log = resume.Log(tmp_path, 0)
    log.write({"step": 1, "loss": float("nan"), "norm": float("inf"), "eval": {"1": -float("inf")}})
    line = (tmp_path / "log.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "norm": None, "eval": {"1": None}}


def test_a_device_that_is_full_is_one_line_that_says_what_to_do(backbone, corpus, tmp_path):
    """The error that torch raises on a GPU, raised while the model is loaded."""
    code = (
        "import runpy, sys, torch\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        "import load_weights\n"
        "def full(*args, **kwargs):\n"
        "    raise torch.OutOfMemoryError('Tried to allocate 2.00 GiB.')\n"
        "load_weights.load_model = full\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--model", backbone, "--data", corpus, "--out", tmp_path / "run", *RECIPE]
    command = [sys.executable, "-c", code, str(ROOT / "train.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    refused(done, "out of memory", "2.00 GiB", "--checkpoint-activations")

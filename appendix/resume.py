"""A run's folder: whether one may write there, its checkpoints, its log, the signals that end it.

A checkpoint is a folder kind-000123 (kind: step or control) in the published layout. Beside the
weights lie trainer-00001.safetensors and so on, the masters and the optimizer's moments, and
trainer.json, a `Progress`, the run's flags and the SHA-256 of the tensors. It is written under
another name and renamed as a whole, so a run that is killed at any moment goes on from the newest
one bit for bit.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
from dataclasses import asdict, dataclass, fields

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from appendix.errors import InputError, first_line, require, say
from appendix.files import read_json, sha256, write_text
from appendix.parallel import part_of, rank, whole

FILE = 2**30  # bytes of a file of the trainer's tensors, about
KINDS = ("master", "step", "exp_avg", "exp_avg_sq")  # of the trainer's tensors, for each parameter

# flags that may differ between a run and its continuation
FREE = ("out", "resume", "device", "keep", "checkpoint_activations", "compile", "shard")


@dataclass
class Progress:
    """How far a run is: all that is needed to go on as if nothing had happened."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # trained on
    spent: float = 0.0  # seconds of training
    skipped: int = 0  # steps whose gradient was not finite
    bad: int = 0  # of them, those in a row up to now
    data: object = None  # the position in the data (JSON), None: its beginning
    choice: object = None  # state of the generator that draws the supervised loops
    pretrained: float | None = None  # held-out loss of the model before training

    def generator(self, seed):
        """The generator that draws the supervised loops, where this run left it."""
        generator = random.Random(seed)
        if self.choice is not None:
            try:
                version, state, gauss = self.choice
                generator.setstate((version, tuple(state), gauss))
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError(
                    f"trainer.json: choice is no generator's state ({error})"
                ) from None
        return generator


def run_flags(args):
    """The flags that a run and its continuation must share, as text."""
    return {name: str(value) for name, value in vars(args).items() if name not in FREE}


def step_of(path):
    """The step of a checkpoint's folder, kind-000123 -> 123; -1 for another name."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def checkpoints(run, kind):
    """The checkpoints in a run's folder, in the order of their numbers, the oldest first.

    kind: step, or control for a run of train.py --control. One that is being written has a name
    that begins with a dot, and is left out.
    """
    found = [path for path in run.glob(f"{kind}-*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest(out, kind):
    """The newest checkpoint, in words for a message."""
    found = checkpoints(out, kind)
    return f"the newest checkpoint is {found[-1]}" if found else "no checkpoint was saved"


def open_run(out, kind, flags, resume, restart=False):
    """May a run be begun or go on in this folder, and from where? -> (Progress, checkpoint or None)

    A run that was stopped goes on, by --resume or by the same command again. InputError for a
    folder with a run of the other kind, other flags, or a run that is finished (unless restart: a
    finished run of the tiny world is given again, for its table).
    """
    other = "step" if kind == "control" else "control"
    how = "without" if kind == "control" else "with"
    require(
        not any(out.glob(f"{other}-*")),
        f"--out {out}: holds a run already, {how} --control; choose another folder",
    )
    log_exists = (out / "log.jsonl").exists()
    checkpoint = None
    progress = Progress()
    if resume or log_exists:
        checkpoint, progress = last_whole_checkpoint(out, kind, flags)
    if resume or not (log_exists or checkpoints(out, kind)):
        return progress, checkpoint
    require(
        checkpoint is not None,
        f"--out {out}: holds a run already, without log.jsonl or a whole checkpoint; move it away, "
        "or go on with --resume (afresh if no checkpoint is whole)",
    )
    require(
        restart or progress.step < int(flags["steps"]),
        f"--out {out}: holds a run already, finished; choose another folder, or train on from "
        f"it: --model {checkpoint} --out OTHER",
    )
    return progress, checkpoint


def last_whole_checkpoint(out, kind, flags):
    """-> (the newest checkpoint that is whole or None, its Progress). A broken one is set aside."""
    for path in reversed(checkpoints(out, kind)):
        try:
            state = read_json(path / "trainer.json")
            require(state.get("digests") == digests(path), "its tensors are not what was saved")
            progress = read_progress(state)
        except InputError as error:
            say(f"{path}: broken ({error}); it is set aside, the one before it is taken")
            os.replace(path, path.with_name(f"broken-{path.name}"))
            continue
        for name, value in flags.items():
            trained = state["flags"].get(name, value)  # a flag that is newer than the checkpoint
            flag = name.replace("_", "-")
            require(
                trained == value,
                f"--out {out}: holds a run already; {path.name} was trained with --{flag} "
                f"{trained}, now it is {value}; give the same, or another --out (--model {path} "
                "trains that one further)",
            )
        return path, progress
    return None, Progress()


def read_progress(state):
    """The Progress in a trainer.json. InputError where it is none, or is not what was saved."""
    record = {name: value for name, value in state.items() if name != "record"}
    expected = state.get("record", record_digest(record))  # which checkpoints did not always have
    require(expected == record_digest(record), "trainer.json is not what was saved")
    require(isinstance(state.get("flags"), dict), "trainer.json holds no flags")
    found = {"bad": state.get("bad", 0)}  # which checkpoints did not always have
    for field in fields(Progress):
        if field.name not in found:
            require(field.name in state, f"trainer.json holds no {field.name}")
            found[field.name] = state[field.name]
    for name in ("step", "tokens", "skipped", "bad"):
        require(
            type(found[name]) is int and found[name] >= 0,
            f"trainer.json: {name} is {found[name]!r}, expected a whole number",
        )
    return Progress(**found)


def record_digest(record):
    """SHA-256 of what trainer.json says, but for this digest itself."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def digests(directory):
    """SHA-256 of a checkpoint's tensors by file."""
    return {path.name: sha256(path) for path in sorted(directory.glob("*.safetensors"))}


@contextlib.contextmanager
def new_checkpoint(target, keep):
    """A folder to write a checkpoint into, which becomes `target` once it is whole.

    Of the older ones of its kind the newest `keep` stay, the new one counted. InputError where
    the disk is full, say.
    """
    out = target.parent
    kind = target.name.split("-")[0]
    partial = target.with_name(f".{target.name}.partial")
    try:
        for stale in out.glob(f".{kind}-*.partial"):  # of a run that was killed in a save
            shutil.rmtree(stale)
        partial.mkdir()
        yield partial
        os.replace(partial, target)
        for old in checkpoints(out, kind)[:-keep]:
            # renamed first, so that none is ever there in parts
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{target}: could not be written ({error}); free space, then --resume goes on from the "
            f"newest checkpoint in {out}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def trainer_state(pairs, optimizer):
    """Masters and moments as (name, tensor), each made when its turn comes: those that are sharded
    are gathered on process 0 then, so every process has to take them all."""
    for name, (p, master) in pairs.items():
        if master is not p:
            yield f"{name}.master", whole(p, master.detach())
        for moment, x in optimizer.state[master].items():
            yield f"{name}.{moment}", whole(p, x)


def write_trainer_state(directory, state, progress, flags):
    """Put what training needs to go on beside the weights that lie in directory.

    state: as from `trainer_state`. It goes into files of about FILE bytes, so that not all of it is
    in the host's memory at once: for 8B parameters it is 90 GB.
    """
    part = {}
    size = 0  # of part, in bytes
    number = 1
    for name, x in state:
        part[name] = x
        size += x.nbytes
        if size >= FILE:
            save_file(part, directory / f"trainer-{number:05d}.safetensors")
            part = {}
            size = 0
            number += 1
    save_file(part, directory / f"trainer-{number:05d}.safetensors")
    record = asdict(progress) | {"flags": flags, "digests": digests(directory)}
    text = json.dumps(record | {"record": record_digest(record)}) + "\n"
    (directory / "trainer.json").write_text(text, encoding="utf-8")


def restore(checkpoint, pairs, optimizer):
    """Put a checkpoint's masters and moments back."""
    for _, master in pairs.values():
        optimizer.state[master] = {}
    for path in sorted(checkpoint.glob("trainer*.safetensors")):
        for entry, x in stored_tensors(path):
            restore_tensor(f"{path}: {entry}", entry, x, pairs, optimizer)


def stored_tensors(path):
    """(name, tensor) of a safetensors file, one after the other."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not readable ({first_line(error):.200}); take another") from None


def restore_tensor(where, entry, x, pairs, optimizer):
    """Put one tensor of a checkpoint back: entry is a parameter's name, a dot, and what it is."""
    name, _, kind = entry.rpartition(".")
    require(name in pairs and kind in KINDS, f"{where}: nothing that is trained has this name")
    p, master = pairs[name]
    expected = () if kind == "step" else tuple(p.shape)
    require(x.shape == expected, f"{where} has shape {tuple(x.shape)}, expected {expected}")
    x = part_of(p, x).to(master.device)
    if kind == "master":
        master.data.copy_(x)
    else:
        optimizer.state[master][kind] = x


class Log:
    """A run's log.jsonl, opened to go on after `step` (None: anew); what was logged later is cut
    off. Written by process 0, a JSON object a line; numbers that are not finite become null."""

    def __init__(self, out, step):
        if rank() > 0:
            self.file = None
            return
        path = out / "log.jsonl"
        kept = []
        try:
            out.mkdir(parents=True, exist_ok=True)
            if step is not None and path.exists():
                for line in path.read_text(encoding="utf-8").splitlines():
                    if line.endswith("}") and json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            write_text(path, "".join(kept))
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the run ends)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"--out {out}: log.jsonl is not usable ({error})") from None

    def write(self, record):
        if self.file is not None:
            print(json.dumps(finite(record)), file=self.file, flush=True)


def finite(value):
    """A record with null instead of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- signals -------------------------------------------------------------------------------------

ENDING = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and what a scheduler sends
if hasattr(signal, "SIGHUP"):
    ENDING.append(signal.SIGHUP)  # the terminal is gone


def catch_signals():
    """A signal to end goes into the list that is returned; a second one ends the program."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in ENDING:
        signal.signal(number, note)
    return caught


def release_signals():
    """Signals end the program again."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

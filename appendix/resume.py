"""A run's folder: its checkpoints, from which training goes on, its log, and the signals that end it."""

import json, os, shutil, signal
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from appendix.errors import InputError, require
from appendix.files import read_json, sha256, write_text
from appendix.parallel import is_sharded, whole
from load_weights import save


def digests(directory):
    """SHA-256 of a checkpoint's tensors by file."""
    return {path.name: sha256(path) for path in sorted(directory.glob("*.safetensors"))}


def save_checkpoint(model, tokenizer, target, keep, pairs, optimizer, dtype, facts):
    """Save as `target`, kind-000123, written beside and renamed; of the folder's older ones of the kind, the newest `keep` stay.
    Beside the published layout: trainer.safetensors (masters, moments) and trainer.json (`facts`)."""
    if target.exists():  # the data ended in an error right behind a checkpoint
        return
    tensors = {
        name: whole(p, p.to_local().to(dtype)) if is_sharded(p) else p
        for name, p in model.state_dict().items()
    }
    state = {
        f"{name}.master": whole(p, master.detach())
        for name, (p, master) in pairs.items()
        if master is not p
    }
    state |= {
        f"{name}.{moment}": whole(p, x)
        for name, (p, master) in pairs.items()
        for moment, x in optimizer.state[master].items()
    }
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    out, partial, kind = (
        target.parent,
        target.with_name(f".{target.name}.partial"),
        target.name.split("-")[0],
    )
    try:
        for stale in out.glob(f".{kind}-*.partial"):  # of a run that was killed in a save
            shutil.rmtree(stale)
        save(model, tokenizer, partial, tensors)
        save_file(state, partial / "trainer.safetensors")
        (partial / "trainer.json").write_text(
            json.dumps(facts | {"digests": digests(partial)}) + "\n"
        )
        os.replace(partial, target)
        for old in sorted(out.glob(f"{kind}-*"))[:-keep]:
            shutil.rmtree(
                old.rename(old.with_name(f".{old.name}.partial"))
            )  # so that none is ever half there
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{target}: could not be written ({error}); free space, then --resume goes on from the newest checkpoint in {out}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def resumable(out, kind, flags):
    """The newest whole checkpoint of a run in `out` -> (directory, its facts), or None. A broken one is set aside, with a word."""
    for path in sorted(out.glob(f"{kind}-*"), reverse=True):
        try:
            facts = read_json(path / "trainer.json")
            require(
                "data" in facts and facts.get("digests") == digests(path),
                "its tensors are not what was saved",
            )
        except InputError as error:
            print(f"{path}: broken ({error}); it is set aside, the one before it is taken")
            os.replace(path, path.with_name(f"broken-{path.name}"))
            continue
        for name, value in flags.items():
            require(
                facts["flags"].get(name) == value,
                f"--out {out}: holds a run already; {path.name} was trained with --{name.replace('_', '-')} {facts['flags'].get(name)}, now it is {value}; give the same, or another --out",
            )
        return path, facts


def restore(path, pairs, optimizer):
    """Put a checkpoint's masters and moments back."""
    state = load_file(path / "trainer.safetensors")
    for name, (p, master) in pairs.items():
        found = {
            moment: state[f"{name}.{moment}"]
            for moment in ("master", "step", "exp_avg", "exp_avg_sq")
            if f"{name}.{moment}" in state
        }
        if is_sharded(p):
            from torch.distributed.tensor import distribute_tensor

            found = {
                key: distribute_tensor(x.to(master.device), p.device_mesh, p.placements).to_local()
                if x.dim()
                else x
                for key, x in found.items()
            }
        if "master" in found:
            master.data.copy_(found["master"])
        optimizer.state[master] = {
            key: x.to(master.device) for key, x in found.items() if key != "master"
        }


def open_log(path, step):
    """A run's log.jsonl, what was logged after `step` cut off, opened to go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        write_text(
            path,
            "".join(
                line + "\n"
                for line in lines
                if line.endswith("}") and json.loads(line)["step"] <= step
            ),
        )
        return open(path, "a", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--out {path.parent}: not usable ({error})") from None


def signals():
    """Ctrl-C and SIGTERM are from now on added to the list that is returned, until the next call of `no_signals`; a second one ends the program at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


def no_signals():
    """Ctrl-C and SIGTERM end the program again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Spoilt files, by the thousand: each is read, or refused in one line. Nothing else may happen.

    python tests/fuzz.py --count 10000
    python tests/fuzz.py --kind tokenizer --seed 4711 --count 1     one input again
    python tests/fuzz.py --kind trouble --count 100                 commands that are disturbed

Small valid files are written into a temporary folder. Then, again and again, one of them is changed
in one way (bytes flipped, cut out or put in; in JSON a value replaced, a key dropped or doubled, a
part nested) and read by the program's own functions. An input that ends in any other error than a
one-line InputError, that takes more than SECONDS, or that asks for more than MEMORY, is printed
with the command that makes it again, and the exit code is 1.

The commands themselves are inputs too: `flags` changes the value of one flag, and `trouble` runs a
script and sends it a signal at a random moment, lets the disk be full after a random number of
bytes, or closes its output.

Reading order: the kinds of input (which files, and how they are read), the changes, the loop.
"""

import argparse
import contextlib
import faulthandler
import gzip
import importlib
import io
import itertools
import json
import lzma
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from conftest import (
    BACKBONES,
    GOLDEN,
    ROOT,
    backbone_tensors,
    environment,
    small,
    write_backbone,
    write_backbone_with_words,
)

import visualize
from appendix import data, resume
from appendix.errors import run_main
from appendix.memory import count
from appendix.optim import fp32_masters
from load_weights import Tokenizer, load, save
from loopus import InputError

SECONDS = 60  # for one input
MEMORY = 4 * 2**30  # bytes of address space beyond what the program has when it starts
LONGEST = 1000  # characters of an error's line

TEXT = "Once upon a time, in 1234, there was a naïve 猫 \n\n\t who couldn't  sleep… 🙂"


# ---- the kinds of input --------------------------------------------------------------------------
# A kind is a function that writes valid files into a folder, and returns which of them may be
# spoilt and a function that reads them all.


def config(folder):
    """config.json of a backbone and of a LoopUS checkpoint."""
    write_backbone(folder / "backbone", "qwen3", old=True)
    write_backbone(folder / "tied", "llama_tied")
    save(small(dtype=torch.float32), None, folder / "checkpoint")
    names = ("backbone", "tied", "checkpoint")
    return [folder / name / "config.json" for name in names], read_model


def safetensors(folder):
    """model.safetensors of a backbone and of a LoopUS checkpoint."""
    write_backbone(folder / "backbone", "llama_tied")
    save(small(dtype=torch.float32), None, folder / "checkpoint")
    names = ("backbone", "checkpoint")
    return [folder / name / "model.safetensors" for name in names], read_model


def index(folder):
    """The index of a backbone in shards."""
    write_backbone(folder / "backbone", "llama_tied", shards=3)
    return [folder / "backbone" / "model.safetensors.index.json"], read_model


def pickles(folder):
    """pytorch_model.bin, the zip that PyTorch writes and the format before it."""
    files = []
    for name in ("zip", "legacy"):
        write_backbone(folder / name, "llama_tied")
        (folder / name / "model.safetensors").unlink()
        path = folder / name / "pytorch_model.bin"
        tensors = backbone_tensors(BACKBONES["llama_tied"])
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "zip")
        files.append(path)
    return files, read_model


def read_model(path):
    model, _ = load(path.parent, split=split_of(path), plan=count)
    ids = torch.tensor([[1, 2, 3]])
    for _ in model.generate(ids, 2, budget=2, temperature=0):
        pass


def split_of(path):
    return None if path.parent.name == "checkpoint" else (1, 1)


def tokenizer(folder):
    """tokenizer.json and the files beside it, of each style."""
    files = []
    for source in sorted(GOLDEN.glob("*/tokenizer.json")):
        style = folder / source.parent.name
        shutil.copytree(source.parent, style)
        (style / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
        (style / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
        files += [style / "tokenizer.json"] * 3  # the one with the most in it
        files += [path for path in sorted(style.iterdir()) if path.name != "tokenizer.json"]
    return files, read_tokenizer


def read_tokenizer(path):
    found = Tokenizer(path.parent)
    for special in (False, True):
        ids = found.encode(TEXT, bos=True, special=special)
        assert all(0 <= i <= found.max_id for i in ids)
        assert isinstance(found.decode(ids), str)


def text(folder):
    """Training text in every kind of file."""
    import pyarrow
    import pyarrow.parquet

    lines = [json.dumps({"text": f"{i} {TEXT * 3}"}) + "\n" for i in range(12)]
    content = "".join(lines).encode()
    (folder / "a.txt").write_text(TEXT * 40, encoding="utf-8")
    (folder / "a.jsonl").write_bytes(content)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(content))
    table = pyarrow.table({"text": [TEXT * 3] * 12, "number": list(range(12))})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    words = Tokenizer(GOLDEN / "bytelevel")

    def read(path):
        batches = data.batches(path, words, batch_size=2, seq_len=16, seed=0, skip=1)
        for ids, _ in itertools.islice(batches, 4):
            assert ids.shape == (2, 16)

    return sorted(folder.iterdir()), read


def run(folder):
    """What a run of train.py leaves for the one that goes on: log, trainer.json and its tensors.

    In the folder `signed`, trainer.json is given the digests of what is there: files that are whole
    and still not what they should be.
    """
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    model = small(dtype=torch.float32)
    pairs, optimizer = trained(model)
    for _, master in pairs.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    state = random.Random(0).getstate()
    progress = resume.Progress(step=3, tokens=96, choice=state, data=next(text_batches(folder))[1])
    files = []
    for name in ("checked", "signed"):
        checkpoint = folder / name / "step-000003"
        save(model, None, checkpoint)
        moments = resume.trainer_state(pairs, optimizer)
        resume.write_trainer_state(checkpoint, moments, progress, {"steps": "9"})
        lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(6)]
        (folder / name / "log.jsonl").write_text("".join(lines))
        files += [checkpoint / "trainer.json", checkpoint / "trainer-00001.safetensors"]
        files.append(folder / name / "log.jsonl")
    return files, read_run


def trained(model):
    """Masters and optimizer of a model, as train.py makes them."""
    pairs = fp32_masters(model, torch.bfloat16)
    masters = [master for _, master in pairs.values()]
    return pairs, torch.optim.AdamW(masters, weight_decay=0.0, fused=True)


def text_batches(folder, position=None):
    words = Tokenizer(GOLDEN / "bytelevel")
    return data.batches(folder / "text.txt", words, 2, 16, seed=0, position=position)


def read_run(path):
    """Go on with a run, in a copy of its folder, since a broken checkpoint is set aside."""
    original = path.parent if path.name == "log.jsonl" else path.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        shutil.copytree(original, out)
        if original.name == "signed" and path.name == "trainer-00001.safetensors":
            record = json.loads((out / "step-000003" / "trainer.json").read_text())
            record["digests"] = resume.digests(out / "step-000003")
            record.pop("record", None)  # trainer.json's own digest
            (out / "step-000003" / "trainer.json").write_text(json.dumps(record))
        progress, checkpoint = resume.open_run(out, "step", {"steps": "9"}, resume=True)
        log = resume.Log(out, progress.step)
        log.write({"step": progress.step + 1})
        log.file.close()
        if checkpoint is None:
            return
        progress.generator(0).sample(range(8), 2)
        model, _ = load(checkpoint)
        resume.restore(checkpoint, *trained(model))
        next(text_batches(original.parent, progress.data))


def figures(folder):
    """What visualize.py draws from: a run's log, the tiny world's table, what bench.py wrote."""
    shutil.copy(ROOT / "assets" / "tiny" / "accuracy.json", folder / "accuracy.json")
    log = (ROOT / "assets" / "tiny" / "log.jsonl").read_text().splitlines()
    records = [line for line in log if "eval" in line] + log[:8]
    (folder / "log.jsonl").write_text("\n".join(records) + "\n")
    context = {"context": 64, "pretrained": 0.1, "1": 0.1, "latest": 0.2, "shared": 0.2}
    bench = {"shape": "small", "budget": 2, "contexts": [context, context | {"context": 128}]}
    (folder / "bench.json").write_text(json.dumps(bench))
    draw = {
        "accuracy.json": visualize.show_accuracy,
        "log.jsonl": lambda path, out: visualize.compare_runs([path.parent], out),
        "bench.json": visualize.show_speed,
    }

    def read(path):
        draw[path.name](path, folder)
        if path.name == "log.jsonl":
            visualize.show_losses(None, None, 8, path, folder)

    return [folder / name for name in draw], read


def commands(folder):
    """Each script with most of its flags, {its name: flags}, quick to run in this folder."""
    write_backbone_with_words(folder / "base")
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    shared = ["--model=base", "--split=1,1", "--device=cpu", "--dtype=float32", "--seed=1"]
    return {
        "train": [
            *shared,
            *("--data=text.txt", "--steps=2", "--batch-size=2", "--accumulate=1", "--seq-len=16"),
            *("--loops=2", "--supervised=1", "--horizon=1", "--lr=1e-3", "--warmup=1", "--clip=1"),
            *("--threshold=0.5", "--eval-every=1", "--eval-sequences=2", "--keep=1"),
            *("--eval-data=text.txt", "--out=run", "--gate-init=open"),
        ],
        "sample": [
            *shared,
            *("--prompt=a b", "--budget=2", "--halt=confidence", "--threshold=0.5", "--kv=latest"),
            *("--window=8", "--max-new-tokens=2", "--temperature=1", "--top-k=3", "--top-p=0.5"),
            "--compare=base",
        ],
        "visualize": [
            *shared,
            *("--prompt=a b", "--loops=2", "--data=text.txt", "--sequences=2", "--out=figures"),
        ],
        "load_weights": ["base", "--split=1,1"],
    }


def flags(folder):
    """The commands themselves, as lists of their flags: a value changed, a flag left out."""
    files = []
    for name, args in commands(folder).items():
        path = folder / f"{name}.flags"
        path.write_text(json.dumps(args))
        files.append(path)

    def read(path):
        with contextlib.chdir(folder):
            run_command(path.stem, json.loads(path.read_text()))
        shutil.rmtree(folder / "run", ignore_errors=True)

    return files, read


def run_command(name, args):
    """Run a script in this process. What it says with exit code 2 becomes an InputError."""
    module = importlib.import_module(name)
    sys.argv = [f"{name}.py", *args]
    errors = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stderr(errors):
            run_main(module.main)
    except SystemExit as ended:
        code = ended.code
    finally:
        resume.release_signals()
    if code:
        before, _, line = errors.getvalue().strip().rpartition("error: ")
        assert code == 2 and "Traceback" not in before, errors.getvalue()
        raise InputError(line)


def trouble(folder):
    """Commands that are disturbed: by a signal, by a full disk, by a reader that goes away."""
    quick = commands(folder)
    quick["bench"] = ["--model=base", "--rounds=2", "--contexts=4", "--batches=1", "--budget=2"]
    files = []
    for name, args in quick.items():
        path = folder / f"{name}.trouble"
        path.write_text(json.dumps({"args": args, "how": "nothing", "when": 0}))
        files.append(path)

    def read(path):
        record = json.loads(path.read_text())
        code = disturb(path.stem, folder=folder, **record)
        if path.stem == "train":  # whatever happened, the same command goes on
            args = [*record["args"], "--resume"]
            assert disturb("train", args, "nothing", 0, folder) == 0
            shutil.rmtree(folder / "run")
        if code:
            raise InputError(f"ended with {code}")

    return files, read


def disturb(name, args, how, when, folder):
    """Run a script, and disturb it. -> the exit code; an AssertionError if it showed a traceback.

    when: seconds from the start for a signal, bytes that a file may have for a full disk, or bytes
    that are read of its output before the pipe is closed.
    """
    command = [sys.executable, str(ROOT / f"{name}.py"), *args]
    if how == "disk":
        command[1:1] = [str(ROOT / "tests" / "run_limited.py"), str(when)]
    if how == "no stdout":
        command = ["sh", "-c", f"{shlex.join(command)} >&-"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as running:
        if how in signal.Signals.__members__:
            time.sleep(when)
            running.send_signal(signal.Signals[how])
        if how == "pipe":
            running.stdout.read(when)
            running.stdout.close()
            errors = running.stderr.read()
        else:
            _, errors = running.communicate()
    errors = errors.decode(errors="replace")
    in_program = "in main\n" in errors  # not so while Python itself still imports torch
    assert "Traceback" not in errors or not in_program, errors
    if how in ("nothing", "pipe", "no stdout"):
        assert running.returncode in (0, 141), errors
    return running.returncode


KINDS = {
    "config": config,
    "safetensors": safetensors,
    "index": index,
    "bin": pickles,
    "tokenizer": tokenizer,
    "data": text,
    "run": run,
    "figures": figures,
    "flags": flags,
    "trouble": trouble,
}


# ---- the changes ---------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2, 7, 0.5, -0.0, 1e-45, 1e30, 1e400, -1e400, float("nan")]
HUGE = [2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**12, 10**19, 10**400, -(2**63)]
ODD = [None, True, False, "", "x", "0", "\ud800", "a\nb\u2028c", "☃" * 3000, [], {}, [[]], {"": 0}]


def spoil(name, content, rng):
    """The content of a file, with one change."""
    if name.endswith(".gz") and rng.random() < 0.7:
        return gzip.compress(spoil("a.jsonl", gzip.decompress(content), rng))
    if name.endswith(".xz") and rng.random() < 0.7:
        return lzma.compress(spoil("a.jsonl", lzma.decompress(content), rng))
    if name.endswith(".flags"):
        return spoil_flags(content, rng)
    if name.endswith(".trouble"):
        return spoil_trouble(content, rng)
    if rng.random() < 0.3:
        return spoil_bytes(content, rng)
    if name.endswith(".json"):
        return spoil_json(content, rng)
    if name.endswith(".jsonl"):
        lines = content.split(b"\n")
        i = rng.randrange(len(lines) - 1)
        lines[i] = spoil_json(lines[i], rng)
        return b"\n".join(lines)
    if name.endswith(".safetensors"):
        return spoil_safetensors(content, rng)
    return spoil_bytes(content, rng)


def spoil_bytes(content, rng):
    spoilt = bytearray(content)
    # Where the structure is, in most formats: at the beginning or at the end.
    edge = rng.choice([len(spoilt), min(len(spoilt), 3000)])
    start = rng.randrange(edge)
    if rng.random() < 0.5:
        start = len(spoilt) - 1 - start
    length = rng.choice([1, 1, 2, 8, 100])
    how = rng.randrange(7)
    if how == 0:
        spoilt[start] ^= 1 << rng.randrange(8)
    elif how == 1:
        spoilt[start] = rng.randrange(256)
    elif how == 2:
        del spoilt[start:]
    elif how == 3:
        del spoilt[start : start + length]
    elif how == 4:
        spoilt[start:start] = rng.randbytes(length)
    elif how == 5:
        spoilt[start:start] = spoilt[start : start + length]
    else:
        filler = rng.choice([b"\x00", b"\xff"])
        spoilt[start : start + length] = filler * length
    return bytes(spoilt)


def spoil_json(content, rng):
    """A JSON text with one value changed, one key dropped or doubled, or one part nested."""
    root = [json.loads(content)]
    holder, key = rng.choice(list(places(root)))
    old = holder[key]
    how = rng.randrange(8)
    if how == 0 and holder is not root:
        del holder[key]
    elif how == 1:
        holder[key] = [old]
    elif how == 2:
        holder[key] = {"": old}
    elif how == 3:
        marker = "a deep place"
        holder[key] = marker
        depth = rng.choice([3, 300, 100_000])
        nested = "[" * depth + json.dumps(old) + "]" * depth
        return json.dumps(root[0]).replace(json.dumps(marker), nested, 1).encode()
    elif how == 4 and isinstance(holder, dict):
        marker = "a double key"
        holder[marker] = absurd(rng)
        return json.dumps(root[0]).replace(json.dumps(marker), json.dumps(key), 1).encode()
    elif how == 5 and type(old) in (int, float):
        holder[key] = old + rng.choice([-1, 1, 0.5, 2**31])
    elif how == 6 and isinstance(old, str) and old:
        i = rng.randrange(len(old))
        holder[key] = old[:i] + rng.choice(["", "\x00", "é", "\\", " "]) + old[i + 1 :]
    else:
        holder[key] = absurd(rng)
    return json.dumps(root[0]).encode()


TEXTS = [
    "",
    " ",
    "x",
    "é\n",
    "☃" * 3000,
    "\udcff",
    "a,b",
    ".",
    "/",
    "/dev/null",
    "--",
    "<s>",
    "None",
]
COUNTS = ["-1", "0", "1", "2", "3", "0.5", "007", "1_0", "1e3", "1e-30", "-0.0", "nan", "inf"]
LARGE = ["1e30", "1e400", "65", "2147483648", "9223372036854775808", "9" * 5000]
DEVICES = ["meta", "mps", "cuda", "cuda:1", "xla", "cpu:3"]
PATIENT = ("steps", "accumulate", "loops", "budget")  # a large one only takes long


def spoil_flags(content, rng):
    """A command with one value changed, one flag left out, or one given without a value."""
    args = json.loads(content)
    i = rng.randrange(len(args))
    name, equals, _ = args[i].partition("=")
    how = rng.randrange(10)
    if how == 0:
        del args[i]
    elif how == 1:
        args[i] = name
    else:
        numbers = COUNTS if name.strip("-") in PATIENT else COUNTS + LARGE
        args[i] = name + equals + rng.choice(rng.choice([TEXTS, numbers, numbers, DEVICES]))
    return json.dumps(args).encode()


def spoil_trouble(content, rng):
    """A command with something that happens to it."""
    how = rng.choice(["SIGINT", "SIGINT", "SIGTERM", "SIGHUP", "disk", "disk", "pipe", "no stdout"])
    when = {"disk": int(10 ** rng.uniform(0, 6)), "pipe": rng.randrange(300), "no stdout": 0}
    happens = {"how": how, "when": when.get(how, rng.uniform(1, 6))}
    return json.dumps(json.loads(content) | happens).encode()


def absurd(rng):
    return rng.choice(rng.choice([NUMBERS, HUGE, ODD]))


def places(root):
    """(list or dict, index or key) of every value below `root`."""
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], (list, dict)):
                waiting.append(holder[key])


def spoil_safetensors(content, rng):
    """A safetensors file with a change in its header, whose length is told rightly."""
    size = struct.unpack("<Q", content[:8])[0]
    header = spoil_json(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


# ---- the loop ------------------------------------------------------------------------------------


class Hang(BaseException):
    """An input took too long. No Exception, so that the program cannot take it for its own."""


def give_up(number, frame):
    raise Hang(f"more than {SECONDS} s")


def try_input(path, content, read):
    """Read a file with this content in place of its own; -> "fine", "refused" or what happened."""
    valid = path.read_bytes()
    path.write_bytes(content)
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    # Where Python gets no turn: the program ends, and says where it was.
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            read(path)
        return "fine"
    except InputError as error:
        line = str(error)
        if len(line.splitlines()) == 1 and len(line) <= LONGEST:
            return "refused"
        return f"an InputError of {len(line.splitlines())} lines, {len(line)} characters: {line}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic in Rust is no Exception either
        return traceback.format_exc(limit=-4)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        path.write_bytes(valid)


def fuzz(kind, seeds):
    """Try an input for each seed; -> a Counter of fine, refused and other, and what was other.

    The latter: [(seed, file name, what happened)].
    """
    counts, others = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        files, read = KINDS[kind](Path(folder))
        for path in files:  # unspoilt, all are fine
            assert try_input(path, path.read_bytes(), read) == "fine", path
        for seed in seeds:
            rng = random.Random(seed)
            path = rng.choice(files)
            outcome = try_input(path, spoil(path.name, path.read_bytes(), rng), read)
            if outcome in ("fine", "refused"):
                counts[outcome] += 1
            else:
                counts["other"] += 1
                others.append((seed, path.name, outcome))
    return counts, others


def limit_memory():
    """From now on an allocation that is too large fails, instead of filling the machine. Linux."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main():
    parser = argparse.ArgumentParser(description="Read spoilt files, and see that each is refused.")
    parser.add_argument("--count", type=int, default=1000, help="inputs, shared by the kinds")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first input; the next has the next"
    )
    parser.add_argument("--kind", choices=KINDS, help="default: all but trouble")
    args = parser.parse_args()
    torch.set_num_threads(1)
    limit_memory()
    kinds = [args.kind] if args.kind else [kind for kind in KINDS if kind != "trouble"]
    failed = False
    for i, kind in enumerate(kinds):
        share = len(range(i, args.count, len(kinds)))
        counts, others = fuzz(kind, range(args.seed, args.seed + share))
        print(f"{kind:12} {share:6d} inputs", end="")
        for outcome in ("fine", "refused", "other"):
            print(f"{counts[outcome]:7d} {outcome}", end="")
        print(flush=True)
        for seed, name, outcome in others:
            print(
                f"python tests/fuzz.py --kind {kind} --seed {seed} --count 1   ({name})\n{outcome}"
            )
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

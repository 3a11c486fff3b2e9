"""Text files -> packed batches of tokens.

Documents follow each other, each with bos in front (where the tokenizer adds one) and eos behind, and are cut into full sequences:
no padding, so every token that is counted is a token that was trained on.
"""

import gzip
import itertools
import json
import lzma
import queue
import re
import threading
import zlib
from pathlib import Path

import torch

from appendix.errors import InputError, require
from appendix.hub import fetch, hub_files

SHUFFLE = 1024  # sequences that are shuffled together

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")


def shards(source):
    """The files of --data, {name: a function that gives its path}: a file, those of a folder, or those of a hub data set (org/name, or
    org/name/folder), fetched when their turn comes. Of a data set, files that are named after a test or validation split are left out."""
    path = Path(source)
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.name.endswith(KINDS) and file.is_file()
        )
        require(files, f"{path}: no {', '.join(KINDS)} file in this folder")
        return {str(file): lambda file=file: file for file in files}
    if (
        path.exists()
        or path.name.endswith(KINDS)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", str(source))
    ):
        return {str(path): lambda: path}
    owner, name, *folder = str(source).strip("/").split("/")
    repo, within = f"{owner}/{name}", "".join(f"{part}/" for part in folder)
    pinned, files = hub_files(repo, "main", "dataset")
    files = {
        file: facts
        for file, facts in sorted(files.items())
        if file.startswith(within)
        and file.endswith(KINDS)
        and not re.search(
            r"(^|[/_.-])(test|valid|validation|dev)([/_.-]|$)", file.removeprefix(within)
        )
    }
    require(
        files,
        f"{source}: no {', '.join(KINDS)} file to train on in this data set"
        + f" below {within}" * bool(within),
    )
    return {
        file: lambda file=file: fetch(repo, pinned, {file: files[file]}, "dataset") / file
        for file in files
    }


def documents(path, skip=0):
    """(number, text) of the documents of a .txt (one), .jsonl, .jsonl.gz, .jsonl.xz or .parquet file (field or column "text"), from number `skip` on."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        if path.name.endswith(".txt"):
            yield 0, path.read_text(encoding="utf-8")
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            with opener(path, "rt", encoding="utf-8") as lines:
                yield from (
                    (n, text)
                    for n, line in enumerate(lines)
                    if n >= skip
                    and line.strip()
                    and (text := text_of(line, f"{path}, line {n + 1}"))
                )
        elif path.name.endswith(".parquet"):
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                columns = {field.name: str(field.type) for field in file.schema_arrow}
                require(
                    columns.get("text") in ("string", "large_string"),
                    f"{path}: expected a column text of strings, found {columns}",
                )
                n = 0
                for group in range(file.num_row_groups):  # a group that is skipped is not read
                    rows = file.metadata.row_group(group).num_rows
                    texts = (
                        file.read_row_group(group, columns=["text"])["text"]
                        if n + rows > skip
                        else ()
                    )
                    yield from (
                        (i, text)
                        for i, cell in enumerate(texts, n)
                        if i >= skip and (text := cell.as_py())
                    )
                    n += rows
        else:
            raise InputError(
                f"{path}: expected a .txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet file"
            )
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        zlib.error,
        ValueError,
    ) as error:  # pyarrow's errors and UnicodeDecodeError are ValueErrors
        raise InputError(
            f"{path}: not readable ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None


def text_of(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{where}: expected a JSON object with a field "text" ({type(error).__name__}: {error})'
        ) from None
    require(
        isinstance(text, str), f'{where}: field "text" is {type(text).__name__}, expected a string'
    )
    return text


def sequences(files, tokenizer, seq_len, place=None):
    """Full sequences of seq_len ids, packed, from the files of `shards` in turn; each with the place behind it, from which the rest comes again:
    the file and number of the document that is being cut, the ids left over from before it, and how many of its sequences were given."""
    place = place or {"file": next(iter(files)), "document": 0, "carry": [], "skip": 0}
    require(
        place["file"] in files,
        f"--data: {place['file']}, in which the run stopped, is not among its {len(files)} files any more",
    )
    end, carry, skip = (
        [] if tokenizer.eos_id is None else [tokenizer.eos_id],
        place["carry"],
        place["skip"],
    )
    for name in itertools.dropwhile(lambda name: name != place["file"], files):
        for n, text in documents(files[name](), place["document"] * (name == place["file"])):
            ids = carry + tokenizer.encode(text, bos=tokenizer.add_bos) + end
            for i in range(skip, len(ids) // seq_len):
                yield (
                    ids[i * seq_len : (i + 1) * seq_len],
                    {"file": name, "document": n, "carry": carry, "skip": i + 1},
                )
            carry, skip = ids[len(ids) - len(ids) % seq_len :], 0


def ahead(stream):
    """The items of a stream, the next one made by a thread while one is used; the thread ends with the program, whatever it waits for."""
    ready = queue.Queue(1)

    def produce():
        try:
            for item in stream:
                ready.put((item, None))
        except Exception as error:  # raised where the item would have been used
            ready.put((None, error))

    threading.Thread(target=produce, daemon=True).start()
    while True:
        item, error = ready.get()
        if error:
            raise error
        yield item


def held_out(path, tokenizer, seq_len, count):
    """The first `count` sequences of a file: (count, seq_len)."""
    rows = [row for row, _ in itertools.islice(sequences(shards(path), tokenizer, seq_len), count)]
    require(
        len(rows) == count,
        f"{path}: {len(rows)} sequences of {seq_len} tokens in it, {count} are held out for evaluation; "
        "give more text, or a smaller --seq-len or --eval-sequences",
    )
    return torch.tensor(rows)


def batches(path, tokenizer, batch_size, seq_len, seed, skip=0, position=None):
    """Batches (batch_size, seq_len) without end, the first `skip` sequences left out, shuffled in parts, anew in each epoch; each with the
    position behind it (JSON), from which the rest comes again: where its part began, its number, what was left over there, and the batches made since."""
    start, files = position or {"place": None, "part": 0, "left": [], "made": 0}, shards(path)
    while True:
        seen, stream = bool(start["place"]), sequences(files, tokenizer, seq_len, start["place"])
        if not start["place"]:
            stream = itertools.islice(stream, skip, None)
        while part := list(itertools.islice(stream, SHUFFLE)):
            seen = True
            order = torch.randperm(
                len(part), generator=torch.Generator().manual_seed(seed + start["part"])
            ).tolist()
            rows = start["left"] + [part[i][0] for i in order]
            count = len(rows) // batch_size
            for i in range(start["made"], count):
                yield (
                    torch.tensor(rows[i * batch_size : (i + 1) * batch_size]),
                    start | {"made": i + 1},
                )
            start = {
                "place": part[-1][1],
                "part": start["part"] + 1,
                "left": rows[count * batch_size :],
                "made": 0,
            }
        require(
            seen,
            f"{path}: too little text for one training sequence of {seq_len} tokens"
            + f" beside the {skip} held out" * bool(skip)
            + "; give more text or a smaller --seq-len",
        )
        start = start | {"place": None}

"""Text files -> packed batches of tokens.

    files ──► documents ──► one stream of ids ──► sequences (T,) ──► batches (N, T)

Documents follow each other, each with bos in front (where the tokenizer adds one) and the end token
behind, and the stream is cut into full sequences: no padding, so every token that is counted is a
token that was trained on. Sequences are shuffled in parts of SHUFFLE and put together to batches.

Positions. Training stops and goes on, so each sequence and each batch comes with the position
behind it: a small JSON object from which the rest comes again, exactly.

  of a sequence  {"file": "a.jsonl", "document": 7, "carry": [5, 3], "skip": 2}
                 Document 7 of this file is the one that was being cut. `carry` are the ids that
                 were left over from before it. Of `carry` and the document's ids together, the
                 first `skip` sequences have been given. To go on, the document is encoded again.
  of a batch     {"place": a sequence's position, "part": 4, "left": [[…], …], "made": 3}
                 Part 4 is the one that was being cut into batches. `place` is where it begins
                 (None: the data's start), its number and the seed give its order, `left` are the
                 sequences of before that did not fill a batch, and `made` of its batches have been
                 given. To go on, the part is read again.

Reading order: files, documents, sequences, batches, and `ahead`, which makes them in a thread.
"""

import atexit
import codecs
import contextlib
import functools
import gzip
import itertools
import json
import lzma
import os
import queue
import re
import sys
import threading
import time
from operator import itemgetter
from pathlib import Path

import torch

from appendix.errors import InputError, require
from appendix.hub import fetch, hub_files
from appendix.tokenizer import SplitError

SHUFFLE = 1024  # sequences that are shuffled together
READ = 2**18  # characters of a .txt that are read at once
LAST_ITEM = 5  # seconds that the end of the program waits for the thread of `ahead`

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
KINDS_TEXT = ", ".join(KINDS)


# ---- files ---------------------------------------------------------------------------------------


def shards(source):
    """The files of --data -> {name: a function that gives its path}.

    source: a file; a folder, whose files of these KINDS are taken, subfolders' too; or a data set
    of the hub, org/name or org/name/folder, whose files are fetched when their turn comes.
    """
    path = Path(source)
    if path.is_dir():
        return folder_shards(path)
    if path.exists() or path.name.endswith(KINDS):  # what is not there is said when it is read
        return {str(path): functools.partial(Path, path)}
    require(
        re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", str(source)),
        f"{source}: no such file or folder here, and no data set of the hub like org/name",
    )
    return hub_shards(str(source))


def folder_shards(folder):
    names = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(KINDS) and path.is_file():
            names.append(str(path))
    require(names, f"{folder}: no {KINDS_TEXT} file in this folder")
    return {name: functools.partial(Path, name) for name in names}


def hub_shards(source):
    """Files that are named after a test or validation split are left out."""
    owner, name, *folder = source.strip("/").split("/")
    repo = f"{owner}/{name}"
    below = "".join(f"{part}/" for part in folder)
    commit, facts = hub_files(repo, "main", "dataset")
    held_back = re.compile(r"(^|[/_.-])(test|valid|validation|dev)([/_.-]|$)")
    names = []
    for name in sorted(facts):
        wanted = name.startswith(below) and name.endswith(KINDS)
        if wanted and not held_back.search(name.removeprefix(below)):
            names.append(name)
    where = f"in this data set below {below}" if below else "in this data set"
    require(names, f"{source}: no {KINDS_TEXT} file to train on {where}")

    def path_of(name):
        return fetch(repo, commit, {name: facts[name]}, "dataset") / name

    return {name: functools.partial(path_of, name) for name in names}


# ---- documents -----------------------------------------------------------------------------------


def documents(path, skip=0):
    """(number, text) of a file's documents, from number `skip` on; empty ones are left out.

    A .txt is one document; a long one comes as several texts, in turn, with the same number. A
    .jsonl (also .gz, .xz) has a document in each line's field "text", a .parquet in each row's
    column "text".
    """
    path = Path(path)
    with reading_errors(path):
        if path.name.endswith(".txt"):
            yield from read_text(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            yield from read_lines(path, skip)
        elif path.name.endswith(".parquet"):
            yield from read_rows(path, skip)
        else:
            raise InputError(f"{path}: expected a {KINDS_TEXT} file")


@contextlib.contextmanager
def reading_errors(path):
    """Whatever goes wrong in reading a file becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: not readable: no such file or folder here") from None
    except Exception as error:  # of the system, UTF-8, the decompressors, pyarrow
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not readable ({reason:.200})") from None


def open_text(path, newline):
    """Open a text file, compressed or not: UTF-8, or UTF-16 if a byte order mark says so.

    Windows programs write such marks; they are no part of the text.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as file:
        start = file.read(2)
    utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return opener(path, "rt", encoding="utf-16" if utf16 else "utf-8-sig", newline=newline)


def read_text(path):
    with open_text(path, newline="") as file:  # "": line ends stay as they are
        while text := file.read(READ):
            yield 0, text


def read_lines(path, skip):
    with open_text(path, newline=None) as lines:
        for number, line in enumerate(lines):
            line = line.removeprefix("\ufeff")  # files that were put together have marks inside
            if number >= skip and line.strip():
                text = text_of(line, f"{path}, line {number + 1}")
                if text:
                    yield number, text


def text_of(line, where):
    """The text of a line of a .jsonl."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f'{where}: expected a JSON object with a field "text" ({type(error).__name__}: {error})'
        ) from None
    require(
        isinstance(text, str), f'{where}: field "text" is {type(text).__name__}, expected a string'
    )
    return text


def read_rows(path, skip):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        require(
            columns.get("text") in ("string", "large_string"),
            f"{path}: expected a column text of strings, found {columns}",
        )
        first = 0  # row of a group
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > skip:  # a group that is skipped is not read
                cells = file.read_row_group(group, columns=["text"])["text"]
                for number, cell in enumerate(cells, first):
                    text = cell.as_py() if number >= skip else None
                    if text:
                        yield number, text
            first = end


# ---- sequences -----------------------------------------------------------------------------------


def sequences(files, tokenizer, seq_len, place=None, special=False):
    """Full sequences of seq_len ids, each with the position behind it (see the head of this file).

    files: as from `shards`, read in turn. place: the position to go on from. special: are texts of
    special tokens these tokens? They are plain text otherwise, and that is said once.
    """
    place = place or {"file": next(iter(files)), "document": 0, "carry": [], "skip": 0}
    require(
        place["file"] in files,
        f"--data: {place['file']}, in which the run stopped, is not among its {len(files)} files "
        "any more",
    )
    carry, skip, document = place["carry"], place["skip"], place["document"]
    names = list(files)
    names = names[names.index(place["file"]) :]
    for name in names:
        for number, ids in encoded_documents(name, files[name](), tokenizer, document, special):
            rest = list(carry)
            for made, row in enumerate(full_rows(ids, seq_len, rest), 1):
                if made > skip:
                    yield row, {"file": name, "document": number, "carry": carry, "skip": made}
            carry, skip = rest, 0
        document = 0


def full_rows(ids, seq_len, rest):
    """Rows of seq_len ids: of `rest`, then of the lists `ids`. What is over stays in `rest`."""
    for more in ids:
        rest += more
        full = len(rest) - len(rest) % seq_len
        rows = [rest[start : start + seq_len] for start in range(0, full, seq_len)]
        del rest[:full]
        yield from rows


def encoded_documents(name, path, tokenizer, skip, special):
    """(number, its ids as lists, in turn) of a file's documents, with bos and end token."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if not end:
        say_once(
            "end",
            f"{tokenizer.path}: neither it nor a file beside it names an end token; documents are "
            "packed without one between them",
        )
    for number, entries in itertools.groupby(documents(path, skip), key=itemgetter(0)):
        texts = (text for _, text in entries)
        where = name if name.endswith(".txt") else f"{name}, document {number + 1}"
        if not special:
            texts = watched(texts, tokenizer, where)
        yield number, encoded(texts, tokenizer, end, special, where)


def encoded(texts, tokenizer, end, special, where):
    """A document's ids as lists, in turn."""
    try:
        yield from tokenizer.encode_parts(texts, tokenizer.add_bos, special)
    except SplitError as error:
        raise InputError(f"{where}: {error}") from None
    yield end


def watched(texts, tokenizer, where):
    """The same texts; that one has a special token's text in it is said once."""
    for text in texts:
        if "special" not in SAID:
            token = tokenizer.find_special(text)
            if token:
                say_once(
                    "special",
                    f"{where}: has the text of a special token, {token}, which is read as plain "
                    "text; --special-tokens reads such texts as the tokens",
                )
        yield text


SAID = set()  # what has been said


def say_once(subject, line):
    """A line on stderr, the first time only, and by one process only."""
    if subject not in SAID and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    SAID.add(subject)


# ---- batches -------------------------------------------------------------------------------------


def held_out(path, tokenizer, seq_len, count, special=False):
    """The first `count` sequences of a file: (count, seq_len)."""
    stream = sequences(shards(path), tokenizer, seq_len, special=special)
    rows = [row for row, _ in itertools.islice(stream, count)]
    require(
        len(rows) == count,
        f"{path}: {len(rows)} sequences of {seq_len} tokens in it, {count} are held out for "
        "evaluation; give more text, or a smaller --seq-len or --eval-sequences",
    )
    return torch.tensor(rows)


def batches(path, tokenizer, batch_size, seq_len, seed, skip=0, position=None, special=False):
    """Batches (batch_size, seq_len) without end, each with the position behind it.

    The first `skip` sequences are left out, the others shuffled in parts, anew in each epoch.
    position: the one to go on from (see the head of this file). special: as in `sequences`.
    """
    files = shards(path)
    part = position or {"place": None, "part": 0, "left": [], "made": 0}
    while True:  # an epoch
        stream = sequences(files, tokenizer, seq_len, part["place"], special)
        found = part["place"] is not None  # an epoch that goes on had sequences already
        if part["place"] is None:
            stream = itertools.islice(stream, skip, None)
        for entries in in_parts(stream, SHUFFLE):
            found = True
            rows = part["left"] + shuffle([row for row, _ in entries], seed + part["part"])
            count = len(rows) // batch_size
            for i in range(part["made"], count):
                batch = rows[i * batch_size : (i + 1) * batch_size]
                yield torch.tensor(batch), part | {"made": i + 1}
            _, place = entries[-1]
            left = rows[count * batch_size :]
            part = {"place": place, "part": part["part"] + 1, "left": left, "made": 0}
        beside = f" beside the {skip} held out" if skip else ""
        require(
            found,
            f"{path}: too little text for one training sequence of {seq_len} tokens{beside}; "
            "give more text or a smaller --seq-len",
        )
        part = part | {"place": None}


def in_parts(stream, size):
    """Lists of `size` items; the last may be shorter."""
    while part := list(itertools.islice(stream, size)):
        yield part


def shuffle(rows, seed):
    """The rows in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    return [rows[i] for i in order.tolist()]


# ---- in a thread ---------------------------------------------------------------------------------


def ahead(stream):
    """The items of a stream, the next one made by a thread while one is used.

    Whatever ends the thread, an error of any kind too, comes out here, where the item would have.
    When the program ends, the thread ends first: one that still computes while the interpreter is
    taken down aborts the program.
    """
    ready = queue.Queue(1)
    at_end = threading.Event()

    def produce():
        failure = None
        try:
            for item in stream:
                ready.put((item, None))
                if at_end.is_set():
                    return
        except BaseException as error:  # tiktoken's panics are no Exception
            failure = error
        ready.put((None, failure))

    thread = threading.Thread(target=produce, daemon=True)  # a download that hangs holds up nobody
    thread.start()
    atexit.register(end_thread, thread, ready, at_end)
    while True:
        item, failure = wait_for(ready)
        if failure:
            raise failure
        if item is None:
            return
        yield item


def end_thread(thread, ready, at_end):
    """Let the thread of `ahead` finish its item, and wait for that, but not for ever."""
    at_end.set()
    deadline = time.monotonic() + LAST_ITEM
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # room for what it waits to put
        thread.join(0.01)


def wait_for(ready):
    """The next entry of a queue. It wakes up every second, so that Ctrl-C is noticed anywhere."""
    while True:
        try:
            return ready.get(timeout=1)
        except queue.Empty:
            continue

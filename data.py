"""Text files -> packed batches of tokens.

Documents follow each other, each with bos in front (where the tokenizer adds one) and eos behind, and are cut into full sequences:
no padding, so every token that is counted is a token that was trained on.
"""
import gzip
import itertools
import json
import lzma
import zlib
from pathlib import Path

import torch

from loopus import InputError, require

SHUFFLE = 1024                                # sequences that are shuffled together

def documents(path):
    """The documents of a .txt (one), .jsonl, .jsonl.gz, .jsonl.xz or .parquet file (field or column "text"), in order."""
    path = Path(path)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        if path.name.endswith(".txt"):
            yield path.read_text(encoding="utf-8")
        elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield text_of(line, f"{path}, line {number}")
        elif path.name.endswith(".parquet"):
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = {field.name: str(field.type) for field in file.schema_arrow}
                require(columns.get("text") in ("string", "large_string"), f"{path}: expected a column text of strings, found {columns}")
                for group in file.iter_batches(batch_size=256, columns=["text"]):
                    yield from (text for text in group["text"].to_pylist() if text)
        else:
            raise InputError(f"{path}: expected a .txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet file")
    except InputError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:    # pyarrow's errors and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path}: not readable ({(str(error) or type(error).__name__).splitlines()[0]})") from None

def text_of(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{where}: expected a JSON object with a field "text" ({type(error).__name__}: {error})') from None
    require(isinstance(text, str), f'{where}: field "text" is {type(text).__name__}, expected a string')
    return text

def sequences(texts, tokenizer, seq_len):
    """Texts -> full sequences of seq_len ids, packed."""
    end, carry = [] if tokenizer.eos_id is None else [tokenizer.eos_id], []
    for text in texts:
        carry += tokenizer.encode(text, bos=tokenizer.add_bos) + end
        cut = len(carry) - len(carry) % seq_len
        yield from (carry[i:i + seq_len] for i in range(0, cut, seq_len))
        carry = carry[cut:]

def held_out(path, tokenizer, seq_len, count):
    """The first `count` sequences of a file: (count, seq_len)."""
    rows = list(itertools.islice(sequences(documents(path), tokenizer, seq_len), count))
    require(len(rows) == count, f"{path}: {len(rows)} sequences of {seq_len} tokens in it, {count} are held out for evaluation; "
            "give more text, or a smaller --seq-len or --eval-sequences")
    return torch.tensor(rows)

def batches(path, tokenizer, batch_size, seq_len, seed, skip=0):
    """Batches (batch_size, seq_len) without end, the first `skip` sequences left out; shuffled in parts, anew in each epoch."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        stream, seen = itertools.islice(sequences(documents(path), tokenizer, seq_len), skip, None), 0
        while part := list(itertools.islice(stream, SHUFFLE)):
            seen += len(part)
            left += [part[i] for i in torch.randperm(len(part), generator=generator).tolist()]
            while len(left) >= batch_size:
                yield torch.tensor(left[:batch_size])
                del left[:batch_size]
        require(seen, f"{path}: too little text for one training sequence of {seq_len} tokens" + f" beside the {skip} held out" * bool(skip)
                + "; give more text or a smaller --seq-len")

"""Text files -> packed batches of tokens.

Documents follow each other, each with bos in front (where the tokenizer adds one) and eos behind, and are cut into full sequences:
no padding, so every token that is counted is a token that was trained on.
"""
import gzip
import itertools
import json
import lzma
from pathlib import Path

import torch

from loopus import InputError

BLOCK = 1024                                  # sequences that are shuffled together

def documents(path):
    """The documents of a .txt (one), .jsonl, .jsonl.gz, .jsonl.xz or .parquet file (field or column "text"), in order."""
    path = Path(path)
    suffix = path.name[path.name.find(".", 1):] if path.name.count(".") else ""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        if suffix.endswith(".txt"):
            yield path.read_text(encoding="utf-8")
        elif suffix.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield text_of(line, f"{path}, line {number}")
        elif suffix.endswith(".parquet"):
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path) as file:
                if "text" not in file.schema_arrow.names:
                    raise InputError(f"{path}: no column text among {', '.join(file.schema_arrow.names)}")
                for group in file.iter_batches(batch_size=256, columns=["text"]):
                    yield from (text for text in group["text"].to_pylist() if text)
        else:
            raise InputError(f"--data {path}: expected a .txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet file")
    except InputError:
        raise
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:    # pyarrow's errors and UnicodeDecodeError are ValueErrors
        raise InputError(f"--data {path}: not readable ({str(error).splitlines()[0]})") from None

def text_of(line, where):
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{where}: expected a JSON object with a field "text" ({type(error).__name__}: {error})') from None
    if not isinstance(text, str):
        raise InputError(f'{where}: field "text" is {type(text).__name__}, expected a string')
    return text

def sequences(texts, tokenizer, seq_len):
    """Texts -> full sequences of seq_len ids, packed."""
    end, carry = [] if tokenizer.eos_id is None else [tokenizer.eos_id], []
    for text in texts:
        carry += tokenizer.encode(text, bos=tokenizer.add_bos) + end
        cut = len(carry) - len(carry) % seq_len
        yield from (carry[i:i + seq_len] for i in range(0, cut, seq_len))
        carry = carry[cut:]

def held_out(texts, tokenizer, seq_len, count):
    """The first `count` sequences (N, T) of an iterator of texts; whole documents are taken from it, what is left over is dropped."""
    rows = list(itertools.islice(sequences(texts, tokenizer, seq_len), count))
    if not rows:
        raise InputError(f"--data: too little text for one held-out sequence of {seq_len} tokens; give more text or a smaller --seq-len")
    return torch.tensor(rows)

def batches(path, tokenizer, batch_size, seq_len, seed, skip=0):
    """Batches (N, T) of packed sequences without end, the first `skip` documents left out; shuffled in blocks, anew in each epoch."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        stream = sequences(itertools.islice(documents(path), skip, None), tokenizer, seq_len)
        seen = 0
        while block := list(itertools.islice(stream, BLOCK)):
            seen += len(block)
            left += [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
            while len(left) >= batch_size:
                yield torch.tensor(left[:batch_size])
                del left[:batch_size]
        if not seen:
            raise InputError(f"--data {path}: too little text for one sequence of {seq_len} tokens after the held-out part; "
                             "give more text or a smaller --seq-len")

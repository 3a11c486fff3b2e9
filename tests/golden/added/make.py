"""Make cases.json again: what the reference makes of added tokens' options and of rarer files.

Needs `pip install tokenizers`; run once, committed: python tests/golden/added/make.py
"""

import contextlib
import itertools
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTENTS = [
    "<a>",
    "<a><b>",
    "ab",
    "abc",
    "e\u0301!",
    "中",
    "  ",
    "x y",
    " w",
    "w ",
    "\tz",
    "▁v",
    "_",
]
PIECES = [*CONTENTS, *" \n\tabcw.é", "\u0301", "\u00a0", "ab ", " <a>", "\x1c", "½", "don't", "42"]
WORDS = ["abcw", "x\u0120y", "\u0120don"]  # as byte-level files write them


def byte_level(first_steps):
    """Changes of a tokenizer.json: other steps before ByteLevel, which then only maps bytes."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    last["trim_offsets"] = False
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first_steps, last]}}


def split(pattern, behavior="Isolated", invert=False):
    step = {"type": "Split", "pattern": {"Regex": pattern}}
    return byte_level([step | {"behavior": behavior, "invert": invert}])


def metaspace(scheme):
    return {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": scheme}}


KINDS = [
    ("bytelevel", {}),
    ("gpt2", {}),
    ("digits", {}),
    ("sentencepiece", {}),
    ("sentencepiece", metaspace("always")),
    ("sentencepiece", metaspace("first")),
    ("sentencepiece", metaspace("never")),
    ("bytelevel", split(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))),
    ("bytelevel", split(QWEN, "Removed", True)),
    ("gpt2", split(r"\p{N}|(a)b")),
    ("gpt2", split(r"[\p{L}\s]+", "Removed", True)),
]


def added_tokens(rng, first_id, contents):
    """A token of each content, with random options."""
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    options = list(itertools.product((False, True), repeat=len(names)))
    tokens = []
    for i, content in enumerate(contents):
        flags = dict(zip(names, rng.choice(options), strict=True))
        tokens.append({"id": first_id + i, "content": content, **flags})
    return tokens


def encode(reference, text, special):
    reference.encode_special_tokens = not special
    return reference.encode(text, add_special_tokens=False).ids


def changed(name, changes, words=()):
    """A golden tokenizer.json, changed; words: tokens that no merge makes, with ignore_merges."""
    raw = json.loads((HERE.parent / name / "tokenizer.json").read_text(encoding="utf-8")) | changes
    raw["model"]["ignore_merges"] = bool(words)
    first = first_free_id(raw)
    raw["model"]["vocab"] |= {word: first + i for i, word in enumerate(words)}
    return raw


def first_free_id(raw):
    added = [token["id"] for token in raw["added_tokens"]]
    return 1 + max(*raw["model"]["vocab"].values(), *added)


def added_case(seed, name, changes, words):
    """Random texts with added tokens of every kind -> ids without and with special tokens."""
    rng = random.Random(seed)
    raw = changed(name, changes, words)
    known = {*raw["model"]["vocab"], *(token["content"] for token in raw["added_tokens"])}
    added = added_tokens(rng, first_free_id(raw), [text for text in CONTENTS if text not in known])
    raw["added_tokens"] += added
    reference = Tokenizer.from_str(json.dumps(raw))
    pieces = [*PIECES, *(word.replace("\u0120", " ") for word in words)]
    texts = []
    for _ in range(30):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        with contextlib.suppress(BaseException):  # the reference panics where some tokens overlap
            texts.append([text, encode(reference, text, False), encode(reference, text, True)])
    case = {"base": name, "changes": changes, "words": words, "added": added}
    return case | {"texts": texts}


def long_case(name, text):
    """A text on which tiktoken's regex gives up, [[part, times], …]; its ids, [[id, times], …]."""
    reference = Tokenizer.from_str(json.dumps(changed(name, {})))
    ids = encode(reference, "".join(part * times for part, times in text), False)
    runs = [[id, len(list(run))] for id, run in itertools.groupby(ids)]
    return {"base": name, "text": text, "ids": runs}


def main():
    kinds = [(*kind, []) for kind in KINDS * 2] + [("gpt2", {}, WORDS), ("bytelevel", {}, WORDS)]
    cases = [added_case(seed, *kind) for seed, kind in enumerate(kinds)]
    spaces, tabs = [["a", 1], [" ", 1_000_001], ["b", 1]], [["\t", 1_000_001], [" c", 1]]
    long_cases = [long_case("bytelevel", spaces)]
    for name in ("bytelevel", "gpt2", "digits", "sentencepiece"):
        long_cases.append(long_case(name, tabs))
    content = json.dumps({"added": cases, "long": long_cases}, ensure_ascii=False)
    (HERE / "cases.json").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

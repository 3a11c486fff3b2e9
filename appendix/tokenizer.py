"""`tokenizer.json` run by tiktoken."""

import re, unicodedata
from pathlib import Path
import regex, tiktoken
from appendix.errors import InputError, require
from appendix.files import read_json
from appendix.hub import TOKENIZER_FILES


GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# the same after every digit was set apart: digits never join, and spaces before one are a run that ends there
DIGITS_GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)


def byte_letters():
    """Byte-level BPE writes each byte as a printable letter: that letter -> the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Tokenizer:
    """`tokenizer.json` run by tiktoken: byte-level BPE (Qwen3, SmolLM2, Llama 3) or SentencePiece-style BPE (TinyLlama).

    tiktoken gets ranks of its own, and `self.ids` maps each rank back to the file's ids: none for a byte that the vocabulary
    lacks, several for a piece of a character that has to be spelt in bytes. `bos_id`, `eos_id`: int or None. `add_bos`: does the
    model expect bos in front of every text? Special tokens in a text are plain text.
    """

    def __init__(self, directory):
        directory = Path(directory)
        self.path = directory / "tokenizer.json"
        raw = read_json(self.path)
        options = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            options |= read_json(directory / name) if (directory / name).exists() else {}
        try:
            self._read(raw, options)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"{self.path}: malformed ({type(error).__name__}: {error}); fetch it again"
            ) from None
        self.files = {
            name: (directory / name).read_bytes()
            for name in TOKENIZER_FILES
            if (directory / name).exists()
        }

    def _read(self, raw, options):
        model = raw["model"]
        if model.get("type", "BPE") != "BPE":
            raise InputError(f"model type {model['type']!r} is not supported; BPE is")
        self.vocab = dict(model["vocab"])
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
        require(
            all(isinstance(text, str) for text in added),
            f"added_tokens {[*added][:3]}: expected strings",
        )
        self.special = {id: text for text, id in added.items()}
        self.inline = {
            t["content"]: t["id"] for t in raw.get("added_tokens") or [] if not t["special"]
        }  # found in text always
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.nfc, self.prefix = False, None
        pattern, ranks = (self._sentencepiece if self.byte_fallback else self._byte_level)(
            raw, merges
        )
        self.pieces = regex.compile(pattern)
        self.bpe = tiktoken.Encoding(
            "loopus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.lost = {bytes_[0] for bytes_, rank in ranks.items() if not self.ids[rank]}

        def token(name):
            content = options.get(name)
            content = content["content"] if isinstance(content, dict) else content
            return added.get(content, self.vocab.get(content)) if content else None

        self.bos_id, self.eos_id = token("bos_token"), token("eos_token")
        processors = raw.get("post_processor") or {}
        processors = processors.get("processors", [processors])
        first = next(
            (p["single"][0] for p in processors if p.get("type") == "TemplateProcessing"), {}
        )
        self.add_bos = self.bos_id is not None and options.get(
            "add_bos_token", "SpecialToken" in first
        )

    def _byte_level(self, raw, merges):
        """The split pattern and tiktoken's ranks: first the 256 bytes, then what the merges make, in their order."""
        normaliser = (raw.get("normalizer") or {"type": None})["type"]
        if normaliser not in (None, "NFC"):
            raise InputError(f"normalizer {normaliser!r} is not supported; NFC or none is")
        self.nfc = normaliser == "NFC"
        steps = raw["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
        if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
            raise InputError(
                f"pre_tokenizer {kinds} is not supported; ByteLevel without add_prefix_space is"
            )
        if (
            kinds == ["Split", "ByteLevel"]
            and not steps[-1].get("use_regex", True)
            and "Regex" in steps[0]["pattern"]
        ):
            pattern = steps[0]["pattern"]["Regex"]
            require(
                isinstance(pattern, str) and not regex.compile(pattern).match(""),
                f"split pattern {pattern!r} matches the empty string",
            )
        elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            pattern = GPT2_SPLIT
        elif (
            kinds == ["Digits", "ByteLevel"]
            and steps[0].get("individual_digits")
            and steps[1].get("use_regex", True)
        ):
            pattern = DIGITS_GPT2_SPLIT
        else:
            raise InputError(
                f"pre_tokenizer {kinds} is not supported; ByteLevel alone or after Split or Digits is"
            )
        letters = byte_letters()
        spell = lambda token: bytes(letters[c] for c in token)
        names = {b: c for c, b in letters.items()}
        ranks = {bytes([b]): b for b in range(256)}
        self.ids = [[self.vocab[names[b]]] if names[b] in self.vocab else [] for b in range(256)]
        for a, b in merges:
            if spell(a + b) not in ranks:
                ranks[spell(a + b)] = len(ranks)
                self.ids.append([self.vocab[a + b]])
        self.bytes_of = {
            id: spell(token) for token, id in self.vocab.items() if id not in self.special
        }
        return pattern, ranks

    def _sentencepiece(self, raw, merges):
        """Characters instead of bytes are the atoms, so tiktoken's ranks begin with a spelling of each character in bytes:
        the 256 bytes, the proper prefixes of every longer character, the characters, then what the merges make."""
        steps = raw.get("normalizer") or {"type": None}
        steps = steps.get("normalizers", [steps])
        pre = raw.get("pre_tokenizer")
        if [s["type"] for s in steps] == ["Prepend", "Replace"] and pre is None:
            self.prefix = lambda text: " " + text
        elif (
            steps == [{"type": None}]
            and pre
            and pre["type"] == "Metaspace"
            and not pre.get("split", True)
        ):
            self.prefix = lambda text: (
                text if text[0] in " ▁" or pre["prepend_scheme"] == "never" else " " + text
            )
        else:
            raise InputError(
                "normalizer and pre_tokenizer are not TinyLlama's (Prepend ▁, Replace; or Metaspace without split)"
            )
        if self.inline:
            raise InputError(
                f"added token {min(self.inline)!r} that is not special: not supported here"
            )
        byte_ids = {b: self.vocab[f"<0x{b:02X}>"] for b in range(256)}
        spell = lambda token: token.replace("▁", " ").encode()
        ids = {bytes([b]): [byte_ids[b]] for b in range(256)}
        letters = [token for token in self.vocab if len(token) == 1]
        long = [spell(token) for token in letters if len(spell(token)) > 1]
        for word in long:
            ids.update((word[:n], [byte_ids[b] for b in word[:n]]) for n in range(2, len(word)))
        ids.update((spell(token), [self.vocab[token]]) for token in letters)
        for a, b in merges:
            ids.setdefault(spell(a + b), [self.vocab[a + b]])
        self.ids = list(ids.values())
        self.bytes_of = {
            id: spell(token) for token, id in self.vocab.items() if id not in self.special
        } | {id: bytes([b]) for b, id in byte_ids.items()}
        self.byte_ids = set(byte_ids.values())
        return " *[^ ]+| +", {
            word: rank for rank, word in enumerate(ids)
        }  # no token has a space after its first letter

    def encode(self, text, bos=False):
        """Text -> ids; with `bos`, bos_id in front (if there is one)."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        parts = (
            re.split(
                "(" + "|".join(map(re.escape, sorted(self.inline, key=len, reverse=True))) + ")",
                text,
            )
            if self.inline
            else [text]
        )
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.inline[part])
            elif part:
                ids += self._encode(
                    part.encode("utf-8", "replace").decode()
                )  # a lone surrogate cannot be written in UTF-8
        return ids

    def _encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = self.prefix(text).replace("▁", " ") if self.prefix else text
        if self.lost and not self.lost.isdisjoint(
            text.encode()
        ):  # a byte without a token goes before its neighbours merge
            pieces = (
                bytes(b for b in piece.encode() if b not in self.lost)
                for piece in self.pieces.findall(text)
            )
            ranks = [
                rank for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)
            ]
        else:
            ranks = self.bpe.encode_ordinary(text)
        return [id for rank in ranks for id in self.ids[rank]]

    def decode(self, ids):
        """Ids -> text; special tokens as they are written, bytes that are no text as U+FFFD."""
        if not self.byte_fallback:
            return b"".join(
                self.special[i].encode() if i in self.special else self.bytes_of.get(i, b"")
                for i in ids
            ).decode("utf-8", "replace")
        text, run = [], b""
        for i in [*ids, None]:  # a run of byte tokens is text as a whole, or not at all
            if i in self.byte_ids:
                run += self.bytes_of[i]
                continue
            try:
                text.append(run.decode())
            except UnicodeDecodeError:
                text.append("\ufffd" * len(run))
            run = b""
            text.append(
                self.special[i] if i in self.special else self.bytes_of.get(i, b"").decode()
            )
        return "".join(text).removeprefix(" ")

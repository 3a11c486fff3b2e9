"""`tokenizer.json` (byte-pair encoding, BPE) run by tiktoken: text <-> ids.

The way of a text to its ids, and the words that this file uses for it:

    text ──► sections ──► pieces ──► ids

A *section* is what stands between two added tokens (`<think>`, `<|im_end|>`, …), which are found
first and are one id each. A section is normalised and cut into *pieces* (about words) by a regular
expression, the split pattern. Within a piece BPE starts from the smallest units, its atoms, and
joins two neighbours again and again: always those whose joint comes first in the file's `merges`.

Why tiktoken needs ranks of its own. tiktoken knows one kind of atom, the byte, and one number a
token, its rank: it is the order of merging and the result at once. `tokenizer.json` keeps the two
apart (`merges` is the order, `vocab` has the ids), and its atoms need not be bytes. So tiktoken is
given ranks that are made here, and a list turns every rank into ids of the file afterwards. There
are two kinds of file:

  `ByteLevel`      (Qwen3, SmolLM2, Llama 3) Atoms are bytes, each written as a printable letter.
                   Ranks: the 256 bytes, then what the merges make, in their order.
  `SentencePiece`  (TinyLlama) Atoms are characters; one that the vocabulary lacks is spelt in
                   tokens for its UTF-8 bytes, <0xE2> say. For tiktoken, characters have to be
                   merged from bytes before anything else is. Ranks: the 256 bytes, then the
                   beginnings of each character of several bytes, then these characters, then what
                   the merges make. The rank of a beginning stands for several ids.

Reading order: what is read from the file, the two kinds, the added tokens, the `Tokenizer`.
"""

import itertools
import re
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import regex
import tiktoken

from appendix.errors import InputError, require
from appendix.files import read_json
from appendix.hub import TOKENIZER_FILES

# The split patterns that are known here. Llama 3's takes up to three digits together.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 sets every digit apart before it: spaces before a digit are then a run that ends there.
DIGITS_GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTE_LEVEL_SPLITS = (GPT2_SPLIT, DIGITS_GPT2_SPLIT, QWEN_SPLIT, LLAMA3_SPLIT)
# TinyLlama has no split pattern. None of its tokens has a space after its first other character, so
# that a text may be cut there without a change; `SentencePiece` holds every file to that.
SENTENCEPIECE_SPLIT = " *[^ ]+| +"

# Where a long text may be cut, so that the parts give the ids of the whole (see `encode_parts`).
# In every byte-level pattern above, a piece has a space only as its first character or among white
# space, and what it is depends on what follows only if it ends in white space. So one ends between
# anything but white space and a space; and between a letter or digit and a line break, which is
# asked of letters that no version of Unicode has changed.
BYTE_LEVEL_CUT = r"(?<=\S)(?= )|(?<=[0-9A-Za-z\u4e00-\u9fff])(?=\n)"
SENTENCEPIECE_CUT = r"(?<=[^\s▁])(?= )"

PATIENCE = 10  # seconds for a split pattern on 100,000 characters; those above take 0.02

# What a section follows: the start of the text, an added token, or text of the part before it.
START, TOKEN, TEXT = "start", "token", "text"


class SplitError(InputError):
    """A text on which the split pattern takes for ever; the message says nothing of the text."""


@contextmanager
def file_errors(path):
    """Whatever goes wrong in this block is the file's fault: an InputError with its name.

    It may show what is in the file, so its length is bounded.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error!s:.300}") from None
    except Exception as error:  # a wrong type anywhere in the file, a regex that does not compile
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: malformed ({reason:.200}); fetch it again") from None


# ---- what is read from the file ------------------------------------------------------------------


def check_id(token, id):
    """InputError unless the id is a whole number that an embedding can have."""
    if type(id) is not int or not 0 <= id < 2**31:
        raise InputError(
            f"token {token!r:.80} has the id {id!r:.80}: expected a whole number of at least 0"
        )


def read_vocab(model):
    """{token: id}, as the file writes tokens."""
    vocab = model["vocab"]
    require(len(vocab) > 0, "the vocabulary is empty")
    owners = {}
    for token, id in vocab.items():
        check_id(token, id)
        owner = owners.setdefault(id, token)
        if owner != token:
            raise InputError(f"tokens {owner!r:.80} and {token!r:.80} have the same id {id}")
    return vocab


def read_merges(model, vocab):
    """The tokens that merges make, in order. A pair is two strings, or one with a space."""
    merges = []
    for pair in model["merges"]:
        if isinstance(pair, str):
            pair = pair.split(" ")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"merge {pair!r:.80}: not in the vocabulary, or a part of it is not")
        merges.append(left + right)
    return merges


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands, with the file's options for finding it."""

    content: str
    id: int
    special: bool  # for the model's own use: plain text, unless special tokens are asked for
    lstrip: bool  # takes the white space before it
    rstrip: bool  # takes the white space behind it
    single_word: bool  # only where no letter, digit or _ is next to it
    normalized: bool  # looked for in normalised text, in its own normalised form


def read_added_tokens(raw, vocab):
    """The file's added tokens."""
    tokens = []
    owners = {id: token for token, id in vocab.items()}
    for entry in raw.get("added_tokens") or []:
        content, id = entry["content"], entry["id"]
        flags = {"special": entry["special"]}
        for name in ("lstrip", "rstrip", "single_word", "normalized"):
            flags[name] = entry.get(name, False)
        require(
            isinstance(content, str) and content != "",
            f"added token {entry!r:.80}: expected a text as its content",
        )
        require(
            all(type(flag) is bool for flag in flags.values()),
            f"added token {content!r:.80}: expected true or false for {', '.join(flags)}",
        )
        content.encode()  # a half of a surrogate pair is no text
        check_id(content, id)
        owner = owners.setdefault(id, content)
        require(
            owner == content and vocab.get(content, id) == id,
            f"added token {content!r:.80} has the id {id}; {owner!r:.80} has it too, or the "
            "vocabulary gives it another",
        )
        tokens.append(AddedToken(content, id, **flags))
    require(
        len({token.content for token in tokens}) == len(tokens),
        "an added token is there twice",
    )
    return tokens


# ---- byte-level BPE ------------------------------------------------------------------------------


def byte_letters():
    """{letter: byte}. A printable byte is written as itself, another as a letter from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    letters |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return letters


class ByteLevel:
    """Atoms are the bytes of UTF-8. See the head of this file.

    pattern: the split pattern. keeps_gaps: is what it does not match a piece too? cut: where a text
    may be cut, or None. ids: {bytes: ids} in the order of tiktoken's ranks. whole: {bytes: ids} of
    words that are a token only if they are a whole piece. bytes_of: {id: bytes}.
    """

    def __init__(self, raw, vocab, merges, added):
        normalizer = (raw.get("normalizer") or {"type": None})["type"]
        require(
            normalizer in (None, "NFC"),
            f"normalizer {normalizer!r} is not supported; NFC or none is",
        )
        self.nfc = normalizer == "NFC"
        self.pattern, self.keeps_gaps = split_pattern(raw["pre_tokenizer"])
        self.cut = BYTE_LEVEL_CUT if self.pattern in BYTE_LEVEL_SPLITS else None
        letters = byte_letters()
        self.ids = {bytes([byte]): [] for byte in range(256)}  # none: the vocabulary lacks the byte
        for letter, byte in letters.items():
            if letter in vocab:
                self.ids[bytes([byte])] = [vocab[letter]]
        own = vocab.keys() - {token.content for token in added}
        words = spell_bytes(own.union(merges))
        for token in merges:
            self.ids.setdefault(words[token], [vocab[token]])
        self.whole = {}
        if raw["model"].get("ignore_merges"):
            never_merged = [token for token in own if words[token] not in self.ids]
            self.whole = {words[token]: [vocab[token]] for token in never_merged}
        self.bytes_of = {vocab[token]: words[token] for token in own}

    def normalize(self, text, before):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def finish(self, section, before):
        return section

    def decode(self, ids, added):
        """Ids -> text; added: {id: text}. Bytes that are no text become U+FFFD."""
        parts = []
        for id in ids:
            parts.append(added[id].encode() if id in added else self.bytes_of.get(id, b""))
        return b"".join(parts).decode("utf-8", "replace")


def spell_bytes(tokens):
    """Byte-level tokens as the file writes them -> {token: bytes}."""
    # Latin-1 writes the characters up to U+00FF as the bytes of the same number, so each letter is
    # first turned into the character of its byte; no other character may come through as one.
    letters = byte_letters()
    table = {code: "\uffff" for code in range(256)}
    table |= {ord(letter): chr(byte) for letter, byte in letters.items()}
    return {token: token.translate(table).encode("latin-1") for token in tokens}


def split_pattern(pre_tokenizer):
    """The split pattern that `pre_tokenizer` stands for, and whether what it leaves out is kept."""
    steps = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    require(
        last["type"] == "ByteLevel" and not last.get("add_prefix_space"),
        f"pre_tokenizer {kinds} is not supported; ByteLevel without add_prefix_space is",
    )
    gpt2_last = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and gpt2_last:
        return GPT2_SPLIT, True
    if kinds == ["Digits", "ByteLevel"] and gpt2_last and steps[0].get("individual_digits"):
        return DIGITS_GPT2_SPLIT, True
    if kinds == ["Split", "ByteLevel"] and not gpt2_last and "Regex" in steps[0]["pattern"]:
        return steps[0]["pattern"]["Regex"], keeps_gaps(steps[0])
    raise InputError(
        f"pre_tokenizer {kinds} is not supported; ByteLevel alone or after Split or Digits is"
    )


def keeps_gaps(split):
    """Is a text that the pattern of a Split does not match a piece as well, or dropped?"""
    behavior, invert = split["behavior"], split.get("invert", False)
    if behavior == "Isolated" and not invert:
        return True
    if behavior == "Removed" and invert:
        return False
    raise InputError(
        f"Split with behavior {behavior!r} and invert {invert!r} is not supported; "
        "Isolated, or Removed and inverted, is"
    )


# ---- SentencePiece-style BPE ---------------------------------------------------------------------


class SentencePiece:
    """Atoms are characters; "▁" stands for a space. See the head of this file.

    Say the tokens are <0x00> … <0xFF>, a, 中 and a中, which a merge makes; 中 is E4 B8 AD in UTF-8:

        rank       bytes          ids
        0 … 255    each byte      that of <0x00> …, but for the byte 61 that of a
        256        E4 B8          those of <0xE4> and <0xB8>: what is left if AD does not follow
        257        E4 B8 AD       that of 中
        258        61 E4 B8 AD    that of a中

    A space is put before a section, by the normaliser (`Prepend`, every section) or after it
    (`Metaspace`, where its prepend_scheme says so and none is there). The attributes are those of
    `ByteLevel`.
    """

    pattern, keeps_gaps, cut = SENTENCEPIECE_SPLIT, True, SENTENCEPIECE_CUT
    whole = {}

    def __init__(self, raw, vocab, merges, added):
        self.prepends, self.metaspace_after = space_rules(raw)
        self.byte_ids = {}
        for byte in range(256):
            name = f"<0x{byte:02X}>"
            require(name in vocab, f"byte_fallback is set, but there is no token {name}")
            self.byte_ids[byte] = vocab[name]
        self.byte_tokens = set(self.byte_ids.values())
        for token in merges:
            if "▁" in token.lstrip("▁"):
                raise InputError(f"token {token!r:.80}: a space inside one is not supported")
        self.ids = self._ranked_ids(vocab, merges)
        own = vocab.keys() - {token.content for token in added}
        self.bytes_of = {vocab[token]: spell(token) for token in own}
        self.bytes_of |= {id: bytes([byte]) for byte, id in self.byte_ids.items()}

    def _ranked_ids(self, vocab, merges):
        """{bytes: ids} in the order of tiktoken's ranks."""
        ids = {bytes([byte]): [id] for byte, id in self.byte_ids.items()}
        characters = [token for token in vocab if len(token) == 1]
        # The beginnings of a character's bytes. One byte is there already.
        for word in map(spell, characters):
            for n in range(2, len(word)):
                ids[word[:n]] = [self.byte_ids[byte] for byte in word[:n]]
        # An ASCII character takes the place of its byte.
        for token in characters:
            ids[spell(token)] = [vocab[token]]
        for token in merges:
            ids.setdefault(spell(token), [vocab[token]])
        return ids

    def normalize(self, text, before):
        if not self.prepends:
            return text
        prefix = "" if before == TEXT else "▁"
        return prefix + text.replace(" ", "▁")

    def finish(self, section, before):
        """A normalised section as tiktoken gets it: with spaces."""
        if before in self.metaspace_after and section[0] not in " ▁":
            section = " " + section
        return section.replace("▁", " ")

    def decode(self, ids, added):
        """Ids -> text; added: {id: text}.

        A run of byte tokens is text as a whole, or each of them is U+FFFD.
        """
        text, run = "", b""
        for id in ids:
            if id in self.byte_tokens:
                run += self.bytes_of[id]
                continue
            text += decode_run(run)
            run = b""
            if id in added:
                text += added[id].replace("▁", " ")
            else:
                text += self.bytes_of.get(id, b"").decode()
        return (text + decode_run(run)).removeprefix(" ")


def spell(token):
    """The bytes that tiktoken gets for a SentencePiece token."""
    return token.replace("▁", " ").encode()


def decode_run(run):
    """Bytes in a row, as text."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def space_rules(raw):
    """Where a space is put before a section.

    -> (does the normaliser put one before each?, what a section must follow to get Metaspace's).
    """
    normalizer = raw.get("normalizer") or {"type": None}
    steps = normalizer.get("normalizers", [normalizer])
    kinds = [step["type"] for step in steps]
    metaspace = raw.get("pre_tokenizer")
    if kinds == ["Prepend", "Replace"] and metaspace is None:
        prepend, replace = steps
        replaced = (replace["pattern"], replace["content"])
        if prepend["prepend"] == "▁" and replaced == ({"String": " "}, "▁"):
            return True, ()
    if kinds == [None] and metaspace and metaspace["type"] == "Metaspace":
        schemes = {"always": (START, TOKEN), "first": (START,), "never": ()}
        scheme = metaspace.get("prepend_scheme", "always")
        whole = metaspace["replacement"] == "▁" and not metaspace.get("split", True)
        if whole and scheme in schemes:
            return False, schemes[scheme]
    raise InputError(
        "normalizer and pre_tokenizer are not TinyLlama's "
        "(Prepend ▁, Replace; or Metaspace without split)"
    )


# ---- added tokens in a text ----------------------------------------------------------------------

WORD = regex.compile(r"\w")


def is_word(character):
    return WORD.match(character) is not None


def is_space(character):
    """White space of Unicode; Python counts four control characters more."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"


class AddedTokens:
    """Added tokens that are looked for together: at each place the longest, from left to right."""

    def __init__(self, tokens):
        """tokens: {the text that is looked for: AddedToken}."""
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.plain = any(not token.special for token in tokens.values())

    def split(self, text, special):
        """Cut a text at its added tokens -> (text between, None) or (text, AddedToken) in turn.

        special: are special tokens meant? They are plain text otherwise. As in Hugging Face's
        tokenizers, white space that a token takes is still searched for the next one.
        """
        if not self.tokens or not (special or self.plain):
            yield text, None
            return
        end = 0  # of the token before
        for match in self.pattern.finditer(text):
            token = self.tokens[match.group()]
            start, stop = match.span()
            if token.special and not special:
                continue
            if token.single_word:
                neighbours = text[max(0, start - 1) : start] + text[stop : stop + 1]
                if any(map(is_word, neighbours)):
                    continue
            if token.lstrip:
                while start > end and is_space(text[start - 1]):
                    start -= 1
                start = max(start, end)
            while token.rstrip and stop < len(text) and is_space(text[stop]):
                stop += 1
            if start >= stop:  # the token before took all of it
                continue
            if end < start:
                yield text[end:start], None
            yield text[start:stop], token
            end = stop
        if end < len(text):
            yield text[end:], None


# ---- what the files beside it say ----------------------------------------------------------------

OPTION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)


def read_options(directory):
    """{name: content} of the files that say how texts begin and end; {} for one that is missing."""
    options = {}
    for name in OPTION_FILES:
        path = directory / name
        options[name] = read_json(path) if path.exists() else {}
    return options


def read_ends(directory, options, token_ids):
    """(ids of bos tokens, ids of end tokens), the tokenizer's own first, each once."""
    bos, eos = [], []
    for name, content in options.items():
        # A LoopUS checkpoint's config.json has the backbone's inside.
        for fields in (content, content.get("base_config_dict") or {}):
            with file_errors(directory / name):
                bos += named_ids(fields, "bos_token", token_ids)
                eos += named_ids(fields, "eos_token", token_ids)
    return list(dict.fromkeys(bos)), list(dict.fromkeys(eos))


def named_ids(fields, name, token_ids):
    """The ids that a file gives as `name`, a token's text, and as `name`_id, an id or several."""
    token = fields.get(name)
    if isinstance(token, dict):
        token = token["content"]
    require(
        token is None or isinstance(token, str),
        f"{name} is {token!r:.80}: expected a token's text",
    )
    ids = fields.get(f"{name}_id")
    if ids is None:
        ids = []
    if not isinstance(ids, list):
        ids = [ids]
    for id in ids:
        check_id(f"{name}_id", id)
    known = [token_ids[token]] if token in token_ids else []
    return known + ids


def expects_bos(raw, tokenizer_config):
    """Does the model expect bos in front of every text?

    tokenizer_config.json says so, or else the template in tokenizer.json (raw).
    """
    if "add_bos_token" in tokenizer_config:
        return bool(tokenizer_config["add_bos_token"])
    processor = raw.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in step["single"][0]
    return False


# ---- the tokenizer -------------------------------------------------------------------------------


class Tokenizer:
    """A directory's `tokenizer.json`, and what the files beside it say about bos and end tokens.

    vocab       {token: id}, without the added tokens
    bos_id      what a text begins with, an int or None
    eos_id      what it ends with, an int or None: the tokenizer's own, else config.json's, else
                generation_config.json's
    eos_ids     the end tokens of all of these files, a tuple
    add_bos     does the model expect bos in front of every text?
    max_id      the highest id that may come out, and max_token, the token that has it
    byte_fallback  is it a SentencePiece-style file?
    files       {name: bytes}, what a checkpoint keeps of the directory
    Raises InputError, one line, for whatever is wrong with a file.
    """

    def __init__(self, directory):
        directory = Path(directory)
        self.path = directory / "tokenizer.json"
        raw = read_json(self.path)
        with file_errors(self.path):
            self._read(raw)
        self._read_ends(directory, raw)
        self.files = {}
        for name in TOKENIZER_FILES:
            if (directory / name).exists():
                with file_errors(directory / name):
                    self.files[name] = (directory / name).read_bytes()

    def _read(self, raw):
        model = raw["model"]
        family = model.get("type", "BPE")
        require(family == "BPE", f"model type {family!r} is not supported; BPE is")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            require(
                not model.get(option),
                f"{option} {model.get(option)!r:.80} is not supported; expected none",
            )
        self.vocab = read_vocab(model)
        merges = read_merges(model, self.vocab)
        self.added = read_added_tokens(raw, self.vocab)
        self.byte_fallback = bool(model.get("byte_fallback"))
        kind = SentencePiece if self.byte_fallback else ByteLevel
        self.bpe = kind(raw, self.vocab, merges, self.added)
        self._prepare_ranks()
        self._prepare_added_tokens()
        require(
            not self.lost_bytes or model.get("unk_token") is None,
            "unk_token is set, and some bytes have no token: not supported",
        )

    def _read_ends(self, directory, raw):
        """bos and end tokens, and the highest id."""
        options = read_options(directory)
        token_ids = self.vocab | {token.content: token.id for token in self.added}
        bos_ids, eos_ids = read_ends(directory, options, token_ids)
        self.bos_id = bos_ids[0] if bos_ids else None
        self.eos_id = eos_ids[0] if eos_ids else None
        self.eos_ids = tuple(eos_ids)
        with file_errors(self.path):
            self.add_bos = bool(bos_ids) and expects_bos(raw, options["tokenizer_config.json"])
        owners = {id: token for token, id in token_ids.items()}
        self.max_id = max([*owners, *bos_ids[:1], *eos_ids])
        self.max_token = owners.get(self.max_id, "bos_token_id or eos_token_id")

    def _prepare_ranks(self):
        """Ranks for tiktoken, and the way back from them."""
        self.ids_of_rank = [*self.bpe.ids.values(), *self.bpe.whole.values()]
        self.whole_ranks = dict(zip(self.bpe.whole, itertools.count(len(self.bpe.ids))))
        ranks = {word: rank for rank, word in enumerate(self.bpe.ids)}
        self.lost_bytes = {word[0] for word, ids in self.bpe.ids.items() if not ids}
        # Only patterns that are known here are given to tiktoken's regex (see `_ranks`). tiktoken
        # is slow without any special token, so it has one, which `_ranks` never lets it use.
        self.piece_pattern = regex.compile(self.bpe.pattern)
        self.tiktoken_splits = self.bpe.cut is not None and not self.bpe.whole
        self.tiktoken = tiktoken.Encoding(
            "loopus",
            pat_str=self.bpe.pattern if self.tiktoken_splits else ".",
            mergeable_ranks=ranks,
            special_tokens={"<|unused|>": len(ranks)},
        )

    def _prepare_added_tokens(self):
        """Some are looked for in the text as it is, the others once it is normalised."""
        early, late = {}, {}
        self.added_texts = {}
        for token in self.added:
            looked_for = token.content
            if token.normalized:
                looked_for = self.bpe.normalize(token.content, START)
            (late if token.normalized else early)[looked_for] = token
            self.added_texts[token.id] = looked_for
        require(
            len(early) + len(late) == len(self.added),
            "two added tokens are the same text once they are normalised",
        )
        self.early, self.late = AddedTokens(early), AddedTokens(late)
        specials = [re.escape(token.content) for token in self.added if token.special]
        self.specials = re.compile("|".join(specials)) if specials else None
        # A text can be cut only where no added token notices it: none may have such a place inside,
        # or look at what follows it.
        self.cut = self.bpe.cut and re.compile(self.bpe.cut)
        for looked_for, token in (early | late).items():
            if token.rstrip or token.single_word or (self.cut and self.cut.search(looked_for)):
                self.cut = None

    # -- text -> ids

    def encode(self, text, bos=False, special=False):
        """Text -> list of ids.

        bos: bos_id in front (if there is one). special: texts of special tokens (`<|im_end|>`, …)
        are these tokens; they are plain text otherwise. What UTF-8 cannot write, a half of a
        surrogate pair, becomes "?". Raises SplitError where the split pattern takes for ever.
        """
        ids = []
        for part in self.encode_parts([text], bos, special):
            ids += part
        return ids

    def encode_parts(self, texts, bos=False, special=False):
        """A long text, which comes in parts cut anywhere -> lists of ids, in turn.

        Together they are `encode` of the whole. Only so much of the text is held as lies behind
        the last place where it may be cut.
        """
        if bos and self.bos_id is not None:
            yield [self.bos_id]
        before, rest = START, ""
        for text in texts:
            end = self._last_cut(rest)
            if end:
                ids, before = self._encode(rest[:end], before, special)
                yield ids
            rest = rest[end:] + text
        if rest:
            ids, _ = self._encode(rest, before, special)
            yield ids

    def _last_cut(self, text):
        """The last place in a text where it may be cut, or 0."""
        if self.cut is None:
            return 0
        for start in (max(0, len(text) - 1000), 0):  # mostly there is one near the end
            places = [place.start() for place in self.cut.finditer(text, start)]
            if places:
                return places[-1]
        return 0

    def _encode(self, text, before, special):
        """Ids of a part; `before` says what it follows -> (ids, what the next part follows)."""
        text = text.encode("utf-8", "replace").decode()
        ids = []
        for section, token in self._sections(text, before, special):
            if token:
                ids.append(token.id)
                before = TOKEN
            else:
                section = self.bpe.finish(section, before)
                for rank in self._ranks(section):
                    ids += self.ids_of_rank[rank]
                before = TEXT
        return ids, before

    def _sections(self, text, before, special):
        """Cut a part at its added tokens -> (normalised section, None) or (text, AddedToken)."""
        for section, token in self.early.split(text, special):
            if token:
                yield section, token
                before = TOKEN
            else:
                section = self.bpe.normalize(section, before)
                yield from self.late.split(section, special)

    def _ranks(self, section):
        """tiktoken's ranks of a section.

        tiktoken cuts it into pieces and merges them; or `regex` cuts it, which is slower: where
        the vocabulary lacks a byte that is in it (it is dropped before its neighbours merge),
        where the pattern is not one of those known here, where some words are tokens only as a
        whole piece, and where tiktoken's regex gives up, as it does on half a million spaces.
        """
        lost = self.lost_bytes and not self.lost_bytes.isdisjoint(section.encode())
        if self.tiktoken_splits and not lost:
            try:
                return self.tiktoken.encode(section, disallowed_special=())
            except ValueError:
                pass
        ranks = []
        for piece in self._pieces(section):
            word = piece.encode().translate(None, delete=bytes(self.lost_bytes))
            if word in self.whole_ranks:
                ranks.append(self.whole_ranks[word])
            elif word:
                ranks += self.tiktoken._encode_single_piece(word)
        return ranks

    def _pieces(self, section):
        """The pieces of a section, by `regex`."""
        seconds = PATIENCE * (1 + len(section) / 100_000)
        pieces, end = [], 0
        try:
            for match in self.piece_pattern.finditer(section, timeout=seconds):
                if self.bpe.keeps_gaps and end < match.start():
                    pieces.append(section[end : match.start()])
                pieces.append(match.group())
                end = match.end()
        except TimeoutError:
            raise SplitError(
                f"{self.path}: its split pattern takes more than {seconds:.0f} s on a text of "
                f"{len(section)} characters; cut the text, or use another tokenizer"
            ) from None
        if self.bpe.keeps_gaps:
            pieces.append(section[end:])
        return pieces

    def find_special(self, text):
        """The first special token whose text is in a text, or None."""
        found = self.specials and self.specials.search(text)
        return found.group() if found else None

    # -- ids -> text

    def decode(self, ids):
        """Ids -> text; added tokens as they are written, bytes that are no text as U+FFFD."""
        return self.bpe.decode(ids, self.added_texts)

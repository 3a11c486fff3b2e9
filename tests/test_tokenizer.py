"""Tokenizers: the reference's ids and texts, and malformed files."""

import json
import random
import re
import shutil
import unicodedata

import pytest
import regex
from conftest import GOLDEN, SHARED

from appendix.tokenizer import (
    BYTE_LEVEL_CUT,
    BYTE_LEVEL_SPLITS,
    SENTENCEPIECE_CUT,
    SENTENCEPIECE_SPLIT,
)
from load_weights import Tokenizer, load, save
from loopus import InputError

TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


@pytest.mark.parametrize("name", TOKENS)
def test_tokenizer_equals_the_reference(name):
    tokenizer = Tokenizer(GOLDEN / name)
    for text, ids, decoded in TOKENS[name]:
        if text is not None:
            assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == decoded, ids


def test_tokenizer_facts():
    sp, byte = Tokenizer(GOLDEN / "sentencepiece"), Tokenizer(GOLDEN / "bytelevel")
    assert (sp.bos_id, sp.eos_id, sp.add_bos) == (1, 2, True) and byte.add_bos is False
    assert byte.encode("hi", bos=True)[0] == byte.bos_id and sp.encode("", bos=True) == [1]
    assert (
        byte.encode("<|end|>") != [byte.eos_id] and byte.decode([byte.eos_id]) == "<|end|>"
    )  # plain text unless asked for
    assert isinstance(byte.encode("a lone \ud800 surrogate"), list)


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="needs the real vocabularies")
@pytest.mark.parametrize(
    "folder, facts",
    [
        ("tokenizers/llama_tinyllama", (1, 2, True)),
        ("tokenizers/qwen3", (None, 151645, False)),
        ("models/smollm2-135m-instruct", (1, 2, False)),
    ],
)
def test_real_vocabularies(folder, facts):
    tokenizer = Tokenizer(SHARED / folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == facts
    text = (SHARED / "data" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")[:200000]
    text += "🙂 中文 a  b\t\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    reference = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(SHARED / folder / "tokenizer.json")
    )
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


BPE = '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {"type": "Unigram", "vocab": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, '
        '"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}}',
        f'{{{BPE}, "pre_tokenizer": {{"type": "Whitespace"}}}}',
        f'{{{BPE}, "normalizer": {{"type": "NFKC"}}, "pre_tokenizer": {{"type": "ByteLevel"}}}}',
    ],
)
def test_malformed_tokenizer_is_one_clear_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_tokenizer_files_travel_with_a_checkpoint(tmp_path, backbone):
    shutil.copytree(backbone, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", split=(1, 1))
    shutil.rmtree(tmp_path / "base")
    save(model, tokenizer, tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").encode("loop") == tokenizer.encode("loop")


# ---- added tokens, rarer files and long texts, against the reference -----------------------------

CASES = json.loads((GOLDEN / "added" / "cases.json").read_text(encoding="utf-8"))


def golden_json(name):
    return json.loads((GOLDEN / name / "tokenizer.json").read_text(encoding="utf-8"))


def write_tokenizer(directory, raw, **beside):
    """A directory with a tokenizer.json, and other files by their names without .json."""
    directory.mkdir(exist_ok=True)
    for name, content in {"tokenizer": raw, **beside}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def case_tokenizer(directory, case):
    raw = golden_json(case["base"]) | case["changes"]
    last_id = max(Tokenizer(GOLDEN / case["base"]).max_id, 0)
    words = {word: last_id + 1 + i for i, word in enumerate(case["words"])}
    raw["model"] |= {"vocab": raw["model"]["vocab"] | words, "ignore_merges": bool(words)}
    raw["added_tokens"] += case["added"]
    return Tokenizer(write_tokenizer(directory, raw))


@pytest.mark.parametrize("case", CASES["added"])
def test_added_tokens_and_rarer_files_equal_the_reference(tmp_path, case):
    """The five options; split patterns, Metaspace and ignore_merges."""
    tokenizer = case_tokenizer(tmp_path, case)
    for text, plain, special in case["texts"]:
        assert tokenizer.encode(text) == plain, text
        assert tokenizer.encode(text, special=True) == special, text


@pytest.mark.parametrize("case", CASES["long"])
def test_a_text_on_which_tiktokens_regex_gives_up_is_encoded(case):
    """A million spaces are one piece, so they cannot be cut; no other program's ids differ."""
    tokenizer = Tokenizer(GOLDEN / case["base"])
    text = "".join(part * times for part, times in case["text"])
    expected = [id for id, times in case["ids"] for _ in range(times)]
    assert tokenizer.encode(text) == expected
    assert sum(tokenizer.encode_parts([text[:400_000], text[400_000:]]), []) == expected


def test_a_split_pattern_that_takes_for_ever_is_one_line(tmp_path, monkeypatch):
    raw = golden_json("gpt2")
    split = {"type": "Split", "pattern": {"Regex": r"(?:a|aa)+c|b"}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    tokenizer = Tokenizer(write_tokenizer(tmp_path, raw))
    assert tokenizer.decode(tokenizer.encode("aac, abd")) == "aac, abd"
    monkeypatch.setattr("appendix.tokenizer.PATIENCE", 0.1)
    with pytest.raises(InputError, match="its split pattern takes more than") as error:
        tokenizer.encode("a" * 60)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# Where pieces end, white space of all kinds, what composes with what stands before it, and letters
# whose normal form ends in something else.
ALPHABET = [*" \n\t\ra1.'s!/é🙂中\u0301\u00a0▁\u093c\u0958\u2000\u3000\x1c\x85\u2028Ω\u2126\u212a"]
ALPHABET += ["ab", "abc", "<a>", "</s>", "<think>", "  ", "\n\n", "\r\n", "'ll", "42", "。", "好\n"]


def cut_anywhere(rng, text, longest):
    parts = []
    while text:
        end = rng.randrange(1, longest)
        parts.append(text[:end])
        text = text[end:]
    return parts


def random_texts(rng, count):
    """Texts over the alphabet in which now these, now those parts are frequent."""
    for _ in range(count):
        weights = [rng.random() ** 3 for _ in ALPHABET]
        yield "".join(rng.choices(ALPHABET, weights, k=rng.randrange(1, 60)))


@pytest.mark.parametrize("pattern", [*BYTE_LEVEL_SPLITS, SENTENCEPIECE_SPLIT])
def test_no_piece_goes_over_a_place_where_a_text_may_be_cut(pattern):
    """Nor does a piece on one side depend on the other, whatever tokens the vocabulary has."""
    cut = SENTENCEPIECE_CUT if pattern == SENTENCEPIECE_SPLIT else BYTE_LEVEL_CUT
    places = 0
    for text in random_texts(random.Random(1), 3000):
        whole = regex.findall(pattern, unicodedata.normalize("NFC", text))
        for place in re.finditer(cut, text):
            left = unicodedata.normalize("NFC", text[: place.start()])
            right = unicodedata.normalize("NFC", text[place.start() :])
            assert regex.findall(pattern, left) + regex.findall(pattern, right) == whole, text
            places += 1
    assert places > 2000


def tokenizers_that_cut(directory):
    """Those of the golden files, and of the cases with only such added tokens as allow cutting."""
    for name in TOKENS:
        yield Tokenizer(GOLDEN / name)
    for i, case in enumerate(CASES["added"]):
        harmless = []
        for token in case["added"]:
            looks_ahead = token["rstrip"] or token["single_word"]
            if not looks_ahead and token["content"] != "x y":
                harmless.append(token)
        tokenizer = case_tokenizer(directory / str(i), case | {"added": harmless})
        if tokenizer.cut:
            yield tokenizer


def test_a_text_in_parts_gives_the_ids_of_the_whole(tmp_path):
    rng = random.Random(0)
    tokenizers = list(tokenizers_that_cut(tmp_path))
    assert len(tokenizers) > 15
    cuts = 0
    for i, text in enumerate(random_texts(rng, 6000)):
        tokenizer, special = tokenizers[i % len(tokenizers)], rng.random() < 0.5
        parts = cut_anywhere(rng, text, 12)
        ids = list(tokenizer.encode_parts(parts, special=special))
        cuts += len(ids) - 1
        assert sum(ids, []) == tokenizer.encode(text, special=special), (text, parts)
    assert cuts > 5000  # it was cut, and not put together again


@pytest.mark.parametrize("options", [{"content": "x y"}, {"rstrip": True}, {"single_word": True}])
def test_no_text_is_cut_where_an_added_token_would_notice(tmp_path, options):
    raw = golden_json("gpt2")
    token = {"content": "xy", "id": 900, "special": False, "rstrip": False, "single_word": False}
    raw["added_tokens"].append(token | options)
    tokenizer = Tokenizer(write_tokenizer(tmp_path, raw))
    text = "xy  word x y xy xyx xy"
    for end in range(len(text)):
        ids = sum(tokenizer.encode_parts([text[:end], text[end:]]), [])
        assert ids == tokenizer.encode(text)


# ---- special tokens in a text --------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENS)
def test_special_tokens_are_read_where_they_are_asked_for(name):
    tokenizer = Tokenizer(GOLDEN / name)
    end = "</s>" if name == "sentencepiece" else "<|end|>"
    assert tokenizer.eos_id not in tokenizer.encode(f"one{end}two")
    ids = tokenizer.encode(f"one{end}two", special=True)
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[: ids.index(tokenizer.eos_id)] == tokenizer.encode("one")
    assert tokenizer.find_special(f"<one> {end}{end} <s>") == end
    assert tokenizer.find_special("one <think> two") is None


# ---- bos and end tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, bos, eos",
    [
        ({}, None, ()),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "<|end|>"}}, 420, (421,)),
        ({"tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, None, (421,)),
        ({"special_tokens_map": {"eos_token": "<|end|>", "bos_token": None}}, None, (421,)),
        ({"config": {"bos_token_id": 3, "eos_token_id": 2}}, 3, (2,)),
        ({"config": {"bos_token_id": None, "eos_token_id": [2, 5]}}, None, (2, 5)),
        ({"generation_config": {"eos_token_id": [7, 421]}}, None, (7, 421)),
        (
            {
                "generation_config": {"eos_token_id": [2, 421, 9], "bos_token_id": 8},
                "config": {"eos_token_id": 5, "bos_token_id": 4},
                "tokenizer_config": {"eos_token": "<|end|>", "bos_token": "nowhere"},
                "special_tokens_map": {"eos_token": "<s>"},
            },
            4,
            (421, 420, 5, 2, 9),
        ),
        (
            {"config": {"model_type": "lds", "base_config_dict": {"eos_token_id": [1, 2]}}},
            None,
            (1, 2),
        ),
    ],
)
def test_end_tokens_of_every_file(tmp_path, files, bos, eos):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, golden_json("gpt2"), **files))
    assert tokenizer.eos_ids == eos and tokenizer.bos_id == bos
    assert tokenizer.eos_id == (eos[0] if eos else None)
    assert tokenizer.add_bos is False


@pytest.mark.parametrize("adds, expected", [(None, True), (True, True), (False, False)])
def test_bos_is_added_as_the_config_or_the_template_says(tmp_path, adds, expected):
    beside = {"config": {"bos_token_id": 1}}
    if adds is not None:
        beside["tokenizer_config"] = {"add_bos_token": adds}
    tokenizer = Tokenizer(write_tokenizer(tmp_path, golden_json("sentencepiece"), **beside))
    assert tokenizer.add_bos is expected


def test_the_highest_id_is_known_with_its_token(tmp_path):
    raw = golden_json("gpt2")
    tokenizer = Tokenizer(write_tokenizer(tmp_path, raw))
    assert (tokenizer.max_id, tokenizer.max_token) == (422, "<think>")
    raw["added_tokens"].append({"content": "<far>", "id": 512, "special": True})
    tokenizer = Tokenizer(write_tokenizer(tmp_path, raw))
    assert (tokenizer.max_id, tokenizer.max_token) == (512, "<far>")
    tokenizer = Tokenizer(write_tokenizer(tmp_path, raw, config={"eos_token_id": 600}))
    assert (tokenizer.max_id, tokenizer.max_token) == (600, "bos_token_id or eos_token_id")


# ---- malformed files -----------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error.value)


def at(raw, *path):
    """The last container on a path into a JSON document, whose last step is a key in it."""
    for step in path[:-1]:
        raw = raw[step]
    return raw


NUMBERS = [None, "7", -1, 1.5, True, [3], {}, 2**40, 1e400]


@pytest.mark.parametrize("id", [*NUMBERS, 65])  # 65 is another token's
@pytest.mark.parametrize("path", [("model", "vocab", "!"), ("added_tokens", 1, "id")])
def test_ids_are_whole_numbers_each_once(tmp_path, path, id):
    raw = golden_json("gpt2")
    at(raw, *path)[path[-1]] = id
    with pytest.raises(InputError, match="tokenizer.json: .*id") as error:
        Tokenizer(write_tokenizer(tmp_path, raw))
    assert one_line(error)


@pytest.mark.parametrize(
    "base, path, value",
    [
        ("gpt2", ("model",), []),
        ("gpt2", ("model", "vocab"), {}),
        ("gpt2", ("model", "vocab"), ["a"]),
        ("gpt2", ("model", "vocab", "中"), 900),
        ("gpt2", ("model", "vocab", " "), 900),
        ("gpt2", ("model", "merges"), None),
        ("gpt2", ("model", "merges", 0), "a b c"),
        ("gpt2", ("model", "merges", 0), ["a"]),
        ("gpt2", ("model", "merges", 0), [1, 2]),
        ("gpt2", ("model", "merges", 0), [["a"], "b"]),
        ("gpt2", ("model", "merges", 0), 5),
        ("gpt2", ("model", "dropout"), 0.1),
        ("gpt2", ("model", "end_of_word_suffix"), "</w>"),
        ("digits", ("model", "unk_token"), "<s>"),
        ("gpt2", ("added_tokens",), 3),
        ("gpt2", ("added_tokens", 1), "<s>"),
        ("gpt2", ("added_tokens", 1, "content"), ""),
        ("gpt2", ("added_tokens", 1, "content"), ["a"]),
        ("gpt2", ("added_tokens", 1, "content"), "<s>"),
        ("gpt2", ("added_tokens", 1, "content"), "a"),
        ("gpt2", ("added_tokens", 1, "content"), "\ud800"),
        ("gpt2", ("added_tokens", 1, "lstrip"), "yes"),
        ("gpt2", ("added_tokens", 1, "special"), None),
        ("gpt2", ("pre_tokenizer",), None),
        ("gpt2", ("normalizer",), "NFC"),
        ("bytelevel", ("pre_tokenizer", "pretokenizers"), []),
        ("bytelevel", ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(a"),
        ("bytelevel", ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), 7),
        ("bytelevel", ("pre_tokenizer", "pretokenizers", 0, "behavior"), "MergedWithNext"),
        ("bytelevel", ("pre_tokenizer", "pretokenizers", 0, "invert"), True),
        ("sentencepiece", ("model", "vocab", "<0x41>"), "x"),
        ("sentencepiece", ("model", "byte_fallback"), False),
        ("sentencepiece", ("normalizer", "normalizers", 0, "prepend"), "_"),
        ("sentencepiece", ("normalizer", "normalizers", 1, "content"), "_"),
        ("sentencepiece", ("post_processor", "single"), []),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(tmp_path, base, path, value):
    raw = golden_json(base)
    at(raw, *path)[path[-1]] = value
    beside = {"config": {"bos_token_id": 1}}
    with pytest.raises(InputError, match="tokenizer.json: ") as error:
        Tokenizer(write_tokenizer(tmp_path, raw, **beside))
    assert one_line(error)


def test_two_added_tokens_that_become_one_are_refused(tmp_path):
    raw = golden_json("bytelevel")
    for id, content in ((900, "\u00e9!"), (901, "e\u0301!")):
        token = {"content": content, "id": id, "special": False, "normalized": True}
        raw["added_tokens"].append(token)
    with pytest.raises(InputError, match="the same text"):
        Tokenizer(write_tokenizer(tmp_path, raw))


def test_a_sentencepiece_token_with_a_space_inside_is_refused(tmp_path):
    raw = golden_json("sentencepiece")
    raw["model"]["vocab"] |= {"a▁": 900}
    raw["model"]["merges"].append(["a", "▁"])
    with pytest.raises(InputError, match="a space inside"):
        Tokenizer(write_tokenizer(tmp_path, raw))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "config"])
@pytest.mark.parametrize(
    "field, value",
    [
        ("eos_token", 5),
        ("eos_token", {"text": "</s>"}),
        ("bos_token", ["<s>"]),
        ("eos_token_id", "2"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", -1),
        ("bos_token_id", 1.0),
        ("bos_token_id", True),
    ],
)
def test_a_wrong_end_token_is_one_line_that_names_the_file(tmp_path, name, field, value):
    write_tokenizer(tmp_path, golden_json("gpt2"), **{name: {field: value}})
    with pytest.raises(InputError, match=f"{name}.json: ") as error:
        Tokenizer(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config", "config"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe{", b"[]", b'{"a": 1', b"\x00"])
def test_a_file_that_is_no_json_object_is_one_line_that_names_it(tmp_path, name, content):
    write_tokenizer(tmp_path, golden_json("gpt2"))
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.json") as error:
        Tokenizer(tmp_path)
    assert one_line(error)

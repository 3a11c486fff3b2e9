"""Tokenizers: the reference's ids and texts, and malformed files."""

import json
import shutil

import pytest
from conftest import GOLDEN, SHARED

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
    text = (SHARED / "data" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")[
        :200000
    ] + "🙂 中文 a  b\t\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    reference = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(SHARED / folder / "tokenizer.json")
    )
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {"type": "Unigram", "vocab": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": {"type": "NFKC"}, "pre_tokenizer": {"type": "ByteLevel"}}',
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

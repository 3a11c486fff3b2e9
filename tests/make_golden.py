"""Make tests/golden again: what the reference libraries compute. Run once, and committed.

    pip install transformers tokenizers
    python tests/make_golden.py

logits.safetensors  what transformers computes with the random backbones of conftest.py
NAME/               tokenizers of every kind that is read, trained on a little text
tokens.json         what the tokenizers library makes of many texts and ids with each of them

The tokenizers learn from loopus.py's text, so with another loopus.py the files come out different.
"""

import json
import random
import tempfile
from pathlib import Path

import torch
from conftest import BACKBONES, GOLDEN, ROOT, write_backbone
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM

TEXTS = [
    "",
    " ",
    "   ",
    "a",
    "\n",
    "\n\n  x",
    " leading",
    "trailing  ",
    "hello world",
    "don't WE'LL",
    "12 345",
    "1  2   3",
    "a1b22c333",
    "   7",
    "\t\tx\r\n\r\n y",
    "e\u0301 caf\u00e9 cafe\u0301 \u212b",
    "🙂👩‍👩‍👧 🇫🇷",
    "\x00\x01\x13\x7f\x80\xa0\xad",
    "\ufeffx",
    "中文字 日本語 한국어",
    "العربية हिन्दी",
    "<s> </s> <|end|>",
    "▁▁ x ▁",
    "\u2028y\u2029",
    "\U0010ffff a",
    "x\U0010ffffy",
    "<think>so</think> <think>\u0338",
    "²³½ Ⅷ ٣٤",
    "loop until q ≥ q_th; α = exp(Δ ⊙ A)",
]

# ---- logits --------------------------------------------------------------------------------------


def make_logits():
    golden = {}
    for name, config in BACKBONES.items():
        with tempfile.TemporaryDirectory() as directory:
            write_backbone(Path(directory), name)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, config["vocab_size"], (2, 33), generator=generator)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        golden[f"{name}.ids"] = ids
        golden[f"{name}.logits"] = out.logits
        golden[f"{name}.layer1"] = out.hidden_states[1].contiguous()
    save_file(golden, GOLDEN / "logits.safetensors")


# ---- tokenizers ----------------------------------------------------------------------------------


def training_lines():
    return (ROOT / "loopus.py").read_text(encoding="utf-8").splitlines() + TEXTS * 3


def by_id(vocab):
    """The tokens of {token: id}, in the order of their ids."""
    return sorted(vocab, key=vocab.get)


def byte_level(pre_tokenizer, nfc, dropped=""):
    """Byte-level BPE. dropped: characters (of bytes) that the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training_lines(), trainer)
    if dropped:
        tokenizer = without(tokenizer, set(dropped))
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def without(tokenizer, dropped):
    """A vocabulary without some bytes: nothing may be merged from them either."""
    raw = json.loads(tokenizer.to_str())
    model = raw["model"]
    vocab = [token for token in by_id(model["vocab"]) if not set(token) & dropped]
    model["vocab"] = {token: i for i, token in enumerate(vocab)}
    model["merges"] = [pair for pair in model["merges"] if not set("".join(pair)) & dropped]
    return Tokenizer.from_str(json.dumps(raw))


def sentencepiece():
    """BPE as in TinyLlama: no pre-tokenizer, "▁" for a space, bytes for what has no token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    trained.train_from_iterator([" " + line for line in training_lines()], trainer)

    tokenizer = Tokenizer(byte_fallback_model(json.loads(trained.to_str())["model"]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_fallback_model(trained):
    """Put special tokens and the 256 bytes in front of a trained model's tokens; "▁" for spaces."""
    tokens = ["<unk>", "<s>", "</s>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    for token in by_id(trained["vocab"]):
        if ord(token[0]) < 0x3000 or len(token) > 1:  # some characters are there only as bytes
            tokens.append(token.replace(" ", "▁"))
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}

    merges = []
    for left, right in trained["merges"]:
        pair = (left.replace(" ", "▁"), right.replace(" ", "▁"))
        if {*pair, "".join(pair)} <= set(vocab):
            merges.append(pair)
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def make_tokenizers():
    """A tokenizer of every kind: like Qwen3's, SmolLM2's (single digits), GPT-2's, TinyLlama's."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    by_pattern = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return {
        "bytelevel": byte_level(by_pattern, nfc=True),
        "digits": byte_level(digits, nfc=False, dropped="ĀĵôõĊ"),
        "gpt2": byte_level(plain, nfc=False),
        "sentencepiece": sentencepiece(),
    }


# ---- what they make of texts ---------------------------------------------------------------------


def random_texts(rng):
    alphabet = [
        *" \n\t\r a1.'sé🙂中\u0301\u00a0\u200d▁",
        *map(chr, range(0x21, 0x7F)),
        *map(chr, range(0xA1, 0x250)),
        "\U0010ffff",
        "\x13",
        "\x00",
    ]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(150)]


def encode_and_decode(tokenizer, texts, rng):
    """[text, its ids, their text] for each text, and [None, ids, their text] for random ids."""
    tokenizer.encode_special_tokens = True
    found = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found.append([text, ids, tokenizer.decode(ids, skip_special_tokens=False)])
    for _ in range(100):  # ids that no text makes: broken characters
        ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randrange(1, 12))
        found.append([None, ids, tokenizer.decode(ids, skip_special_tokens=False)])
    return found


def make_tokens():
    rng = random.Random(0)
    texts = TEXTS + random_texts(rng)
    golden = {}
    for name, tokenizer in make_tokenizers().items():
        directory = GOLDEN / name
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
        end = "</s>" if name == "sentencepiece" else "<|end|>"
        config = {"bos_token": "<s>", "eos_token": {"content": end}}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        given = texts
        if name == "sentencepiece":
            given = [text.replace("▁", " ") for text in texts]
        golden[name] = encode_and_decode(tokenizer, given, rng)
    (GOLDEN / "tokens.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    make_logits()
    make_tokens()

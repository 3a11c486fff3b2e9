"""Make tests/golden again: what the reference libraries compute. Needs `pip install transformers tokenizers`; run once, committed.

python tests/make_golden.py
"""

import json
import random
import tempfile
from pathlib import Path

import torch
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

from conftest import BACKBONES, GOLDEN, ROOT, write_backbone

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


def logits():
    golden = {}
    for name, config in BACKBONES.items():
        with tempfile.TemporaryDirectory() as directory:
            write_backbone(Path(directory), name)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        ids = torch.randint(
            0, config["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        golden |= {
            f"{name}.ids": ids,
            f"{name}.logits": out.logits,
            f"{name}.layer1": out.hidden_states[1].contiguous(),
        }
    save_file(golden, GOLDEN / "logits.safetensors")


def byte_level(pre, nfc, drop=None):
    text = (ROOT / "loopus.py").read_text(encoding="utf-8").splitlines() + TEXTS * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw = json.loads(tokenizer.to_str())
    if drop:  # a vocabulary without some bytes: nothing may be merged from them either
        vocab = [
            t
            for t in sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
            if not set(t) & set(drop)
        ]
        raw["model"]["vocab"] = {t: i for i, t in enumerate(vocab)}
        raw["model"]["merges"] = [
            m for m in raw["model"]["merges"] if not set("".join(m)) & set(drop)
        ]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def sentencepiece():
    lines = [
        " " + line
        for line in (ROOT / "loopus.py").read_text(encoding="utf-8").splitlines() + TEXTS * 3
    ]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+| +"), "isolated")
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    raw = json.loads(trained.to_str())["model"]
    mark = lambda token: token.replace(" ", "▁")
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens += [
        mark(t)
        for t in sorted(raw["vocab"], key=raw["vocab"].get)
        if ord(t[0]) < 0x3000 or len(t) > 1
    ]  # some characters only as bytes
    kept = set(tokens)
    merges = [
        (mark(a), mark(b)) for a, b in raw["merges"] if {mark(a), mark(b), mark(a + b)} <= kept
    ]
    model = models.BPE(
        {t: i for i, t in enumerate(dict.fromkeys(tokens))},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
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


def tokens():
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain, digits = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=True),
    )
    kinds = {
        "bytelevel": byte_level(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(split), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            True,
        ),
        "digits": byte_level(pre_tokenizers.Sequence([digits, plain]), False, drop="ĀĵôõĊ"),
        "gpt2": byte_level(plain, False),
        "sentencepiece": sentencepiece(),
    }
    rng, golden = random.Random(0), {}
    alphabet = [
        *" \n\t\r a1.'sé🙂中\u0301\u00a0\u200d▁",
        *map(chr, range(0x21, 0x7F)),
        *map(chr, range(0xA1, 0x250)),
        "\U0010ffff",
        "\x13",
        "\x00",
    ]
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(150)]
    for name, tokenizer in kinds.items():
        (GOLDEN / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(GOLDEN / name / "tokenizer.json"), pretty=False)
        end = "</s>" if name == "sentencepiece" else "<|end|>"
        (GOLDEN / name / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": {"content": end}})
        )
        tokenizer.encode_special_tokens = True
        golden[name] = []
        for text in texts:
            text = text.replace("▁", " ") if name == "sentencepiece" else text
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            golden[name].append([text, ids, tokenizer.decode(ids, skip_special_tokens=False)])
        for _ in range(100):  # ids that no text makes: broken characters
            ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randrange(1, 12))
            golden[name].append([None, ids, tokenizer.decode(ids, skip_special_tokens=False)])
    (GOLDEN / "tokens.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    logits()
    tokens()

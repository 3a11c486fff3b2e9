"""What several tests need: random backbones on disk in every format that is loaded, and small models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = ROOT.parent / "shared"  # optional: real vocabularies and data, never needed
sys.path.insert(0, str(ROOT))

from loopus import LoopUS, LoopUSConfig  # noqa: E402

# name: Hugging Face config of a random backbone; golden/logits.safetensors has what transformers makes of each
BACKBONES = {
    "llama_gqa": {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "llama_tied": {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 83,
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
}


def backbone_tensors(config, seed=0):
    """Hugging Face names -> fp32 tensors drawn by numpy, the same everywhere; norms near 1, the rest large enough to matter."""
    rng, c = np.random.default_rng(seed), config
    D, I, H, G = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
    )
    K = c.get("head_dim", D // H)
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], D)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (D,),
            p + "post_attention_layernorm.weight": (D,),
            p + "self_attn.q_proj.weight": (H * K, D),
            p + "self_attn.k_proj.weight": (G * K, D),
            p + "self_attn.v_proj.weight": (G * K, D),
            p + "self_attn.o_proj.weight": (D, H * K),
            p + "mlp.gate_proj.weight": (I, D),
            p + "mlp.up_proj.weight": (I, D),
            p + "mlp.down_proj.weight": (D, I),
        }
        if c["model_type"] == "qwen3":
            shapes |= {p + "self_attn.q_norm.weight": (K,), p + "self_attn.k_norm.weight": (K,)}
    draw = lambda name, shape: (
        1 + 0.2 * rng.standard_normal(shape)
        if "norm" in name
        else rng.standard_normal(shape) * 1.5 * shape[-1] ** -0.5
    )
    return {
        name: torch.from_numpy(draw(name, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def write_backbone(directory, name, dtype=torch.float32, shards=1, old=False, seed=0):
    """A backbone as a Hugging Face directory, config.json in the old style or the new."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(BACKBONES[name])
    tensors = {k: v.to(dtype) for k, v in backbone_tensors(config, seed).items()}
    written, word = dict(config), str(dtype).removeprefix("torch.")
    written["architectures"] = [
        {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[config["model_type"]]
    ]
    if old:
        written |= {"rope_scaling": None, "torch_dtype": word}
    else:
        written |= {
            "rope_parameters": {"rope_type": "default", "rope_theta": written.pop("rope_theta")},
            "dtype": word,
        }
    (directory / "config.json").write_text(json.dumps(written))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        names, index = sorted(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n] for n in names[i::shards]}, directory / file)
            index |= dict.fromkeys(names[i::shards], file)
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    return tensors


def small(seed=0, gate=True, dtype=torch.float64, **changes):
    """A random model of every added part too, fp64 so that comparisons can be strict. Its gate is about half open and varied."""
    torch.manual_seed(seed)
    fields = {
        "model_type": "qwen3",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "loops": 4,
    }
    model = LoopUS(LoopUSConfig(**fields | changes)).to(dtype)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data += 0.2 * torch.randn_like(p)
        elif "embed" not in name and "gate." not in name and p.dim() == 2:
            p.data *= 2
    if gate:
        model.reasoning.gate.A_log.data = torch.randn(model.config.hidden_size, dtype=dtype)
        model.reasoning.gate.delta_proj.bias.data = torch.randn(
            model.config.hidden_size, dtype=dtype
        )
    return model


def script(*args, cwd=None, timeout=300, **env):
    """Run a command as a user runs it."""
    return subprocess.run(
        [sys.executable, str(ROOT / args[0]), *map(str, args[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        encoding="utf-8",
        env={
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "2",
            "HF_HUB_OFFLINE": "1",
            **env,
        },
    )


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A small backbone with a tokenizer: what the scripts are run on."""
    directory = tmp_path_factory.mktemp("models") / "toy"
    directory.mkdir()
    vocab = (
        len(
            json.loads((GOLDEN / "bytelevel" / "tokenizer.json").read_text(encoding="utf-8"))[
                "model"
            ]["vocab"]
        )
        + 3
    )
    config = BACKBONES["llama_gqa"] | {"vocab_size": vocab}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(backbone_tensors(config), directory / "model.safetensors")
    for file in (GOLDEN / "bytelevel").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    line = (ROOT / "loopus.py").read_text(encoding="utf-8")
    path.write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in line.split("\n\n") * 2),
        encoding="utf-8",
    )
    return path

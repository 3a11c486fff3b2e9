"""What several tests need: random backbones on disk, small models, and a script run as a user does.

First the backbones and how they are written, then `small`, then `script`, then the fixtures.
"""

import json
import os
import shlex
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

# Name -> Hugging Face config of a random backbone. golden/logits.safetensors has what transformers
# computes with each of them.
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
BACKBONES["llama3"] = BACKBONES["llama_gqa"] | {
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
PHI3 = {"model_type": "phi3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BACKBONES["phi3"] = BACKBONES["llama_gqa"] | PHI3
BACKBONES["phi3_partial"] = BACKBONES["llama_tied"] | PHI3 | {"partial_rotary_factor": 0.5}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}

# The fields of `small`'s config: every size is another, so that a mixed-up one does not fit.
SMALL = {
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


# ---- backbones on disk ---------------------------------------------------------------------------


def layer_shapes(config):
    """Names within a layer -> shapes."""
    D, I = config["hidden_size"], config["intermediate_size"]
    K = config.get("head_dim", D // config["num_attention_heads"])
    queries = config["num_attention_heads"] * K
    keys = config["num_key_value_heads"] * K
    shapes = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.k_proj.weight": (keys, D),
        "self_attn.v_proj.weight": (keys, D),
        "self_attn.o_proj.weight": (D, queries),
        "mlp.gate_proj.weight": (I, D),
        "mlp.up_proj.weight": (I, D),
        "mlp.down_proj.weight": (D, I),
    }
    if config["model_type"] == "phi3":
        parts = [shapes.pop(f"self_attn.{x}_proj.weight") for x in "qkv"]
        shapes["self_attn.qkv_proj.weight"] = (sum(rows for rows, _ in parts), D)
        for name in ("gate", "up"):
            del shapes[f"mlp.{name}_proj.weight"]
        shapes["mlp.gate_up_proj.weight"] = (2 * I, D)
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (K,), "self_attn.k_norm.weight": (K,)}
    return shapes


def backbone_shapes(config):
    """Hugging Face names -> shapes, of a whole backbone."""
    V, D = config["vocab_size"], config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


def backbone_tensors(config, seed=0):
    """Hugging Face names -> fp32 tensors, the same on every machine, since numpy draws them.

    Norms are near 1, and the rest is large enough that every part of a layer matters.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in backbone_shapes(config).items():
        x = rng.standard_normal(shape)
        x = 1 + 0.2 * x if "norm" in name else x * 1.5 * shape[-1] ** -0.5
        tensors[name] = torch.from_numpy(x.astype(np.float32))
    return tensors


def write_backbone(directory, name, dtype=torch.float32, shards=1, old=False, seed=0):
    """Write a backbone as a Hugging Face directory; -> its tensors.

    old: config.json as transformers 4 wrote it, else as transformers 5 does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(BACKBONES[name])
    tensors = {
        tensor_name: x.to(dtype) for tensor_name, x in backbone_tensors(config, seed).items()
    }
    dtype_name = str(dtype).removeprefix("torch.")
    fields = config | {"architectures": [ARCHITECTURES[config["model_type"]]]}
    if old:
        fields |= {"rope_scaling": config.get("rope_scaling"), "torch_dtype": dtype_name}
    else:
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        rope |= fields.pop("rope_scaling", {})
        if "partial_rotary_factor" in fields:
            rope["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
        fields |= {"rope_parameters": rope, "dtype": dtype_name}
    (directory / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        write_shards(directory, tensors, shards)
    return tensors


def write_shards(directory, tensors, shards):
    """Spread the tensors over several files, with the index that says which file has which."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_backbone_with_words(directory, name="llama_gqa"):
    """Write a small backbone with a tokenizer, and room in its embedding for that; -> directory."""
    directory.mkdir()
    for file in (GOLDEN / "bytelevel").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    config = BACKBONES[name] | {"vocab_size": vocab_size}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(backbone_tensors(config), directory / "model.safetensors")
    return directory


# ---- a small model -------------------------------------------------------------------------------


def small(seed=0, gate=True, dtype=torch.float64, **changes):
    """A random model, the added parts random too; fp64, so that comparisons can be strict.

    gate: make the gate about half open, differently in every channel; else leave it as it starts.
    """
    torch.manual_seed(seed)
    model = LoopUS(LoopUSConfig(**SMALL | changes)).to(dtype)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data += 0.2 * torch.randn_like(p)
        elif "embed" not in name and "gate." not in name and p.dim() == 2:
            p.data *= 2
    if gate:
        D = model.config.hidden_size
        model.reasoning.gate.A_log.data = torch.randn(D, dtype=dtype)
        model.reasoning.gate.delta_proj.bias.data = torch.randn(D, dtype=dtype)
    return model


# ---- commands ------------------------------------------------------------------------------------


def environment(**changes):
    """The environment of a script: the user's own, but for what changes how its output is written.

    Only tests/test_hub.py is about the network: it says HF_HUB_OFFLINE="0". One thread is the
    fastest for models this small, and by far where something else runs beside the tests.
    """
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LC_ALL", "PYTHONIOENCODING", "PYTHONUNBUFFERED")
    }
    return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def flags(line):
    """The flags of a command, as one writes them in a shell, as a list."""
    return shlex.split(line)


def command_line(name, *args):
    """What a shell would be given to run a script of this repository: a list of strings."""
    return [sys.executable, str(ROOT / name), *map(str, args)]


def script(*args, cwd=None, timeout=300, **env):
    """Run a script as a user runs it: args are its name and its flags; env is changed in it."""
    return subprocess.run(
        command_line(*args),
        cwd=cwd,
        capture_output=True,
        timeout=timeout,
        encoding="utf-8",
        errors="replace",
        env=environment(**env),
    )


def succeeded(done, *words):
    """Assert that a command ended well and printed these words; -> all that it printed."""
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout
    return done.stdout


def refused(done, *words):
    """Assert that a command ended as it does for bad input, and said these words."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# ---- what is made once ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A small backbone with a tokenizer: what the scripts are run on."""
    return write_backbone_with_words(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A text to train on, as JSON Lines: the paragraphs of loopus.py, twice."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    paragraphs = (ROOT / "loopus.py").read_text(encoding="utf-8").split("\n\n")
    lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs * 2]
    path.write_text("".join(lines), encoding="utf-8")
    return path

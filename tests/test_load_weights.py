"""What crosses the disk: formats, strictness, round trips, tokenizers."""

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    BACKBONES,
    GOLDEN,
    ROOT,
    backbone_tensors,
    script,
    small,
    write_backbone,
)
from safetensors.torch import load_file, save_file

from load_weights import load, save
from loopus import InputError

# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards, old", [(1, False), (3, True)])
def test_every_format_gives_the_stored_numbers(tmp_path, name, dtype, shards, old):
    stored = write_backbone(tmp_path, name, dtype, shards, old)
    model, tokenizer = load(tmp_path, split=(1, 1))
    assert tokenizer is None
    state, n = model.state_dict(), BACKBONES[name]["num_hidden_layers"]
    assert torch.equal(state["encoder.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(
        state["reasoning.layers.0.mlp.up_proj.weight"], stored["model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.equal(
        state["decoder.layers.0.self_attn.o_proj.weight"],
        stored[f"model.layers.{n - 1}.self_attn.o_proj.weight"],
    )
    assert torch.equal(
        state["decoder.lm_head.weight"],
        stored.get("lm_head.weight", stored["model.embed_tokens.weight"]),
    )
    assert (
        state["decoder.lm_head.weight"].data_ptr()
        != state["encoder.embed_tokens.weight"].data_ptr()
    )  # untied
    assert (
        state["encoder.embed_tokens.weight"].dtype == dtype
        and state["q_head.1.weight"].dtype == torch.float32
    )
    wide, _ = load(tmp_path, split=(1, 1), dtype=torch.float32)
    assert torch.equal(
        wide.state_dict()["encoder.embed_tokens.weight"],
        stored["model.embed_tokens.weight"].float(),
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_save_and_load_is_bit_exact(tmp_path, name):
    write_backbone(tmp_path / "base", name, torch.bfloat16)
    model, _ = load(tmp_path / "base", split=(1, 1))
    model.config.loops, model.config.exit_threshold = 7, 0.45
    save(model, None, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    assert (again.config.loops, again.config.exit_threshold, again.config.base_model) == (
        7,
        0.45,
        str(tmp_path / "base"),
    )
    a, b = model.state_dict(), again.state_dict()
    assert list(a) == list(b) and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )
    save(again, None, tmp_path / "twice")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    assert not list((tmp_path / "saved").glob("*.partial")) and not list(
        (tmp_path / "saved").glob(".*")
    )


def test_published_config_and_legacy_names(tmp_path):
    """The fields of the published config.json (PAPER's section 7), and a checkpoint from before `plateau.` became `reasoning.`"""
    model = small(dtype=torch.float32)
    save(model, None, tmp_path / "now")
    config = json.loads((tmp_path / "now" / "config.json").read_text())
    assert (
        config["model_type"] == "lds" and config["base_config_dict"]["tie_word_embeddings"] is False
    )
    assert (
        config["encoder_layer_indices"],
        config["reasoning_layer_indices"],
        config["decoder_layer_indices"],
    ) == ([0], [1, 2], [3])
    assert {
        "base_model_name_or_path",
        "N",
        "q_threshold",
        "q_eval_interval",
        "halting_strategy",
        "convergence_epsilon",
    } <= set(config)
    tensors = load_file(tmp_path / "now" / "model.safetensors")
    assert set(tensors) == set(model.state_dict())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    save_file(
        {k.replace("reasoning.", "plateau."): v for k, v in tensors.items()},
        tmp_path / "old" / "model.safetensors",
    )
    old, _ = load(tmp_path / "old")
    assert all(
        torch.equal(a, b)
        for a, b in zip(old.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_save_that_does_not_fit_leaves_what_was_there(tmp_path):
    """A real limit on file sizes stands for the full disk: the weights do not fit, the small files do."""
    save(small(dtype=torch.float32), None, tmp_path / "x")
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[1:3]\n"
        "import torch; from conftest import small; from load_weights import save; from appendix.errors import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "run(lambda: save(small(seed=9, dtype=torch.float32), None, sys.argv[3]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, ROOT / "tests", tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "could not be written" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before and len(
        list((tmp_path / "x").iterdir())
    ) == 2


# ---- strictness ------------------------------------------------------------------------------------------------------


def spoil(directory, how):
    file, config = directory / "model.safetensors", directory / "config.json"
    raw, fields = file.read_bytes(), json.loads(config.read_text())
    size = struct.unpack("<Q", raw[:8])[0]
    rewrite = lambda change: config.write_text(json.dumps({**fields, **change}))
    tensors = load_file(file)
    if how == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "header lies":
        file.write_bytes(struct.pack("<Q", size + 10**9) + raw[8:])
    elif how == "offsets lie":
        header = json.loads(raw[8 : 8 + size])
        header["model.norm.weight"]["data_offsets"][1] += 4
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    elif how == "no file":
        file.unlink()
    elif how == "shape":
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(79, 48)
        save_file(tensors, file)
    elif how == "integers":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
        save_file(tensors, file)
    elif how == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, file)
    elif how == "extra":
        save_file(tensors | {"model.layers.2.self_attn.q_proj.bias": torch.zeros(48)}, file)
    elif how == "untied without head":
        del tensors["lm_head.weight"]
        save_file(tensors, file)
    elif how.startswith("pickle"):
        file.unlink()
        torch.save(
            {"pickle of a list": [1], "pickle of numbers": dict.fromkeys(tensors, 1)}[how],
            directory / "pytorch_model.bin",
        )
    elif how == "no config":
        config.unlink()
    elif how == "config is not JSON":
        config.write_text(config.read_text()[:-5])
    elif how == "config is a list":
        config.write_text("[]")
    elif how == "config lacks a size":
        rewrite({"hidden_size": None})
    elif how == "config has a string":
        rewrite({"num_hidden_layers": "4"})
    elif how == "architecture":
        rewrite({"model_type": "gpt_neox"})
    elif how == "rope":
        rewrite({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    elif how == "rope, new":
        rewrite({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}})
    elif how == "a billion layers":
        rewrite({"num_hidden_layers": 10**9})
    elif how == "rope is a word":
        rewrite({"rope_parameters": "default"})
    elif how == "small vocabulary":
        shutil.copy(GOLDEN / "gpt2" / "tokenizer.json", directory)
    elif how == "bias":
        rewrite({"attention_bias": True})
    elif how == "activation":
        rewrite({"hidden_act": "gelu"})
    elif how == "shard":
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {n: "model-00002-of-00002.safetensors" for n in tensors}})
        )
    elif how == "shard without it":
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(
                {
                    "weight_map": {
                        **dict.fromkeys(tensors, "model.safetensors"),
                        "nowhere": "model.safetensors",
                    }
                }
            )
        )
    elif how == "index":
        (directory / "model.safetensors.index.json").write_text('{"weight_map": 3}')


@pytest.mark.parametrize(
    "how, words",
    [
        ("truncated", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("header lies", "model.safetensors"),
        ("offsets lie", "model.safetensors"),
        ("no file", "no model.safetensors"),
        ("shape", r"model.layers.2.mlp.up_proj.weight has shape \[79, 48\].*\[80, 48\]"),
        ("integers", "model.norm.weight is I32"),
        ("missing", "model.layers.2.mlp.up_proj.weight"),
        ("extra", "model.layers.2.self_attn.q_proj.bias"),
        ("untied without head", "lm_head.weight"),
        ("no config", "config.json"),
        ("config is not JSON", "config.json"),
        ("config is a list", "config.json"),
        ("config lacks a size", "hidden_size"),
        ("config has a string", "num_hidden_layers"),
        ("architecture", "gpt_neox"),
        ("rope", "yarn"),
        ("rope, new", "llama3"),
        ("a billion layers", "only 39 tensors"),
        ("rope is a word", "rope_parameters"),
        ("small vocabulary", "97 embeddings"),
        ("bias", "attention_bias"),
        ("activation", "gelu"),
        ("shard", "model-00002-of-00002.safetensors"),
        ("shard without it", "nowhere"),
        ("index", "weight_map"),
        ("pickle of a list", "pytorch_model.bin: not a readable"),
        ("pickle of numbers", "only 0 tensors"),
    ],
)
def test_a_spoilt_model_is_one_clear_line(tmp_path, how, words):
    write_backbone(tmp_path, "llama_gqa", old=True)
    spoil(tmp_path, how)
    with pytest.raises(InputError, match=words) as error:
        load(tmp_path, split=(1, 1))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_flipped_bytes_in_the_header_never_crash_nor_load_other_numbers(tmp_path):
    stored = write_backbone(tmp_path, "llama_tied")
    raw, rng = (tmp_path / "model.safetensors").read_bytes(), random.Random(0)
    size, refused = struct.unpack("<Q", raw[:8])[0], 0
    for _ in range(300):
        at = rng.randrange(8 + size)
        (tmp_path / "model.safetensors").write_bytes(
            raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
        )
        try:
            model, _ = load(tmp_path, split=(1, 1))
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(
                model.state_dict()["encoder.embed_tokens.weight"],
                stored["model.embed_tokens.weight"],
            )
    assert refused > 250


@pytest.mark.parametrize("split", [(0, 1), (1, 0), (3, 1), (2, 9)])
def test_impossible_split(tmp_path, split):
    write_backbone(tmp_path, "llama_gqa")
    with pytest.raises(InputError, match=f"split {split[0]},{split[1]}"):
        load(tmp_path, split=split)


def test_a_checkpoint_keeps_its_split(tmp_path):
    save(small(dtype=torch.float32), None, tmp_path)
    with pytest.raises(InputError, match="split 1,1 already"):
        load(tmp_path, split=(2, 1))


def test_unknown_backbone_says_which_split_it_took(tmp_path, capsys):
    write_backbone(tmp_path, "llama_gqa")
    model, _ = load(tmp_path)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (
        1,
        1,
    ) and "--split" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_of_loading(tmp_path):
    """At most 1.2 times the model as loaded, in a process of its own, beyond what the libraries take."""
    D, V = 512, 40000
    config = BACKBONES["llama_gqa"] | {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 12,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {k: v.to(torch.bfloat16) for k, v in backbone_tensors(config).items()},
        tmp_path / "model.safetensors",
    )
    write_backbone(
        tmp_path / "tiny", "llama_gqa"
    )  # loaded first: what the libraries take once is not the model's
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from load_weights import load\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "load(sys.argv[4], split=(1, 1))\n"
        "before = peak(); model, _ = load(sys.argv[2], split=(1, 1), dtype=getattr(torch, sys.argv[3]))\n"
        "print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))"
    )
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run(
            [sys.executable, probe, ROOT, tmp_path, dtype, tmp_path / "tiny"],
            capture_output=True,
            text=True,
        )
        assert 0.5 < float(done.stdout) < 1.2, done.stderr


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_prints_what_it_found(backbone):
    done = script("load_weights.py", backbone, "--split", "2,1")
    assert done.returncode == 0, done.stderr
    for words in (
        "llama, 4 layers, 48 wide, 6 query / 2 key-value heads of 8",
        "layers 0-1",
        "layers 2-2",
        "layers 3-3",
        "float32",
        "byte-level BPE",
        "continued",
    ):
        assert words in done.stdout
    wrong = script("load_weights.py", backbone / "nowhere")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "nowhere" in wrong.stderr

"""What crosses the disk: formats, round trips, and models that are not what they should be."""

import json
import random
import shutil
import struct
import subprocess
import sys
import time
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

from appendix.memory import count
from load_weights import export_backbone, load, read_config, save
from loopus import InputError


def same_tensors(one, other):
    """Are two {name: tensor} the same, bit for bit?"""
    if list(one) != list(other):
        return False
    same = [torch.equal(one[name], other[name]) for name in one]
    return all(same) and all(one[name].dtype == other[name].dtype for name in one)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards, old", [(1, False), (3, True)])
def test_every_format_gives_the_stored_numbers(tmp_path, name, dtype, shards, old):
    stored = write_backbone(tmp_path, name, dtype, shards, old)
    last = BACKBONES[name]["num_hidden_layers"] - 1
    model, tokenizer = load(tmp_path, split=(1, 1))
    assert tokenizer is None
    state = model.state_dict()
    embedding = stored["model.embed_tokens.weight"]
    expected = {
        "encoder.embed_tokens.weight": embedding,
        "reasoning.layers.0.mlp.up_proj.weight": unfused(
            stored, "model.layers.1.mlp.up_proj.weight"
        ),
        "encoder.layers.0.self_attn.k_proj.weight": unfused(
            stored, "model.layers.0.self_attn.k_proj.weight"
        ),
        "decoder.layers.0.self_attn.o_proj.weight": stored[
            f"model.layers.{last}.self_attn.o_proj.weight"
        ],
        "decoder.lm_head.weight": stored.get("lm_head.weight", embedding),
    }
    for ours, tensor in expected.items():
        assert torch.equal(state[ours], tensor), ours
        assert state[ours].dtype == dtype
    assert state["q_head.1.weight"].dtype == torch.float32

    # A tied head is a copy.
    head = state["decoder.lm_head.weight"]
    assert head.data_ptr() != state["encoder.embed_tokens.weight"].data_ptr()

    wide, _ = load(tmp_path, split=(1, 1), dtype=torch.float32)
    assert torch.equal(wide.state_dict()["encoder.embed_tokens.weight"], embedding.float())


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_bin_file_of_either_format_gives_the_same_numbers(tmp_path, as_zip, shards):
    """PyTorch writes a zip since 1.6; before, it was one pickle after another."""
    stored = write_backbone(tmp_path / "base", "llama_gqa")
    expected, _ = load(tmp_path / "base", split=(1, 1))
    (tmp_path / "base" / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for i in range(shards):
        file = "pytorch_model.bin"
        if shards > 1:
            file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        tensors = {name: stored[name] for name in names[i::shards]}
        content = tensors | {"epoch": 3, f"model.layers.{i}.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(content, tmp_path / "base" / file, _use_new_zipfile_serialization=as_zip)
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / "base" / "pytorch_model.bin.index.json").write_text(index)
    found, _ = load(tmp_path / "base", split=(1, 1))
    for name, tensor in expected.state_dict().items():
        is_new = name.startswith(("reasoning.gate.", "q_head."))
        assert is_new or torch.equal(found.state_dict()[name], tensor), name


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    """As some Windows programs write it."""
    write_backbone(tmp_path, "llama_gqa")
    plain = read_config(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert read_config(tmp_path / "config.json") == plain


def unfused(stored, name):
    """A tensor of a backbone's files; of Phi-3's, its rows in the one that holds it."""
    if name in stored:
        return stored[name]
    if name.endswith("up_proj.weight"):
        return stored[name.replace("up_proj", "gate_up_proj")].chunk(2)[1]
    qkv = stored[name.replace("k_proj", "qkv_proj")]
    queries = stored[name.replace("k_proj", "o_proj")].shape[1]
    return qkv[queries:].chunk(2)[0]


def test_a_saved_phi3_has_the_names_and_shapes_of_its_family(tmp_path):
    stored = write_backbone(tmp_path / "base", "phi3")
    model, _ = load(tmp_path / "base", split=(1, 1))
    save(model, None, tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in stored.items():
        if "layers.0." in name:
            assert torch.equal(found[name.replace("model.", "encoder.")], tensor), name
    assert not [name for name in found if "q_proj" in name or ".up_proj" in name]


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_save_and_load_is_bit_exact(tmp_path, name):
    write_backbone(tmp_path / "base", name, torch.bfloat16)
    model, _ = load(tmp_path / "base", split=(1, 1))
    model.config.loops = 7
    model.config.exit_threshold = 0.45
    save(model, None, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    assert again.config.loops == 7
    assert again.config.exit_threshold == 0.45
    assert again.config.base_model == str(tmp_path / "base")
    assert same_tensors(model.state_dict(), again.state_dict())

    save(again, None, tmp_path / "twice")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    left = [path.name for path in (tmp_path / "saved").iterdir()]
    assert not [file for file in left if file.startswith(".") or file.endswith(".partial")]


def test_published_config_and_legacy_names(tmp_path):
    """The published config.json, and a checkpoint from before `plateau.` became `reasoning.`"""
    model = small(dtype=torch.float32)
    save(model, None, tmp_path / "now")
    config = json.loads((tmp_path / "now" / "config.json").read_text())
    assert config["model_type"] == "lds"
    assert config["base_config_dict"]["tie_word_embeddings"] is False
    assert config["encoder_layer_indices"] == [0]
    assert config["reasoning_layer_indices"] == [1, 2]
    assert config["decoder_layer_indices"] == [3]
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
    legacy = {name.replace("reasoning.", "plateau."): tensor for name, tensor in tensors.items()}
    save_file(legacy, tmp_path / "old" / "model.safetensors")
    old, _ = load(tmp_path / "old")
    assert same_tensors(old.state_dict(), model.state_dict())


def test_end_tokens_that_only_config_json_names_survive(tmp_path, backbone):
    """A checkpoint stops where its base stops, and so does a checkpoint of the checkpoint."""
    shutil.copytree(backbone, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    change_config(tmp_path / "base", bos_token_id=1, eos_token_id=[2, 5])
    model, tokenizer = load(tmp_path / "base", split=(1, 1))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, 5))
    for name in ("saved", "twice"):
        save(model, tokenizer, tmp_path / name)
        model, tokenizer = load(tmp_path / name)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, 5))


def test_a_save_that_does_not_fit_leaves_what_was_there(tmp_path):
    """A limit on file sizes stands for the full disk: the weights do not fit, the rest does."""
    save(small(dtype=torch.float32), None, tmp_path / "x")
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    code = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import torch
from conftest import small
from load_weights import save
from appendix.errors import run_main

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    save(small(seed=9, dtype=torch.float32), None, sys.argv[3])

run_main(main)
"""
    command = [sys.executable, "-c", code, ROOT, ROOT / "tests", tmp_path / "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before
    assert len(list((tmp_path / "x").iterdir())) == 2


# ---- what is wrong with a model is said in one line ----------------------------------------------


def truncated(directory):
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def empty(directory):
    (directory / "model.safetensors").write_bytes(b"")


def header_lies(directory):
    raw = (directory / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", size + 10**9) + raw[8:])


def offsets_lie(directory):
    raw = (directory / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + raw[8 + size :]
    (directory / "model.safetensors").write_bytes(content)


def no_file(directory):
    (directory / "model.safetensors").unlink()


def change_tensors(directory, remove=None, **changes):
    tensors = load_file(directory / "model.safetensors") | changes
    tensors.pop(remove, None)
    save_file(tensors, directory / "model.safetensors")


def wrong_shape(directory):
    change_tensors(directory, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(79, 48)})


def integers(directory):
    change_tensors(directory, **{"model.norm.weight": torch.zeros(48, dtype=torch.int32)})


def missing(directory):
    change_tensors(directory, remove="model.layers.2.mlp.up_proj.weight")


def extra(directory):
    change_tensors(directory, **{"model.layers.2.self_attn.q_proj.bias": torch.zeros(48)})


def untied_without_head(directory):
    change_tensors(directory, remove="lm_head.weight")


def pickle_of_a_list(directory):
    no_file(directory)
    torch.save([1], directory / "pytorch_model.bin")


def pickle_of_numbers(directory):
    names = load_file(directory / "model.safetensors")
    no_file(directory)
    torch.save(dict.fromkeys(names, 1), directory / "pytorch_model.bin")


class Planted:
    """Something that a pickle may hold and PyTorch's reader for untrusted files must not make."""


def pickle_of_an_object(directory):
    no_file(directory)
    torch.save({"model.norm.weight": Planted()}, directory / "pytorch_model.bin")


def no_config(directory):
    (directory / "config.json").unlink()


def config_is_not_json(directory):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text[:-5])


def config_is_a_list(directory):
    (directory / "config.json").write_text("[]")


def config_is_not_text(directory):
    (directory / "config.json").write_bytes(b'{"model_type": "\xff"}')


def config_is_nested(directory):
    (directory / "config.json").write_text('{"model_type": ' + "[" * 10**5 + "]" * 10**5 + "}")


def config_lacks_a_size(directory):
    change_config(directory, hidden_size=None)


def config_has_a_string(directory):
    change_config(directory, num_hidden_layers="4")


def architecture(directory):
    change_config(directory, model_type="gpt_neox")


def rope(directory):
    change_config(directory, rope_scaling={"rope_type": "yarn", "factor": 4.0})


def new_rope(directory):
    change_config(directory, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5})


def rope_that_mixes_nothing(directory):
    scaling = {"factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": 64}
    change_config(directory, rope_scaling=scaling)


def long_rope(directory):
    change_config(directory, model_type="phi3", rope_scaling={"type": "longrope"})


def short_window(directory):
    change_config(directory, model_type="phi3", sliding_window=16)


def rope_is_a_word(directory):
    change_config(directory, rope_parameters="default")


def a_billion_layers(directory):
    change_config(directory, num_hidden_layers=10**9)


def bias(directory):
    change_config(directory, attention_bias=True)


def activation(directory):
    change_config(directory, hidden_act="gelu")


def small_vocabulary(directory):
    shutil.copy(GOLDEN / "gpt2" / "tokenizer.json", directory)


def write_index(directory, weight_map):
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))


def shard(directory):
    names = load_file(directory / "model.safetensors")
    write_index(directory, dict.fromkeys(names, "model-00002-of-00002.safetensors"))


def shard_without_it(directory):
    names = load_file(directory / "model.safetensors")
    write_index(directory, dict.fromkeys([*names, "nowhere"], "model.safetensors"))


def shard_elsewhere(directory):
    """An index that points out of its folder."""
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    write_index(directory, dict.fromkeys(names, "../outside.safetensors"))


def index(directory):
    write_index(directory, 3)


SPOILT = [
    (truncated, "model.safetensors"),
    (empty, "model.safetensors"),
    (header_lies, "model.safetensors"),
    (offsets_lie, "model.safetensors"),
    (no_file, "no model.safetensors"),
    (wrong_shape, r"model.layers.2.mlp.up_proj.weight has shape \[79, 48\].*\[80, 48\]"),
    (integers, "model.norm.weight is I32"),
    (missing, "model.layers.2.mlp.up_proj.weight"),
    (extra, "model.layers.2.self_attn.q_proj.bias"),
    (untied_without_head, "lm_head.weight"),
    (no_config, "config.json"),
    (config_is_not_json, "config.json"),
    (config_is_a_list, "config.json"),
    (config_is_not_text, "config.json: not readable as JSON"),
    (config_is_nested, "config.json: not readable as JSON .nested too deeply"),
    (config_lacks_a_size, "hidden_size"),
    (config_has_a_string, "num_hidden_layers"),
    (architecture, "gpt_neox"),
    (rope, "yarn"),
    (new_rope, "factor is None"),
    (rope_that_mixes_nothing, "low_freq_factor 4.0 is not below high_freq_factor"),
    (long_rope, "longrope"),
    (short_window, "sliding_window 16"),
    (a_billion_layers, "only 39 tensors"),
    (rope_is_a_word, "rope_parameters"),
    (small_vocabulary, "97 embeddings"),
    (bias, "attention_bias"),
    (activation, "gelu"),
    (shard, "model-00002-of-00002.safetensors"),
    (shard_without_it, "nowhere"),
    (shard_elsewhere, "weight_map names '../outside.safetensors'"),
    (index, "weight_map"),
    (pickle_of_a_list, "pytorch_model.bin: not a readable"),
    (pickle_of_numbers, "only 0 tensors"),
    (pickle_of_an_object, "pytorch_model.bin: not a readable"),
]


@pytest.mark.parametrize("spoil, words", SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_a_spoilt_model_is_one_clear_line(tmp_path, spoil, words):
    directory = tmp_path / "model"
    write_backbone(directory, "llama_gqa", old=True)
    spoil(directory)
    with pytest.raises(InputError, match=words) as error:
        load(directory, split=(1, 1))
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


# Values that no field of config.json may have. json writes and reads the last three too.
ABSURD = [None, True, -1, 0, 0.5, "7", [], {"a": 1}, 10**12, 10**400, 1e400, -1e400, float("nan")]


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "num_key_value_heads",
        "max_position_embeddings",
    ],
)
def test_absurd_sizes_are_one_line(tmp_path, field):
    write_backbone(tmp_path, "llama_gqa")
    optional = field in ("head_dim", "num_key_value_heads", "max_position_embeddings")
    for value in ABSURD[optional:]:  # None stands for the default there
        change_config(tmp_path, **{field: value})
        with pytest.raises(InputError, match=f"config.json: {field} is ") as error:
            load(tmp_path, split=(1, 1))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_absurd_numbers_are_one_line(tmp_path, field):
    write_backbone(tmp_path, "llama_gqa", old=True)
    for value in [*ABSURD[:4], *ABSURD[5:8], *ABSURD[9:]]:
        change_config(tmp_path, **{field: value})
        with pytest.raises(InputError, match=f"config.json: {field} is ") as error:
            load(tmp_path, split=(1, 1))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"N": True}, "N is True"),
        ({"N": 10**12}, "N is 1000000000000"),
        ({"q_threshold": float("nan")}, "q_threshold is nan"),
        ({"q_threshold": True}, "q_threshold is True"),
        ({"base_config_dict": [1]}, "base_config_dict"),
        ({"encoder_layer_indices": 0}, "layers 0 to 3 in order"),
        ({"decoder_layer_indices": [2]}, "layers 0 to 3 in order"),
        ({"decoder_layer_indices": [3, 4]}, "layers 0 to 3 in order"),
        ({"decoder_layer_indices": [[3]]}, "layers 0 to 3 in order"),
    ],
)
def test_a_checkpoint_with_absurd_fields_is_one_line(tmp_path, changes, words):
    save(small(dtype=torch.float32), None, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_sizes_that_are_possible_but_huge_are_refused_at_once(tmp_path):
    """Also where the memory is reckoned up before any file is read, as train.py does it."""
    write_backbone(tmp_path, "llama_gqa")
    started = time.monotonic()
    seen = []

    def plan(config):
        seen.append(count(config)[0])

    change_config(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(InputError, match="only 39 tensors"):
        load(tmp_path, split=(1, 1), plan=plan)
    change_config(tmp_path, num_hidden_layers=4, vocab_size=10**9)
    with pytest.raises(InputError, match="embed_tokens.weight has shape"):
        load(tmp_path, split=(1, 1), plan=plan)
    change_config(tmp_path, hidden_size=2**30, vocab_size=2**30)
    with pytest.raises(InputError, match="hidden_size 1073741824"):
        load(tmp_path, split=(1, 1), plan=plan)
    assert seen[0] > 10**13
    assert seen[1] > 9 * 10**10
    assert time.monotonic() - started < 20


def test_flipped_bytes_in_the_header_never_crash_nor_load_other_numbers(tmp_path):
    stored = write_backbone(tmp_path, "llama_tied")
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        spoilt = bytearray(raw)
        spoilt[rng.randrange(header)] ^= 1 << rng.randrange(8)
        file.write_bytes(spoilt)
        try:
            model, _ = load(tmp_path, split=(1, 1))
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            embedding = model.state_dict()["encoder.embed_tokens.weight"]
            assert torch.equal(embedding, stored["model.embed_tokens.weight"])
    assert refused > 250


# ---- split, tokenizer and model must fit each other ----------------------------------------------


@pytest.mark.parametrize("split", [(0, 1), (1, 0), (3, 1), (2, 9)])
def test_impossible_split(tmp_path, split):
    write_backbone(tmp_path, "llama_gqa")
    with pytest.raises(InputError, match=f"split {split[0]},{split[1]}"):
        load(tmp_path, split=split)


def test_a_checkpoint_keeps_its_split(tmp_path):
    save(small(dtype=torch.float32), None, tmp_path)
    with pytest.raises(InputError, match="--split 2,1: .* split 1,1 already"):
        load(tmp_path, split=(2, 1))


def test_unknown_backbone_says_which_split_it_took(tmp_path, capsys):
    write_backbone(tmp_path, "llama_gqa")
    model, _ = load(tmp_path)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (1, 1)
    assert "--split" in capsys.readouterr().err


def test_a_token_that_the_model_has_no_embedding_for_is_named(tmp_path, backbone):
    shutil.copytree(backbone, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    size = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    token = tokenizer["added_tokens"][0] | {"content": "<|one more|>", "id": size}
    tokenizer["added_tokens"].append(token)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match=rf"<\|one more\|>.* has the id {size}, .*{size} embed"):
        load(tmp_path / "base", split=(1, 1))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_of_loading(tmp_path):
    """At most 1.2 times the model as loaded, beyond what the libraries take; in a new process."""
    config = BACKBONES["llama_gqa"] | {
        "vocab_size": 40000,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 12,
    }
    stored = {name: x.to(torch.bfloat16) for name, x in backbone_tensors(config).items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors")
    # Loaded first: what the libraries take once is not the model's.
    write_backbone(tmp_path / "tiny", "llama_gqa")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from load_weights import load

def peak():
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024

load(sys.argv[4], split=(1, 1))
before = peak()
model, _ = load(sys.argv[2], split=(1, 1), dtype=getattr(torch, sys.argv[3]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / size)
"""
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", code, ROOT, tmp_path, dtype, tmp_path / "tiny"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 0.5 < float(done.stdout) < 1.2


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_an_exported_backbone_is_an_ordinary_model_that_computes_one_ungated_pass(tmp_path, name):
    write_backbone(tmp_path / "base", name, old=True)
    model, _ = load(tmp_path / "base", split=(1, 1))
    with torch.no_grad():  # as if it had been trained
        for p in model.reasoning.layers.parameters():
            p.mul_(1.1)
    export_backbone(model, None, tmp_path / "new")
    again, _ = load(tmp_path / "new", split=(1, model.config.num_hidden_layers - 2))
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.forward_pretrained(ids), model.forward_pretrained(ids))
    found = load_file(tmp_path / "new" / "model.safetensors")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert found.keys() == stored.keys() | {"lm_head.weight"}


@pytest.mark.parametrize("name", BACKBONES)
def test_transformers_opens_an_exported_backbone(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    write_backbone(tmp_path / "base", name)
    model, _ = load(tmp_path / "base", split=(1, 1))
    export_backbone(model, None, tmp_path / "new")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32
    )
    ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model.forward_pretrained(ids), expected, rtol=0, atol=2e-4)


def test_the_command_exports_and_overwrites_nothing(backbone, tmp_path):
    for layout in ("loopus", "huggingface"):
        new = tmp_path / layout
        command = ["load_weights.py", backbone, "--split", "2,1", "--export", new, "--as", layout]
        done = script(*command)
        assert done.returncode == 0 and f"in the layout of {layout}" in done.stdout, done.stderr
        again = script("load_weights.py", new)
        assert again.returncode == 0, again.stderr
        assert ("LoopUS checkpoint" in again.stdout) == (layout == "loopus")
        assert (new / "tokenizer.json").read_bytes() == (backbone / "tokenizer.json").read_bytes()
        refused = script(*command)
        assert refused.returncode == 2 and "nothing is overwritten" in refused.stderr


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
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "nowhere" in wrong.stderr

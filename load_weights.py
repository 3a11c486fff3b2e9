"""Everything that crosses the disk or the hub: presets, downloads, config.json, safetensors, tokenizers, checkpoints.

    python load_weights.py --list   the presets
    python load_weights.py DIR      print what is there, and continue one prompt

A Hugging Face backbone loads by a change of prefix (`layout`), a LoopUS checkpoint as it is. Loading is strict: every tensor
must be there in the shape the config gives, and nothing else may be.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from appendix.errors import InputError, require, run
from appendix.files import read_json, write_whole, write_text
from appendix.flags import parse_split
from appendix.hub import EMBEDDED, PRESETS, find, weight_files
from appendix.memory import NoInit
from appendix.tokenizer import Tokenizer
from loopus import ADDED, LoopUS, LoopUSConfig


# ---- for every script: errors for people, and the machine's defaults -------------------------------------------------


# ---- config.json -----------------------------------------------------------------------------------------------------

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def read_config(path, split=None):
    """config.json of a backbone or of a LoopUS checkpoint -> LoopUSConfig. split: what the user asks for."""
    raw = read_json(path)
    recast = raw.get("model_type") == "lds"
    base = raw.get("base_config_dict") if recast else raw
    try:
        require(
            isinstance(base, dict), f"base_config_dict is {base!r}: expected the backbone's config"
        )
        if base.get("model_type") == "qwen3":  # what transformers takes where its file is silent
            base = {
                "head_dim": 128,
                "num_key_value_heads": 32,
                "max_position_embeddings": 32768,
                **base,
            }
        rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
        require(isinstance(rope, dict), f"rope_parameters is {rope!r}: expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        require(
            kind == "default", f"rope type {kind!r} is not supported; plain rotary positions are"
        )
        for field, value in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("use_sliding_window", False),
        ):
            require(
                base.get(field, value) == value,
                f"{field} {base.get(field)!r} is not supported; expected {value!r}",
            )
        fields = {
            "model_type": base.get("model_type"),
            "rope_theta": rope.get("rope_theta", base.get("rope_theta", 10000.0)),
        }
        for field in SIZES + OPTIONAL_SIZES:
            if field in SIZES or base.get(field) is not None:
                fields[field] = base.get(field)
                require(
                    type(fields[field]) is int and fields[field] > 0,
                    f"{field} is {fields[field]!r}: expected a positive whole number",
                )
        fields["rms_norm_eps"] = base.get("rms_norm_eps", 1e-6)  # transformers' default for both
        for field in ("rope_theta", "rms_norm_eps"):
            require(
                isinstance(fields[field], (int, float)) and fields[field] > 0,
                f"{field} is {fields[field]!r}: expected a positive number",
            )
        if recast:
            parts = [
                raw.get(f"{part}_layer_indices") for part in ("encoder", "reasoning", "decoder")
            ]
            order = [i for part in parts if isinstance(part, list) for i in part]
            require(
                all(isinstance(part, list) for part in parts)
                and order == [*range(len(order))]
                and len(order) == fields["num_hidden_layers"],
                f"encoder, reasoning and decoder_layer_indices {parts}: expected layers 0 to {fields['num_hidden_layers'] - 1} in order",
            )
            stored = len(parts[0]), len(parts[2])
            require(
                split in (None, stored),
                f"--split {split and split[0]},{split and split[1]}: "
                f"this LoopUS checkpoint is split {stored[0]},{stored[1]} already; leave --split out",
            )
            split, loops, threshold = stored, raw.get("N", 20), raw.get("q_threshold", 0.6)
            require(
                type(loops) is int and loops > 0,
                f"N is {loops!r}: expected a positive whole number",
            )
            require(
                isinstance(threshold, (int, float)) and 0 <= threshold <= 1,
                f"q_threshold is {threshold!r}: expected 0 to 1",
            )
            fields |= {
                "from_checkpoint": True,
                "loops": loops,
                "exit_threshold": threshold,
                "base_model": str(raw.get("base_model_name_or_path") or ""),
            }
        encoder, decoder = split or (1, 1)
        return LoopUSConfig(encoder_layers=encoder, decoder_layers=decoder, **fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def published_config(model):
    """The published checkpoints' config.json (fields of the authors' LDSConfig) for a model."""
    c, dtype = model.config, str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    first, last = c.encoder_layers, c.num_hidden_layers - c.decoder_layers
    base = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[c.model_type]],
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    for field in ("model_type", *SIZES, *OPTIONAL_SIZES, "rms_norm_eps", "rope_theta"):
        base[field] = getattr(c, field)
    return {
        "architectures": ["LDSForCausalLM"],
        "model_type": "lds",
        "base_model_name_or_path": c.base_model,
        "base_config_dict": base,
        "encoder_layer_indices": [*range(first)],
        "reasoning_layer_indices": [*range(first, last)],
        "decoder_layer_indices": [*range(last, c.num_hidden_layers)],
        "N": c.loops,
        "q_threshold": c.exit_threshold,
        "q_eval_interval": 1,
        "halting_strategy": "threshold",
        "convergence_epsilon": 0.01,
        "torch_dtype": dtype,
    }


# ---- the hub: its client downloads, resumes and keeps; here is what it is asked for, and its errors as lines for people ----


# ---- weights ---------------------------------------------------------------------------------------------------------


def backbone_name(name, config):
    """The Hugging Face name of a backbone tensor: reasoning.layers.0.… of a model with 2 encoder layers is model.layers.2.…"""
    part, rest = name.split(".", 1)
    if rest.startswith("layers."):
        _, i, rest = rest.split(".", 2)
        first = {
            "encoder": 0,
            "reasoning": config.encoder_layers,
            "decoder": config.num_hidden_layers - config.decoder_layers,
        }[part]
        return f"model.layers.{int(i) + first}.{rest}"
    return rest if rest == "lm_head.weight" else f"model.{rest}"


def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None


@functools.lru_cache(1)
def unpickled(path):
    """The tensors of a foreign PyTorch file, mapped, by name; nothing but tensors may be in it."""
    try:
        return {
            name: x
            for name, x in torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            ).items()
            if isinstance(x, torch.Tensor)
        }
    except Exception as error:  # zip, pickle, OS and other errors, each with words of its own
        raise InputError(
            f"{path}: not a readable PyTorch file of tensors ({str(error).splitlines()[0]}); fetch it again"
        ) from None


def tensor_files(directory):
    """name of each stored tensor -> the file that holds it, from one file or from an index and its shards."""
    files = weight_files(
        [path.name for path in directory.iterdir()] if directory.is_dir() else [], directory
    )
    names_in = lambda path: set(
        (opened if path.suffix == ".safetensors" else unpickled)(path).keys()
    )
    index = next((directory / file for file in files if file.endswith(".json")), None)
    if index is None:
        require(
            len(files) == 1,
            f"{directory}: shards {files[:2]} … without their index; fetch it again",
        )
        return dict.fromkeys(names_in(directory / files[0]), directory / files[0])
    where = read_json(index).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) for file in where.values())
    ):
        raise InputError(f"{index}: no weight_map from tensor names to files")
    for file in sorted(set(where.values())):
        if not (directory / file).exists():
            raise InputError(
                f"{directory / file}: this shard is named in {index.name} but missing; fetch it again"
            )
        if missing := {name for name, f in where.items() if f == file} - names_in(directory / file):
            raise InputError(
                f"{directory / file}: tensor {min(missing)} is not in it, though {index.name} says so"
            )
    return {name: directory / file for name, file in where.items()}


STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored(path, name):
    """Shape and dtype of a tensor in a file."""
    if path.suffix == ".safetensors":
        with opened(path) as f:
            found = f.get_slice(name)
            return found.get_shape(), STORED.get(found.get_dtype(), found.get_dtype())
    found = unpickled(path)[name]
    return (
        (list(found.shape), found.dtype)
        if isinstance(found, torch.Tensor)
        else ("none", type(found).__name__)
    )


def read_tensor(path, name, shape, device, dtype):
    """One tensor, checked. In parts, the file opened anew for each, so that at no time much of it is mapped beside the copy."""
    found, kind = stored(path, name)
    require(
        found == list(shape),
        f"{path}: tensor {name} has shape {found}, the config asks for {list(shape)}",
    )
    require(kind in STORED.values(), f"{path}: tensor {name} is {kind}; expected F32, F16 or BF16")
    tensor = torch.empty(shape, device=device, dtype=dtype)
    rows = max(1, 2**22 // tensor[0].numel())
    for i in range(0, len(tensor), rows):
        if path.suffix == ".safetensors":
            with opened(path) as f:
                tensor[i : i + rows] = f.get_slice(name)[i : i + rows]
        else:
            tensor[i : i + rows] = unpickled(path)[name][i : i + rows]
    return tensor


def load_model(directory, split=None, device=None, dtype=None):
    """A LoopUS model from a Hugging Face backbone (gate and head new) or a LoopUS checkpoint in `directory`."""
    directory = Path(directory)
    config = read_config(directory / "config.json", split)
    files = {
        name: (path, name)
        for name, path in tensor_files(directory).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.from_checkpoint:  # early checkpoints call the block plateau
        files = {re.sub(r"^plateau\.", "reasoning.", name): place for name, place in files.items()}
    require(
        config.num_hidden_layers <= len(files),
        f"{directory}: config.json says {config.num_hidden_layers} layers, its files hold only {len(files)} tensors",
    )
    with torch.device("meta"), NoInit():
        model = LoopUS(config)
    wanted = {
        name: name if config.from_checkpoint else backbone_name(name, config)
        for name in model.state_dict()
        if config.from_checkpoint or not name.startswith(ADDED)
    }
    if (
        not config.from_checkpoint
        and "lm_head.weight" not in files
        and read_json(directory / "config.json").get("tie_word_embeddings", False)
    ):
        wanted["decoder.lm_head.weight"] = (
            "model.embed_tokens.weight"  # a tied head: a copy, to be trained alone
        )
    missing, extra = (
        [name for name in wanted.values() if name not in files],
        sorted(set(files) - set(wanted.values())),
    )
    require(
        not missing,
        f"{directory}: {len(missing)} tensors of this architecture are not in its files, {missing[:1]} first",
    )
    require(
        not extra,
        f"{directory}: {len(extra)} tensors are not of this architecture ({config.model_type}, {config.num_hidden_layers} layers), {extra[:1]} first",
    )
    if dtype is None:  # as stored, one dtype for the whole backbone
        dtype = stored(*files[wanted["encoder.embed_tokens.weight"]])[1]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, source in wanted.items():
        path, key = files[source]
        tensor = read_tensor(
            path,
            key,
            shapes[name],
            device or "cpu",
            torch.float32 if name.startswith(ADDED) else dtype,
        )
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    if not config.from_checkpoint:
        for module in (model.reasoning.gate, *model.q_head):
            module.to_empty(device=device or "cpu").reset_parameters()
        config.base_model = str(directory)
    return model.eval()


def load(name, *, split=None, device=None, dtype=None, plan=None):
    """(LoopUS, Tokenizer or None) from a preset's name, a local directory or a hub id (org/name, or org/name@revision).

    split: (encoder_layers, decoder_layers). device and dtype: where and as what the backbone's tensors are kept (None: the CPU, as
    stored); gate and head stay fp32. A directory without tokenizer files gives None. plan: called with the config before any weights
    are fetched or read. Raises InputError.
    """
    directory, known = find(
        name,
        lambda directory, known: (
            plan and plan(read_config(directory / "config.json", split or known))
        ),
    )
    model = load_model(directory, split or known, device, dtype)
    if not model.config.from_checkpoint:
        if split is None and known is None:
            print(
                f"{name}: no split is known for this model; 1 encoder and 1 decoder layer (--split E,D sets it)",
                file=sys.stderr,
            )
        if name in PRESETS or not Path(name).is_dir():
            model.config.base_model = (
                name if EMBEDDED in directory.parents else PRESETS.get(name, (name,))[0]
            )  # not this machine's path
    if not (directory / "tokenizer.json").exists():
        return model, None
    tokenizer, size = Tokenizer(directory), model.config.vocab_size
    require(
        max(tokenizer.vocab.values()) < size,
        f"{directory}: tokenizer.json has ids up to {max(tokenizer.vocab.values())}, the model only {size} embeddings",
    )
    return model, tokenizer


def save(model, tokenizer, directory, tensors=None):
    """Write the published layout: model.safetensors (tensors in the dtype they have), config.json, the tokenizer's files.

    Each file is written beside and renamed, so that none is ever half written; to replace a whole checkpoint at once, save into a
    new directory and rename that, as train.py does. tensors: instead of the model's own. Raises InputError.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "config.json", json.dumps(published_config(model), indent=2) + "\n")
        for name, content in (tokenizer.files if tokenizer else {}).items():
            write_whole(directory / name, lambda path: path.write_bytes(content))
        state = {
            name: tensor.contiguous() for name, tensor in (tensors or model.state_dict()).items()
        }
        write_whole(
            directory / "model.safetensors",
            lambda path: save_file(state, path, metadata={"format": "pt"}),
        )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{directory}: could not be written ({error}); free space or choose another directory"
        ) from None


# ---- checkpoints of a run: the published layout, and beside it what training needs to go on ---------------------------


# ---- tokenizers ------------------------------------------------------------------------------------------------------


# ---- python load_weights.py DIR --------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Load a model, print what was found, continue one prompt."
    )
    parser.add_argument(
        "directory",
        nargs="?",
        help="a Hugging Face backbone or LoopUS checkpoint: preset, directory or hub id",
    )
    parser.add_argument("--list", action="store_true", help="list the presets instead")
    parser.add_argument("--split", metavar="E,D", type=parse_split)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()
    if args.list:
        print(f"{'preset':22} {'hub id':36} revision  split  parameters  bfloat16  licence")
        for name, (source, revision, split, billions, licence) in PRESETS.items():
            print(
                f"{name:22} {'comes with the code' if EMBEDDED in Path(source).parents else source:36} {revision or '-':8}  {'{},{}'.format(*split) if split else 'own':5} "
                f"{billions:9.4g} B {billions * 2:6.4g} GB  {licence}"
            )
        return
    if not args.directory:
        parser.error("name a preset, a directory or a hub id, or give --list")
    directory, known = find(args.directory)
    model, tokenizer = load(str(directory), split=args.split or known)
    c, count = model.config, lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    mid, end = c.encoder_layers, c.num_hidden_layers - c.decoder_layers
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"""{directory}
  architecture  {c.model_type}, {c.num_hidden_layers} layers, {c.hidden_size} wide, {c.num_attention_heads} query / {c.num_key_value_heads} key-value heads of {c.head_dim}, context {c.max_position_embeddings}
  kind          {"LoopUS checkpoint" if c.from_checkpoint else "plain backbone (gate and head are new, untrained)"}
  encoder       layers 0-{mid - 1}, {count(model.encoder):.1f} M parameters with the embedding of {c.vocab_size}
  reasoning     layers {mid}-{end - 1}, {count(model.reasoning.layers):.1f} M, run up to {c.loops} times; gate {count(model.reasoning.gate):.2f} M, head {count(model.q_head) * 1e3:.1f} k
  decoder       layers {end}-{c.num_hidden_layers - 1}, {count(model.decoder):.1f} M with the output head
  stored as     {str(model.decoder.norm.weight.dtype).removeprefix("torch.")}, {size / 1e9:.2f} GB in memory
  tokenizer     {"none" if tokenizer is None else f"{len(tokenizer.vocab)} tokens, {'SentencePiece-style' if tokenizer.byte_fallback else 'byte-level'} BPE, bos {tokenizer.bos_id}{' (added)' if tokenizer.add_bos else ''}, eos {tokenizer.eos_id}"}""")
    if tokenizer is None:
        return
    ids, budget = tokenizer.encode(args.prompt, bos=tokenizer.add_bos), min(c.loops, 8)
    require(ids, "--prompt: empty; give at least one character")
    if not c.from_checkpoint:  # the backbone itself: one loop, the gate wide open
        model.reasoning.gate.A_log.data.fill_(-torch.inf)
        budget = 1
    steps = model.generate(torch.tensor([ids]), 12, budget=budget, halt="none", temperature=0)
    text = tokenizer.decode(ids[tokenizer.add_bos :] + [step.tokens.item() for step in steps])
    print(
        f"  continued     {text!r} ({f'{budget} loops' if c.from_checkpoint else 'the backbone, without the gate'})"
    )


if __name__ == "__main__":
    run(main)

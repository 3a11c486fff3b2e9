"""A Hugging Face directory <-> this model.

    python load_weights.py DIR      print what is in a directory, and continue a prompt with it
    python load_weights.py --list   the presets: models with a short name
    python load_weights.py DIR --export NEW --as huggingface      the trained backbone alone

Two kinds of directory are read. A backbone is a pretrained Llama, Qwen3 or Phi-3 (Phi-4 is one):
its layers are dealt out to encoder, reasoning block and decoder, and gate and confidence head are
new. A LoopUS checkpoint has all of these; `save` writes it in the layout that the paper's authors
published.

    config.json        shape of the model           read_config, published_config
    model.safetensors  the tensors, by name         backbone_name, tensor_files, load_model
    tokenizer.json     the vocabulary               Tokenizer, in appendix/tokenizer.py

Loading is strict. Every tensor of the model must be in the files, in the shape that config.json
gives, and there may be no other: a model without some of its parts talks nonsense, and says nothing
of it.
"""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from appendix.errors import InputError, require, run_main
from appendix.fast import split_single_token_products
from appendix.files import read_json, shorten, write_bytes, write_text, write_whole
from appendix.flags import FlagParser, parse_split
from appendix.hub import EMBEDDED, PRESETS, find, public_name
from appendix.memory import build_empty, count_parameters
from appendix.tensors import (
    DTYPES,
    close_bin,
    find_index,
    read_index,
    read_rows,
    shape_and_dtype,
    tensor_names,
    weight_files,
)
from appendix.tokenizer import Tokenizer
from loopus import ADDED, LoopUSConfig

# ---- config.json -> LoopUSConfig -----------------------------------------------------------------

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
LARGEST = 2**31 - 1  # far above the sizes of any model

# What transformers takes where a Qwen3's config.json is silent.
QWEN3_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768}

# What the layers of loopus.py cannot do otherwise.
SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def read_config(path, split=None):
    """config.json of a backbone or of a LoopUS checkpoint -> LoopUSConfig. Raises InputError.

    split: (encoder layers, decoder layers) of a backbone; a checkpoint knows its own.
    """
    raw = read_json(path)
    try:
        if raw.get("model_type") == "lds":  # as the authors named it
            return checkpoint_config(raw, split)
        encoder, decoder = split or (1, 1)
        fields = backbone_fields(raw)
        return LoopUSConfig(encoder_layers=encoder, decoder_layers=decoder, **fields)
    except InputError as error:
        raise InputError(f"{path}: {error!s:.500}") from None  # a value may be very long


def backbone_fields(raw):
    """A backbone's config.json -> the fields of LoopUSConfig that it decides."""
    if raw.get("model_type") == "qwen3":
        raw = QWEN3_DEFAULTS | raw
    for field, value in SUPPORTED.items():
        found = raw.get(field, value)
        require(found == value, f"{field} {shorten(found)} is not supported; expected {value!r}")
    fields = {"model_type": raw.get("model_type"), **rope_fields(raw)}
    for field in SIZES:
        fields[field] = whole_number(raw, field)
    for field in OPTIONAL_SIZES:
        if raw.get(field) is not None:
            fields[field] = whole_number(raw, field)
    check_sizes(fields)
    check_window(raw, fields)
    fields["rms_norm_eps"] = positive_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6))
    return fields


def check_window(raw, fields):
    """InputError if a Phi-3's layers see less than its whole context."""
    window = raw.get("sliding_window")
    longest = fields.get("max_position_embeddings", LoopUSConfig.max_position_embeddings)
    if raw.get("model_type") == "phi3" and window is not None:
        require(
            whole_number(raw, "sliding_window") >= longest,
            f"sliding_window {window} is smaller than the context, {longest}: not supported",
        )


def check_sizes(fields):
    """InputError if the sizes, each possible, make a tensor without numbers, or one too large."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim", width // heads)
    require(head_dim >= 1, f"hidden_size {width} is smaller than num_attention_heads {heads}")
    sizes = (fields["vocab_size"], fields["intermediate_size"], heads * head_dim)
    require(
        width * max(sizes) <= 2**40,  # so that its bytes can be counted
        f"hidden_size {width}, with the other sizes, makes tensors of {width * max(sizes)} numbers",
    )


LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def rope_fields(raw):
    """What config.json says of rotary positions; transformers 5 writes it into rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict), f"rope_parameters is {shorten(rope)}: expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"rope type {shorten(kind)} is not supported; plain rotary positions and llama3's are",
    )

    def number(field, default):
        return positive_number(field, rope.get(field, raw.get(field, default)))

    fields = {
        "rope_theta": number("rope_theta", 10000.0),
        "partial_rotary_factor": number("partial_rotary_factor", 1.0),
    }
    if kind == "llama3":
        scaling = {name: positive_number(name, rope.get(name)) for name in LLAMA3_SCALING}
        require(
            scaling["low_freq_factor"] < scaling["high_freq_factor"],
            f"low_freq_factor {scaling['low_freq_factor']} is not below high_freq_factor "
            f"{scaling['high_freq_factor']}",
        )
        fields["rope_scaling"] = scaling
    return fields


def checkpoint_config(raw, split):
    """A LoopUS checkpoint's config.json -> LoopUSConfig. split: what the user asks for, or None."""
    base = raw.get("base_config_dict")
    require(
        isinstance(base, dict),
        f"base_config_dict is {shorten(base)}: expected the backbone's config",
    )
    fields = backbone_fields(base)
    encoder, decoder = checkpoint_split(raw, fields["num_hidden_layers"])
    if split not in (None, (encoder, decoder)):
        raise InputError(
            f"--split {split[0]},{split[1]}: this LoopUS checkpoint is split {encoder},{decoder} "
            "already; leave --split out"
        )
    threshold = raw.get("q_threshold", 0.6)
    require(
        type(threshold) in (int, float) and 0 <= threshold <= 1,
        f"q_threshold is {shorten(threshold)}: expected 0 to 1",
    )
    base_model = raw.get("base_model_name_or_path")
    return LoopUSConfig(
        encoder_layers=encoder,
        decoder_layers=decoder,
        loops=whole_number({"N": 20} | raw, "N"),
        exit_threshold=threshold,
        base_model=base_model if isinstance(base_model, str) else "",
        from_checkpoint=True,
        **fields,
    )


def checkpoint_split(raw, num_hidden_layers):
    """(encoder layers, decoder layers), from the three lists that share out the layers."""
    names = ("encoder_layer_indices", "reasoning_layer_indices", "decoder_layer_indices")
    parts = [raw.get(name) for name in names]
    layers = []
    for part in parts:
        layers += part if isinstance(part, list) else [None]
    require(
        len(layers) == num_hidden_layers and layers == list(range(len(layers))),
        f"{', '.join(names)} are {shorten(parts, 200)}: expected layers 0 to "
        f"{num_hidden_layers - 1} in order",
    )
    encoder, _, decoder = parts
    return len(encoder), len(decoder)


def whole_number(raw, field):
    value = raw.get(field)
    # type(), since True is an int for isinstance.
    require(
        type(value) is int and 1 <= value <= LARGEST,
        f"{field} is {shorten(value)}: expected a whole number from 1 to {LARGEST}",
    )
    return value


def positive_number(field, value):
    require(  # NaN, which JSON files may hold, compares as False
        type(value) in (int, float) and 1e-30 < value < 1e30,
        f"{field} is {shorten(value)}: expected a positive number",
    )
    return float(value)


# ---- Hugging Face's names <-> ours ---------------------------------------------------------------


def backbone_name(name, config):
    """One of this model's names -> the name of the same tensor in a backbone's files.

    A backbone numbers its layers through, this model from 0 in each of its three parts. With 22
    layers, 2 of them in the encoder and 1 in the decoder:

        encoder.embed_tokens.weight              model.embed_tokens.weight
        encoder.layers.1.mlp.up_proj.weight      model.layers.1.mlp.up_proj.weight
        reasoning.layers.0.mlp.up_proj.weight    model.layers.2.mlp.up_proj.weight
        decoder.layers.0.mlp.up_proj.weight      model.layers.21.mlp.up_proj.weight
        decoder.norm.weight                      model.norm.weight
        decoder.lm_head.weight                   lm_head.weight

    The gate and the confidence head (names in loopus.ADDED) are in no backbone.
    """
    part, rest = name.split(".", 1)
    if rest == "lm_head.weight":
        return rest
    if not rest.startswith("layers."):
        return f"model.{rest}"
    first_layer = {
        "encoder": 0,
        "reasoning": config.encoder_layers,
        "decoder": config.num_hidden_layers - config.decoder_layers,
    }
    _, i, rest = rest.split(".", 2)
    return f"model.layers.{first_layer[part] + int(i)}.{rest}"


def stored_names(model, has_head, is_tied):
    """This model's names -> the names in its files, for all tensors that the files must have.

    has_head, is_tied: do the files have an output head, and does config.json say that the embedding
    serves as one?
    """
    config = model.config
    if config.from_checkpoint:
        return {name: fused_name(name, config) for name in model.state_dict()}
    pretrained = [name for name in model.state_dict() if not name.startswith(ADDED)]
    names = {name: fused_name(backbone_name(name, config), config) for name in pretrained}
    if is_tied and not has_head:  # the head is a copy, which is trained without the embedding
        names["decoder.lm_head.weight"] = "model.embed_tokens.weight"
    return names


# ---- fused tensors -------------------------------------------------------------------------------
#
# Phi-3's family keeps the projections that read the same input in one tensor, row below row.


def fused(config):
    """{name of a fused tensor: {part: its rows}}; none but for Phi-3's family."""
    if config.model_type != "phi3":
        return {}
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        },
    }


def fused_name(name, config):
    """The name of the tensor that holds this one: another where it is a part of a fused one."""
    for whole, parts in fused(config).items():
        for part in parts:
            name = name.replace(f".{part}.", f".{whole}.")
    return name


def rows_in_fused(name, shape, config):
    """Where a tensor's rows are in the stored one: its first row, and how many rows that has."""
    for parts in fused(config).values():
        first = 0
        for part, rows in parts.items():
            if f".{part}." in name:
                return first, sum(parts.values())
            first += rows
    return 0, shape[0]


def fuse(state, config):
    """{name: tensor} of a model -> the same as files hold it, parts put together."""
    joined = {}
    for name, tensor in state.items():
        joined.setdefault(fused_name(name, config), []).append(tensor)
    return {
        name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in joined.items()
    }


# ---- which file holds which tensor ---------------------------------------------------------------


def tensor_files(directory):
    """{name of a tensor: the file that holds it}, from one file or from an index and its shards."""
    files = weight_files([path.name for path in directory.iterdir()], directory)
    index = find_index(files)
    if index is None:
        require(
            len(files) == 1,
            f"{directory}: shards {files[:2]} … without their index; fetch it again",
        )
        path = directory / files[0]
        return dict.fromkeys(tensor_names(path), path)
    weight_map = read_index(directory / index)
    for file in sorted(set(weight_map.values())):
        names = {name for name in weight_map if weight_map[name] == file}
        check_shard(directory / file, names, index)
    return {name: directory / file for name, file in weight_map.items()}


def check_shard(path, names, index):
    """InputError if a shard is missing, or lacks a tensor that the index says is in it."""
    require(
        path.is_file(),
        f"{path}: this shard is named in {index} but missing; fetch it again",
    )
    missing = names - tensor_names(path)
    if missing:
        raise InputError(
            f"{path}: tensor {min(missing)!r} is not in it, though {index} says so; fetch it again"
        )


def find_tensors(directory, config):
    """{name: (file, name in the file)} of all stored tensors that are parameters."""
    found = {}
    for stored, path in tensor_files(directory).items():
        if stored.endswith("rotary_emb.inv_freq"):  # in old files; the angles are computed here
            continue
        name = stored
        if config.from_checkpoint:  # the first published checkpoints call the block plateau
            name = re.sub(r"^plateau\.", "reasoning.", stored)
        found[name] = (path, stored)
    return found


# ---- reading one tensor --------------------------------------------------------------------------


def read_tensor(path, name, shape, device, dtype, place):
    """One tensor, checked and converted. place: as from `rows_in_fused`.

    It is read in parts, and each part is let go before the next is read, so that loading takes
    little more memory than the model.
    """
    first, stored_rows = place
    found, found_dtype = shape_and_dtype(path, name)
    expected = [stored_rows, *shape[1:]]
    require(
        found == expected,
        f"{path}: tensor {name} has shape {found}, the config asks for {expected}",
    )
    require(
        found_dtype in DTYPES.values(),
        f"{path}: tensor {name} is {found_dtype}; expected F32, F16 or BF16",
    )
    tensor = torch.empty(shape, device=device, dtype=dtype)
    rows = max(1, 2**22 // tensor[0].numel())
    for start in range(0, len(tensor), rows):
        stop = min(start + rows, len(tensor))
        tensor[start:stop] = read_rows(path, name, first + start, first + stop)
    return tensor


# ---- load ----------------------------------------------------------------------------------------


def load_model(directory, split=None, device=None, dtype=None):
    """The model in a local directory: a backbone (gate and head new) or a LoopUS checkpoint."""
    config = read_config(directory / "config.json", split)
    found = find_tensors(directory, config)
    require(
        config.num_hidden_layers <= len(found),
        f"{directory}: config.json says {config.num_hidden_layers} layers, "
        f"its files hold only {len(found)} tensors",
    )
    # The model is built without memory, and its tensors are put in one by one as they are read.
    model = build_empty(config)
    names = stored_names(model, "lm_head.weight" in found, ties_head(directory))
    require_same(directory, config, set(names.values()), set(found))
    if dtype is None:  # as stored, one dtype for the whole backbone
        dtype = shape_and_dtype(*found[names["encoder.embed_tokens.weight"]])[1]
    device = device or "cpu"
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    for name, stored in names.items():
        kept_as = torch.float32 if name.startswith(ADDED) else dtype
        place = rows_in_fused(name, shapes[name], config)
        tensor = read_tensor(*found[stored], shapes[name], device, kept_as, place)
        model.load_state_dict({name: tensor}, strict=False, assign=True)
    close_bin()
    if not config.from_checkpoint:
        for module in (model.reasoning.gate, *model.q_head):
            module.to_empty(device=device).reset_parameters()
    return model.eval()


def ties_head(directory):
    return read_json(directory / "config.json").get("tie_word_embeddings") is True


def require_same(directory, config, expected, found):
    """InputError unless the names of the model's tensors are exactly those found in its files."""
    missing = sorted(expected - found)
    extra = sorted(found - expected)
    require(
        not missing,
        f"{directory}: {len(missing)} tensors of this architecture are not in its files, "
        f"{missing[:1]} first",
    )
    require(
        not extra,
        f"{directory}: {len(extra)} tensors are not of this architecture "
        f"({config.model_type}, {config.num_hidden_layers} layers), {shorten(extra[:1])} first",
    )


def load_tokenizer(directory, vocab_size):
    """The tokenizer in a directory, or None. InputError if the model lacks some of its tokens."""
    if not (directory / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer(directory)
    require(
        tokenizer.max_id < vocab_size,
        f"{directory}: token {shorten(tokenizer.max_token)} has the id {tokenizer.max_id}, "
        f"the model has only {vocab_size} embeddings, ids 0 to {vocab_size - 1}",
    )
    return tokenizer


def load(name, *, split=None, device=None, dtype=None, plan=None):
    """A preset, a local directory or a hub id (org/name, org/name@revision) -> (LoopUS, Tokenizer).

    split: (encoder layers, decoder layers) of a backbone; None: the preset's, else (1, 1).
    device, dtype: where and as what the backbone's tensors are kept; None: the CPU, as stored. Gate
    and confidence head are always fp32.
    plan: is called with the LoopUSConfig before any weights are fetched or read.
    The tokenizer is None where there is no tokenizer.json. Raises InputError.
    """
    name = str(name)
    if plan is not None:
        directory, known = find(name, weights=False)
        plan(read_config(directory / "config.json", split or known))
    directory, known = find(name)
    model = load_model(directory, split or known, device, dtype)
    if not model.config.from_checkpoint:
        model.config.base_model = public_name(name, directory)
        if split is None and known is None:
            print(
                f"{name}: no split is known for this model; 1 encoder and 1 decoder layer "
                "(--split E,D sets it)",
                file=sys.stderr,
            )
    split_single_token_products(model)  # so that a CPU's threads share the work of one token
    return model, load_tokenizer(directory, model.config.vocab_size)


# ---- save ----------------------------------------------------------------------------------------


def published_config(model, tokenizer=None):
    """config.json in the published checkpoints' layout (the fields of the authors' LDSConfig)."""
    config = model.config
    dtype = str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    architecture = {
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "phi3": "Phi3ForCausalLM",
    }[config.model_type]
    # transformers 5 reads rope_parameters, those before it the fields beside.
    scaling = {}
    partial = {}
    if config.rope_scaling:
        original = int(config.rope_scaling["original_max_position_embeddings"])
        scaling = {"rope_type": "llama3"} | config.rope_scaling
        scaling["original_max_position_embeddings"] = original
    if config.partial_rotary_factor != 1:
        partial = {"partial_rotary_factor": config.partial_rotary_factor}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling | partial
    base = {
        "architectures": [architecture],
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": rope,
        **({"rope_scaling": scaling} if scaling else {}),
        **partial,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    for field in ("model_type", *SIZES, *OPTIONAL_SIZES, "rms_norm_eps", "rope_theta"):
        base[field] = getattr(config, field)
    if config.model_type == "phi3":
        base["pad_token_id"] = None  # transformers' default is an id that others may not have
    # Some backbones name their first and last tokens in config.json only.
    if tokenizer is not None and tokenizer.bos_id is not None:
        base["bos_token_id"] = tokenizer.bos_id
    if tokenizer is not None and tokenizer.eos_ids:
        base["eos_token_id"] = list(tokenizer.eos_ids)
    layers = list(range(config.num_hidden_layers))
    first = config.encoder_layers  # of the reasoning block
    last = config.num_hidden_layers - config.decoder_layers  # of the decoder, the first one
    return {
        "architectures": ["LDSForCausalLM"],
        "model_type": "lds",
        "base_model_name_or_path": config.base_model,
        "base_config_dict": base,
        "encoder_layer_indices": layers[:first],
        "reasoning_layer_indices": layers[first:last],
        "decoder_layer_indices": layers[last:],
        "N": config.loops,
        "q_threshold": config.exit_threshold,
        "q_eval_interval": 1,
        "halting_strategy": "threshold",
        "convergence_epsilon": 0.01,
        "torch_dtype": dtype,
    }


def save(model, tokenizer, directory, tensors=None):
    """Write a LoopUS checkpoint: config.json, the tokenizer's files, and model.safetensors.

    The tensors are written in the dtype they have. Each file is written beside and renamed, so that
    none is ever half written; to replace a whole checkpoint at once, save into a new directory and
    rename that, as train.py does.
    tensors: {name: tensor} instead of the model's own. Raises InputError.
    """
    state = model.state_dict() if tensors is None else tensors
    write_model(directory, published_config(model, tokenizer), state, model, tokenizer)


def export_backbone(model, tokenizer, directory):
    """Write the backbone alone, as an ordinary Hugging Face model without gate, head and loops.

    It computes what `forward_pretrained` does: one ungated pass. Raises InputError.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(ADDED):
            state[backbone_name(name, model.config)] = tensor
    config = published_config(model, tokenizer)["base_config_dict"]
    write_model(directory, config, state, model, tokenizer)


def write_model(directory, config, state, model, tokenizer):
    """Write config.json, the tokenizer's files and the tensors {name: tensor}."""
    directory = Path(directory)
    state = fuse(state, model.config)
    state = {name: tensor.contiguous() for name, tensor in state.items()}

    def write_weights(path):
        save_file(state, path, metadata={"format": "pt"})

    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            for name, content in tokenizer.files.items():
                write_bytes(directory / name, content)
        write_whole(directory / "model.safetensors", write_weights)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{directory}: could not be written ({error}); free space or choose another directory"
        ) from None


# ---- python load_weights.py DIR ------------------------------------------------------------------


def parse_args():
    parser = FlagParser("Load a model, print what was found, and continue one prompt.")
    parser.add_argument(
        "directory",
        nargs="?",
        help="a Hugging Face backbone or a LoopUS checkpoint: preset, directory or hub id",
    )
    parser.add_argument("--list", action="store_true", help="list the presets instead")
    parser.add_argument("--split", metavar="E,D", type=parse_split)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--export", type=Path, metavar="NEW", help="a new folder to write it to")
    parser.add_argument(
        "--as",
        dest="layout",
        choices=["loopus", "huggingface"],
        default="loopus",
        help="of --export: the published LoopUS layout, or an ordinary Hugging Face model, whose "
        "one pass is the trained layers run once, without gate and head",
    )
    args = parser.parse_args()
    if not args.directory and not args.list:
        parser.error("name a preset, a directory or a hub id, or give --list")
    return args


def print_presets():
    print(f"{'preset':22} {'hub id':36} split  parameters  bfloat16  licence")
    for name, preset in PRESETS.items():
        is_embedded = EMBEDDED in Path(preset.source).parents
        source = "comes with the code" if is_embedded else preset.source
        split = "own" if preset.split is None else "{},{}".format(*preset.split)
        size = f"{preset.billions:9.4g} B {preset.billions * 2:6.4g} GB"
        print(f"{name:22} {source:36} {split:5} {size}  {preset.licence}")


def print_model(model):
    c = model.config
    first = c.encoder_layers
    last = c.num_hidden_layers - c.decoder_layers
    kind = "plain backbone (gate and head are new, untrained)"
    if c.from_checkpoint:
        kind = "LoopUS checkpoint"
    print(
        f"  architecture  {c.model_type}, {c.num_hidden_layers} layers, {c.hidden_size} wide, "
        f"{c.num_attention_heads} query / {c.num_key_value_heads} key-value heads of {c.head_dim}, "
        f"context {c.max_position_embeddings}"
    )
    print(f"  kind          {kind}")
    print(
        f"  encoder       layers 0-{first - 1}, {millions(model.encoder):.1f} M parameters "
        f"with the embedding of {c.vocab_size}"
    )
    print(
        f"  reasoning     layers {first}-{last - 1}, {millions(model.reasoning.layers):.1f} M, "
        f"run up to {c.loops} times; gate {millions(model.reasoning.gate):.2f} M, "
        f"head {millions(model.q_head) * 1e3:.1f} k"
    )
    print(
        f"  decoder       layers {last}-{c.num_hidden_layers - 1}, "
        f"{millions(model.decoder):.1f} M with the output head"
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    print(f"  stored as     {dtype}, {size / 1e9:.2f} GB in memory")


def millions(module):
    return count_parameters(module) / 1e6


def print_tokenizer(tokenizer):
    if tokenizer is None:
        print("  tokenizer     none")
        return
    kind = "SentencePiece-style" if tokenizer.byte_fallback else "byte-level"
    added = " (added)" if tokenizer.add_bos else ""
    print(
        f"  tokenizer     {len(tokenizer.vocab)} tokens, {kind} BPE, "
        f"bos {tokenizer.bos_id}{added}, eos {tokenizer.eos_id}"
    )


def print_continuation(model, tokenizer, prompt):
    ids = tokenizer.encode(prompt, bos=tokenizer.add_bos)
    require(ids, "--prompt: empty; give at least one character")
    budget = min(model.config.loops, 8)
    how = f"{budget} loops"
    if not model.config.from_checkpoint:
        # One loop with a gate that is wide open (α = 1) is the backbone as it was pretrained.
        model.reasoning.gate.open_fully()
        budget = 1
        how = "the backbone, without the gate"
    steps = model.generate(torch.tensor([ids]), 12, budget=budget, halt="none", temperature=0)
    new = [step.tokens.item() for step in steps]
    text = tokenizer.decode(ids[tokenizer.add_bos :] + new)
    print(f"  continued     {text!r} ({how})")


def export(model, tokenizer, directory, layout):
    """Write the model into a new folder, in one of the two layouts."""
    require(
        not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
        f"--export {directory}: is there already; nothing is overwritten, name another folder",
    )
    if layout == "loopus":
        save(model, tokenizer, directory)
    else:
        export_backbone(model, tokenizer, directory)
    print(f"  written       {directory}, in the layout of {layout}")


def main():
    args = parse_args()
    if args.list:
        print_presets()
        return
    model, tokenizer = load(args.directory, split=args.split)
    print(find(args.directory)[0])
    print_model(model)
    print_tokenizer(tokenizer)
    if args.export:
        export(model, tokenizer, args.export, args.layout)
    if tokenizer is not None:
        print_continuation(model, tokenizer, args.prompt)


if __name__ == "__main__":
    run_main(main)

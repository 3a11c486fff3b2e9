"""Everything that crosses the disk or the hub: presets, downloads, config.json, safetensors, tokenizers, checkpoints.

    python load_weights.py --list   the presets
    python load_weights.py DIR      print what is there, and continue one prompt

A Hugging Face backbone loads by a change of prefix (`layout`), a LoopUS checkpoint as it is. Loading is strict: every tensor
must be there in the shape the config gives, and nothing else may be.
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import regex                                  # comes with tiktoken
import tiktoken
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from loopus import InputError, LoopUS, LoopUSConfig, free_memory, require

EMBEDDED = Path(__file__).resolve().parent / "assets"    # what comes with this repository
# name: (hub id or directory, revision, (encoder layers, decoder layers), billions of parameters, licence). The splits are the paper's (App. A.1); a
# LoopUS checkpoint knows its own. Parameters as loaded: with an output head of its own.
PRESETS = {
    "tiny": (EMBEDDED / "tiny" / "base", None, (1, 1), 0.0002, "MIT"),
    "tiny-loopus": (EMBEDDED / "tiny" / "loopus", None, None, 0.0002, "MIT"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "main", (2, 1), 0.16, "Apache-2.0"),
    "tinyllama": ("TinyLlama/TinyLlama_v1.1", "main", (1, 1), 1.10, "Apache-2.0"),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "main", (2, 1), 2.03, "Apache-2.0"),
    "qwen3-4b": ("Qwen/Qwen3-4B", "main", (2, 1), 4.41, "Apache-2.0"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "main", (6, 1), 8.19, "Apache-2.0"),
    "tinyllama-loopus": ("Thrillcrazyer/TinyLlama_v1.1_LoopUS", "main", None, 1.10, "see its page"),
    "qwen3-1.7b-loopus": ("Thrillcrazyer/Qwen3_1.7B_LoopUS", "main", None, 2.03, "see its page"),
    "qwen3-1.7b-loopus-sft": ("Thrillcrazyer/Qwen3_1.7B_LoopUS_SFT", "main", None, 2.03, "see its page"),
    "qwen3-4b-loopus": ("Thrillcrazyer/Qwen3-4B_LoopUS", "main", None, 4.41, "see its page"),
    "qwen3-8b-loopus": ("Thrillcrazyer/Qwen3-8B_LoopUS", "main", None, 8.19, "see its page"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt")

# ---- for every script: errors for people, and the machine's defaults -------------------------------------------------

def run(main):
    """Run a script's main: bad input is one line and exit code 2, Ctrl-C is exit code 130, neither a traceback."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                   # `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                  # a full disk while the log is written, say
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)

def number(kind, low, high=float("inf")):
    """An argparse type: a number from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {'a whole number' if kind is int else 'a number'} "
                                             + (f"of at least {low}" if high == float("inf") else f"from {low} to {high}"))
        return value
    return parse

def add_model_flags(parser, model_help, model=None):
    """The flags every script shares."""
    parser.add_argument("--model", default=model, help=model_help)
    parser.add_argument("--split", metavar="E,D", type=parse_split, help="layers of encoder and decoder (default: the preset's; else 1,1)")
    parser.add_argument("--device", default="auto", help="auto (CUDA, then Apple's mps, then the CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the computation (auto: bfloat16 where the hardware multiplies it faster)")
    parser.add_argument("--seed", type=int, default=1337)

def parse_split(text):
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected two counts of layers, as in 2,1")
    return tuple(map(int, text.split(",")))

def pick_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not usable here ({(str(error) or type(error).__name__).splitlines()[0]}); try --device cpu") from None
    return device

def pick_dtype(name, device):
    """auto: bfloat16 where the hardware has instructions for it, float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32

# ---- config.json -----------------------------------------------------------------------------------------------------

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")

def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}")
    return value

def place(path, write):
    """Have `write` make a file beside `path`, and rename it: none is ever half written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def write_text(path, text):
    place(path, lambda partial: partial.write_text(text, encoding="utf-8"))

def read_config(path, split=None):
    """config.json of a backbone or of a LoopUS checkpoint -> LoopUSConfig. split: what the user asks for."""
    raw = read_json(path)
    recast = raw.get("model_type") == "lds"
    base = raw.get("base_config_dict") if recast else raw
    try:
        require(isinstance(base, dict), f"base_config_dict is {base!r}: expected the backbone's config")
        if base.get("model_type") == "qwen3":            # what transformers takes where its file is silent
            base = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, **base}
        rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
        require(isinstance(rope, dict), f"rope_parameters is {rope!r}: expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        require(kind == "default", f"rope type {kind!r} is not supported; plain rotary positions are")
        for field, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False)):
            require(base.get(field, value) == value, f"{field} {base.get(field)!r} is not supported; expected {value!r}")
        fields = {"model_type": base.get("model_type"), "rope_theta": rope.get("rope_theta", base.get("rope_theta", 10000.0))}
        for field in SIZES + OPTIONAL_SIZES:
            if field in SIZES or base.get(field) is not None:
                fields[field] = base.get(field)
                require(type(fields[field]) is int and fields[field] > 0, f"{field} is {fields[field]!r}: expected a positive whole number")
        fields["rms_norm_eps"] = base.get("rms_norm_eps", 1e-6)          # transformers' default for both
        for field in ("rope_theta", "rms_norm_eps"):
            require(isinstance(fields[field], (int, float)) and fields[field] > 0, f"{field} is {fields[field]!r}: expected a positive number")
        if recast:
            parts = [raw.get(f"{part}_layer_indices") for part in ("encoder", "reasoning", "decoder")]
            order = [i for part in parts if isinstance(part, list) for i in part]
            require(all(isinstance(part, list) for part in parts) and order == [*range(len(order))] and len(order) == fields["num_hidden_layers"],
                    f"encoder, reasoning and decoder_layer_indices {parts}: expected layers 0 to {fields['num_hidden_layers'] - 1} in order")
            stored = len(parts[0]), len(parts[2])
            require(split in (None, stored), f"--split {split and split[0]},{split and split[1]}: "
                    f"this LoopUS checkpoint is split {stored[0]},{stored[1]} already; leave --split out")
            split, loops, threshold = stored, raw.get("N", 20), raw.get("q_threshold", 0.6)
            require(type(loops) is int and loops > 0, f"N is {loops!r}: expected a positive whole number")
            require(isinstance(threshold, (int, float)) and 0 <= threshold <= 1, f"q_threshold is {threshold!r}: expected 0 to 1")
            fields |= {"from_checkpoint": True, "loops": loops, "exit_threshold": threshold, "base_model": str(raw.get("base_model_name_or_path") or "")}
        encoder, decoder = split or (1, 1)
        return LoopUSConfig(encoder_layers=encoder, decoder_layers=decoder, **fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None

def published_config(model):
    """The published checkpoints' config.json (fields of the authors' LDSConfig) for a model."""
    c, dtype = model.config, str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    first, last = c.encoder_layers, c.num_hidden_layers - c.decoder_layers
    base = {"architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[c.model_type]], "hidden_act": "silu",
            "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "tie_word_embeddings": False, "torch_dtype": dtype}
    for field in ("model_type", *SIZES, *OPTIONAL_SIZES, "rms_norm_eps", "rope_theta"):
        base[field] = getattr(c, field)
    return {"architectures": ["LDSForCausalLM"], "model_type": "lds", "base_model_name_or_path": c.base_model, "base_config_dict": base,
            "encoder_layer_indices": [*range(first)], "reasoning_layer_indices": [*range(first, last)],
            "decoder_layer_indices": [*range(last, c.num_hidden_layers)], "N": c.loops, "q_threshold": c.exit_threshold,
            "q_eval_interval": 1, "halting_strategy": "threshold", "convergence_epsilon": 0.01, "torch_dtype": dtype}

# ---- the hub: its client downloads, resumes and keeps; here is what it is asked for, and its errors as lines for people ----

@contextlib.contextmanager
def hub_errors(name):
    """What goes wrong with the hub, as a line that says what to do."""
    from huggingface_hub import constants, errors
    try:
        yield
    except Exception as error:
        chain, status = [error], getattr(getattr(error, "response", None), "status_code", None)
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        is_a = lambda *kinds: any(isinstance(e, kinds) for e in chain)
        words = (str(chain[-1]) or type(chain[-1]).__name__).splitlines()[0]
        if is_a(errors.GatedRepoError):
            words = "gated: accept its terms on its page, then set HF_TOKEN to a token of your account"
        elif is_a(errors.OfflineModeIsEnabled):
            words = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of it; unset it, or fetch it once where there is a network"
        elif status == 401 and not is_a(errors.RepositoryNotFoundError):
            words = f"{constants.ENDPOINT} refuses HF_TOKEN (HTTP 401); correct it, or unset it for what is public"
        elif is_a(errors.RepositoryNotFoundError):
            words = f"not found on {constants.ENDPOINT}, or private (HTTP {status}); check the id, and HF_TOKEN if it is private"
        elif is_a(errors.RevisionNotFoundError, errors.EntryNotFoundError) and status == 404:
            words = f"no such revision or file (HTTP 404: {words})"
        elif is_a(errors.HFValidationError):
            words = f"not a hub id ({words})"
        else:
            words = f"{constants.ENDPOINT} could not be used ({words}); check the network, HF_ENDPOINT and free space; whole files are kept, and the same command goes on"
        raise InputError(f"{name}: {words}") from None

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@functools.lru_cache
def hub_files(repo, revision, kind="model"):
    """What a revision of a hub repository is now, and {file name: (bytes, SHA-256 or None)} of it; without a network, as the cache knows it."""
    from huggingface_hub import HfApi, errors, get_cached_repo_tree, resolve_revision
    with hub_errors(repo):
        pinned = resolve_revision(repo, repo_type=kind, revision=revision)
        try:
            tree = get_cached_repo_tree(repo, repo_type=kind, revision=pinned.resolved)
        except errors.CachedRepoTreeNotFoundError:
            tree = HfApi().list_repo_tree(repo, recursive=True, repo_type=kind, revision=pinned.resolved)
        return pinned, {file.path: (file.size or 0, file.lfs and file.lfs.sha256) for file in tree if hasattr(file, "size")}

def fetch(repo, pinned, files, kind="model"):
    """Bring some of hub_files' {file name: (bytes, SHA-256 or None)} here -> the local directory they lie in. What arrives is held against its SHA-256."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    new = {name for name in files if not isinstance(try_to_load_from_cache(repo, name, repo_type=kind, revision=pinned.resolved), str)}
    cache, size = Path(constants.HF_HUB_CACHE), sum(files[name][0] for name in new)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > 1e5:
        print(f"{repo}: fetching {', '.join(sorted(new))} ({size / 1e6:.1f} MB) from {constants.ENDPOINT} into {cache} ({free / 1e9:.0f} GB free)", file=sys.stderr, flush=True)
    require(size < free, f"{cache}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed for {repo}; free space, or set HF_HOME to another disk")
    large = [name for name, (_, sha) in files.items() if sha]
    for group in ([name for name in files if name not in large], *([name] for name in large)):
        if not group:
            continue
        with hub_errors(repo):
            directory = Path(snapshot_download(repo, repo_type=kind, revision=pinned, allow_patterns=[glob.escape(name) for name in group]))
        for path, sha in ((directory / name, files[name][1]) for name in group if name in new and files[name][1]):
            if sha256(path) != sha:
                path.resolve().unlink(), path.unlink(missing_ok=True)
                raise InputError(f"{repo}: {path.name} arrived damaged (its SHA-256 is not {sha[:12]}…) and was removed; run the same command again")
    return directory

def find(name, plan=lambda directory, split: None):
    """A preset, directory or hub id -> (local directory, the preset's split or None). plan(directory, split) is called once config.json is there."""
    source, revision, split, *_ = PRESETS.get(str(name), (name, None, None))
    if Path(source).is_dir():
        plan(Path(source), split)
        return Path(source), split
    source, _, asked = str(source).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(f"--model {name}: neither a directory nor one of {', '.join(PRESETS)} nor a hub id like org/name")
    pinned, files = hub_files(source, revision or asked or "main")
    require("config.json" in files, f"--model {name}: {source} has no config.json, so it is no model in Hugging Face's layout")
    weights = weight_files(files, f"--model {name}: {source}")
    plan(fetch(source, pinned, {"config.json": files["config.json"]}), split)
    return fetch(source, pinned, {file: files[file] for file in (*TOKENIZER_FILES, "config.json", *weights) if file in files}), split

# ---- weights ---------------------------------------------------------------------------------------------------------

ADDED = ("reasoning.gate.", "q_head.")                   # what LoopUS adds to a backbone; fp32 always

def backbone_name(name, config):
    """The Hugging Face name of a backbone tensor: reasoning.layers.0.… of a model with 2 encoder layers is model.layers.2.…"""
    part, rest = name.split(".", 1)
    if rest.startswith("layers."):
        _, i, rest = rest.split(".", 2)
        first = {"encoder": 0, "reasoning": config.encoder_layers, "decoder": config.num_hidden_layers - config.decoder_layers}[part]
        return f"model.layers.{int(i) + first}.{rest}"
    return rest if rest == "lm_head.weight" else f"model.{rest}"

class NoInit(torch.overrides.TorchFunctionMode):
    """Build modules without filling them: on the meta device even that imports 80 MB of compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))

def opened(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None

@functools.lru_cache(1)
def unpickled(path):
    """The tensors of a foreign PyTorch file, mapped, by name; nothing but tensors may be in it."""
    try:
        return {name: x for name, x in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items() if isinstance(x, torch.Tensor)}
    except Exception as error:               # zip, pickle, OS and other errors, each with words of its own
        raise InputError(f"{path}: not a readable PyTorch file of tensors ({str(error).splitlines()[0]}); fetch it again") from None

def weight_files(names, where):
    """Which of these file names hold a model's weights: safetensors, else PyTorch's .bin. InputError where there are none."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, kind = whole.split(".")
        if found := [name for name in names if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{kind}(\.index\.json)?", name)]:
            return found
    require("combined_model.pt" not in names, f"{where}: holds only combined_model.pt, a pickle that can run code as it is opened; "
            "load it in the program that wrote it, and save it there as safetensors")
    raise InputError(f"{where}: no model.safetensors (or model.safetensors.index.json with its shards) in it, and no pytorch_model.bin")

def tensor_files(directory):
    """name of each stored tensor -> the file that holds it, from one file or from an index and its shards."""
    files = weight_files([path.name for path in directory.iterdir()] if directory.is_dir() else [], directory)
    names_in = lambda path: set((opened if path.suffix == ".safetensors" else unpickled)(path).keys())
    index = next((directory / file for file in files if file.endswith(".json")), None)
    if index is None:
        require(len(files) == 1, f"{directory}: shards {files[:2]} … without their index; fetch it again")
        return dict.fromkeys(names_in(directory / files[0]), directory / files[0])
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: no weight_map from tensor names to files")
    for file in sorted(set(where.values())):
        if not (directory / file).exists():
            raise InputError(f"{directory / file}: this shard is named in {index.name} but missing; fetch it again")
        if missing := {name for name, f in where.items() if f == file} - names_in(directory / file):
            raise InputError(f"{directory / file}: tensor {min(missing)} is not in it, though {index.name} says so")
    return {name: directory / file for name, file in where.items()}

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def stored(path, name):
    """Shape and dtype of a tensor in a file."""
    if path.suffix == ".safetensors":
        with opened(path) as f:
            found = f.get_slice(name)
            return found.get_shape(), STORED.get(found.get_dtype(), found.get_dtype())
    found = unpickled(path)[name]
    return (list(found.shape), found.dtype) if isinstance(found, torch.Tensor) else ("none", type(found).__name__)

def read_tensor(path, name, shape, device, dtype):
    """One tensor, checked. In parts, the file opened anew for each, so that at no time much of it is mapped beside the copy."""
    found, kind = stored(path, name)
    require(found == list(shape), f"{path}: tensor {name} has shape {found}, the config asks for {list(shape)}")
    require(kind in STORED.values(), f"{path}: tensor {name} is {kind}; expected F32, F16 or BF16")
    tensor = torch.empty(shape, device=device, dtype=dtype)
    rows = max(1, 2**22 // tensor[0].numel())
    for i in range(0, len(tensor), rows):
        if path.suffix == ".safetensors":
            with opened(path) as f:
                tensor[i:i + rows] = f.get_slice(name)[i:i + rows]
        else:
            tensor[i:i + rows] = unpickled(path)[name][i:i + rows]
    return tensor

def load_model(directory, split=None, device=None, dtype=None):
    """A LoopUS model from a Hugging Face backbone (gate and head new) or a LoopUS checkpoint in `directory`."""
    directory = Path(directory)
    config = read_config(directory / "config.json", split)
    files = {name: (path, name) for name, path in tensor_files(directory).items() if not name.endswith("rotary_emb.inv_freq")}
    if config.from_checkpoint:                                    # early checkpoints call the block plateau
        files = {re.sub(r"^plateau\.", "reasoning.", name): place for name, place in files.items()}
    require(config.num_hidden_layers <= len(files), f"{directory}: config.json says {config.num_hidden_layers} layers, its files hold only {len(files)} tensors")
    with torch.device("meta"), NoInit():
        model = LoopUS(config)
    wanted = {name: name if config.from_checkpoint else backbone_name(name, config) for name in model.state_dict() if config.from_checkpoint or not name.startswith(ADDED)}
    if not config.from_checkpoint and "lm_head.weight" not in files and read_json(directory / "config.json").get("tie_word_embeddings", False):
        wanted["decoder.lm_head.weight"] = "model.embed_tokens.weight"   # a tied head: a copy, to be trained alone
    missing, extra = [name for name in wanted.values() if name not in files], sorted(set(files) - set(wanted.values()))
    require(not missing, f"{directory}: {len(missing)} tensors of this architecture are not in its files, {missing[:1]} first")
    require(not extra, f"{directory}: {len(extra)} tensors are not of this architecture ({config.model_type}, {config.num_hidden_layers} layers), {extra[:1]} first")
    if dtype is None:                                    # as stored, one dtype for the whole backbone
        dtype = stored(*files[wanted["encoder.embed_tokens.weight"]])[1]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, source in wanted.items():
        path, key = files[source]
        tensor = read_tensor(path, key, shapes[name], device or "cpu", torch.float32 if name.startswith(ADDED) else dtype)
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
    directory, known = find(name, lambda directory, known: plan and plan(read_config(directory / "config.json", split or known)))
    model = load_model(directory, split or known, device, dtype)
    if not model.config.from_checkpoint:
        if split is None and known is None:
            print(f"{name}: no split is known for this model; 1 encoder and 1 decoder layer (--split E,D sets it)", file=sys.stderr)
        if name in PRESETS or not Path(name).is_dir():
            model.config.base_model = name if EMBEDDED in directory.parents else PRESETS.get(name, (name,))[0]   # not this machine's path
    if not (directory / "tokenizer.json").exists():
        return model, None
    tokenizer, size = Tokenizer(directory), model.config.vocab_size
    require(max(tokenizer.vocab.values()) < size, f"{directory}: tokenizer.json has ids up to {max(tokenizer.vocab.values())}, the model only {size} embeddings")
    return model, tokenizer

def compile_decoding(model):
    """From now on `generate` runs a token's encoder, loops and decoder through torch.compile, a loop at a time, so that early exit
    still saves its loops: the same tokens (in bf16 but for rounding), faster, after a compilation. Prompts, and rows that others have left behind, run as before."""
    model.static = model.decoder.norm.weight.is_cuda                # captured as CUDA graphs, which need shapes and addresses that stay
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "size_asserts": False,
               "triton.cudagraphs": model.static, "cpp_wrapper": not model.static}

    def compiled(part, first=False):
        run = torch.compile(part, dynamic=not model.static, options=options)

        def call(x, span, cache):
            if model.static:
                for room in (room for layer in cache for room in layer):
                    torch._dynamo.mark_static_address(room, guard=False)
                if first:
                    torch.compiler.cudagraph_mark_step_begin()
            return run(x, span, cache)
        return call
    model.compiled = compiled(model.encoder, first=True), compiled(model._loop), compiled(model.decoder.last)

def count(config):
    """Parameters of a model of this shape: all, and those that training leaves alone (embedding and encoder)."""
    with torch.device("meta"), NoInit():
        model = LoopUS(config)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))

def announce(what, needs, device, advice):
    """Say what memory something needs, {part: bytes}, beside what there is, and what helps where that is too little."""
    total, free = sum(needs.values()), free_memory(device)
    if total > 1e8:                           # what is small goes without saying
        print(f"{what} needs about {total / 1e9:.1f} GB ({', '.join(f'{part} {size / 1e9:.1f}' for part, size in needs.items())}); on {device} "
              f"{'an unknown amount is' if free == float('inf') else f'{free / 1e9:.1f} GB are'} free" + f". That will not fit: {advice}" * (total > free), file=sys.stderr, flush=True)

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
            place(directory / name, lambda path: path.write_bytes(content))
        state = {name: tensor.contiguous() for name, tensor in (tensors or model.state_dict()).items()}
        place(directory / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: could not be written ({error}); free space or choose another directory") from None

# ---- checkpoints of a run: the published layout, and beside it what training needs to go on ---------------------------

def digests(directory):
    """SHA-256 of a checkpoint's tensors by file."""
    return {path.name: sha256(path) for path in sorted(directory.glob("*.safetensors"))}

def is_sharded(p):
    """Is p a DTensor, spread over the processes by optim.shard?"""
    return hasattr(p, "device_mesh")

def whole(p, x):
    """Of a tensor that is sharded as parameter p is, all of it, on the CPU of process 0 (every process has to ask); else x itself."""
    if not is_sharded(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import DTensor
    full = DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None

def save_checkpoint(model, tokenizer, target, keep, pairs, optimizer, dtype, facts):
    """Save as `target`, kind-000123, written beside and renamed; of the folder's older ones of the kind, the newest `keep` stay.
    Beside the published layout: trainer.safetensors (masters, moments) and trainer.json (`facts`)."""
    if target.exists():                       # the data ended in an error right behind a checkpoint
        return
    tensors = {name: whole(p, p.to_local().to(dtype)) if is_sharded(p) else p for name, p in model.state_dict().items()}
    state = {f"{name}.master": whole(p, master.detach()) for name, (p, master) in pairs.items() if master is not p}
    state |= {f"{name}.{moment}": whole(p, x) for name, (p, master) in pairs.items() for moment, x in optimizer.state[master].items()}
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    out, partial, kind = target.parent, target.with_name(f".{target.name}.partial"), target.name.split("-")[0]
    try:
        for stale in out.glob(f".{kind}-*.partial"):              # of a run that was killed in a save
            shutil.rmtree(stale)
        save(model, tokenizer, partial, tensors)
        save_file(state, partial / "trainer.safetensors")
        (partial / "trainer.json").write_text(json.dumps(facts | {"digests": digests(partial)}) + "\n")
        os.replace(partial, target)
        for old in sorted(out.glob(f"{kind}-*"))[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))      # so that none is ever half there
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: could not be written ({error}); free space, then --resume goes on from the newest checkpoint in {out}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)

def resumable(out, kind, flags):
    """The newest whole checkpoint of a run in `out` -> (directory, its facts), or None. A broken one is set aside, with a word."""
    for path in sorted(out.glob(f"{kind}-*"), reverse=True):
        try:
            facts = read_json(path / "trainer.json")
            require("data" in facts and facts.get("digests") == digests(path), "its tensors are not what was saved")
        except InputError as error:
            print(f"{path}: broken ({error}); it is set aside, the one before it is taken")
            os.replace(path, path.with_name(f"broken-{path.name}"))
            continue
        for name, value in flags.items():
            require(facts["flags"].get(name) == value, f"--out {out}: holds a run already; {path.name} was trained with --{name.replace('_', '-')} {facts['flags'].get(name)}, now it is {value}; give the same, or another --out")
        return path, facts

def restore(path, pairs, optimizer):
    """Put a checkpoint's masters and moments back."""
    state = load_file(path / "trainer.safetensors")
    for name, (p, master) in pairs.items():
        found = {moment: state[f"{name}.{moment}"] for moment in ("master", "step", "exp_avg", "exp_avg_sq") if f"{name}.{moment}" in state}
        if is_sharded(p):
            from torch.distributed.tensor import distribute_tensor
            found = {key: distribute_tensor(x.to(master.device), p.device_mesh, p.placements).to_local() if x.dim() else x for key, x in found.items()}
        if "master" in found:
            master.data.copy_(found["master"])
        optimizer.state[master] = {key: x.to(master.device) for key, x in found.items() if key != "master"}

def open_log(path, step):
    """A run's log.jsonl, what was logged after `step` cut off, opened to go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        write_text(path, "".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))
        return open(path, "a", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--out {path.parent}: not usable ({error})") from None

# ---- tokenizers ------------------------------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same after every digit was set apart: digits never join, and spaces before one are a run that ends there
DIGITS_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

def byte_letters():
    """Byte-level BPE writes each byte as a printable letter: that letter -> the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}

class Tokenizer:
    """`tokenizer.json` run by tiktoken: byte-level BPE (Qwen3, SmolLM2, Llama 3) or SentencePiece-style BPE (TinyLlama).

    tiktoken gets ranks of its own, and `self.ids` maps each rank back to the file's ids: none for a byte that the vocabulary
    lacks, several for a piece of a character that has to be spelt in bytes. `bos_id`, `eos_id`: int or None. `add_bos`: does the
    model expect bos in front of every text? Special tokens in a text are plain text.
    """

    def __init__(self, directory):
        directory = Path(directory)
        self.path = directory / "tokenizer.json"
        raw = read_json(self.path)
        options = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            options |= read_json(directory / name) if (directory / name).exists() else {}
        try:
            self._read(raw, options)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{self.path}: malformed ({type(error).__name__}: {error}); fetch it again") from None
        self.files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).exists()}

    def _read(self, raw, options):
        model = raw["model"]
        if model.get("type", "BPE") != "BPE":
            raise InputError(f"model type {model['type']!r} is not supported; BPE is")
        self.vocab = dict(model["vocab"])
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in raw.get("added_tokens") or []}
        require(all(isinstance(text, str) for text in added), f"added_tokens {[*added][:3]}: expected strings")
        self.special = {id: text for text, id in added.items()}
        self.inline = {t["content"]: t["id"] for t in raw.get("added_tokens") or [] if not t["special"]}   # found in text always
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.nfc, self.prefix = False, None
        pattern, ranks = (self._sentencepiece if self.byte_fallback else self._byte_level)(raw, merges)
        self.pieces = regex.compile(pattern)
        self.bpe = tiktoken.Encoding("loopus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.lost = {bytes_[0] for bytes_, rank in ranks.items() if not self.ids[rank]}

        def token(name):
            content = options.get(name)
            content = content["content"] if isinstance(content, dict) else content
            return added.get(content, self.vocab.get(content)) if content else None
        self.bos_id, self.eos_id = token("bos_token"), token("eos_token")
        processors = (raw.get("post_processor") or {})
        processors = processors.get("processors", [processors])
        first = next((p["single"][0] for p in processors if p.get("type") == "TemplateProcessing"), {})
        self.add_bos = self.bos_id is not None and options.get("add_bos_token", "SpecialToken" in first)

    def _byte_level(self, raw, merges):
        """The split pattern and tiktoken's ranks: first the 256 bytes, then what the merges make, in their order."""
        normaliser = (raw.get("normalizer") or {"type": None})["type"]
        if normaliser not in (None, "NFC"):
            raise InputError(f"normalizer {normaliser!r} is not supported; NFC or none is")
        self.nfc = normaliser == "NFC"
        steps = raw["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
        if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
            raise InputError(f"pre_tokenizer {kinds} is not supported; ByteLevel without add_prefix_space is")
        if kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex", True) and "Regex" in steps[0]["pattern"]:
            pattern = steps[0]["pattern"]["Regex"]
            require(isinstance(pattern, str) and not regex.compile(pattern).match(""), f"split pattern {pattern!r} matches the empty string")
        elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            pattern = GPT2_SPLIT
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            pattern = DIGITS_GPT2_SPLIT
        else:
            raise InputError(f"pre_tokenizer {kinds} is not supported; ByteLevel alone or after Split or Digits is")
        letters = byte_letters()
        spell = lambda token: bytes(letters[c] for c in token)
        names = {b: c for c, b in letters.items()}
        ranks = {bytes([b]): b for b in range(256)}
        self.ids = [[self.vocab[names[b]]] if names[b] in self.vocab else [] for b in range(256)]
        for a, b in merges:
            if spell(a + b) not in ranks:
                ranks[spell(a + b)] = len(ranks)
                self.ids.append([self.vocab[a + b]])
        self.bytes_of = {id: spell(token) for token, id in self.vocab.items() if id not in self.special}
        return pattern, ranks

    def _sentencepiece(self, raw, merges):
        """Characters instead of bytes are the atoms, so tiktoken's ranks begin with a spelling of each character in bytes:
        the 256 bytes, the proper prefixes of every longer character, the characters, then what the merges make."""
        steps = raw.get("normalizer") or {"type": None}
        steps = steps.get("normalizers", [steps])
        pre = raw.get("pre_tokenizer")
        if [s["type"] for s in steps] == ["Prepend", "Replace"] and pre is None:
            self.prefix = lambda text: " " + text
        elif steps == [{"type": None}] and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
            self.prefix = lambda text: text if text[0] in " ▁" or pre["prepend_scheme"] == "never" else " " + text
        else:
            raise InputError("normalizer and pre_tokenizer are not TinyLlama's (Prepend ▁, Replace; or Metaspace without split)")
        if self.inline:
            raise InputError(f"added token {min(self.inline)!r} that is not special: not supported here")
        byte_ids = {b: self.vocab[f"<0x{b:02X}>"] for b in range(256)}
        spell = lambda token: token.replace("▁", " ").encode()
        ids = {bytes([b]): [byte_ids[b]] for b in range(256)}
        letters = [token for token in self.vocab if len(token) == 1]
        long = [spell(token) for token in letters if len(spell(token)) > 1]
        for word in long:
            ids.update((word[:n], [byte_ids[b] for b in word[:n]]) for n in range(2, len(word)))
        ids.update((spell(token), [self.vocab[token]]) for token in letters)
        for a, b in merges:
            ids.setdefault(spell(a + b), [self.vocab[a + b]])
        self.ids = list(ids.values())
        self.bytes_of = {id: spell(token) for token, id in self.vocab.items() if id not in self.special} | {id: bytes([b]) for b, id in byte_ids.items()}
        self.byte_ids = set(byte_ids.values())
        return " *[^ ]+| +", {word: rank for rank, word in enumerate(ids)}   # no token has a space after its first letter

    def encode(self, text, bos=False):
        """Text -> ids; with `bos`, bos_id in front (if there is one)."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        parts = re.split("(" + "|".join(map(re.escape, sorted(self.inline, key=len, reverse=True))) + ")", text) if self.inline else [text]
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.inline[part])
            elif part:
                ids += self._encode(part.encode("utf-8", "replace").decode())   # a lone surrogate cannot be written in UTF-8
        return ids

    def _encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        text = self.prefix(text).replace("▁", " ") if self.prefix else text
        if self.lost and not self.lost.isdisjoint(text.encode()):        # a byte without a token goes before its neighbours merge
            pieces = (bytes(b for b in piece.encode() if b not in self.lost) for piece in self.pieces.findall(text))
            ranks = [rank for piece in pieces if piece for rank in self.bpe._encode_single_piece(piece)]
        else:
            ranks = self.bpe.encode_ordinary(text)
        return [id for rank in ranks for id in self.ids[rank]]

    def decode(self, ids):
        """Ids -> text; special tokens as they are written, bytes that are no text as U+FFFD."""
        if not self.byte_fallback:
            return b"".join(self.special[i].encode() if i in self.special else self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")
        text, run = [], b""
        for i in [*ids, None]:               # a run of byte tokens is text as a whole, or not at all
            if i in self.byte_ids:
                run += self.bytes_of[i]
                continue
            try:
                text.append(run.decode())
            except UnicodeDecodeError:
                text.append("\ufffd" * len(run))
            run = b""
            text.append(self.special[i] if i in self.special else self.bytes_of.get(i, b"").decode())
        return "".join(text).removeprefix(" ")

def newest_checkpoint(root="out"):
    """The checkpoint that train.py last wrote below `root`; without one, the embedded model."""
    return max(Path(root).glob("**/step-*"), key=lambda path: path.stat().st_mtime, default="tiny-loopus")

# ---- python load_weights.py DIR --------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Load a model, print what was found, continue one prompt.")
    parser.add_argument("directory", nargs="?", help="a Hugging Face backbone or LoopUS checkpoint: preset, directory or hub id")
    parser.add_argument("--list", action="store_true", help="list the presets instead")
    parser.add_argument("--split", metavar="E,D", type=parse_split)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()
    if args.list:
        print(f"{'preset':22} {'hub id':36} revision  split  parameters  bfloat16  licence")
        for name, (source, revision, split, billions, licence) in PRESETS.items():
            print(f"{name:22} {'comes with the code' if EMBEDDED in Path(source).parents else source:36} {revision or '-':8}  {'{},{}'.format(*split) if split else 'own':5} "
                  f"{billions:9.4g} B {billions * 2:6.4g} GB  {licence}")
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
  kind          {'LoopUS checkpoint' if c.from_checkpoint else 'plain backbone (gate and head are new, untrained)'}
  encoder       layers 0-{mid - 1}, {count(model.encoder):.1f} M parameters with the embedding of {c.vocab_size}
  reasoning     layers {mid}-{end - 1}, {count(model.reasoning.layers):.1f} M, run up to {c.loops} times; gate {count(model.reasoning.gate):.2f} M, head {count(model.q_head) * 1e3:.1f} k
  decoder       layers {end}-{c.num_hidden_layers - 1}, {count(model.decoder):.1f} M with the output head
  stored as     {str(model.decoder.norm.weight.dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB in memory
  tokenizer     {'none' if tokenizer is None else f"{len(tokenizer.vocab)} tokens, {'SentencePiece-style' if tokenizer.byte_fallback else 'byte-level'} BPE, bos {tokenizer.bos_id}{' (added)' if tokenizer.add_bos else ''}, eos {tokenizer.eos_id}"}""")
    if tokenizer is None:
        return
    ids, budget = tokenizer.encode(args.prompt, bos=tokenizer.add_bos), min(c.loops, 8)
    require(ids, "--prompt: empty; give at least one character")
    if not c.from_checkpoint:                            # the backbone itself: one loop, the gate wide open
        model.reasoning.gate.A_log.data.fill_(-torch.inf)
        budget = 1
    steps = model.generate(torch.tensor([ids]), 12, budget=budget, halt="none", temperature=0)
    text = tokenizer.decode(ids[tokenizer.add_bos:] + [step.tokens.item() for step in steps])
    print(f"  continued     {text!r} ({f'{budget} loops' if c.from_checkpoint else 'the backbone, without the gate'})")

if __name__ == "__main__":
    run(main)

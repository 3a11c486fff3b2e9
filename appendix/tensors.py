"""A model's tensors in files: which files they are, and reading them by name.

They are safetensors, or .bin, which PyTorch programs used to write. A .bin is a pickle, which can
run code as it is opened. PyTorch's reader for untrusted files (weights_only=True) refuses all but
tensors and plain containers; nothing else opens a .bin here, and none is ever written.
"""

import functools
import re
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open

from appendix.errors import InputError, first_line, require
from appendix.files import read_json, shorten

# ---- which files of a folder or repository are a model's weights ---------------------------------


def weight_files(names, where):
    """Which of these file names hold a model's weights: safetensors, else PyTorch's .bin.

    A model is one file, or an index and the shards that the index names. where: for the message.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, kind = whole.split(".")
        pattern = rf"{stem}(-\d+-of-\d+)?\.{kind}(\.index\.json)?"
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return found
    require(
        "combined_model.pt" not in names,
        f"{where}: holds only combined_model.pt, a pickle that can run code as it is opened; "
        "load it in the program that wrote it, and save it there as safetensors",
    )
    raise InputError(
        f"{where}: no model.safetensors (or model.safetensors.index.json with its shards) in it, "
        "and no pytorch_model.bin"
    )


def find_index(names):
    """The index file among a model's weight files, or None."""
    return next((name for name in names if name.endswith(".index.json")), None)


def read_index(path):
    """An index file -> {tensor name: file name}."""
    weight_map = read_json(path).get("weight_map")
    require(
        isinstance(weight_map, dict) and len(weight_map) > 0,
        f"{path}: no weight_map from tensor names to files",
    )
    for file in weight_map.values():
        # A plain name: what lies in another folder of this machine is not the model's.
        require(
            isinstance(file, str) and re.fullmatch(r"[\w.-]{1,200}", file, re.ASCII),
            f"{path}: weight_map names {shorten(file)}: expected a file beside it",
        )
    return weight_map


# ---- one file ------------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_names(path):
    """The names of the tensors in a file: a set."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return set(file.keys())
    return set(unpickle(path))


def shape_and_dtype(path, name):
    """Of a tensor in a file: a list, and a torch.dtype (a name, if the dtype is not in DTYPES)."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            found = file.get_slice(name)
            dtype = found.get_dtype()
            return found.get_shape(), DTYPES.get(dtype, dtype)
    tensor = unpickle(path)[name]
    return list(tensor.shape), tensor.dtype


def read_rows(path, name, start, stop):
    """Rows start … stop − 1 of a tensor in a file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return file.get_slice(name)[start:stop]
    return unpickle(path)[name][start:stop]


@contextmanager
def open_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({first_line(error):.200}); fetch it again"
        ) from None


# The last file is kept, since its tensors are asked for one by one; `close_bin` lets it go.
@functools.lru_cache(maxsize=1)
def unpickle(path):
    """The tensors of a .bin file by name. What is not an ordinary tensor is left out."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        # The format since PyTorch 1.6 is a zip, which is mapped; the one before is read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        return {name: x for name, x in content.items() if is_ordinary(name, x)}
    except Exception as error:  # of zip, pickle, the system and others, each with its own words
        raise InputError(
            f"{path}: not a readable PyTorch file of tensors ({first_line(error):.200}); "
            "fetch it again"
        ) from None


def close_bin():
    """Let the .bin file go that was last read from."""
    unpickle.cache_clear()


def is_ordinary(name, x):
    """Is it a tensor with numbers in memory, under a name?"""
    if not isinstance(name, str) or not isinstance(x, torch.Tensor):
        return False
    return x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized

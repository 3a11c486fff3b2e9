"""Flags that several scripts share, and what their values mean on this machine."""

import argparse
import math
import re

import torch

from appendix.errors import InputError, first_line

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        wanted = "a whole number" if kind is int else "a number"
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {wanted} {bounds}")

    return parse


def parse_split(text):
    """An argparse type: layers of encoder and decoder, "E,D" -> (E, D)."""
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected two counts of layers, as in 2,1")
    encoder, decoder = text.split(",")
    return int(encoder), int(decoder)


def add_model_flags(parser, model_help, model=None):
    """The flags every script shares."""
    parser.add_argument("--model", default=model, help=model_help)
    add = parser.add_argument
    add(
        "--split",
        metavar="E,D",
        type=parse_split,
        help="layers of encoder and decoder (default: the preset's; else 1,1)",
    )
    add(
        "--device",
        default="auto",
        help="auto (CUDA, then Apple's mps, then the CPU), cpu, cuda, cuda:1, mps",
    )
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the computation (auto: bfloat16 where the hardware multiplies it faster)",
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=1337)


def pick_device(name):
    """The device that --device names."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: not usable here ({first_line(error)}); try --device cpu"
        ) from None
    return device


def pick_dtype(name, device):
    """The dtype that --dtype names. auto: bfloat16 where the hardware has instructions for it."""
    if name != "auto":
        return DTYPES[name]
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32

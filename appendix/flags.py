"""Flags that several scripts share, and what their values mean on this machine."""

import argparse
import math
import re
import sys

import torch

from appendix.errors import InputError, end, first_line, one_line
from appendix.files import shorten

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


LARGEST = {int: 10**12, float: 1e38}  # more is a slip of the hand


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with a flag's default, unless it has none or its words name it."""

    def _get_help_string(self, action):
        if action.default in (None, False) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """argparse's parser, its defaults in the help and its errors as short as ours."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Defaults)

    def parse_args(self):
        args = super().parse_args()
        for name, value in vars(args).items():
            if value in ([], [[]]):  # what Python 3.11 and 3.12 make of --prompt=--
                self.error(f"--{name.replace('_', '-')}: two dashes are no value for it")
        return args

    def error(self, message):
        self.print_usage(sys.stderr)
        end(f"{self.prog}: error: {one_line(message)}", 2)


def number(kind, low, high=None):
    """An argparse type: an int or a float from low to high (None: no limit that matters)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= (high or LARGEST[kind]):
            return value
        wanted = "a whole number" if kind is int else "a number"
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        if high is None and value > low:
            bounds = f"of at most {LARGEST[kind]:g}"
        raise argparse.ArgumentTypeError(f"{shorten(text)}: expected {wanted} {bounds}")

    return parse


def parse_split(text):
    """An argparse type: layers of encoder and decoder, "E,D" -> (E, D)."""
    if not re.fullmatch(r"\d{1,9},\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{shorten(text)}: expected two counts of layers, as in 2,1"
        )
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
    add("--special-tokens", action="store_true", help="read special tokens in texts as tokens")


def pick_device(name):
    """The device that --device names."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # which the device meta, without memory, cannot
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

"""Flags that several scripts share, and what their values mean on this machine."""

import argparse, re
import torch
from appendix.errors import InputError


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(kind, low, high=float("inf")):
    """An argparse type: a number from low to high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected {'a whole number' if kind is int else 'a number'} "
                + (f"of at least {low}" if high == float("inf") else f"from {low} to {high}")
            )
        return value

    return parse


def parse_split(text):
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected two counts of layers, as in 2,1")
    return tuple(map(int, text.split(",")))


def add_model_flags(parser, model_help, model=None):
    """The flags every script shares."""
    parser.add_argument("--model", default=model, help=model_help)
    parser.add_argument(
        "--split",
        metavar="E,D",
        type=parse_split,
        help="layers of encoder and decoder (default: the preset's; else 1,1)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA, then Apple's mps, then the CPU), cpu, cuda, cuda:1, mps",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the computation (auto: bfloat16 where the hardware multiplies it faster)",
    )
    parser.add_argument("--seed", type=int, default=1337)


def pick_device(name):
    if name == "auto":
        return torch.device(
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: not usable here ({(str(error) or type(error).__name__).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def pick_dtype(name, device):
    """auto: bfloat16 where the hardware has instructions for it, float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return torch.bfloat16 if fast else torch.float32

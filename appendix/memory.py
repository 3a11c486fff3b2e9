"""What loading, training and sampling need of a machine's memory, beside what it has."""

import ctypes
import sys
from dataclasses import replace

import torch

from appendix.errors import free_memory, require
from loopus import LoopUS

HOPELESS = 4  # times what is free: no estimate of ours is as wrong as that


class NoInit(torch.overrides.TorchFunctionMode):
    """Build modules without filling them with random numbers, which will be replaced anyway.

    On the meta device, where tensors have no memory, filling them would be free but for an import
    of 80 MB of compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **kwargs)
        if "tensor" in kwargs:
            return kwargs["tensor"]
        return args[0]


def build_empty(config):
    """A LoopUS model without memory for its tensors: names and shapes only."""
    with torch.device("meta"), NoInit():
        return LoopUS(config)


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def count(config):
    """Parameters of a model of this shape: all of them, and those that training leaves alone.

    The latter are the embedding's and the encoder's.
    """
    # One layer of each part is built and multiplied, since a config may say a billion layers.
    one_each = replace(config, num_hidden_layers=3, encoder_layers=1, decoder_layers=1)
    model = build_empty(one_each)
    layer = count_parameters(model.encoder.layers)
    frozen = count_parameters(model.encoder) + (config.encoder_layers - 1) * layer
    every = count_parameters(model) + (config.num_hidden_layers - 3) * layer
    return every, frozen


def announce(what, needs, device, advice):
    """Say what memory something needs, {part: bytes}, and what is free; advice if that is less."""
    total = sum(needs.values())
    if total <= 1e8:  # what is small goes without saying
        return
    free = free_memory(device)
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in needs.items())
    amount = "an unknown amount is" if free == float("inf") else f"{free / 1e9:.1f} GB are"
    line = f"{what} needs about {total / 1e9:.1f} GB ({parts}); on {device} {amount} free"
    if total > free:
        line += f". That will not fit: {advice}"
    require(total < HOPELESS * free, line)
    print(line, file=sys.stderr, flush=True)


def training_needs(config, dtype, tokens, chunk, checkpointing=False, shards=1, horizon=1):
    """About the bytes that a training step needs on each of `shards` devices, by what they are for.

    tokens: of one training_step. chunk: logits that are in memory together. checkpointing: of
    activations (train.py --checkpoint-activations). horizon: loops that a gradient passes through.
    """
    every, frozen = count(config)
    fp32 = dtype == torch.float32
    if shards == 1:
        weights = every * dtype.itemsize
    else:  # the fp32 shard, and the largest module gathered, which is the embedding
        embedding = config.vocab_size * config.hidden_size
        weights = every * 4 / shards + embedding * dtype.itemsize
    # Adam's two moments and the gradient, 4 bytes each; beside lower precision a master too.
    state = 12 if fp32 or shards > 1 else 16
    # Numbers that one layer keeps of one token for the gradient, counted with autograd's hooks.
    kept = (9 if fp32 else 13) * config.hidden_size + 4 * config.intermediate_size
    layers = config.reasoning_layers * horizon + config.decoder_layers
    activations = layers * kept
    if checkpointing:  # the input of every layer, and one layer at a time in full
        activations = layers * config.hidden_size + kept
    return {
        "weights": weights,
        "masters, gradients and moments": (every - frozen) * state / shards,
        "activations": tokens * dtype.itemsize * activations,
        "logits": 12 * min(tokens * config.vocab_size, chunk),
    }


def announce_training(args, config, dtype, device, world, chunk):
    """Say what a run of train.py needs and what there is; -> the advice, which flags would help.

    args: its flags. world: how many processes train together.
    """

    def needs(share=1, checkpointing=args.checkpoint_activations, shards=None):
        tokens = args.batch_size * args.seq_len // share
        if shards is None:
            shards = world if args.shard else 1
        return training_needs(config, dtype, tokens, chunk, checkpointing, shards, args.horizon)

    def size(**changes):
        return f"{sum(needs(**changes).values()) / 1e9:.1f} GB"

    advice = (
        f"half of --batch-size {args.batch_size} (with twice --accumulate) or of "
        f"--seq-len {args.seq_len} takes {size(share=2)}, "
        f"--checkpoint-activations {size(checkpointing=True)}, "
        f"--shard over 8 GPUs {size(shards=8)} each"
    )
    announce("training", needs(), device, advice)
    return advice


def keep_freed_memory():
    """Have glibc keep freed buffers for the next that is asked for, on Linux.

    Else every buffer of logits comes from the kernel page by page and goes back at once, which is
    a third of a training step on a CPU.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

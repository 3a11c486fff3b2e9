"""What training and sampling need, beside what the machine has."""

import ctypes, sys
import torch
from loopus import LoopUS
from appendix.errors import free_memory


class NoInit(torch.overrides.TorchFunctionMode):
    """Build modules without filling them: on the meta device even that imports 80 MB of compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def count(config):
    """Parameters of a model of this shape: all, and those that training leaves alone (embedding and encoder)."""
    with torch.device("meta"), NoInit():
        model = LoopUS(config)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))


def announce(what, needs, device, advice):
    """Say what memory something needs, {part: bytes}, beside what there is, and what helps where that is too little."""
    total, free = sum(needs.values()), free_memory(device)
    if total > 1e8:  # what is small goes without saying
        print(
            f"{what} needs about {total / 1e9:.1f} GB ({', '.join(f'{part} {size / 1e9:.1f}' for part, size in needs.items())}); on {device} "
            f"{'an unknown amount is' if free == float('inf') else f'{free / 1e9:.1f} GB are'} free"
            + f". That will not fit: {advice}"
            * (total > free),
            file=sys.stderr,
            flush=True,
        )


def training_needs(config, dtype, tokens, chunk, checkpointing=False, shards=1):
    """About the bytes that training on `tokens` tokens a step needs on each of `shards` devices, by what they are for; chunk: logits at once."""
    every, frozen = count(config)
    fp32 = dtype == torch.float32
    weights = (
        every * dtype.itemsize
        if shards == 1
        else (every * 4 / shards + config.vocab_size * config.hidden_size * dtype.itemsize)
    )  # and the largest module gathered
    kept = (
        (9 if fp32 else 13) * config.hidden_size + 4 * config.intermediate_size
    )  # numbers that a layer keeps of a token; counted with autograd's hooks
    layers = config.reasoning_layers + config.decoder_layers
    return {
        "weights": weights,
        "masters, gradients and moments": (every - frozen)
        * (12 if fp32 or shards > 1 else 16)
        / shards,
        "activations": tokens
        * dtype.itemsize
        * (config.hidden_size * layers + kept if checkpointing else kept * layers),
        "logits": 12 * min(tokens * config.vocab_size, chunk),
    }


def plan(args, config, dtype, device, world, chunk):
    """Say what a run needs and what there is -> which flags would help."""

    def needs(
        share=1, checkpointing=args.checkpoint_activations, shards=world if args.shard else 1
    ):
        return training_needs(
            config, dtype, args.batch_size * args.seq_len // share, chunk, checkpointing, shards
        )

    size = lambda **changes: f"{sum(needs(**changes).values()) / 1e9:.1f} GB"
    advice = (
        f"half of --batch-size {args.batch_size} (with twice --accumulate) or of --seq-len {args.seq_len} takes {size(share=2)}, --checkpoint-activations {size(checkpointing=True)}, "
        f"--shard over 8 GPUs {size(shards=8)} each"
    )
    announce("training", needs(), device, advice)
    return advice


def keep_freed_memory():
    """Have glibc keep freed buffers (M_MMAP_MAX 0, a large M_TRIM_THRESHOLD): else every buffer of logits comes from the kernel page
    by page and goes back at once, which is a third of a step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)

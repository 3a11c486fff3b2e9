"""How weights move: fp32 masters, averaged and clipped gradients, the learning rate."""

import math

import torch
import torch.distributed as dist
from torch import nn

from appendix.parallel import average, is_sharded, own_part
from loopus import ADDED


def fp32_masters(model, dtype):
    """Freeze the encoder, put the backbone into `dtype`, pair all that is trained with a master.

    -> {name: (parameter, fp32 master)}. The optimizer sees masters only: a step of 5e-5 would be
    rounded away on about 43 % of typical bf16 weights. A parameter that is fp32 is its own master.
    """
    pairs = {}
    for name, p in model.named_parameters():
        if name.startswith("encoder."):  # frozen: no master
            p.requires_grad_(False)
            if not is_sharded(p):
                p.data = p.data.to(dtype)
            continue
        if is_sharded(p):  # fp32 already; this process's part is the master
            master = nn.Parameter(own_part(p).detach())
        elif dtype == torch.float32 or name.startswith(ADDED):
            p.data = p.data.float()
            master = p
        else:
            master = nn.Parameter(p.detach().float())
            p.data = p.data.to(dtype)
            move_gradients(p, master)
        pairs[name] = (p, master)
    return pairs


def move_gradients(p, master):
    """Let the gradient of p go to its master as soon as a backward pass has made it, so that the
    gradients of several backward passes add up in fp32."""

    def move(p):
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad.add_(p.grad)
        p.grad = None

    p.register_post_accumulate_grad_hook(move)


def gradient_norm(masters, parts):
    """Norm of all gradients together. parts: masters of which other processes hold other parts."""
    norm = nn.utils.get_total_norm([master.grad for master in masters])
    if parts:
        squares = nn.utils.get_total_norm([master.grad for master in parts]).square()
        dist.all_reduce(squares)
        norm = (norm.square() + squares).sqrt()
    return norm


def update(pairs, optimizer, max_norm):
    """One optimizer step on the mean gradient over all processes, its norm clipped to max_norm.

    A gradient that is not finite moves nothing. -> the norm before clipping
    """
    masters = []
    parts = []
    for p, master in pairs.values():
        if is_sharded(p) and p.grad is not None:
            master.grad = own_part(p.grad)  # which FSDP has averaged
        if master.grad is not None:
            (parts if is_sharded(p) else masters).append(master)
    average([master.grad for master in masters])
    norm = gradient_norm(masters, parts)
    if torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(masters + parts, max_norm, norm)
        optimizer.step()
    with torch.no_grad():
        for p, master in pairs.values():
            if p is not master and not is_sharded(p):
                p.copy_(master)
            p.grad = None
            master.grad = None
    return norm.item()


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, at most a tenth of the steps, then one cosine to zero; step from 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

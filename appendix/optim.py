"""How weights move: fp32 masters, averaged and clipped gradients, the learning rate; one process, or several with the model whole or sharded."""

import math
import torch
import torch.distributed as dist
from torch import nn
from appendix.parallel import average, is_sharded
from loopus import ADDED


def fp32_masters(model, dtype):
    """Freeze E, put the backbone into `dtype`, and return {name: (parameter, fp32 master)} of all that is trained.

    The optimizer sees masters only: a step of 5e-5 would be rounded away on about 43 % of typical bf16 weights. Where a parameter is
    fp32 it is its own master; else its gradient moves to the master as soon as a backward pass has made it: K losses add up in fp32.
    """
    pairs = {}
    for name, p in model.named_parameters():
        if name.startswith("encoder."):
            p.requires_grad_(False)
        if is_sharded(p):  # sharded: fp32 already, and this process's part is the master
            master = nn.Parameter(p.to_local().detach())
        elif dtype == torch.float32 or name.startswith(ADDED):
            p.data = p.data.float()
            master = p
        else:
            master = nn.Parameter(p.detach().float())
            p.data = p.data.to(dtype)

            def move_gradient(p, master=master):
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

            if p.requires_grad:
                p.register_post_accumulate_grad_hook(move_gradient)
        if p.requires_grad:
            pairs[name] = p, master
    return pairs


def update(pairs, optimizer, most):
    """One optimizer step on the mean gradient of all processes, its norm clipped to `most`. One that is not finite moves nothing. -> the norm"""
    for p, master in pairs.values():
        if is_sharded(p):
            master.grad = p.grad.to_local()  # which FSDP has averaged
    sharded, plain = (
        [
            master
            for p, master in pairs.values()
            if master.grad is not None and is_sharded(p) == kind
        ]
        for kind in (True, False)
    )
    average([master.grad for master in plain])
    norm = nn.utils.get_total_norm([master.grad for master in plain])
    if sharded:
        squares = nn.utils.get_total_norm([master.grad for master in sharded]).square()
        dist.all_reduce(squares)
        norm = (norm.square() + squares).sqrt()
    if torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(sharded + plain, most, norm)
        optimizer.step()
    with torch.no_grad():
        for p, master in pairs.values():
            if p is not master and not is_sharded(p):
                p.copy_(master)
            p.grad = master.grad = None
    return norm.item()


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up (at most a tenth of the steps), then one cosine to zero; step from 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

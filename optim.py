"""How weights move: fp32 masters, averaged and clipped gradients, the learning rate; one process, or several with the model whole or sharded."""
import ctypes
import functools
import math
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from load_weights import ADDED, announce, count, is_sharded

def fp32_masters(model, dtype):
    """Freeze E, put the backbone into `dtype`, and return {name: (parameter, fp32 master)} of all that is trained.

    The optimizer sees masters only: a step of 5e-5 would be rounded away on about 43 % of typical bf16 weights. Where a parameter is
    fp32 it is its own master; else its gradient moves to the master as soon as a backward pass has made it: K losses add up in fp32.
    """
    pairs = {}
    for name, p in model.named_parameters():
        if name.startswith("encoder."):
            p.requires_grad_(False)
        if is_sharded(p):            # sharded: fp32 already, and this process's part is the master
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

def shard(model, dtype, device):
    """Spread layers, embedding and output head over the processes (FSDP2): fp32 parts, gathered in `dtype` while a module runs."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard      # half a second and 80 MB that one process never needs
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.encoder.requires_grad_(False)
    for module in (model.encoder.embed_tokens, *model.encoder.layers, *model.reasoning.layers, *model.decoder.layers, model.decoder.lm_head):
        fully_shard(module.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to(device)

def join():
    """Become one of the processes that torchrun started."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                     # which "cuda" means from here on
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

def leave(code):
    """End the program with this exit code. One of several processes ends at once: a thread of gloo that lets go of its last tensor while
    the interpreter is being taken down aborts the program, and FSDP keeps those threads beyond destroy_process_group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

def meet():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()

def average(tensors):
    """Mean of each tensor over all processes, in place."""
    for x in tensors if dist.is_initialized() else ():
        dist.all_reduce(x)
        x /= dist.get_world_size()

def update(pairs, optimizer, most):
    """One optimizer step on the mean gradient of all processes, its norm clipped to `most`. One that is not finite moves nothing. -> the norm"""
    for p, master in pairs.values():
        if is_sharded(p):
            master.grad = p.grad.to_local()   # which FSDP has averaged
    sharded, plain = ([master for p, master in pairs.values() if master.grad is not None and is_sharded(p) == kind] for kind in (True, False))
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

def compile_layers(model):
    """Compile the trained layers. Of what a layer keeps for the gradient the compiler may keep half and makes the rest again, the cheapest
    first; what that gives beside layers that are not compiled: docs/training.md."""
    import torch._functorch.config
    torch._functorch.config.activation_memory_budget = 0.5
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.compile()

def checkpoint_activations(model):
    """Keep only each layer's input for the gradient, and make the rest again when it is needed."""
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

def keep_freed_memory():
    """Have glibc keep freed buffers (M_MMAP_MAX 0, a large M_TRIM_THRESHOLD): else every buffer of logits comes from the kernel page
    by page and goes back at once, which is a third of a step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)

def training_needs(config, dtype, tokens, chunk, checkpointing=False, shards=1):
    """About the bytes that training on `tokens` tokens a step needs on each of `shards` devices, by what they are for; chunk: logits at once."""
    every, frozen = count(config)
    fp32 = dtype == torch.float32
    weights = every * dtype.itemsize if shards == 1 else (every * 4 / shards + config.vocab_size * config.hidden_size * dtype.itemsize)   # and the largest module gathered
    kept = (9 if fp32 else 13) * config.hidden_size + 4 * config.intermediate_size     # numbers that a layer keeps of a token; counted with autograd's hooks
    layers = config.reasoning_layers + config.decoder_layers
    return {"weights": weights, "masters, gradients and moments": (every - frozen) * (12 if fp32 or shards > 1 else 16) / shards,
            "activations": tokens * dtype.itemsize * (config.hidden_size * layers + kept if checkpointing else kept * layers),
            "logits": 12 * min(tokens * config.vocab_size, chunk)}

def plan(args, config, dtype, device, world, chunk):
    """Say what a run needs and what there is -> which flags would help."""
    def needs(share=1, checkpointing=args.checkpoint_activations, shards=world if args.shard else 1):
        return training_needs(config, dtype, args.batch_size * args.seq_len // share, chunk, checkpointing, shards)
    size = lambda **changes: f"{sum(needs(**changes).values()) / 1e9:.1f} GB"
    advice = (f"half of --batch-size {args.batch_size} (with twice --accumulate) or of --seq-len {args.seq_len} takes {size(share=2)}, --checkpoint-activations {size(checkpointing=True)}, "
              f"--shard over 8 GPUs {size(shards=8)} each")
    announce("training", needs(), device, advice)
    return advice

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up (at most a tenth of the steps), then one cosine to zero; step from 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

def signals():
    """Ctrl-C and SIGTERM are from now on added to the list that is returned, until the next call of `no_signals`; a second one ends the program at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked

def no_signals():
    """Ctrl-C and SIGTERM end the program again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

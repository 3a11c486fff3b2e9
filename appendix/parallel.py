"""Several processes, as torchrun starts them: joining, meeting, averaging, and a model spread over them."""

import os, sys
import torch
import torch.distributed as dist


def join():
    """Become one of the processes that torchrun started."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" means from here on
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


def shard(model, dtype, device):
    """Spread layers, embedding and output head over the processes (FSDP2): fp32 parts, gathered in `dtype` while a module runs."""
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
    )  # half a second and 80 MB that one process never needs

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.encoder.requires_grad_(False)
    for module in (
        model.encoder.embed_tokens,
        *model.encoder.layers,
        *model.reasoning.layers,
        *model.decoder.layers,
        model.decoder.lm_head,
    ):
        fully_shard(module.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to(device)


def is_sharded(p):
    """Is p a DTensor, spread over the processes by optim.shard?"""
    return hasattr(p, "device_mesh")


def whole(p, x):
    """Of a tensor that is sharded as parameter p is, all of it, on the CPU of process 0 (every process has to ask); else x itself."""
    if not is_sharded(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import DTensor

    full = DTensor.from_local(
        x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
    ).full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None

"""Several processes, as torchrun starts them: one a GPU, each with batches of its own.

First what every such run needs: to join, to average, to end together. Then what only --shard needs:
a model of which every process holds a part.
"""

import itertools
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from appendix.errors import InputError, require


def rank():
    """This process's number; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device="auto"):
    """Become one of the processes that torchrun started, if it did. Only process 0 prints.

    device: as --device says; on a GPU each process takes the one with its own number.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    require(
        device in ("auto", "cpu", "cuda"),
        f"--device {device}: torchrun gives each process a device of its own; leave it out, or "
        "say cpu",
    )
    timeout = timedelta(hours=1)  # the others wait while process 0 writes and hashes a checkpoint
    if torch.cuda.is_available() and device != "cpu":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)  # which "cuda" means from here on
        dist.init_process_group("nccl", timeout=timeout, device_id=own)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the program ends)


def leave(code):
    """End the program with this exit code.

    One of several processes ends at once: a thread of gloo that lets go of its last tensor while
    the interpreter is being taken down aborts the program, and FSDP keeps such threads.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def from_first(function, *args):
    """What function(*args) gives or raises (InputError) in process 0, in every process."""
    if world() == 1:
        return function(*args)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function(*args)
        except InputError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def own_share(stream):
    """Of world() batches in turn this process's own, with the position behind all of them.

    stream: items (batch, position).
    """
    stream = iter(stream)
    while group := list(itertools.islice(stream, world())):
        batch, _ = group[rank()]
        _, position = group[-1]
        yield batch, position


def average(tensors):
    """Mean of each tensor over all processes, in place."""
    if world() == 1:
        return
    for x in tensors:
        dist.all_reduce(x)
        x /= world()


def anywhere(flag, device):
    """Is it true in any process?"""
    if world() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found)
    return found.item() > 0


# ---- --shard: fully sharded training (FSDP2) -----------------------------------------------------


def shard(model, dtype, device):
    """Spread layers, embedding and output head over the processes.

    Each keeps its part in fp32; a module is gathered in `dtype` while it runs.
    """
    # imported here: half a second and 80 MB that one process never needs
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.encoder.requires_grad_(False)
    stacks = [model.encoder.layers, model.reasoning.layers, model.decoder.layers]
    modules = [layer for stack in stacks for layer in stack]
    # A stack holds its layers together: each layer alone would keep its whole gradient until the
    # end of backward, and none would be gathered while the one before it runs.
    modules += [*stacks, model.encoder.embed_tokens, model.decoder.lm_head]
    for module in modules:
        fully_shard(module.float(), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to(device)


def is_sharded(p):
    """Is this parameter spread over the processes?"""
    return hasattr(p, "device_mesh")


def own_part(p):
    """The part of a sharded parameter or gradient that this process holds."""
    return p.to_local()


def whole(p, x):
    """Of a tensor x that is spread as parameter p is, all of it, on the CPU of process 0.

    Every process has to ask, and the others get None. x itself where p is not sharded.
    """
    if not is_sharded(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    full = spread.full_tensor()
    return full.cpu() if rank() == 0 else None


def part_of(p, x):
    """Of a whole tensor x the part that this process holds of parameter p."""
    if not is_sharded(p) or x.dim() == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    device = own_part(p).device
    return distribute_tensor(x.to(device), p.device_mesh, p.placements).to_local()


def whole_tensors(model, dtype):
    """state_dict of a model in `dtype`, sharded parameters gathered on process 0."""
    tensors = {}
    for name, p in model.state_dict().items():
        tensors[name] = whole(p, own_part(p).to(dtype)) if is_sharded(p) else p
    return tensors

"""One of two processes that each hold half of every layer; torchrun starts it for test_runs.py.

The gradients of a chunked and checkpointed step, on a sequence a process, must be those of one
process that holds everything and sees both sequences; and a step of descent must move alike.
"""

import torch
import torch.distributed as dist
from conftest import small
from torch.distributed.tensor import DTensor

import train
from appendix import chunks, fast, optim, parallel

MAX_NORM = 0.1


def count(parameters):
    return sum(p.numel() for p in parameters)


def descend(pairs):
    """A step of plain descent of length 1; -> the gradient's norm before clipping."""
    optimizer = torch.optim.SGD([master for _, master in pairs.values()], lr=1.0)
    return optim.update(pairs, optimizer, MAX_NORM)


parallel.join()
chunks.LOGITS["cpu"] = 7 * 50  # seven tokens at a time
ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))
start = small(2, dtype=torch.float32)
alone = small(2, dtype=torch.float32)
sharded = small(2, dtype=torch.float32)
parallel.shard(sharded, torch.float32, torch.device("cpu"))
fast.checkpoint_activations(sharded)
alone_pairs = optim.fp32_masters(alone, torch.float32)
sharded_pairs = optim.fp32_masters(sharded, torch.float32)

# Half of all that is spread is here, and what is not spread is next to nothing.
spread = [p for p in sharded.parameters() if isinstance(p, DTensor)]
rest = [p for p in sharded.parameters() if not isinstance(p, DTensor)]
assert 2 * count(p.to_local() for p in spread) == count(spread)
assert count(rest) < 0.02 * count(start.parameters())

for _ in range(2):
    train.training_step(alone, ids, 4, {0, 2}, 0.5)
    train.training_step(sharded, ids[dist.get_rank()][None], 4, {0, 2}, 0.5)
gradients = {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}
norm = descend(alone_pairs)
sharded_norm = descend(sharded_pairs)
assert norm > MAX_NORM  # else nothing is clipped
assert abs(norm / sharded_norm - 1) < 1e-5, (norm, sharded_norm)

found = dict(sharded.named_parameters())
for name, p in start.named_parameters():
    moved = gradients[name] * MAX_NORM / norm if name in gradients else 0
    now = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
    torch.testing.assert_close(now, p - moved, rtol=1e-5, atol=1e-6, msg=name)
parallel.leave(0)

"""The output head and the loss in chunks of tokens, since all logits at once would be the largest
tensor of a training step: tokens times vocabulary."""

import torch
from torch.utils.checkpoint import checkpoint

# How many logits are made together. 67 M are 268 MB in fp32, and of the largest vocabulary 440
# tokens, enough to keep a large GPU busy; a CPU is no slower with a fifth.
LOGITS = {"cuda": 2**26, "cpu": 3 * 2**22}


def logits_at_once(device):
    return LOGITS.get(device.type, LOGITS["cpu"])


def in_chunks(function, x, targets, vocab_size):
    """function(x (C, D), targets (C,)) for all tokens of x (N, T, D) and targets (N, T).

    function gives a tuple of (C,); -> the same tuple of (N, T). Where there are several chunks,
    what a chunk computes is made again for the gradient instead of kept.
    """
    size = max(1, logits_at_once(x.device) // vocab_size)  # C
    chunks = list(zip(x.flatten(0, 1).split(size), targets.flatten().split(size), strict=True))
    if len(chunks) == 1:
        results = [function(*chunks[0])]
    else:
        results = []
        for chunk in chunks:
            again = checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False)
            results.append(again)
    return tuple(torch.cat(parts).view_as(targets) for parts in zip(*results, strict=True))

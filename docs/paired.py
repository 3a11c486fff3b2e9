"""Held-out losses of several runs on the same sequences, and their differences to a control's.

    python docs/paired.py --data heldout.jsonl --seeds 1 2 3 --control out/control out/open out/shut

A run is named without its seed: out/open stands for out/open-s1, out/open-s2 and out/open-s3, three
folders that train.py left. Of each the newest checkpoint is taken. A difference is the mean over
seeds and sequences, each sequence against itself under the control of the same seed; ± is half the
95 % interval that the sequences leave (1.96 standard errors of their means over seeds), and the
brackets hold the seeds' own lowest and highest mean.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from appendix import data
from appendix.errors import require, run_main
from appendix.flags import FlagParser, number, pick_device
from load_weights import load
from train import next_tokens, sequence_losses


def parse_args():
    parser = FlagParser("Compare runs of train.py, paired by sequence.")
    add = parser.add_argument
    add("runs", nargs="+", help="folders, without the -sSEED at their end")
    add("--control", required=True, help="the run to compare with, named likewise")
    add("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3])
    add("--data", required=True, help="held-out text")
    add("--sequences", type=number(int, 2), default=512)
    add("--seq-len", type=number(int, 2), default=256)
    add("--batch-size", type=number(int, 1), default=16)
    add("--budgets", type=number(int, 1), nargs="+", default=[1, 2, 4, 8, 16])
    add("--device", default="auto")
    return parser.parse_args()


def losses_of(run, args):
    """{budget: (seeds, sequences)} of a run; of a control {"plain": …}, its one ungated pass."""
    found = []
    for seed in args.seeds:
        folder = f"{run}-s{seed}"
        model, tokenizer = load(folder, device=pick_device(args.device), dtype=torch.float32)
        require(tokenizer, f"{folder}: no tokenizer in its checkpoint")
        ids = data.held_out(args.data, tokenizer, args.seq_len, args.sequences)
        ids = ids.to(model.decoder.norm.weight.device)
        plain = any(Path(folder).glob("control-*"))
        held_out = (ids, next_tokens(ids))
        losses = sequence_losses(model, held_out, args.batch_size, plain, args.budgets)
        found.append({name: x.double().cpu() for name, x in losses.items()})
    return {name: torch.stack([losses[name] for losses in found]) for name in found[0]}


def difference(losses, control):
    """Of (seeds, sequences) the mean difference, half its 95 % interval, and the seeds' range."""
    by_pair = losses - control
    by_sequence = by_pair.mean(0)
    half = 1.96 * by_sequence.std() / len(by_sequence) ** 0.5
    by_seed = by_pair.mean(1)
    return f"{by_sequence.mean():+.3f} ± {half:.3f} [{by_seed.min():+.3f}, {by_seed.max():+.3f}]"


def main():
    args = parse_args()
    control = losses_of(args.control, args)
    require("plain" in control, f"--control {args.control}: no run of train.py --control")
    control = control["plain"]
    print("| run | loops | loss | difference to the control |")
    print("|---|---|---|---|")
    print(f"| {Path(args.control).name} | - | {control.mean():.3f} | |")
    for run in args.runs:
        for name, losses in losses_of(run, args).items():
            loops = "-" if name == "plain" else name
            words = difference(losses, control)
            print(f"| {Path(run).name} | {loops} | {losses.mean():.3f} | {words} |", flush=True)


if __name__ == "__main__":
    run_main(main)

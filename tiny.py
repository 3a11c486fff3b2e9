"""Trails: a tiny world whose answers need many dependent steps, and a small Llama pretrained on it.

    python tiny.py            make assets/tiny/base again, from a seed
    python tiny.py --check    train for a moment from the shipped weights' own start, and compare

A strip has 13 rows of 4 cells. A letter is its own value. A digit copies the value of the cell that many places to its left, which
stands in the row before, so a digit in the last row sends the reader from row to row until a letter is met: the steps of the problem.
After the strip, a question is one more digit, and the next token is its value:

    d a h c  5 3 4 4  …  6 2 5 3 ? 5 h 6 a 7 d 8 c

Each row is a shuffle of the row before, so the four letters all arrive, and only the order has to be worked out. Rows above the first
digits are letters that nobody asks for. Loss is taken on the answers alone, as in instruction tuning: the strip itself is random.
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from safetensors.torch import save_file

from appendix.errors import require, run
from appendix.files import read_json, write_whole, write_text
from load_weights import backbone_name, load
from loopus import ADDED, LoopUS, LoopUSConfig

ROWS, LANES, LETTERS = 13, 4, 8  # a problem needs 0 to ROWS - 1 steps
SYMBOLS = "abcdefgh12345678?"  # ids in this order
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SYMBOLS),
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}
STAGE, CHECKED = (
    4000,
    100,
)  # batches of each stage of pretraining; how many losses of it --check makes again
BUDGETS = (1, 2, 4, 8, 16, 32)
# train.py's defaults for this world; docs/tiny.md says what they are worth
RECIPE = {
    "steps": 1200,
    "batch_size": 64,
    "accumulate": 1,
    "seq_len": 64,
    "lr": 2e-3,
    "warmup": 100,
    "gate_init": "open",
    "threshold": 0.95,
    "eval_every": 300,
    "eval_sequences": 208,
    "dtype": "float32",
}

# ---- the language ----------------------------------------------------------------------------------------------------


def problems(steps, questions, generator, rows=ROWS):
    """Problems that need `steps` (N,) steps -> ids (N, T), which end with the last question, and targets (N, T): -100 but for the answers."""
    N = len(steps)
    letters = torch.randint(LETTERS, (N, rows, LANES), generator=generator)
    source = torch.rand(N, rows, LANES, generator=generator).argsort(
        -1
    )  # the cell of the row before that is copied
    digits = (
        LETTERS - 1 + LANES + torch.arange(LANES) - source
    )  # the token of that many places back
    copies = torch.arange(rows) >= rows - steps[:, None]  # (N, rows): is the row of digits?
    answers = letters[:, 0]
    for row in range(1, rows):
        answers = torch.where(
            copies[:, row, None], answers.gather(1, source[:, row]), letters[:, row]
        )
    strip = torch.where(copies[..., None], digits, letters).flatten(1)
    asked = torch.stack(
        (torch.arange(LETTERS + LANES, LETTERS + 2 * LANES).expand(N, -1), answers), -1
    ).flatten(1)  # digit, answer, digit, …
    ids = torch.cat((strip, torch.full((N, 1), len(SYMBOLS) - 1), asked[:, : 2 * questions - 1]), 1)
    targets = torch.full_like(ids, -100)
    targets[:, rows * LANES + 1 :: 2] = answers[:, :questions]
    return ids, targets


def batches(batch_size, seed):
    """Batches (ids, targets) without end, all numbers of steps alike, with 1, 2, 3, 4 questions in turn."""
    generator = torch.Generator().manual_seed(seed)
    for i in itertools.count():
        yield problems(
            torch.randint(ROWS, (batch_size,), generator=generator), i % LANES + 1, generator
        )


def held_out(count):
    """The same (ids, targets) for every run: `count` problems with four questions, all numbers of steps alike."""
    return problems(torch.arange(count) % ROWS, LANES, torch.Generator().manual_seed(2025))


# ---- the base --------------------------------------------------------------------------------------------------------


def pretrain(model, batches, steps, peak):
    """Plain next-token training of the whole backbone on `steps` batches, or as many as there are: warm-up, then one cosine to a twentieth. -> losses"""
    parameters = [p for name, p in model.named_parameters() if not name.startswith(ADDED)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    started, losses = time.perf_counter(), []
    for step, (ids, targets) in zip(range(1, steps + 1), batches):
        optimizer.param_groups[0]["lr"] = (
            peak * min(1, step / 200) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
        )
        loss = F.cross_entropy(model.forward_pretrained(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 500 == 0:
            spent = time.perf_counter() - started
            print(
                f"{step:6d} {sum(losses[-500:]) / 500:6.3f}  {percent(right(model, None)[0])}  {spent:5.0f} s, {spent / step * (steps - step):4.0f} s to go",
                flush=True,
            )
    return losses


def fresh():
    """A backbone with random weights, and the batches of its two stages: short strips; then whole ones, more of them easy."""
    torch.manual_seed(0)
    model = LoopUS(
        LoopUSConfig(
            **{
                name: value
                for name, value in CONFIG.items()
                if name in LoopUSConfig.__dataclass_fields__
            }
        )
    )
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.startswith(ADDED):
            nn.init.normal_(
                p,
                std=(0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                * CONFIG["hidden_size"] ** -0.5,
            )
    generator = torch.Generator().manual_seed(0)
    short = (
        problems(torch.randint(9, (64,), generator=generator), LANES, generator, rows=9)
        for _ in itertools.count()
    )
    whole = (
        problems(torch.randint(ROWS, (2, 64), generator=generator).amin(0), LANES, generator)
        for _ in itertools.count()
    )
    return model, short, whole


def make_base(directory):
    """Pretrain the base and write it as a Hugging Face directory, with what `check` compares."""
    started = time.perf_counter()
    model, short, whole = fresh()
    print("  step   loss  accuracy (%) by steps needed, 0 to 12")
    first, second = pretrain(model, short, STAGE, 4e-3), pretrain(model, whole, STAGE, 3e-3)
    vocab = {symbol: id for id, symbol in enumerate(SYMBOLS)}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    record = {
        "first_losses": [round(loss, 4) for loss in first[:CHECKED]],
        "last_losses": [sum(x[-500:]) / 500 for x in (first, second)],
        "accuracy": right(model, None)[0].tolist(),
        "seconds": round(time.perf_counter() - started),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer.json", tokenizer),
        ("pretraining.json", record),
    ):
        write_text(directory / name, json.dumps(content, indent=1) + "\n")
    tensors = {
        backbone_name(name, model.config): p
        for name, p in model.state_dict().items()
        if not name.startswith(ADDED)
    }
    write_whole(
        directory / "model.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    print(
        f"wrote {directory}: {sum(p.numel() for p in tensors.values())} parameters, {time.perf_counter() - started:.0f} s"
    )


def check(directory):
    """Does the shipped base come from this code? Its first losses and its accuracy again; InputError if they differ."""
    record = read_json(directory / "pretraining.json")
    model, short, _ = fresh()
    shipped, tokenizer = load(str(directory), split=(1, 1))
    require(
        tokenizer.encode(SYMBOLS) == [*range(len(SYMBOLS))],
        f"{directory}: its tokenizer does not number {SYMBOLS} in this order",
    )
    require(
        {n: p.shape for n, p in model.state_dict().items()}
        == {n: p.shape for n, p in shipped.state_dict().items()},
        f"{directory}: other shapes than this code makes",
    )
    losses = torch.tensor(pretrain(model, itertools.islice(short, CHECKED), STAGE, 4e-3))
    apart = (losses / torch.tensor(record["first_losses"]) - 1).abs().max().item()
    again, written = right(shipped, None)[0], torch.tensor(record["accuracy"])
    print(
        f"first {CHECKED} losses {losses[0]:.4f} to {losses[-1]:.4f}, at most {apart:.2%} from the record; accuracy by steps needed now and then:\n  {percent(again)}\n  {percent(written)}"
    )
    require(
        apart < 0.02 and (again - written).abs().max() < 0.02,
        f"{directory}: not what this code makes (limits: 2 % of a loss, 2 points of accuracy)",
    )
    print(f"{directory}: made by this code, in {record['seconds']} s")


# ---- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def right(model, budget, threshold=None, count=200, seed=2026):
    """Share of problems with all four answers right and mean loops, each by steps needed (13,), and the rank correlation of the two.

    budget None: the backbone's one ungated pass. With a threshold a problem, as one block, stops once q of its last token reaches it.
    """
    steps = torch.arange(ROWS).repeat_interleave(count)
    ids, targets = (
        x.to(model.decoder.norm.weight.device)
        for x in problems(steps, LANES, torch.Generator().manual_seed(seed))
    )
    h, loops, live = (
        model.encode(ids),
        torch.zeros(len(ids), device=ids.device),
        torch.ones(len(ids), dtype=torch.bool, device=ids.device),
    )
    if budget is None:
        h = model.pretrained_loop(h)
    for _ in range(budget or 0):
        after, q = model.loop(h)
        h, loops = torch.where(live[:, None, None], after, h), loops + live
        if threshold is not None:
            live = live & (q.sigmoid() < threshold)
    solved, loops = (
        ((model.decode(h).argmax(-1) == targets) | (targets < 0)).all(1).float().cpu(),
        loops.cpu(),
    )
    return (
        solved.view(-1, count).mean(1),
        loops.view(-1, count).mean(1),
        rank_correlation(steps, loops),
    )


def rank_correlation(x, y):
    """Spearman's, ties sharing their mean rank; 0 where one of them never varies."""

    def ranks(values):
        _, which, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[which]

    return torch.corrcoef(torch.stack((ranks(x), ranks(y)))).nan_to_num()[0, 1].item()


def percent(shares):
    return " ".join(f"{share * 100:4.0f}" for share in shares)


def hard(shares):
    """Mean over the numbers of steps at which the base solves less than 60 %: shares {name: (13,)} -> {name: float}"""
    fails = shares["base"] < 0.6
    return {name: share[fails].mean().item() for name, share in shares.items()}


def report(looped, control, directory):
    """Print what base, control and the looped model make of each number of steps; write it as directory/accuracy.json."""
    shares = {"base": right(load("tiny")[0], None)[0], "control": right(control, None)[0]} | {
        str(budget): right(looped, budget)[0] for budget in BUDGETS
    }
    shares["exit"], loops, correlation = right(looped, 8, looped.config.exit_threshold)
    means = hard(shares)
    print(
        f"\nproblems with all four answers right (%), by steps needed; hard: the {sum(shares['base'] < 0.6)} that the base solves less than 60 % of"
    )
    print("               " + " ".join(f"{steps:4d}" for steps in range(ROWS)) + "   mean  hard")
    for name, share in shares.items():
        label = (
            f"{name} loop{'s' * (name != '1')}"
            if name.isdigit()
            else f"exit, q >= {looped.config.exit_threshold}"
            if name == "exit"
            else name
        )
        print(
            f"{label:15}" + percent(share) + f"  {share.mean() * 100:5.1f} {means[name] * 100:5.1f}"
        )
    print(
        "  its loops    "
        + " ".join(f"{n:4.1f}" for n in loops)
        + f"  {loops.mean():5.2f}        rank correlation with the steps needed {correlation:.2f}"
    )
    found = {name: [round(x, 4) for x in share.tolist()] for name, share in shares.items()}
    found |= {
        "loops": [round(x, 2) for x in loops.tolist()],
        "rank_correlation": round(correlation, 3),
    }
    if int(os.environ.get("RANK", 0)) == 0:  # every process of torchrun finds the same
        write_text(directory / "accuracy.json", json.dumps(found) + "\n")


def answers(model, strip, budget, **options):
    """Greedy answers to the four questions after a strip (T,), one `generate` each: -> text, loops of each"""
    ids, text, loops = torch.cat((strip, strip.new_tensor([len(SYMBOLS) - 1])))[None], "", []
    for question in range(LANES):
        ids = torch.cat((ids, ids.new_tensor([[LETTERS + LANES + question]])), 1)
        (step,) = model.generate(ids, 1, budget=budget, temperature=0, **options)
        ids, text, loops = (
            torch.cat((ids, step.tokens[:, None]), 1),
            text + SYMBOLS[step.tokens],
            loops + [step.loops.item()],
        )
    return text, loops


def show(model, seed, budget, **options):
    """Print some problems of rising difficulty, what the model answers at budget 1 and at `budget`, and the loops it used."""
    steps = torch.tensor([1, 3, 5, 6, 7, 8, 10])
    ids, targets = problems(steps, LANES, torch.Generator().manual_seed(seed))
    print(f"steps  {'strip':{ROWS * (LANES + 1)}}right  at 1    at {budget:<4d} loops")
    for n, row, target in zip(steps.tolist(), ids.to(model.decoder.norm.weight.device), targets):
        strip, truth = row[: ROWS * LANES], "".join(SYMBOLS[i] for i in target[target >= 0])
        cells = " ".join(
            "".join(SYMBOLS[i] for i in strip[r : r + LANES]) for r in range(0, len(strip), LANES)
        )
        (one, _), (many, loops) = (
            answers(model, strip, 1, **options),
            answers(model, strip, budget, **options),
        )
        mark = lambda text: f"{text} {'✓' if text == truth else '✗'}"
        print(
            f"{n:5d}  {cells} {truth:5}  {mark(one)}  {mark(many)}   {' '.join(map(str, loops))}",
            flush=True,
        )


def examples():
    """A few problems as text, each up to its first question."""
    ids, _ = problems(torch.tensor([2, 5, 7, 10]), 1, torch.Generator().manual_seed(7))
    return ["".join(SYMBOLS[i] for i in row) for row in ids]


def main():
    parser = argparse.ArgumentParser(
        description="Pretrain the tiny base (assets/tiny/base), or check the one that is shipped."
    )
    parser.add_argument(
        "--check", action="store_true", help="train for a moment and compare with the shipped base"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "assets" / "tiny" / "base",
        help="folder of the base",
    )
    args = parser.parse_args()
    check(args.out) if args.check else make_base(args.out)


if __name__ == "__main__":
    run(main)

"""Random deep supervision: train a recast model (paper section 3.2, Fig. 10).

    python train.py                                     the embedded tiny world (tiny.py)
    python train.py --model DIR --data text.jsonl

    torchrun --nproc_per_node 8 train.py --model …      data parallel: each process its own batches, gradients averaged

`training_step` is the method. The rest is an ordinary training loop: batches, AdamW on fp32 masters, warm-up and one cosine, evaluation,
and checkpoints from which --resume goes on as if nothing had happened.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tiny
from appendix import data
from appendix.errors import InputError, require, run
from appendix.fast import checkpoint_activations, compile_layers
from appendix.flags import add_model_flags, number, pick_device, pick_dtype
from appendix.hub import PRESETS
from appendix.memory import count, keep_freed_memory, plan
from appendix.optim import fp32_masters, learning_rate, update
from appendix.parallel import average, join, leave, meet, shard
from appendix.resume import no_signals, open_log, restore, resumable, save_checkpoint, signals
from load_weights import load

BUDGETS = (1, 2, 4, 8)  # loops at which the held-out loss is taken
FINEWEB = "HuggingFaceFW/fineweb-edu/data/CC-MAIN-2025-26"  # the paper's text, shard by shard
CHUNK = (
    3 * 2**24
)  # logits in memory together, 200 MB in fp32; a quarter of it on a CPU, where smaller products are no slower
START = {
    "step": 0,
    "tokens": 0,
    "spent": 0.0,
    "skipped": 0,
    "data": None,
}  # facts of a run without a checkpoint
PATIENCE = 5  # steps in a row without a finite gradient before a run stops

# ---- the method ------------------------------------------------------------------------------------------------------


def next_tokens(ids):
    """What each token is to predict (N, T): the token after it; -100, nothing, for the last."""
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)


def next_token_loss(model, h, targets):
    """L_LM of every sequence (N,), in nats a target, and the share (N,) of its targets that argmax D(h) gets right (eq. 11, 13).
    The logits of a chunk of tokens are made, used and, where there are several chunks, made again for the gradient: never all at once."""

    def head(x, targets):  # (C, D), (C,)
        logits = model.decoder.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (C, V)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    x = model.decoder.layers(h, model._span(h.shape[1]))
    size = max(1, CHUNK // (1 if h.is_cuda else 4) // model.config.vocab_size)  # C
    chunks = list(zip(x.flatten(0, 1).split(size), targets.flatten().split(size)))
    parts = [
        head(*chunk) if len(chunks) == 1 else checkpoint(head, *chunk, use_reentrant=False)
        for chunk in chunks
    ]
    loss, right = (
        torch.cat(part).view_as(targets).sum(1) / (targets >= 0).sum(1) for part in zip(*parts)
    )
    return loss, right


def training_step(model, ids, loops, supervised, scale=1.0, targets=None):
    """Run up to `loops` loops on ids (N, T); at each index in `supervised` add the gradient of that one loop's losses to .grad.

    In all: scale / len(supervised) times the sum over supervised loops of the batch mean of L_LM + L_mono + L_Q, each taken
    per sequence (eq. 10-13). No gradient crosses a loop or reaches the encoder. targets (N, T), -100 where no loss is taken
    (None: the next tokens of ids). Returns a record of floats per supervised loop.
    """
    targets = next_tokens(ids) if targets is None else targets
    require(
        supervised and set(supervised) <= set(range(loops)),
        f"supervised loops {sorted(supervised)}: expected some of 0 to {loops - 1}",
    )
    with torch.no_grad():
        h = model.encode(ids)  # h⁰, eq. 1: never trained
    records, previous_lm = [], None
    for b in range(
        max(supervised) + 1
    ):  # what comes after the last supervised loop changes nothing
        if b not in supervised:
            with torch.no_grad():
                h, _ = model.loop(h)  # hᵇ⁺¹, eq. 2-5
            previous_lm = None
            continue
        if previous_lm is None:  # else known: the loop before was supervised too
            with torch.no_grad():
                previous_lm, _ = next_token_loss(
                    model, h, targets
                )  # of D(hᵇ); at b = 0 of D(h⁰), no loop at all
        h, q_logit = model.loop(h)  # the one loop with gradient
        lm, share = next_token_loss(model, h, targets)  # eq. 11
        mono = F.silu(lm - previous_lm)  # eq. 12
        q = F.binary_cross_entropy_with_logits(
            q_logit, share.to(q_logit.dtype), reduction="none"
        )  # eq. 13
        ((lm + mono + q).mean() * (scale / len(supervised))).backward()  # eq. 10
        h, previous_lm = h.detach(), lm.detach()
        records.append(
            {"loop": b, "lm": lm.mean().item(), "mono": mono.mean().item(), "q": q.mean().item()}
        )
    return records


def control_step(model, ids, scale=1.0, targets=None):
    """The control: the same layers trained plainly, as one pass of the backbone, on the same tokens."""
    with torch.no_grad():
        h = model.encode(ids)
    loss = plain_loss(model, h, next_tokens(ids) if targets is None else targets)
    (loss * scale).backward()
    return [{"loop": 0, "lm": loss.item(), "mono": 0.0, "q": 0.0}]


def plain_loss(model, h, targets):
    """Mean L_LM of the backbone as one ungated pass, from h⁰."""
    return next_token_loss(model, model.pretrained_loop(h), targets)[0].mean()


@torch.no_grad()
def evaluate(model, held_out, batch_size, plain, budgets=BUDGETS):
    """Held-out loss of (ids, targets), both (N, T): `plain`, the backbone's one ungated pass; else at each of the budgets."""
    sums = dict.fromkeys(["plain"] if plain else map(str, budgets), 0.0)
    for ids, targets in zip(*(rows.split(batch_size) for rows in held_out)):
        h = model.encode(ids)
        if plain:
            sums["plain"] += plain_loss(model, h, targets).item() * len(ids)
            continue
        for b in range(1, max(budgets) + 1):
            h, _ = model.loop(h)
            if b in budgets:
                sums[str(b)] += next_token_loss(model, h, targets)[0].sum().item()
    return {name: total / len(held_out[0]) for name, total in sums.items()}


# ---- the training loop -----------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description="Recast a pretrained model and train it with random deep supervision.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_flags(
        parser,
        "preset, directory or hub id of a backbone, or a LoopUS checkpoint to go on from; tiny brings its own data and defaults",
        "tiny",
    )
    parser.add_argument(
        "--data",
        help=f"training text: .txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, a folder of such, or a hub data set: org/name or org/name/folder (default for a preset: {FINEWEB})",
    )
    parser.add_argument(
        "--eval-data",
        help="held-out text (default: the first sequences of --data, which are then not trained on)",
    )
    parser.add_argument(
        "--eval-sequences", type=number(int, 1), default=16, help="held-out sequences"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of log and checkpoints (default: out/<model>)"
    )
    # the recipe; the paper's: 3B tokens, about 26 sequences of 1024 a step
    parser.add_argument("--steps", type=number(int, 1), default=1000, help="optimizer steps")
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=2, help="sequences of one training_step"
    )
    parser.add_argument(
        "--accumulate", type=number(int, 1), default=13, help="training_steps an optimizer step"
    )
    parser.add_argument("--seq-len", type=number(int, 2), default=1024, help="tokens of a sequence")
    parser.add_argument("--lr", type=number(float, 0), default=5e-5, help="peak learning rate")
    parser.add_argument(
        "--warmup",
        type=number(int, 0),
        default=300,
        help="warm-up steps, at most a tenth of --steps",
    )
    parser.add_argument(
        "--clip", type=number(float, 1e-9), default=1.0, help="largest norm of the gradient"
    )
    parser.add_argument(
        "--loops", type=number(int, 1), default=20, help="B, loops of a training step"
    )
    parser.add_argument(
        "--supervised", type=number(int, 1), default=5, help="K, how many of them are supervised"
    )
    parser.add_argument(
        "--threshold",
        type=number(float, 0, 1),
        default=0.6,
        help="q_th, the exit threshold that is stored with the model",
    )
    parser.add_argument(
        "--gate-init", choices=["paper", "open"], default="paper", help="of a fresh recast's gate"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="train the backbone plainly instead, on the same tokens",
    )
    parser.add_argument(
        "--eval-every",
        type=number(int, 1),
        default=100,
        help="steps between evaluations, each with a checkpoint",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, or start afresh if there is none (the same command alone goes on with a run that was stopped)",
    )
    parser.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep only each layer's input for the gradient and make the rest again: less memory, a third more work in supervised loops",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="with torchrun: spread the model over the GPUs, where one is too small for it",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers: faster after a minute or more, and less memory",
    )
    parser.add_argument("--keep", type=number(int, 1), default=2, help="newest checkpoints kept")
    if parser.parse_known_args()[0].model == "tiny":
        parser.set_defaults(**tiny.RECIPE)
    args = parser.parse_args()
    if args.supervised > args.loops:
        parser.error(f"--supervised {args.supervised}: more than --loops {args.loops}")
    if args.model == "tiny" and (args.data or args.eval_data):
        parser.error(
            "--data and --eval-data: the tiny world makes its own problems; leave them out, or name another --model"
        )
    if args.model != "tiny" and not args.data:
        if args.model not in PRESETS:
            parser.error(f"--data is needed: a text file or a hub data set, for example {FINEWEB}")
        args.data = FINEWEB
    if args.dtype == "float16":
        parser.error(
            "--dtype float16: its gradients need scaling, which is not built; take bfloat16 or float32"
        )
    if args.shard and "WORLD_SIZE" not in os.environ:
        parser.error(
            "--shard spreads a model over several processes: torchrun --nproc_per_node N train.py …"
        )
    args.out = args.out or Path("out") / Path(args.model).resolve().name
    return args


def material(args, tokenizer, position):
    """Held-out (ids, targets), both (N, T), and a stream without end of such batches, each with the position that follows it."""
    if args.model == "tiny":
        return tiny.held_out(args.eval_sequences), itertools.islice(
            zip(tiny.batches(args.batch_size, args.seed), itertools.count(1)), position or 0, None
        )
    ids = data.held_out(args.eval_data or args.data, tokenizer, args.seq_len, args.eval_sequences)
    stream = data.batches(
        args.data,
        tokenizer,
        args.batch_size,
        args.seq_len,
        args.seed,
        0 if args.eval_data else args.eval_sequences,
        position,
    )
    return (ids, next_tokens(ids)), (
        ((ids, next_tokens(ids)), position) for ids, position in stream
    )


def fit(args):
    """Train as the flags say, the backbone plainly if args.control; -> the trained model."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    kind = (
        "control" if args.control else "step"
    )  # a control's folder is not taken for a LoopUS model by sample.py
    flags = {
        name: str(value)
        for name, value in vars(args).items()
        if name
        not in ("out", "resume", "device", "keep", "checkpoint_activations", "compile", "shard")
    }
    log_path = args.out / "log.jsonl"
    if rank > 0:
        meet()  # process 0 looks first: it may set a broken checkpoint aside
    used = log_path.exists() or any(args.out.glob(f"{kind}-*"))
    resumed, facts = (
        (args.resume or log_path.exists()) and resumable(args.out, kind, flags) or (None, START)
    )
    other = "step" if args.control else "control"
    require(
        not any(args.out.glob(f"{other}-*")),
        f"--out {args.out}: holds a run already, with{'out' * args.control} --control; choose another folder",
    )
    require(
        args.resume or not used or resumed and (facts["step"] < args.steps or args.model == "tiny"),
        f"--out {args.out}: holds a run already, {'finished; choose another folder' if resumed else 'without log.jsonl or a whole checkpoint; move it away, or go on with --resume (afresh if no checkpoint is whole)'}",
    )
    meet() if rank == 0 else None
    meet()  # and nobody writes before all have looked
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    choice = random.Random(args.seed)  # the same supervised loops in every process
    needed = lambda config: plan(
        args, config, dtype, device, world, CHUNK // (1 if device.type == "cuda" else 4)
    )
    model, tokenizer = load(
        str(resumed or args.model),
        split=args.split,
        device="cpu" if args.shard else device,
        plan=needed,
    )
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which text needs")
    require(
        args.seq_len <= model.config.max_position_embeddings,
        f"--seq-len {args.seq_len}: the model's context is {model.config.max_position_embeddings}",
    )
    if not model.config.from_checkpoint:
        model.reasoning.gate.reset_parameters(args.gate_init)
    elif not resumed:
        print(
            'going on from a LoopUS checkpoint: its gate is kept, and "pretrained" below is its own layers run once, ungated'
        )
    model.config.loops, model.config.exit_threshold = args.loops, args.threshold
    if args.shard:
        shard(model, dtype, device)
    pairs = fp32_masters(model, dtype)
    optimizer = torch.optim.AdamW(
        [master for _, master in pairs.values()],
        lr=args.lr,
        weight_decay=0.0,
        fused=device.type in ("cuda", "cpu"),
    )
    if resumed:
        restore(resumed, pairs, optimizer)
        choice.setstate((facts["choice"][0], tuple(facts["choice"][1]), facts["choice"][2]))
        print(f"going on from {resumed}")
    first, tokens, spent, skipped, position = (
        facts[name] for name in ("step", "tokens", "spent", "skipped", "data")
    )
    if args.compile:
        compile_layers(model)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    held_out, stream = material(args, tokenizer, position)
    held_out = [x.to(device) for x in held_out]
    groups = iter(
        lambda: list(itertools.islice(stream, world)), []
    )  # of `world` batches in turn, a process trains on its own,
    coming = data.ahead(
        (group[rank][0], group[-1][1]) for group in groups
    )  # and the position is that behind all of them
    coming = itertools.chain(
        [next(coming)], coming
    )  # data that cannot be read is found before anything is written
    log = open_log(log_path, first) if rank == 0 else open(os.devnull, "w")

    def report_held_out(step):
        """Evaluate, log, show."""
        found = evaluate(model, held_out, args.batch_size, plain=args.control)
        record = {
            "pretrained": pretrained,
            **({"control": found["plain"]} if args.control else found),
        }
        print(json.dumps({"step": step, "eval": record}), file=log, flush=True)
        print(
            "      held-out loss  "
            + "  ".join(
                f"{'budget ' * name.isdigit()}{name} {loss:.3f}" for name, loss in record.items()
            ),
            flush=True,
        )

    def save_now(step, position, chosen):
        target = args.out / f"{kind}-{step:06d}"
        facts = {
            "step": step,
            "tokens": tokens,
            "spent": spent,
            "skipped": skipped,
            "data": position,
            "choice": chosen,
            "pretrained": pretrained,
            "flags": flags,
        }
        save_checkpoint(model, tokenizer, target, args.keep, pairs, optimizer, dtype, facts)
        print(f"      saved {target}", flush=True)

    every, frozen = count(model.config)
    print(
        f"{args.model} on {device}: {(every - frozen) / 1e6:.1f} M parameters trained, {frozen / 1e6:.1f} M frozen (embedding and encoder); {str(dtype).removeprefix('torch.')} "
        f"computation, fp32 masters; {args.steps} steps of {args.accumulate} x {args.batch_size}{f' x {world}' * (world > 1)} sequences"
    )
    pretrained = (
        facts["pretrained"]
        if resumed
        else evaluate(model, held_out, args.batch_size, plain=True)["plain"]
    )
    if not resumed:
        report_held_out(0)
    print("  step    loss      lm    mono       q      norm        lr   tokens  tok/s      ETA")
    if device.type == "cpu":
        keep_freed_memory()
    asked, bad, started = signals(), 0, time.perf_counter()
    for step in range(first, args.steps):
        before, records, seen, at = time.perf_counter(), [], 0, (position, choice.getstate())
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args.steps, args.lr, args.warmup)
        try:
            for _ in range(args.accumulate):
                batch, position = next(coming)
                ids, targets = (x.to(device) for x in batch)
                if args.control:
                    records += control_step(model, ids, 1 / args.accumulate, targets)
                else:
                    records += training_step(
                        model,
                        ids,
                        args.loops,
                        set(choice.sample(range(args.loops), args.supervised)),
                        1 / args.accumulate,
                        targets,
                    )
                seen += ids.numel()
            means = torch.tensor(
                [sum(r[name] for r in records) / len(records) for name in ("lm", "mono", "q")]
                + [len(asked), seen],
                device=device,
            )
            average([means])
            norm = update(pairs, optimizer, args.clip)
        except (
            InputError
        ):  # the data ended in an error, a lost network say: what was trained is kept
            if not args.shard and step > first:
                save_now(step, *at)
            raise
        except torch.OutOfMemoryError:
            raise InputError("out of memory: " + needed(model.config)) from None
        lm, mono, q, stop, seen = means.tolist()
        tokens += round(seen * world)
        bad, skipped = (0, skipped) if math.isfinite(norm) else (bad + 1, skipped + 1)
        spent += time.perf_counter() - before
        loss, speed, eta = (
            lm + mono + q,
            tokens / spent,
            int((args.steps - step - 1) * spent / (step + 1)),
        )
        record = {
            "step": step + 1,
            "tokens": tokens,
            "lr": lr,
            "loss": loss,
            "lm": lm,
            "mono": mono,
            "q": q,
            "norm": norm,
            "tokens_per_s": speed,
            "skipped": skipped,
        }
        print(json.dumps(record), file=log, flush=True)
        print(
            f"{step + 1:6d} {loss:7.3f} {lm:7.3f} {mono:7.3f} {q:7.3f} {norm:9.2f} {lr:9.2e} {tokens:8d} {speed:6.0f} "
            f"{eta // 3600:2d}:{eta // 60 % 60:02d}:{eta % 60:02d}"
            + f"   not finite: step skipped, {skipped} so far"
            * (bad > 0),
            flush=True,
        )
        require(
            bad < PATIENCE,
            f"step {step + 1}: the gradient was not finite {PATIENCE} times in a row; the newest checkpoint in {args.out} is good; try a smaller --lr",
        )
        if due := (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            report_held_out(step + 1)
        if due or stop:
            save_now(step + 1, position, choice.getstate())
        if stop and (step + 1 < args.steps or args.model == "tiny"):
            print("stopped; the same command with --resume goes on from here")
            leave(130)
    no_signals()
    print(f"{tokens} tokens in {time.perf_counter() - started:.0f} s")
    return model


def main():
    args = parse_args()
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        join()
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    model = fit(args)
    if args.model == "tiny" and not args.control:  # the control beside it, then what came of both
        out, args.control, args.out = args.out, True, args.out / "control"
        tiny.report(model, fit(args), out)
    leave(0)


if __name__ == "__main__":
    run(main)

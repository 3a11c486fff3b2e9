"""Random deep supervision: train a recast model (paper section 3.2, Fig. 10).

    python train.py                                     the embedded tiny world (tiny.py)
    python train.py --model DIR --data text.jsonl
    torchrun --nproc_per_node 8 train.py --model …      data parallel: gradients are averaged

The method is `training_step`, in the first half of this file: of B loops some are drawn at random
(--supervised), and each of these is supervised by the three losses of loopus.py's opening. The
second half is an ordinary training loop around it: `fit`, in the order of time.
"""

import argparse
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F

import tiny
from appendix import data, parallel, resume
from appendix.chunks import in_chunks, logits_at_once
from appendix.errors import InputError, first_line, require, run_main, say, say_over
from appendix.fast import checkpoint_activations, compile_layers, require_compiler
from appendix.flags import FlagParser, add_model_flags, number, pick_device, pick_dtype
from appendix.hub import PRESETS
from appendix.memory import announce_training, count, keep_freed_memory
from appendix.optim import fp32_masters, learning_rate, update
from load_weights import load, save
from loopus import LoopUS

BUDGETS = (1, 2, 4, 8)  # loops at which the held-out loss is taken
FINEWEB = "HuggingFaceFW/fineweb-edu/data/CC-MAIN-2025-26"  # the paper's text, shard by shard
STORIES = "roneneldan/TinyStories"  # what stories15m was pretrained on
COST = 0.005  # nats a token that leaving loops out may cost, half a percent of perplexity
PATIENCE = 5  # steps in a row without a finite gradient before a run stops

# ---- the method ----------------------------------------------------------------------------------


def next_tokens(ids):
    """What each token of ids (N, T) is to predict: the next one; -100, nothing, for the last."""
    nothing = torch.full_like(ids[:, :1], -100)
    return torch.cat((ids[:, 1:], nothing), dim=1)


def token_losses(model, x, targets):
    """−log p(target) of every token, 0 for a target of -100, and is the argmax right?

    x (N, T, D): what D's layers made; targets (N, T) -> nats (N, T), bool (N, T).
    """

    def losses(x, targets):  # (C, D), (C,), some of the tokens at a time
        logits = model.decoder.logits(x)  # (C, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, reduction="none")
        return loss, logits.argmax(-1) == targets

    return in_chunks(losses, x, targets, model.config.vocab_size)


def next_token_loss(model, h, targets):
    """L_LM of every sequence (eq. 11), and the share of its targets that argmax D(h) gets right.

    h (N, T, D), targets (N, T), -100 where no loss is taken -> nats a target (N,), share (N,).
    """
    x = model.decoder.layers(h, model.span(h.shape[1]))
    loss, right = token_losses(model, x, targets)  # (N, T) each
    counted = (targets >= 0).sum(1).clamp(min=1)
    return loss.sum(1) / counted, right.sum(1) / counted


def training_step(model, ids, loops, supervised, scale=1.0, targets=None, horizon=1):
    """Run up to `loops` loops on ids (N, T); at each index in `supervised` (from 0) take the loop's
    losses and add their gradient to .grad.

    What is added is the gradient of `scale` times the mean, over supervised loops and sequences, of
    L_LM + L_mono + L_Q. The gradient of a supervised loop passes back through `horizon` loops,
    itself included, but never past the supervised loop before it, and never into the encoder.
    horizon 1 is the paper's: no gradient crosses a loop.
    targets (N, T), -100 where no loss is taken (None: the next tokens of ids).
    -> a record of floats for each supervised loop: loop, lm, mono, q
    """
    targets = next_tokens(ids) if targets is None else targets
    require(
        supervised and set(supervised) <= set(range(loops)),
        f"supervised loops {sorted(supervised)}: expected some of 0 to {loops - 1}",
    )
    require(horizon >= 1, f"horizon {horizon}: expected 1 or more")
    losses = []
    with torch.no_grad():
        h = model.encode(ids)  # h⁰, eq. 1
    for b in range(max(supervised) + 1):  # a loop after the last supervised one changes nothing
        to_go = min(s for s in supervised if s >= b) - b  # loops until the next supervised one
        if to_go > 0:
            with torch.set_grad_enabled(to_go < horizon):
                h, _ = model.loop(h)  # hᵇ⁺¹, eq. 2-5
            continue
        with torch.no_grad():
            lm_before, _ = next_token_loss(model, h, targets)  # of D(hᵇ), at b = 0 without any loop
        h, q_logit = model.loop(h)  # the gradient of q reaches M through δ
        lm, accuracy = next_token_loss(model, h, targets)  # eq. 11
        mono = F.silu(lm - lm_before)  # eq. 12: lm_before is a constant
        accuracy = accuracy.to(q_logit.dtype)  # of an argmax, so without a gradient
        loss_q = F.binary_cross_entropy_with_logits(q_logit, accuracy, reduction="none")  # eq. 13
        loss = (lm + mono + loss_q).mean()  # eq. 10
        (loss * (scale / len(supervised))).backward()
        h = h.detach()  # no later loss reaches this loop
        losses.append(torch.stack([lm.mean(), mono.mean(), loss_q.mean()]).detach())
    records = []
    for b, (lm, mono, q) in zip(sorted(supervised), torch.stack(losses).tolist(), strict=True):
        records.append({"loop": b, "lm": lm, "mono": mono, "q": q})
    return records


def control_step(model, ids, scale=1.0, targets=None):
    """The control: one pass of the backbone, the same layers trained plainly on the same tokens."""
    targets = next_tokens(ids) if targets is None else targets
    with torch.no_grad():
        h = model.encode(ids)
    lm, _ = next_token_loss(model, model.pretrained_loop(h), targets)
    loss = lm.mean()
    (loss * scale).backward()
    return [{"loop": 0, "lm": loss.item(), "mono": 0.0, "q": 0.0}]


@torch.no_grad()
def sequence_losses(model, held_out, batch_size, plain, budgets=BUDGETS):
    """Held-out loss of each sequence, {name: (N,) nats a token}, of (ids, targets), both (N, T).

    plain: of the backbone's one ungated pass, as "plain"; else at each of the budgets.
    """
    losses = {name: [] for name in (["plain"] if plain else map(str, budgets))}
    all_ids, all_targets = (rows.split(batch_size) for rows in held_out)
    for ids, targets in zip(all_ids, all_targets, strict=True):
        h = model.encode(ids)
        if plain:
            lm, _ = next_token_loss(model, model.pretrained_loop(h), targets)
            losses["plain"].append(lm)
            continue
        for b in range(1, max(budgets) + 1):
            h, _ = model.loop(h)
            if b in budgets:
                lm, _ = next_token_loss(model, h, targets)
                losses[str(b)].append(lm)
    return {name: torch.cat(found) for name, found in losses.items()}


def evaluate(model, held_out, batch_size, plain, budgets=BUDGETS):
    """Held-out loss {name: nats a token}: the means of `sequence_losses`."""
    losses = sequence_losses(model, held_out, batch_size, plain, budgets)
    return {name: found.double().mean().item() for name, found in losses.items()}


@torch.no_grad()
def losses_and_confidences(model, ids, targets, budget):
    """Loss and confidence of every token that has a target, loop by loop: two of (budget, tokens).

    q is taken at every token, as if generation stood there.
    """
    h = model.encode(ids)
    span = model.span(ids.shape[1])
    counted = targets >= 0
    losses = []
    confidences = []
    for _ in range(budget):
        h, delta = model.reasoning(h, span)
        loss, _ = token_losses(model, model.decoder.layers(h, span), targets)
        losses.append(loss[counted])
        confidences.append(model.q_head(delta).squeeze(-1)[counted].sigmoid())
    return torch.stack(losses), torch.stack(confidences)


def last_loop(enough):
    """The loop, from 0, at which each token stops: the first that is enough, else the last one.

    enough (loops, tokens), bool -> (tokens,)
    """
    enough = enough.clone()
    enough[-1] = True
    return enough.int().argmax(0)


def outcome(losses, last):
    """Mean loops and mean loss of tokens that stop at the loops `last` (tokens,), from 0."""
    return (last + 1).float().mean().item(), losses.gather(0, last[None]).mean().item()


def find_threshold(losses, confidences):
    """The exit threshold (eq. 9) that needs the fewest loops on held-out text, at little cost.

    How much of its text a model gets right, and so how high q can be, differs from model to model:
    a fixed threshold may be reached at once or never. Here each token stops at the loop where its q
    first reaches the threshold, at the last one at the latest. Of all thresholds whose mean loss is
    at most COST nats above the best one's, that with the fewest loops is taken.
    losses, confidences (budget, tokens) -> threshold, mean loops, mean loss
    """
    found = []
    candidates = confidences.flatten().sort().values
    for threshold in [*candidates[:: max(1, len(candidates) // 200)].tolist(), 1.0]:
        found.append((threshold, *outcome(losses, last_loop(confidences >= threshold))))
    best = min(loss for _, _, loss in found)
    cheap = [entry for entry in found if entry[2] <= best + COST]
    return min(cheap, key=itemgetter(1))


# ---- the training loop: what the user asks for ---------------------------------------------------


def parse_args():
    parser = FlagParser("Recast a pretrained model and train it with random deep supervision.")
    add_recipe_flags(parser)
    add_run_flags(parser)
    first_look = argparse.ArgumentParser(add_help=False)
    first_look.add_argument("--model", default="tiny")
    if first_look.parse_known_args()[0].model == "tiny":
        parser.set_defaults(**tiny.RECIPE)
    args = parser.parse_args()
    check_flags(parser, args)
    if args.model != "tiny" and not args.data:
        args.data = STORIES if args.model == "stories15m" else FINEWEB
    args.out = args.out or Path("out") / Path(args.model).resolve().name
    return args


def add_recipe_flags(parser):
    """What is trained, on what, and how."""
    add_model_flags(
        parser,
        "preset, directory or hub id of a backbone, or a LoopUS checkpoint to train further; tiny "
        "brings its own data and defaults",
        "tiny",
    )
    add = parser.add_argument
    # the text
    add(
        "--data",
        help="training text: .txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, a folder of such, or a "
        f"hub data set: org/name or org/name/folder (default for a preset: {FINEWEB})",
    )
    add(
        "--eval-data", help="held-out text (default: the first sequences of --data, not trained on)"
    )
    add("--eval-sequences", type=number(int, 1), default=16, help="held-out sequences")
    add("--seq-len", type=number(int, 2), default=1024, help="tokens of a sequence")
    # the recipe; the paper's: 3B tokens, about 26 sequences of 1024 a step
    add("--steps", type=number(int, 1), default=1000, help="optimizer steps")
    add("--batch-size", type=number(int, 1), default=2, help="sequences of one training_step")
    add("--accumulate", type=number(int, 1), default=13, help="training_steps an optimizer step")
    add("--lr", type=number(float, 0), default=5e-5, help="peak learning rate")
    add("--warmup", type=number(int, 0), default=300, help="steps, at most a tenth of --steps")
    add("--clip", type=number(float, 1e-9), default=1.0, help="largest norm of the gradient")
    add("--loops", type=number(int, 1), default=20, help="B, loops of a training step")
    add("--supervised", type=number(int, 1), default=5, help="K, how many of them are supervised")
    add(
        "--horizon",
        type=number(int, 1),
        default=1,
        help="loops that a supervised loop's gradient passes back through, itself included",
    )
    add(
        "--threshold",
        type=number(float, 0, 1),
        help="q_th, the exit threshold that is stored with the model (default: found at each "
        "evaluation; the paper's is 0.6)",
    )
    add("--gate-init", choices=["paper", "open"], default="paper", help="of a fresh recast's gate")
    add("--control", action="store_true", help="train the backbone plainly instead, as a control")


def add_run_flags(parser):
    """Where the run is kept, and on what machine it fits."""
    add = parser.add_argument
    add("--out", type=Path, help="folder of log and checkpoints (default: out/<model>)")
    add(
        "--eval-every", type=number(int, 1), default=100, help="steps between evaluations and saves"
    )
    add("--keep", type=number(int, 1), default=2, help="newest checkpoints kept")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, or start afresh if there is none (the "
        "same command alone goes on with a run that was stopped)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="keep only each layer's input for the gradient and make the rest again: less memory, "
        "a third more work in supervised loops",
    )
    add("--compile", action="store_true", help="compile the layers: slow to start, then faster")
    add("--shard", action="store_true", help="with torchrun: spread the model over the GPUs")


def check_flags(parser, args):
    """Refuse what does not go together."""
    if args.supervised > args.loops:
        parser.error(f"--supervised {args.supervised}: more than --loops {args.loops}")
    if args.model == "tiny" and (args.data or args.eval_data):
        parser.error(
            "--data and --eval-data: the tiny world makes its own problems; leave them out, or "
            "name another --model"
        )
    if args.model != "tiny" and not args.data and args.model not in PRESETS:
        parser.error(f"--data is needed: a text file or a hub data set, for example {FINEWEB}")
    if args.dtype == "float16":
        parser.error(
            "--dtype float16: its gradients need scaling, which is not built; take bfloat16 or "
            "float32"
        )
    if args.shard and "WORLD_SIZE" not in os.environ:
        parser.error(
            "--shard spreads a model over several processes: torchrun --nproc_per_node N train.py …"
        )


# ---- the training loop: what it is made of -------------------------------------------------------


@dataclass
class Run:
    """What is trained, and with what."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype  # of the computation; the optimizer's masters are fp32
    model: LoopUS
    tokenizer: object
    pairs: dict  # {name: (parameter, fp32 master)} of all that is trained
    optimizer: torch.optim.Optimizer

    @property
    def kind(self):
        """A control's checkpoints have another name, so that sample.py does not take them."""
        return "control" if self.args.control else "step"


def load_run(args, checkpoint, device):
    """The Run that the flags ask for, as it was in the checkpoint, if there is one."""
    dtype = pick_dtype(args.dtype, device)

    def say_needs(config):  # before any weights are read
        announce_training(args, config, dtype, device, parallel.world(), logits_at_once(device))

    model, tokenizer = load(
        str(checkpoint or args.model),
        split=args.split,
        device="cpu" if args.shard else device,
        plan=say_needs,
    )
    config = model.config
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which text needs")
    require(
        args.seq_len <= config.max_position_embeddings,
        f"--seq-len {args.seq_len}: the model's context is {config.max_position_embeddings}",
    )
    if not config.from_checkpoint:
        model.reasoning.gate.reset_parameters(args.gate_init)
    elif checkpoint is None:
        say(
            'going on from a LoopUS checkpoint: its gate is kept, and "pretrained" below is its '
            "own layers run once, ungated"
        )
    config.loops = args.loops
    if args.threshold is not None:
        config.exit_threshold = args.threshold
    if args.shard:
        parallel.shard(model, dtype, device)
    pairs = fp32_masters(model, dtype)  # freezes the encoder
    masters = [master for _, master in pairs.values()]
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(masters, lr=args.lr, weight_decay=0.0, fused=fused)
    if checkpoint is not None:
        resume.restore(checkpoint, pairs, optimizer)
        say(f"going on from {checkpoint}")
    if args.compile:
        compile_layers(model)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if device.type == "cpu":
        keep_freed_memory()
    return Run(args, device, dtype, model, tokenizer, pairs, optimizer)


def training_data(args, tokenizer, position):
    """-> held-out (ids, targets), both (N, T), and endless batches ((ids, targets), position)."""
    if args.model == "tiny":
        held_out = tiny.held_out(args.eval_sequences)
        stream = zip(tiny.batches(args.batch_size, args.seed), itertools.count(1), strict=True)
        stream = itertools.islice(stream, position or 0, None)
    else:
        ids = data.held_out(
            args.eval_data or args.data,
            tokenizer,
            args.seq_len,
            args.eval_sequences,
            special=args.special_tokens,
        )
        held_out = (ids, next_tokens(ids))
        rows = data.batches(
            args.data,
            tokenizer,
            args.batch_size,
            args.seq_len,
            args.seed,
            skip=0 if args.eval_data else args.eval_sequences,
            position=position,
            special=args.special_tokens,
        )
        stream = (((ids, next_tokens(ids)), behind) for ids, behind in rows)
    stream = data.ahead(parallel.own_share(stream))
    first = next(stream)  # data that cannot be read is found before anything is written
    return held_out, itertools.chain([first], stream)


def next_batches(run, batches):
    """The batches [(ids, targets)] of one optimizer step, and the position in the data behind them.

    InputError, in all processes, if the data of one end in an error: a lost network, say.
    """
    drawn = []
    error = None
    try:
        for _ in range(run.args.accumulate):
            batch, position = next(batches)
            drawn.append(batch)
    except InputError as found:
        error = found
    if parallel.anywhere(error is not None, run.device):
        raise error or InputError("the data of another process ended in an error")
    return drawn, position


def optimizer_step(run, lr, batches, choice):
    """One step of the optimizer -> mean losses (lm, mono, q), the same by loop, norm of the
    gradient, tokens."""
    args = run.args
    share = 1 / args.accumulate
    records = []
    tokens = 0
    for ids, targets in batches:
        ids = ids.to(run.device)
        targets = targets.to(run.device)
        tokens += ids.numel() * parallel.world()
        if args.control:
            records += control_step(run.model, ids, share, targets)
        else:
            chosen = set(choice.sample(range(args.loops), args.supervised))
            records += training_step(
                run.model, ids, args.loops, chosen, share, targets, args.horizon
            )
    losses = torch.tensor([[r[name] for name in ("lm", "mono", "q")] for r in records])
    losses = losses.to(run.device)  # (records, 3); every process took the same loops
    parallel.average([losses])
    run.optimizer.param_groups[0]["lr"] = lr
    norm = update(run.pairs, run.optimizer, args.clip)  # averages the gradients over processes
    loops = torch.tensor([record["loop"] + 1 for record in records])
    by_loop = {}
    for loop in loops.unique().tolist():
        by_loop[loop] = losses[loops == loop].mean(0).tolist()
    return losses.mean(0).tolist(), by_loop, norm, tokens


def report_held_out(run, held_out, progress, log):
    """Evaluate, find the exit threshold, log and print. InputError if the model is no good."""
    found = evaluate(run.model, held_out, run.args.batch_size, plain=run.args.control)
    if run.args.control:
        found = {"control": found["plain"]}
    losses = {"pretrained": progress.pretrained} | found
    record = {"step": progress.step, "eval": losses}
    words = []
    for name, loss in losses.items():
        label = f"budget {name}" if name.isdigit() else name
        words.append(f"{label} {loss:.3f}")
    finite = all(math.isfinite(loss) for loss in losses.values())
    if finite and not run.args.control and run.args.threshold is None:
        threshold, loops, loss = calibrate(run, held_out)
        record |= {"threshold": threshold, "exit": loss, "exit_loops": loops}
        words.append(f"exit at q >= {threshold:.3f} {loss:.3f} ({loops:.1f} loops)")
    log.write(record)
    say("      held-out loss  " + "  ".join(words))
    require(
        finite,
        f"step {progress.step}: the held-out loss is not finite, so this model is not saved; "
        f"{resume.newest(run.args.out, run.kind)}; try a smaller --lr",
    )


def calibrate(run, held_out):
    """Store the exit threshold that `find_threshold` finds -> threshold, mean loops, mean loss."""
    size = run.args.batch_size
    parts = []
    for ids, targets in zip(*(x.split(size) for x in held_out), strict=True):
        parts.append(losses_and_confidences(run.model, ids, targets, max(BUDGETS)))
    losses, confidences = (torch.cat(x, dim=1).float() for x in zip(*parts, strict=True))
    found = find_threshold(losses, confidences)
    run.model.config.exit_threshold = found[0]
    return found


def save_checkpoint(run, progress):
    """Save the run as it stands, unless it is saved already."""
    target = run.args.out / f"{run.kind}-{progress.step:06d}"
    if target.exists():
        return
    tensors = parallel.whole_tensors(run.model, run.dtype)  # every process takes part
    state = resume.trainer_state(run.pairs, run.optimizer)
    if parallel.rank() == 0:
        with resume.new_checkpoint(target, run.args.keep) as directory:
            save(run.model, run.tokenizer, directory, tensors)
            resume.write_trainer_state(directory, state, progress, resume.run_flags(run.args))
    for _ in state:  # the other processes give their parts of each
        pass
    say(f"      saved {target}")


# ---- the training loop: what it prints -----------------------------------------------------------

# lm, mono and q are L_LM, L_mono and L_Q, means over the supervised loops; loss is their sum
HEAD = "  step    loss      lm    mono       q      norm        lr   tokens  tok/s      ETA"


def describe(run):
    """The first line of a run."""
    args = run.args
    every, frozen = count(run.model.config)
    sequences = f"{args.accumulate} x {args.batch_size}"
    if parallel.world() > 1:
        sequences += f" x {parallel.world()}"
    return (
        f"{args.model} on {run.device}: {(every - frozen) / 1e6:.1f} M parameters trained, "
        f"{frozen / 1e6:.1f} M frozen (embedding and encoder); {str(run.dtype)[6:]} computation, "
        f"fp32 masters; {args.steps} steps of {sequences} sequences"
    )


def step_record(progress, lr, losses, loops, norm):
    """What log.jsonl says of a step."""
    lm, mono, q = losses
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "lr": lr,
        "loss": lm + mono + q,
        "lm": lm,
        "mono": mono,
        "q": q,
        "by_loop": loops,
        "norm": norm,
        "tokens_per_s": progress.tokens / progress.spent,
        "skipped": progress.skipped,
    }


def step_line(record, steps, spent):
    """A step's record in the columns of HEAD."""
    step = record["step"]
    to_go = int((steps - step) * spent / step)
    eta = f"{to_go // 3600:2d}:{to_go // 60 % 60:02d}:{to_go % 60:02d}"
    return (
        f"{step:6d} {record['loss']:7.3f} {record['lm']:7.3f} {record['mono']:7.3f} "
        f"{record['q']:7.3f} {record['norm']:9.2f} {record['lr']:9.2e} {record['tokens']:8d} "
        f"{record['tokens_per_s']:6.0f} {eta}"
    )


def print_step(record, args, spent):
    """In a terminal a line that each step writes over; those at an evaluation stay. Elsewhere these
    lines, the first, and about twenty more of a run. log.jsonl has every step."""
    step = record["step"]
    line = step_line(record, args.steps, spent)
    if not math.isfinite(record["norm"]):
        say(f"{line}   not finite: step skipped, {record['skipped']} so far")
    elif step in (1, args.steps) or step % args.eval_every == 0:
        say(line)
    elif sys.stdout.isatty():
        say_over(line)
    elif step % max(1, args.steps // 20) == 0:
        say(line)


# ---- the training loop ---------------------------------------------------------------------------


def fit(args, device):
    """Train as the flags say, the backbone plainly if args.control; -> the trained model."""
    kind = "control" if args.control else "step"
    tiny_again = args.model == "tiny"  # a finished run of the tiny world gives its table again
    progress, checkpoint = parallel.from_first(
        resume.open_run, args.out, kind, resume.run_flags(args), args.resume, tiny_again
    )
    torch.manual_seed(args.seed)
    run = load_run(args, checkpoint, device)
    held_out, batches = training_data(args, run.tokenizer, progress.data)
    held_out = [x.to(run.device) for x in held_out]
    choice = progress.generator(args.seed)  # the same supervised loops in every process
    log = resume.Log(args.out, progress.step if checkpoint else None)
    say(describe(run))
    if checkpoint is None:
        plain = evaluate(run.model, held_out, args.batch_size, plain=True)["plain"]
        progress = replace(progress, pretrained=plain)
        report_held_out(run, held_out, progress, log)
    say(HEAD)

    caught = resume.catch_signals()
    for step in range(progress.step + 1, args.steps + 1):
        before = time.perf_counter()
        lr = learning_rate(step - 1, args.steps, args.lr, args.warmup)
        try:
            drawn, position = next_batches(run, batches)
        except InputError:  # keep what was trained
            save_checkpoint(run, progress)
            raise
        losses, loops, norm, tokens = optimizer_step(run, lr, drawn, choice)
        finite = math.isfinite(norm)
        progress = replace(
            progress,
            step=step,
            tokens=progress.tokens + tokens,
            spent=progress.spent + time.perf_counter() - before,
            bad=0 if finite else progress.bad + 1,
            skipped=progress.skipped + (not finite),
            data=position,
            choice=choice.getstate(),
        )
        record = step_record(progress, lr, losses, loops, norm)
        log.write(record)
        print_step(record, args, progress.spent)
        require(
            progress.bad < PATIENCE,
            f"step {step}: the gradient was not finite {PATIENCE} times in a row; "
            f"{resume.newest(args.out, kind)}; try a smaller --lr",
        )
        due = step % args.eval_every == 0 or step == args.steps
        if due:
            report_held_out(run, held_out, progress, log)
        stop = parallel.anywhere(bool(caught), run.device)  # a signal, in any process
        if due or stop:
            save_checkpoint(run, progress)
        if stop and (step < args.steps or tiny_again):
            say("stopped; the same command with --resume goes on from here")
            parallel.leave(130)
    resume.release_signals()
    say(f"{progress.tokens} tokens in {progress.spent:.0f} s")
    return run.model


def main():
    args = parse_args()
    parallel.join(args.device)
    device = pick_device(args.device)
    if args.compile:
        require_compiler(device)
    try:
        train_as_asked(args, device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory ({first_line(error)}): take --checkpoint-activations, a smaller "
            "--batch-size with a larger --accumulate, or a smaller --seq-len"
        ) from None
    parallel.leave(0)


def train_as_asked(args, device):
    """One run; in the tiny world the control's behind it, and what came of both."""
    model = fit(args, device)
    if args.model == "tiny" and not args.control:
        out = args.out
        args.control = True
        args.out = out / "control"
        tiny.report(model, fit(args, device), out)


if __name__ == "__main__":
    run_main(main)

"""The paper's tables, by the field's own harness: is the recast model better than what it was?

    python evaluate.py --model DIR --tasks table1 --budget pretrained,8
    python evaluate.py --model DIR --tasks arc_easy,piqa --local FOLDER --budget pretrained,1,2,4,8

The questions, their formatting and their metrics are lm-evaluation-harness' (an optional package).
What it asks of a model are log-likelihoods: how likely is a continuation behind a context? `score`
answers for all budgets in one run of the deepest, since the state after b loops is on its way.

Reading order: scoring, the harness, what is printed and written, the command.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from appendix.errors import InputError, first_line, require, run_main, say
from appendix.files import make_folder, read_json, shorten, write_text
from appendix.flags import FlagParser, add_model_flags, number, pick_device, pick_dtype
from appendix.hub import find
from load_weights import load
from loopus import PROBABILITIES, RULES, THRESHOLDS, Loop, never
from train import token_losses
from visualize import LINES, finish, panels, ticks_at

INSTALL = "pip install -r requirements-eval.txt"

# ---- scoring -------------------------------------------------------------------------------------


@dataclass
class Halt:
    """When a text's loops end: by a stopping rule of loopus.py and its threshold."""

    rule: str
    threshold: float


@dataclass
class Score:
    """What a continuation got, in one budget."""

    loglikelihood: float  # of the whole continuation, in nats
    greedy: bool  # is each of its tokens the likeliest?
    loops: int


@torch.inference_mode()
def score(model, rows, budgets, halt):
    """Log-likelihoods of continuations.

    rows: [(context, continuation)], lists of ids, neither empty. budgets: numbers of loops, or
    "pretrained" for the backbone's one ungated pass. A text is one block: all its tokens take the
    loops that the stopping rule gives the context's last token, as a prompt's do in generation, and
    never more than the budget. -> for each row {budget: Score}
    """
    device = model.decoder.norm.weight.device
    most = model.config.max_position_embeddings
    inputs = [(context + continuation)[-most - 1 : -1] for context, continuation in rows]
    ids = torch.zeros(len(rows), max(map(len, inputs)), dtype=torch.long)
    for row, text in zip(ids, inputs, strict=True):
        row[: len(text)] = torch.tensor(text)  # padding stands behind, where no token sees it
    # Where the continuations' tokens are predicted: row, column and the token itself.
    places = []
    for r, (text, (_, continuation)) in enumerate(zip(inputs, rows, strict=True)):
        first = len(text) - len(continuation)
        places += [(r, first + i, token) for i, token in enumerate(continuation)]
    places = torch.tensor(places, device=device).T  # (3, tokens)
    last = torch.tensor(
        [len(text) - len(k) for text, (_, k) in zip(inputs, rows, strict=True)], device=device
    )  # (N,) the context's last token
    every = torch.arange(len(rows), device=device)
    ids = ids.to(device)

    h = model.encode(ids)
    span = model.span(ids.shape[1])
    scores = [{} for _ in rows]
    if "pretrained" in budgets:
        note(scores, "pretrained", read(model, model.pretrained_loop(h), places, len(rows)), None)
    numbers = [b for b in budgets if b != "pretrained"]
    rule = RULES[halt.rule]
    live = torch.ones(len(rows), dtype=torch.bool, device=device)
    loops = torch.zeros(len(rows), dtype=torch.long, device=device)
    confidences = []
    before = None
    for b in range(1, max(numbers, default=0) + 1):
        new, delta = model.reasoning(h, span)
        new = torch.where(live[:, None, None], new, h)
        loops = loops + live
        confidences.append(model.q_logit(delta[every, last][:, None]).sigmoid())
        decode = partial(logits_at, model, new, span, every, last)
        loop = Loop([*confidences], new[every, last][:, None], h[every, last][:, None], decode)
        h = new
        if b in numbers:
            note(scores, b, read(model, h, places, len(rows)), loops)
        if rule is not never:
            live = live & ~rule(loop, before, halt.threshold)
        before = loop
    return scores


def logits_at(model, h, span, rows, columns):
    """The next token's logits (N, V) at one column of each row of h (N, T, D)."""
    return model.decoder.logits(model.decoder.layers(h, span)[rows, columns])


def read(model, h, places, rows):
    """Of each row's continuation under D(h) the log-likelihood and how many tokens are not the
    likeliest: two of (rows,). places (3, tokens): row, column and token of what is predicted."""
    row, column, token = places
    x = model.decoder.layers(h, model.span(h.shape[1]))[row, column]  # (tokens, D)
    loss, right = (found[0] for found in token_losses(model, x[None], token[None]))
    total = torch.zeros(rows, dtype=torch.float64, device=h.device).index_add(
        0, row, -loss.double()
    )
    missed = torch.zeros(rows, dtype=torch.long, device=h.device).index_add(0, row, (~right).long())
    return total, missed


def note(scores, budget, found, loops):
    """Put what `read` found into the rows' scores. loops (N,), None for the backbone."""
    total, missed = (x.tolist() for x in found)
    for r, row in enumerate(scores):
        row[budget] = Score(total[r], missed[r] == 0, 1 if loops is None else loops[r].item())


class Scorer:
    """Scores what the harness asks, all budgets at once, and remembers it in a file of its folder:
    a run that was stopped goes on there."""

    def __init__(self, model, budgets, halt, batch_size, path):
        self.model = model
        self.budgets = budgets
        self.halt = halt
        self.batch_size = batch_size
        self.path = path
        self.known = {}  # {key of a row: {budget: Score}}
        if path.exists():
            self.remember()

    def remember(self):
        """Take what a run before this one scored; its last line may be half a line, and goes."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("}\n")]
            for line in lines:
                record = json.loads(line)
                scores = dict(zip(self.budgets, record["scores"], strict=True))
                self.known[record["key"]] = {b: Score(*s) for b, s in scores.items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.path}: not the scores that were written ({first_line(error)}); remove it, "
                "or choose another --out"
            ) from None
        write_text(self.path, "".join(lines))

    def key(self, row):
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()

    def score(self, rows):
        """[(context, continuation)] -> for each {budget: Score}."""
        new = {self.key(row): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.known}
        start = time.perf_counter()
        done = 0
        with open(self.path, "a", encoding="utf-8") as file:
            for part in in_batches(new, self.batch_size):
                found = score(self.model, [new[key] for key in part], self.budgets, self.halt)
                for key, scores in zip(part, found, strict=True):
                    self.known[key] = scores
                    values = [list(vars(scores[b]).values()) for b in self.budgets]
                    print(json.dumps({"key": key, "scores": values}), file=file, flush=True)
                done += len(part)
                tell_progress(done, len(new), time.perf_counter() - start)
        return [self.known[self.key(row)] for row in rows]

    def generate(self, ids, count, budget, eos_ids, **options):
        """Continue one text: an iterator of loopus.Step."""
        ids = torch.tensor([ids], device=self.model.decoder.norm.weight.device)
        options |= {"eos_id": eos_ids or None, "exit_threshold": self.halt.threshold}
        if budget != "pretrained":
            options |= {"budget": budget, "halt": self.halt.rule}
            yield from self.model.generate(ids, count, **options)
            return
        gate = self.model.reasoning.gate
        rates = gate.A_log.data.clone()
        gate.open_fully()
        try:
            yield from self.model.generate(ids, count, **options | {"budget": 1, "halt": "none"})
        finally:
            gate.A_log.data.copy_(rates)


def in_batches(rows, size):
    """The keys of rows {key: (context, continuation)} in batches of like length, the longest first.

    A batch has `size` rows, fewer where they are longer than 512 tokens.
    """
    lengths = {
        key: len(context) + len(continuation) for key, (context, continuation) in rows.items()
    }
    keys = sorted(rows, key=lambda key: -lengths[key])
    while keys:
        count = max(1, min(size, size * 512 // lengths[keys[0]]))
        yield keys[:count]
        keys = keys[count:]


def tell_progress(done, total, spent):
    """In a terminal a line that is written over, on stderr; elsewhere twenty lines in all."""
    step = max(1, total // 20)
    to_go = spent / done * (total - done)
    line = f"  {done} of {total} texts, {spent:.0f} s, {to_go:.0f} s to go"
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)
    elif done == total or done // step > (done - 1) // step:
        print(line, file=sys.stderr, flush=True)


# ---- what came of it -----------------------------------------------------------------------------

# The paper's own numbers: model -> (original, LoopUS), each WikiText, LAMBADA, mean accuracy.
PAPER = {
    "Qwen3-1.7B": ((21.0, 12.21, 53.7), (16.9, 7.43, 55.3)),
    "Qwen3-4B": ((16.4, 7.29, 60.3), (13.9, 5.33, 62.1)),
    "Qwen3-8B": ((12.2, 4.58, 63.2), (10.3, 4.32, 65.4)),
    "Phi-4": ((9.59, 4.03, 67.0), (7.75, 3.49, 68.6)),
}
PAPER_TABLE2 = {
    "TinyLlama, original": 43.1,
    "TinyLlama, LoopUS": 49.4,
    "McLeish et al., original": 52.1,
    "McLeish et al., adapted": 49.3,
    "Bae et al., original": 43.3,
    "Bae et al., adapted": 46.7,
}


def metrics_of(found, samples):
    """The harness' numbers of a task under our names, and the mean loops of its items."""
    result = {}
    for name, value in found.items():
        is_metric = "," in name  # as in "acc,none" and "exact_match,strict-match"
        if is_metric and isinstance(value, (int, float)):
            result[name.removesuffix(",none")] = value
    shown = "acc_norm" if "acc_norm" in result else "acc"
    require(result, "a group that has no number of its own; name its tasks")
    if f"{shown}_stderr" in result:
        result["stderr"] = result[f"{shown}_stderr"]
    result["loops"] = sum(s["loops"] for s in samples) / len(samples)
    result["items"] = len(samples)
    return result


def item(task, budget, sample, loops):
    """An item as it stands in items.jsonl."""
    values = [answer[0] for answer in sample["resps"]]
    values = [value[0] if isinstance(value, (tuple, list)) else value for value in values]
    gold = sample["target"]
    if len(values) > 1 and not isinstance(gold, int):  # as in winogrande, of several contexts
        doc = sample["doc"]
        gold = doc.get("gold", {"1": 0, "2": 1}.get(doc.get("answer")))
    return {
        "task": task,
        "index": sample["doc_id"],
        "budget": str(budget),
        "loglikelihoods": values,
        "gold": gold,
        "loops": loops,
    }


OURS = ("stderr", "loops", "items")  # of a result, beside the harness' metrics


def column_of(result, table):
    """Which number of a task the paper's tables hold: its name and the number."""
    for name in ("word_perplexity", "perplexity"):
        if name in result:
            return name, result[name]
    if table == "table2" and "acc_norm" in result:
        return "acc_norm", result["acc_norm"] * 100
    own = [name for name in result if name not in OURS and "_stderr" not in name]
    name = "acc" if "acc" in result else own[0]
    return name, result[name] * 100


def cell_of(value, error=None):
    """A number as the table shows it, with its standard error where there is one."""
    shown = f"{value:9.2f}" if value < 1e5 else f"{value:9.3g}"
    spread = f" ± {error:<4.3g}" if isinstance(error, float) else " " * 7
    return shown + spread


def print_row(label, cells):
    print(f"{label:34}" + "  ".join(f"{cell:>16}" for cell in cells))


def print_results(results, budgets, table):
    """A line a task: its metric, and its value ± standard error at each budget."""
    print()
    print_row(f"{'task':18}metric", budgets)
    accuracies = {budget: [] for budget in budgets}
    loops = {budget: [] for budget in budgets}
    for task, by_budget in results.items():
        cells = []
        for budget in budgets:
            result = by_budget[str(budget)]
            name, value = column_of(result, table)
            error = result.get(f"{name}_stderr")
            loops[budget].append(result["loops"])
            if "perplexity" not in name:
                accuracies[budget].append(value)
                error = error * 100 if isinstance(error, float) else None
            cells.append(cell_of(value, error))
        print_row(f"{task:18}{name}", cells)
    count = len(accuracies[budgets[0]])
    if count > 1:
        print_row(f"mean of {count}", [cell_of(sum(x) / count) for x in accuracies.values()])
    print_row("mean loops", [cell_of(sum(x) / len(x)) for x in loops.values()])


def draw_sweep(results, budgets, table, path):
    """Fig. 5: quality by number of loops, a line a task, the backbone's own one thin; accuracies on
    the left, perplexities on the right. budgets: of several numbers of loops."""
    numbers = [b for b in budgets if b != "pretrained"]
    fig, axes = panels(2, 11, 4)
    lines = itertools.cycle(LINES)
    for task, by_budget in results.items():
        columns = [column_of(by_budget[str(b)], table) for b in numbers]
        name, _ = columns[0]
        ax = axes[0, 1] if "perplexity" in name else axes[0, 0]
        line = next(lines)
        ax.plot(numbers, [value for _, value in columns], **line, ms=4, label=f"{task}, {name}")
        if "pretrained" in budgets:
            _, value = column_of(by_budget["pretrained"], table)
            ax.axhline(value, color=line["color"], lw=0.8, alpha=0.6)
    for ax, title in zip(axes[0], ("accuracy (%)", "perplexity"), strict=True):
        ax.set(title=title, xlabel="loops")
        ticks_at(ax, numbers)
        if ax.lines:
            ax.legend(fontsize=7)
    finish(fig, path)


def print_paper(table):
    """The paper's numbers beside which a table is read."""
    if table == "table1":
        print("\nthe paper's (original -> LoopUS): WikiText, LAMBADA, mean of the seven")
        for name, (original, looped) in PAPER.items():
            cells = [f"{a:g} -> {b:g}" for a, b in zip(original, looped, strict=True)]
            print(f"  {name:12}" + "   ".join(f"{cell:>16}" for cell in cells))
    if table == "table2":
        print("\nthe paper's, mean of the six")
        for name, value in PAPER_TABLE2.items():
            print(f"  {name:28}{value:6.1f}")


def is_right(record):
    """Does the gold choice have the highest log-likelihood? None: no choice, or no gold."""
    values = record["loglikelihoods"]
    if len(values) < 2 or not isinstance(record["gold"], int):
        return None
    return values.index(max(values)) == record["gold"]


def print_difference(own, other, name):
    """Accuracy of two sets of items.jsonl, item by item: the difference and its 95 % interval."""
    groups = {}
    for record in own:
        twin = other.get((record["task"], record["index"], record["budget"]))
        if twin is not None and is_right(record) is not None:
            difference = float(is_right(record)) - float(is_right(twin))
            groups.setdefault((record["task"], record["budget"]), []).append(difference)
    require(groups, f"--against {name}: none of its items is among these tasks and budgets")
    print(f"\naccuracy (acc) minus that of {name}, in points, paired by item")
    for (task, budget), differences in groups.items():
        x = torch.tensor(differences, dtype=torch.float64) * 100
        half = 1.96 * x.std().item() / len(x) ** 0.5 if len(x) > 1 else float("nan")
        print(f"  {task:18} budget {budget:12} {x.mean():+7.2f} ± {half:.2f}   {len(x)} items")


# ---- the command ---------------------------------------------------------------------------------


def parse_budgets(text):
    """An argparse type: "pretrained,1,8" -> ["pretrained", 1, 8]."""
    budgets = []
    for word in text.split(","):
        budgets.append(word if word == "pretrained" else number(int, 1)(word))
    if len(set(budgets)) < len(budgets):
        raise argparse.ArgumentTypeError(f"{shorten(text)}: expected each budget once")
    return budgets


def parse_args():
    parser = FlagParser("Score a model on the paper's tasks, with lm-evaluation-harness.")
    add_model_flags(parser, "preset, directory or hub id", "tiny-loopus")
    add = parser.add_argument
    add("--tasks", default="table1", help="table1, table2, or the harness' names with commas")
    add(
        "--budget",
        type=parse_budgets,
        default=["pretrained", 8],
        help="numbers of loops with commas; pretrained: the backbone's one pass",
    )
    add("--halt", choices=RULES, default="none", help="when a text's loops end; none: never")
    add("--threshold", type=number(float, 0), help="of the stopping rule (default: as sample.py's)")
    add("--limit", type=number(int, 1), help="items of each task (default: all)")
    add("--local", type=Path, help="a folder with the tasks as .jsonl, instead of the network")
    add("--batch-size", type=number(int, 1), default=16, help="texts that are scored together")
    add("--out", type=Path, default=Path("out/evaluate"), help="results.json and items.jsonl")
    add("--against", type=Path, help="an earlier --out: paired differences to it")
    add(
        "--authors-protocol",
        action="store_true",
        help="as the authors score: no BOS, context and continuation tokenised apart, windows of "
        "1024 tokens that advance by 512",
    )
    args = parser.parse_args()
    if args.halt in PROBABILITIES and args.threshold is not None and args.threshold > 1:
        parser.error(f"--threshold {args.threshold}: expected 0 to 1 with --halt {args.halt}")
    return args


def load_harness():
    """appendix/harness.py. InputError where the package that it needs is missing or too old."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness' own bars; ours says what matters
    try:
        import lm_eval

        from appendix import harness
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness is missing or too old ({error}); install it: {INSTALL}"
        ) from None
    logging.getLogger(lm_eval.__name__).setLevel(logging.ERROR)
    return harness


def settings(args, directory, dtype, halt):
    """What scores depend on: a folder's may only be used again where all of it is the same."""
    names = ("split", "budget", "halt", "authors_protocol", "special_tokens", "seed")
    found = {name: str(getattr(args, name)) for name in names}
    files = sorted(directory.glob("*.safetensors"))
    written = [f"{path.name} {path.stat().st_mtime_ns}" for path in files]
    found["model"] = ", ".join([str(directory.resolve()), *written])
    return found | {"dtype": str(dtype), "threshold": str(halt.threshold)}


def open_folder(args, wanted):
    """Make --out, or go on in it. InputError where what it holds was scored otherwise.

    wanted: the settings.
    """
    path = args.out / "settings.json"
    if path.exists():
        found = read_json(path)
        for name, value in wanted.items():
            flag = name.replace("_", "-")
            require(
                found.get(name) == value,
                f"--out {args.out}: holds scores with --{flag} {found.get(name)}, now it is "
                f"{value}; choose another folder",
            )
        return
    make_folder(args.out)
    write_text(path, json.dumps(wanted) + "\n")


def evaluate_tasks(args, lm, tasks, scorer):
    """Every task at every budget -> results {task: {budget: metrics}}, and all items."""
    import lm_eval

    results = {}
    items = []
    for name, task in tasks.items():
        results[name] = {}
        print(f"{name}:", file=sys.stderr)
        for budget in args.budget:
            lm.budget = budget
            lm.loops = {}
            try:
                found = lm_eval.simple_evaluate(
                    lm, tasks=[task], limit=args.limit, bootstrap_iters=1000, log_samples=True
                )
            except (InputError, KeyboardInterrupt):
                raise
            except Exception as error:  # of the harness, its data sets, the network
                raise InputError(
                    f"--tasks {name}: {type(error).__name__}: {first_line(error):.300}"
                ) from None
            records = []
            for part, samples in found["samples"].items():  # several where the task is a group
                records += [item(part, budget, s, lm.loops_of(s)) for s in samples]
            items += records
            results[name][str(budget)] = metrics_of(found["results"][name], records)
    return results, items


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    harness = load_harness()
    tasks = harness.tasks_by_name(args.tasks, args.local)
    against = read_items(args.against) if args.against else None
    model, tokenizer = load(args.model, split=args.split, device=device, dtype=dtype)
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which text needs")
    threshold = THRESHOLDS.get(args.halt, model.config.exit_threshold)
    halt = Halt(args.halt, threshold if args.threshold is None else args.threshold)
    open_folder(args, settings(args, find(args.model)[0], dtype, halt))
    start = time.perf_counter()
    scorer = Scorer(model, args.budget, halt, args.batch_size, args.out / "scores.jsonl")
    lm = harness.Adapter(scorer, tokenizer, args.authors_protocol, args.special_tokens)
    results, items = evaluate_tasks(args, lm, tasks, scorer)
    write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(args.out / "items.jsonl", "".join(json.dumps(record) + "\n" for record in items))
    print_results(results, args.budget, args.tasks)
    print_paper(args.tasks)
    if len([b for b in args.budget if b != "pretrained"]) > 2:
        draw_sweep(results, args.budget, args.tasks, args.out / "budgets.png")
    if against is not None:
        print_difference(items, against, args.against)
    if args.halt != "none":
        at = "" if args.halt == "argmax" else f" at {halt.threshold:g}"
        say(f"\nwith --halt {args.halt}{at}: a text's loops are those of its context's last token")
    say(f"\n{time.perf_counter() - start:.0f} s; wrote {args.out}/results.json and items.jsonl")


def read_items(folder):
    """The items of an earlier run {(task, index, budget): item}."""
    path = folder / "items.jsonl"
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(r["task"], r["index"], r["budget"]): r for r in items if is_right(r) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--against {folder}: no items.jsonl to read in it ({error})") from None


if __name__ == "__main__":
    run_main(main)

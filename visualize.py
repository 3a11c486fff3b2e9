"""The paper's figures, for any model: PNG files that a black-and-white print and a colour-blind eye can read.

    python visualize.py                the newest checkpoint below out/, else the embedded tiny world
    python visualize.py --model DIR

accuracy.png      the tiny world: accuracy by budget and by steps needed, base and control beside it, and where it stops
trajectories.png  Fig. 7: per prompt the PCA of h⁰ … hᴮ of the last token, the gate's α, the distances between successive states
profile.png       Fig. 1: what each layer, run once, does to the state, with the split in use and the split that the rule proposes
runs.png          with --runs: held-out loss of several training runs beside each other
speed.png         with --bench: Fig. 11, seconds a token by context, cached and not, from bench.py's numbers
budget.png        held-out loss by number of loops     } from --data, or from the log.jsonl of the model's training run
training.png      losses and held-out loss by step     }
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator

import tiny
from appendix import data
from appendix.errors import InputError, require, run
from appendix.files import read_json, write_whole
from appendix.flags import add_model_flags, number, pick_device, pick_dtype
from appendix.hub import find, newest_checkpoint
from load_weights import load
from train import evaluate, next_tokens

PROMPTS = (
    "32 * 64 =",
    "82 *64 + 21 =",
    "404 Not Found in the system 404 The new era",
    "What is the capital of South Korea? S",
)  # the paper's
LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (5, 1)), "v"),
)  # Okabe and Ito's colours
plt.rcParams.update(
    {
        "figure.dpi": 130,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "legend.frameon": False,
    }
)


def pca(states):
    """States (P, D) -> their first two principal components (P, 2) and each one's share of the variance."""
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    share = s.square() / s.square().sum().clamp(min=1e-300)
    return (u * s)[:, :2], share[:2].tolist()


def draw_pca(ax, states, name):
    """A path through successive states, coloured by index, arrows between them, start and end marked."""
    points, share = pca(states)
    x, y = points[:, 0], points[:, -1]
    dots = ax.scatter(x, y, c=range(len(x)), cmap="viridis", s=26, zorder=3)
    for i in range(len(x) - 1):
        ax.annotate(
            "",
            (x[i + 1], y[i + 1]),
            (x[i], y[i]),
            arrowprops={"arrowstyle": "->", "color": "0.5", "lw": 0.8},
        )
    ax.scatter(
        x[:1], y[:1], marker="s", s=90, facecolors="none", edgecolors="k", label="start", zorder=4
    )
    ax.scatter(
        x[-1:], y[-1:], marker="*", s=170, facecolors="none", edgecolors="k", label="end", zorder=4
    )
    ax.set(xlabel=f"PC 1 ({share[0]:.1%} of variance)", ylabel=f"PC 2 ({share[1]:.1%})")
    ax.legend(fontsize=8)
    ax.margins(0.12)
    ax.figure.colorbar(dots, ax=ax, label=name, ticks=MaxNLocator(integer=True))


def distances(states):
    """1 - cos and Euclidean distance of successive states: (P, …, D) -> two (P - 1, …)."""
    a, b = states[:-1].double(), states[1:].double()
    return 1 - torch.cosine_similarity(a, b, dim=-1), (b - a).norm(dim=-1)


@torch.inference_mode()
def follow(model, ids, loops):
    """h⁰ … hᴮ of the last token (B + 1, D) and α at every loop (B, D), for ids (1, T)."""
    alphas = []
    hook = model.reasoning.gate.register_forward_hook(
        lambda gate, inputs, alpha: alphas.append(alpha[0, -1].float())
    )
    h = model.encode(ids)
    states = [h[0, -1].float()]
    for _ in range(loops):
        h, _ = model.loop(h)
        states.append(h[0, -1].float())
    hook.remove()
    return torch.stack(states).cpu(), torch.stack(alphas).cpu()


def trajectories(model, prompts, loops, path):
    """Fig. 7; prompts: [(text, ids (1, T))]."""
    fig, axes = plt.subplots(
        len(prompts), 3, figsize=(13, 3.6 * len(prompts)), squeeze=False, layout="constrained"
    )
    for (left, middle, right), (text, ids) in zip(axes, prompts):
        states, alphas = follow(model, ids, loops)
        draw_pca(left, states, "loop")
        left.set_title(text if len(text) < 50 else text[:49] + "…", parse_math=False)
        at, mean, std = range(1, loops + 1), alphas.mean(1), alphas.std(1)
        print(
            f"{text!r}: mean α {mean[0]:.3f} ± {std[0]:.3f} over channels at loop 1, {mean[-1]:.3f} ± {std[-1]:.3f} at loop {loops}"
        )
        middle.plot(at, mean, color="#0072B2", marker="o", ms=3)
        middle.fill_between(at, mean - std, mean + std, color="#0072B2", alpha=0.2)
        middle.set(
            title="gate α over channels (mean ± std)",
            xlabel="loop",
            ylabel="α: share of the new proposal",
            ylim=(-0.05, 1.05),
        )
        cosine, euclid = distances(states)
        (one,) = right.plot(
            at, cosine, color="#0072B2", marker="o", ms=3, label="cosine distance (left)"
        )
        right.set(title="distance of successive states", xlabel="loop", ylabel="1 - cos")
        log = right.twinx()
        (two,) = log.plot(
            at,
            euclid,
            color="#D55E00",
            ls="--",
            marker="s",
            ms=3,
            label="Euclidean distance (right, log)",
        )
        log.set(yscale="log", ylabel="‖hᵇ - hᵇ⁻¹‖₂")
        log.spines["right"].set_visible(True)
        right.legend(
            handles=[one, two], fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2
        )
        for ax in (middle, right):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(fig, path)


@torch.inference_mode()
def layer_states(model, batches):
    """What goes into the first layer and comes out of each, over all tokens of some ids (N, T): (layers + 1, tokens, D)."""
    layers, states = [*model.encoder.layers, *model.reasoning.layers, *model.decoder.layers], []
    for ids in batches:
        span = model._span(ids.shape[1])
        passed = itertools.accumulate(
            layers, lambda h, layer: layer(h, span), initial=model.encoder.embed_tokens(ids)
        )
        states.append(torch.stack([h.float() for h in passed]).flatten(1, 2).cpu())
    return torch.cat(states, dim=1)


def propose_split(change):
    """Encoder: the leading layers that turn the state (1 - cos) more than twice as far as the median layer; decoder: the trailing
    ones. At least one each, and a layer left between them. The paper's rule is qualitative (section 3.1); this is one reading."""
    busy = [value > 2 * change.median().item() for value in change.tolist()]
    lead = next((i for i, b in enumerate(busy) if not b), len(busy))
    trail = next((i for i, b in enumerate(reversed(busy)) if not b), len(busy))
    encoder = min(max(lead, 1), len(busy) - 2)
    return encoder, min(max(trail, 1), len(busy) - encoder - 1)


def profile(model, batches, path):
    """Fig. 1: 1 - cos(h_l, h_l+1) and ‖h_l+1 - h_l‖₂ per layer, means over tokens; PCA of the mean states. -> the proposed split"""
    c, states = model.config, layer_states(model, batches)
    cosine, euclid = (x.mean(1) for x in distances(states))
    proposed = propose_split(cosine)
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for ax, values, label in (
        (axes[0], cosine, "1 - cos(input, output)"),
        (axes[1], euclid, "‖output - input‖₂"),
    ):
        ax.bar(range(len(values)), values, color="0.6")
        for (encoder, decoder), (colour, style, _), name in (
            ((c.encoder_layers, c.decoder_layers), LINES[0], "in use"),
            (proposed, LINES[1], "proposed"),
        ):
            for i, x in enumerate((encoder - 0.5, len(values) - decoder - 0.5)):
                ax.axvline(
                    x,
                    color=colour,
                    ls=style,
                    lw=1.6,
                    label=f"split {name}: {encoder} | {len(values) - encoder - decoder} | {decoder}"
                    if i == 0
                    else None,
                )
        ax.set(xlabel="layer", ylabel=label, yscale="log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8)
    axes[0].set_title("turn of the state by each layer")
    axes[1].set_title("length of each layer's step")
    draw_pca(axes[2], states.mean(1), "layers passed")
    axes[2].set_title("mean state after each layer")
    finish(fig, path)
    return proposed


def loss_by_budget(model, ids, loops):
    """Held-out loss of ids (N, T): {loops run: nats a token}, and the ungated pass under "pretrained"."""
    wanted, rows = (
        [b for b in (1, 2, 4, 6, 8, 12, 16, 20, 40, 80, 100) if b <= loops],
        (ids, next_tokens(ids)),
    )
    looped = evaluate(model, rows, 2, plain=False, budgets=wanted)
    return {"pretrained": evaluate(model, rows, 2, plain=True)["plain"]} | {
        int(b): loss for b, loss in looped.items()
    }


def draw_budget(losses, reference, path):
    fig, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    ax.plot(list(losses), list(losses.values()), color="#0072B2", marker="o", label="looped")
    ax.axhline(reference[1], color="#D55E00", ls="--", label=reference[0])
    ax.set(
        xscale="log",
        xlabel="loops",
        ylabel="held-out loss (nats a token)",
        xticks=list(losses),
        xticklabels=list(losses),
        title="loss by budget",
    )
    ax.minorticks_off()
    ax.legend()
    finish(fig, path)


def draw_training(records, path):
    """Training losses by step, and the held-out loss of every evaluation."""
    steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval" in r]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, (colour, style, _) in zip(("loss", "lm", "mono", "q"), LINES):
        left.plot(
            [r["step"] for r in steps],
            [r[name] for r in steps],
            color=colour,
            ls=style,
            lw=1.1,
            label={"loss": "sum", "lm": "L_LM", "mono": "L_mono", "q": "L_Q"}[name],
        )
    left.set(xlabel="optimizer step", ylabel="loss over supervised loops", title="training")
    left.legend()
    for name, (colour, style, marker) in zip(evals[-1]["eval"], (("0.5", "-", None), *LINES)):
        right.plot(
            [r["step"] for r in evals],
            [r["eval"][name] for r in evals],
            color=colour,
            ls=style,
            marker=marker,
            ms=4,
            label=f"{name} loop{'s' * (name != '1')}" if name.isdigit() else name,
        )
    right.set(
        xlabel="optimizer step",
        ylabel="held-out loss (nats a token)",
        title="held-out",
        yscale="log",
    )
    right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    right.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.1f"))
    right.legend()
    finish(fig, path)


def draw_runs(runs, path):
    """Held-out loss by step of several runs {name: log records}, one panel a budget; a control run is one line in all of them."""
    evals = {name: [r for r in records if "eval" in r] for name, records in runs.items()}
    looped = [name for name in evals if "control" not in evals[name][0]["eval"]]
    budgets = list(
        dict.fromkeys(b for name in evals for b in evals[name][0]["eval"] if b.isdigit())
    ) or ["1"]
    fig, axes = plt.subplots(
        1, len(budgets), figsize=(3.2 * len(budgets), 3.6), layout="constrained", squeeze=False
    )
    for ax, budget in zip(axes[0], budgets):
        for (name, points), (colour, style, marker) in zip(evals.items(), LINES):
            key = budget if name in looped else "control"
            ax.plot(
                [r["step"] for r in points],
                [r["eval"][key] for r in points],
                color=colour,
                ls=style,
                marker=marker,
                ms=4,
                label=name,
            )
        ax.axhline(
            next(iter(evals.values()))[0]["eval"]["pretrained"],
            color="0.6",
            lw=1,
            label="pretrained",
        )
        ax.set(title=f"{budget} loop{'s' * (budget != '1')}", xlabel="optimizer step", yscale="log")
        ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.1f"))
        ax.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.1f"))
    axes[0, 0].set_ylabel("held-out loss (nats a token)")
    axes[0, 0].legend()
    finish(fig, path)


def draw_accuracy(found, path):
    """The tiny world's accuracy.json: accuracy by steps needed and by budget, base and control as lines; loops used by steps needed."""
    budgets = [name for name in found if name.isdigit()]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, colour, style in (("base", "k", "-"), ("control", "0.5", "--")):
        left.plot(found[name], color=colour, ls=style, lw=2, label=name)
    shades = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(budgets)).numpy())
    for name, colour, marker in zip(budgets, shades, "os^Dvx"):
        left.plot(
            found[name],
            color=colour,
            marker=marker,
            ms=4,
            lw=1,
            label=f"{name} loop{'s' * (name != '1')}",
        )
    left.set(
        xlabel="steps needed", ylabel="problems solved", title="by steps needed", ylim=(-0.03, 1.05)
    )
    kinds = {
        "base solves them": lambda share: share >= 0.6,
        "base fails (< 60 %)": lambda share: share < 0.6,
    }
    for (kind, chosen), (colour, style, marker) in zip(kinds.items(), LINES):
        mean = lambda name: (lambda kept: sum(kept) / max(len(kept), 1))(
            [x for x, base in zip(found[name], found["base"]) if chosen(base)]
        )
        middle.plot(
            [int(b) for b in budgets],
            [mean(b) for b in budgets],
            color=colour,
            ls=style,
            marker=marker,
            label=kind,
        )
        middle.axhline(mean("base"), color=colour, lw=1, alpha=0.6)
        middle.axhline(mean("control"), color=colour, lw=1, ls=":", alpha=0.9)
    middle.plot([], [], color="0.3", lw=1, label="base alone")
    middle.plot([], [], color="0.3", lw=1, ls=":", label="control alone")
    middle.set(
        xscale="log",
        xlabel="loops",
        ylabel="problems solved",
        title="by budget",
        ylim=(-0.03, 1.05),
        xticks=[int(b) for b in budgets],
        xticklabels=budgets,
    )
    middle.minorticks_off()
    right.bar(range(len(found["loops"])), found["loops"], color="0.6")
    right.set(
        xlabel="steps needed",
        ylabel="loops before q reaches the threshold",
        title=f"where it stops (rank correlation {found['rank_correlation']:.2f})",
    )
    left.legend(fontsize=7)
    middle.legend(fontsize=7)
    finish(fig, path)


def draw_speed(found, path):
    """Fig. 11: seconds a token by context, one line a contender of bench.py."""
    fig, ax = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    at = [row["context"] for row in found["contexts"]]
    for name, (colour, style, marker) in zip(
        [name for name in found["contexts"][0] if name != "context"], LINES
    ):
        ax.plot(
            at,
            [row[name] for row in found["contexts"]],
            color=colour,
            ls=style,
            marker=marker,
            label=name if name == "uncached" else f"cached, {name}",
        )
    ax.set(
        xscale="log",
        yscale="log",
        xticks=at,
        xticklabels=at,
        xlabel="tokens before",
        ylabel="seconds a token",
        title=f"{found['shape']}, {found['budget']} loops",
    )
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.legend()
    finish(fig, path)


def read_log(path):
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a training log ({error})") from None
    require(any("eval" in record for record in records), f"{path}: no evaluation in it yet")
    return records


def finish(fig, path):
    """Write a figure beside and rename it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda partial: fig.savefig(partial, format="png"))
    except OSError as error:
        raise InputError(f"--out {path.parent}: not writable ({error})") from None
    plt.close(fig)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(
        description="Draw what the loops do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_flags(
        parser,
        "preset, directory or hub id (default: the newest checkpoint below out/, else the embedded tiny-loopus)",
    )
    parser.add_argument("--prompt", action="append", help="repeatable (default: the paper's four)")
    parser.add_argument("--loops", type=number(int, 1), default=20)
    parser.add_argument(
        "--data",
        help="text for the stage profile and the loss by budget: .txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet",
    )
    parser.add_argument(
        "--sequences",
        type=number(int, 1),
        default=16,
        help="of 256 tokens, taken from the start of --data",
    )
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="compare training runs by their log.jsonl (runs.png), and draw nothing else",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        metavar="FILE",
        help="draw the numbers that bench.py wrote (speed.png), and nothing else",
    )
    args = parser.parse_args()
    if args.runs or args.bench:
        if args.runs:
            require(
                len(args.runs) <= len(LINES),
                f"--runs: {len(args.runs)} runs; {len(LINES)} can be told apart in a figure",
            )
            unique = len({run.name for run in args.runs}) == len(args.runs)
            draw_runs(
                {
                    run.name if unique else str(run): read_log(run / "log.jsonl")
                    for run in args.runs
                },
                args.out / "runs.png",
            )
        if args.bench:
            found = read_json(args.bench)
            require(
                found.get("contexts"),
                f"--bench {args.bench}: no times by context in it; expected what bench.py writes",
            )
            draw_speed(found, args.out / "speed.png")
        return
    args.model = args.model or newest_checkpoint()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    model, tokenizer = load(
        str(args.model), split=args.split, device=device, dtype=pick_dtype(args.dtype, device)
    )
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which prompts need")
    prompts = []
    world = "tiny" in (model.config.base_model, args.model)
    for text in args.prompt or (tiny.examples() if world else PROMPTS):
        ids = tokenizer.encode(text, bos=tokenizer.add_bos)
        require(
            1 <= len(ids) <= model.config.max_position_embeddings,
            f"--prompt {text[:30]!r}: {len(ids)} tokens; the model takes 1 to {model.config.max_position_embeddings}",
        )
        prompts.append((text, torch.tensor([ids], device=device)))
    text = [ids for _, ids in prompts]
    if args.data:
        length = min(256, model.config.max_position_embeddings)
        rows = data.held_out(args.data, tokenizer, length, args.sequences).to(device)
        text = rows.split(2)
    trajectories(model, prompts, args.loops, args.out / "trajectories.png")
    encoder, decoder = profile(model, text, args.out / "profile.png")
    print(
        f"split in use {model.config.encoder_layers},{model.config.decoder_layers}; proposed {encoder},{decoder} "
        "(leading and trailing layers that turn the state more than twice as far as the median layer)"
    )
    folder = find(str(args.model))[0].parent
    if world and (folder / "accuracy.json").exists():
        draw_accuracy(read_json(folder / "accuracy.json"), args.out / "accuracy.png")
    log = folder / "log.jsonl"
    records = read_log(log) if log.exists() else []
    evals = [r["eval"] for r in records if "eval" in r]
    if args.data:
        losses = loss_by_budget(model, rows, args.loops)
        draw_budget(
            losses, ("one pass without the gate", losses.pop("pretrained")), args.out / "budget.png"
        )
        print("loss by loops: " + ", ".join(f"{b}: {loss:.3f}" for b, loss in losses.items()))
    elif evals and "1" in evals[-1]:
        draw_budget(
            {int(b): loss for b, loss in evals[-1].items() if b.isdigit()},
            ("pretrained", evals[-1]["pretrained"]),
            args.out / "budget.png",
        )
    else:
        print(
            "no budget.png: give --data, or a checkpoint of a training run with its log.jsonl beside"
        )
    if evals:
        draw_training(records, args.out / "training.png")
    else:
        print(f"no training.png: no {log}")


if __name__ == "__main__":
    run(main)

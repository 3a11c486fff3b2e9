"""The paper's figures, and ours: PNG files, also for a black-and-white print or a colour-blind eye.

    python visualize.py                the newest checkpoint below out/, else the embedded model
    python visualize.py --model DIR

trajectories.png  Fig. 7, for each prompt: the way of the last token's state h⁰ … hᴮ (PCA), the
                  gate's α, and the distances between successive states
profile.png       Fig. 1: what each layer, run once, does to the state, with the split in use and
                  the split that the rule proposes
accuracy.png      the tiny world: problems solved by steps needed and by budget, base and control
                  beside them, and where the model stops
confidence.png    what the head knows: q against the share of tokens that are right, where tokens
                  stop, and the loss by mean loops of each stopping rule, with a table in print
budget.png        held-out loss by number of loops: of --data, or of the model's training run
loops.png         Fig. 6: the losses of each loop, in four parts of the training run
next.png          Fig. 8: the likeliest next tokens of each prompt, and how likely they are by loop
text.html         Fig. 12: a continuation of each prompt, every token on a shade of its loops; the
                  pointer on a token shows q and the likeliest tokens at each loop
training.png      losses and held-out loss by step, of the model's training run
runs.png          with --runs: held-out loss of several training runs beside each other
speed.png         with --bench: Fig. 11, seconds a token by context, as bench.py measured them

Reading order: what is computed, how figures are drawn, the figures one by one, the command.
"""

import contextlib
import html
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

import tiny
from appendix import data
from appendix.errors import InputError, first_line, require, run_main
from appendix.files import read_json, write_text, write_whole
from appendix.flags import FlagParser, add_model_flags, number, pick_device, pick_dtype
from appendix.hub import find, newest_checkpoint
from load_weights import load
from train import evaluate, last_loop, next_tokens, outcome

# The paper's.
PROMPTS = (
    "32 * 64 =",
    "82 *64 + 21 =",
    "404 Not Found in the system 404 The new era",
    "What is the capital of South Korea? S",
)

WORDS = 32  # tokens of a continuation in text.html

# ---- what is computed ----------------------------------------------------------------------------


def run_loops(model, ids, loops):
    """Loop ids (N, T) by loop: hᵇ⁻¹, hᵇ and δ (N, T, D) each, and the Span to decode with."""
    span = model.span(ids.shape[1])
    h = model.encoder(ids, span)
    for _ in range(loops):
        new, delta = model.reasoning(h, span)
        yield h, new, delta, span
        h = new


@torch.inference_mode()
def follow(model, ids, loops):
    """The last token's state and gate, loop by loop: ids (1, T) -> h⁰ … hᴮ (B + 1, D), α (B, D)."""
    states = []
    alphas = []
    for old, new, delta, _ in run_loops(model, ids, loops):
        states = states or [old[0, -1].float()]
        states.append(new[0, -1].float())
        alphas.append(model.reasoning.gate(delta)[0, -1].float())
    return torch.stack(states).cpu(), torch.stack(alphas).cpu()


@torch.inference_mode()
def layer_states(model, batches):
    """The state before the first layer and after each, over all tokens of some ids (N, T).

    Each layer runs once, without the gate -> (layers + 1, tokens, D).
    """
    layers = [*model.encoder.layers, *model.reasoning.layers, *model.decoder.layers]
    collected = []
    for ids in batches:
        span = model.span(ids.shape[1])
        h = model.encoder.embed_tokens(ids)
        states = [h.float()]
        for layer in layers:
            h = layer(h, span)
            states.append(h.float())
        collected.append(torch.stack(states).flatten(1, 2).cpu())
    return torch.cat(collected, dim=1)


@torch.inference_mode()
def follow_tokens(model, batches, loops):
    """What each token with a target meets at each loop, all tokens looped alike.

    batches: [(ids, targets)], (N, T) each -> {name: (loops, tokens)}: loss (nats), q, choice (the
    likeliest token), right (0 or 1), moved and kl, which the rules convergence and kl look at.
    """
    collected = []
    for ids, targets in batches:
        counted = targets >= 0
        before = None
        for old, new, delta, span in run_loops(model, ids, loops):
            log_p = model.decoder(new, span)[counted].float().log_softmax(-1)  # (tokens, V)
            loss = F.nll_loss(log_p, targets[counted], reduction="none")
            kl = torch.full_like(loss, torch.inf)
            if before is not None:
                kl = F.kl_div(before, log_p, reduction="none", log_target=True).sum(-1)
            choice = log_p.argmax(-1)
            facts = {
                "loss": loss,
                "q": model.q_head(delta)[counted].squeeze(-1).float().sigmoid(),
                "choice": choice,
                "right": (choice == targets[counted]).float(),
                "moved": (new - old)[counted].float().norm(dim=-1),
                "kl": kl,
            }
            collected.append({name: x.cpu() for name, x in facts.items()})
            before = log_p
    parts = [collected[b::loops] for b in range(loops)]  # of each loop, those of all batches
    return {
        name: torch.stack([torch.cat([facts[name] for facts in part]) for part in parts])
        for name in collected[0]
    }


def statistics(facts):
    """{rule: (loops, tokens)}: a token stops at the first loop where it is at most a threshold."""
    changed = facts["choice"][1:] != facts["choice"][:-1]
    return {
        "confidence": -facts["q"],
        "cdf": (1 - facts["q"]).cumprod(0),
        "convergence": facts["moved"],
        "argmax": torch.cat((torch.ones_like(facts["q"][:1]), changed.float())),
        "kl": facts["kl"],
    }


def frontiers(facts):
    """{rule: [(mean loops, mean loss)]} for a range of thresholds, of fixed budgets, and of an
    oracle that stops each token where its loss is lowest."""
    losses = facts["loss"]
    found = {"fixed": [(b + 1, loss.mean().item()) for b, loss in enumerate(losses)]}

    for rule, statistic in statistics(facts).items():
        values = statistic[statistic.isfinite()].sort().values
        thresholds = values[:: max(1, len(values) // 30)].unique().tolist()
        found[rule] = [outcome(losses, last_loop(statistic <= t)) for t in thresholds]
    found["argmax"] = found["argmax"][:1]  # it has no threshold: the choice is the same, or not
    found["oracle"] = [outcome(losses, losses.argmin(0))]
    return found


def auc(score, label):
    """The chance that of two tokens, one with the label and one without, the former has the higher
    score (ties count half); nan where all are alike. score (tokens,), label (tokens,) of 0 or 1."""
    n = label.sum()
    above = (tiny.ranks(score) * label).sum() - n * (n + 1) / 2
    return (above / (n * (len(label) - n))).item()


def calibration(q, right, bins=10):
    """q and the share that is right, by bins of as many tokens each: two of (bins,)."""
    order = q.argsort()
    parts = [part for part in order.tensor_split(bins) if len(part)]
    return torch.tensor([[x[part].mean() for part in parts] for x in (q, right)])


def distances(states):
    """1 - cos and Euclidean distance of successive states: (P, …, D) -> two of (P - 1, …)."""
    before = states[:-1].double()
    after = states[1:].double()
    return 1 - torch.cosine_similarity(before, after, dim=-1), (after - before).norm(dim=-1)


def pca(states):
    """First two principal components (P, 2) of states (P, D), and each one's share of variance."""
    centred = states.double() - states.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    share = s.square() / s.square().sum().clamp(min=1e-300)
    return (u * s)[:, :2], share[:2].tolist()


def propose_split(change):
    """Layers of encoder and decoder, from how far each layer turns the state: 1 - cos (layers,).

    The encoder is the leading layers that turn the state more than twice as far as the median layer
    does, the decoder the trailing ones; at least one each, and a layer is left between them. The
    paper's rule is qualitative (section 3.1); this is one reading of it.
    """
    busy = (change > 2 * change.median()).tolist()
    encoder = max(1, leading(busy))
    encoder = min(encoder, len(busy) - 2)
    decoder = max(1, leading(busy[::-1]))
    return encoder, min(decoder, len(busy) - encoder - 1)


def leading(flags):
    """How many of the flags are true before the first that is not."""
    return flags.index(False) if False in flags else len(flags)


def loss_by_budget(model, ids, loops):
    """Held-out loss of ids (N, T): {loops: nats a token}; "pretrained" is the pass without gate."""
    budgets = [b for b in (1, 2, 4, 6, 8, 12, 16, 20, 40, 80, 100) if b <= loops]
    held_out = (ids, next_tokens(ids))
    losses = {"pretrained": evaluate(model, held_out, 2, plain=True)["plain"]}
    looped = evaluate(model, held_out, 2, plain=False, budgets=budgets)
    for budget, loss in looped.items():
        losses[int(budget)] = loss
    return losses


# ---- how figures are drawn -----------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#D55E00"

# The lines of a figure differ in colour (Okabe and Ito's), dashes and marker.
LINES = (
    {"color": BLUE, "ls": "-", "marker": "o"},
    {"color": ORANGE, "ls": "--", "marker": "s"},
    {"color": "#009E73", "ls": "-.", "marker": "^"},
    {"color": "#CC79A7", "ls": ":", "marker": "D"},
    {"color": "#000000", "ls": (0, (5, 1)), "marker": "v"},
    {"color": "#56B4E9", "ls": "-", "marker": "x"},
    {"color": "#D55E00", "ls": "--", "marker": "*"},
)
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


def panels(columns, width, height, rows=1):
    """A figure and its axes (rows, columns); width and height in inches, of the whole."""
    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def whole_numbers(axis):
    axis.set_major_locator(MaxNLocator(integer=True))


def ticks_at(ax, values):
    """A logarithmic x axis with ticks at these values only."""
    ax.set(xscale="log", xticks=values, xticklabels=values)
    ax.xaxis.set_minor_locator(NullLocator())


def logarithmic_losses(ax, form):
    """A logarithmic y axis, its ticks written as plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FormatStrFormatter(form))
    ax.yaxis.set_minor_formatter(FormatStrFormatter("%.1f"))


def draw_path(ax, states, name):
    """The way through successive states (P, D) on the plane of their first two components.

    A state is a dot, coloured by its number, with an arrow to the next. name: what is numbered.
    """
    points, share = pca(states)
    x, y = points[:, 0], points[:, -1]
    dots = ax.scatter(x, y, c=range(len(x)), cmap="viridis", s=26, zorder=3)
    arrow = {"arrowstyle": "->", "color": "0.5", "lw": 0.8}
    for i in range(len(x) - 1):
        ax.annotate("", (x[i + 1], y[i + 1]), (x[i], y[i]), arrowprops=arrow)
    outline = {"facecolors": "none", "edgecolors": "k", "zorder": 4}
    ax.scatter(x[:1], y[:1], marker="s", s=90, label="start", **outline)
    ax.scatter(x[-1:], y[-1:], marker="*", s=170, label="end", **outline)
    ax.set(xlabel=f"PC 1 ({share[0]:.1%} of variance)", ylabel=f"PC 2 ({share[1]:.1%})")
    ax.legend(fontsize=8)
    ax.margins(0.12)
    ax.figure.colorbar(dots, ax=ax, label=name, ticks=MaxNLocator(integer=True))


def finish(fig, path):
    """Write a figure, beside and renamed."""

    def write(partial):
        fig.savefig(partial, format="png")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise InputError(f"--out {path.parent}: not writable ({error})") from None
    plt.close(fig)
    print(f"wrote {path}")


# ---- trajectories.png ----------------------------------------------------------------------------


def draw_trajectories(followed, path):
    """Fig. 7, a row of panels for each prompt. followed: [(text, states (B + 1, D), α (B, D))]."""
    fig, axes = panels(3, 13, 3.6 * len(followed), rows=len(followed))
    for (path_ax, gate_ax, distance_ax), (text, states, alphas) in zip(axes, followed, strict=True):
        draw_path(path_ax, states, "loop")
        title = text if len(text) < 50 else text[:49] + "…"
        path_ax.set_title(title, parse_math=False)
        draw_gate(gate_ax, alphas)
        draw_distances(distance_ax, states)
    finish(fig, path)


def draw_gate(ax, alphas):
    """Mean and spread of α (B, D) over the channels, by loop."""
    loops = range(1, len(alphas) + 1)
    mean = alphas.mean(1)
    std = alphas.std(1)
    ax.plot(loops, mean, color=BLUE, marker="o", ms=3)
    ax.fill_between(loops, mean - std, mean + std, color=BLUE, alpha=0.2)
    ax.set(
        title="gate α over channels (mean ± std)",
        xlabel="loop",
        ylabel="α: share of the new proposal",
        ylim=(-0.05, 1.05),
    )
    whole_numbers(ax.xaxis)


def draw_distances(ax, states):
    """How far each loop moves the state, in two measures with an axis each."""
    cosine, euclid = distances(states)
    loops = range(1, len(states))
    log_ax = ax.twinx()
    lines = [
        *ax.plot(loops, cosine, **LINES[0], ms=3, label="cosine distance (left)"),
        *log_ax.plot(loops, euclid, **LINES[1], ms=3, label="Euclidean distance (right, log)"),
    ]
    ax.set(title="distance of successive states", xlabel="loop", ylabel="1 - cos")
    log_ax.set(yscale="log", ylabel="‖hᵇ - hᵇ⁻¹‖₂")
    log_ax.spines["right"].set_visible(True)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncol": 2}
    ax.legend(handles=lines, fontsize=8, **below)
    whole_numbers(ax.xaxis)


# ---- profile.png ---------------------------------------------------------------------------------


def draw_profile(states, config, path):
    """Fig. 1: how far each layer turns and moves the state, means over the tokens.

    states (layers + 1, tokens, D) -> the proposed split.
    """
    cosine, euclid = distances(states)
    turn = cosine.mean(1)
    proposed = propose_split(turn)
    splits = {"in use": (config.encoder_layers, config.decoder_layers), "proposed": proposed}
    fig, axes = panels(3, 13, 3.8)
    turn_ax, step_ax, path_ax = axes[0]
    draw_layers(turn_ax, turn, splits)
    turn_ax.set(title="turn of the state by each layer", ylabel="1 - cos(input, output)")
    draw_layers(step_ax, euclid.mean(1), splits)
    step_ax.set(title="length of each layer's step", ylabel="‖output - input‖₂")
    draw_path(path_ax, states.mean(1), "layers passed")
    path_ax.set_title("mean state after each layer")
    finish(fig, path)
    return proposed


def draw_layers(ax, values, splits):
    """A bar for each layer's value, and where the splits {name: (encoder, decoder)} cut."""
    count = len(values)
    ax.bar(range(count), values, color="0.6")
    for (name, (encoder, decoder)), line in zip(splits.items(), LINES, strict=False):
        style = {"color": line["color"], "ls": line["ls"], "lw": 1.6}
        label = f"split {name}: {encoder} | {count - encoder - decoder} | {decoder}"
        ax.axvline(encoder - 0.5, **style, label=label)
        ax.axvline(count - decoder - 0.5, **style)
    ax.set(xlabel="layer", yscale="log")
    whole_numbers(ax.xaxis)
    ax.legend(fontsize=8)


# ---- next.png ------------------------------------------------------------------------------------


@torch.inference_mode()
def next_shares(model, ids, loops):
    """The next token's distribution behind ids (1, T), at each loop: (loops, V)."""
    shares = []
    for _, h, _, span in run_loops(model, ids, loops):
        shares.append(model.decoder.last(h, span)[0].float().softmax(-1).cpu())
    return torch.stack(shares)


def draw_next(followed, tokenizer, path):
    """followed: [(text, next_shares (B, V))]."""
    fig, axes = panels(len(followed), 3.6 * len(followed), 3.6)
    for ax, (text, shares) in zip(axes[0], followed, strict=True):
        loops = range(1, len(shares) + 1)
        count = min(len(LINES), shares.shape[1])
        shown = shares.amax(0).topk(count).indices.tolist()  # the likeliest at any loop
        for token, line in zip(shown, LINES, strict=False):
            label = repr(tokenizer.decode([token])).replace("$", r"\$")
            ax.plot(loops, shares[:, token], **line, ms=3, lw=1, label=label)
        ax.set(xlabel="loop", ylabel="probability", ylim=(-0.03, 1.03))
        ax.set_title(text if len(text) < 40 else "…" + text[-39:], parse_math=False)
        whole_numbers(ax.xaxis)
        ax.legend(fontsize=7)
    finish(fig, path)


# ---- text.html -----------------------------------------------------------------------------------

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>loops by token</title>
<style>
body {{ font: 16px/1.9 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
.token {{ position: relative; white-space: pre-wrap; padding: 2px 0; border-radius: 3px; }}
.facts {{ display: none; position: absolute; left: 0; top: 1.8em; z-index: 1;
  background: white; color: black; border: 1px solid #888; padding: 4px 8px;
  font: 12px/1.4 monospace; white-space: pre; }}
.token:hover .facts {{ display: block; }}
</style>
<p>Every token of the continuation stands on a shade of the loops it took, 1 to {budget}:
{legend}. The pointer on a token shows q and the likeliest tokens at each loop, all tokens looped
alike.</p>
{texts}
"""


def shade_of(loops, budget):
    """CSS colours of a token that took so many loops: dark is many."""
    lightness = 95 - 55 * (loops - 1) / max(budget - 1, 1)
    text = "white" if lightness < 60 else "black"
    return f"background: hsl(210 80% {lightness:.0f}%); color: {text}"


@torch.inference_mode()
def next_tokens_by_loop(model, ids, loops, count=5):
    """For every token of ids (1, T) the likeliest next ones at each loop: ids and probabilities,
    two of (loops, T, count)."""
    tokens = []
    shares = []
    for _, h, _, span in run_loops(model, ids, loops):
        share, token = (
            model.decoder(h, span)[0].float().softmax(-1).topk(min(count, model.config.vocab_size))
        )
        tokens.append(token.cpu())
        shares.append(share.cpu())
    return torch.stack(tokens), torch.stack(shares)


def token_html(piece, step, tokens, shares, tokenizer, budget):
    """A token as HTML. step: (loops, q); tokens, shares (B, 5): what was likely at each loop."""
    loops, q = step
    lines = [f"{tiny.loops_label(str(loops))}, q {q:.3f}"]
    for b, (row, share) in enumerate(zip(tokens.tolist(), shares.tolist(), strict=True), 1):
        words = [f"{tokenizer.decode([t])!r} {s:.2f}" for t, s in zip(row, share, strict=True)]
        lines.append(f"{b:2d}  " + "  ".join(words))
    facts = html.escape("\n".join(lines))
    return (
        f'<span class="token" style="{shade_of(loops, budget)}">{html.escape(piece)}'
        f'<span class="facts">{facts}</span></span>'
    )


def continue_for_page(model, tokenizer, text, ids, budget, count):
    """A prompt and its continuation as HTML."""
    options = {"budget": budget, "exit_threshold": model.config.exit_threshold, "temperature": 0}
    made = []
    steps = []
    for step in model.generate(ids, count, eos_id=tokenizer.eos_ids or None, **options):
        made.append(step.tokens.item())
        steps.append((step.loops.item(), step.confidence.item()))
    whole = ids[0].tolist() + made
    tokens, shares = next_tokens_by_loop(model, torch.tensor([whole], device=ids.device), budget)
    spans = []
    shown = tokenizer.decode(ids[0].tolist())
    for i, step in enumerate(steps, ids.shape[1]):  # the token in place i, which i - 1 predicted
        now = tokenizer.decode(whole[: i + 1])
        if now.endswith("\ufffd"):  # a character whose other bytes are still to come
            now = now[: len(shown)]
        piece = now[len(shown) :]
        spans.append(token_html(piece, step, tokens[:, i - 1], shares[:, i - 1], tokenizer, budget))
        shown = now
    return f"<p>{html.escape(text)}{''.join(spans)}</p>"


def write_page(texts, budget, path):
    legend = " ".join(
        f'<span class="token" style="{shade_of(n, budget)}">&nbsp;{n}&nbsp;</span>'
        for n in range(1, budget + 1)
    )
    page = PAGE.format(budget=budget, legend=legend, texts="\n".join(texts))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    print(f"wrote {path}")


# ---- confidence.png ------------------------------------------------------------------------------


def draw_confidence(facts, threshold, path):
    """facts: as from follow_tokens; threshold: the checkpoint's, of q."""
    loops = len(facts["q"])
    shown = [b for b in (1, 2, 4, 8, 16, 32) if b <= loops]
    fig, axes = panels(3, 13, 3.8)
    reliability, exits, prices = axes[0]
    for b, line in zip(shown, LINES, strict=False):
        q, right = calibration(facts["q"][b - 1], facts["right"][b - 1])
        reliability.plot(q, right, **line, ms=4, label=tiny.loops_label(str(b)))
    reliability.axline((0, 0), slope=1, color="0.7", lw=1)
    reliability.set(
        title="is q true? (on the line it is)",
        xlabel="q, mean of a tenth of the tokens",
        ylabel="share of them that are right",
    )
    reliability.legend(fontsize=8)

    last = last_loop(facts["q"] >= threshold)
    share = torch.bincount(last, minlength=loops) / len(last)
    exits.bar(range(1, loops + 1), share, color="0.6")
    exits.set(
        title=f"where tokens stop at q >= {threshold:.2f}", xlabel="loops", ylabel="share of tokens"
    )
    whole_numbers(exits.xaxis)

    found = frontiers(facts)
    for (rule, outcomes), line in zip(found.items(), LINES, strict=False):
        outcomes = sorted(outcomes)
        prices.plot(
            [n for n, _ in outcomes], [loss for _, loss in outcomes], **line, ms=3, label=rule
        )
    prices.set(
        title="loss by loops, a line a stopping rule",
        xlabel="mean loops, by the rule's threshold",
        ylabel="mean loss (nats)",
    )
    prices.legend(fontsize=7)
    finish(fig, path)


def print_confidence(facts, threshold):
    """The same as a table: what q knows at each loop."""
    losses, q, right = facts["loss"], facts["q"], facts["right"]
    last = last_loop(q >= threshold)
    print(
        "what the confidence head knows at each loop; AUC: 0.5 is a coin, 1 is always right; "
        f"stop here: tokens whose q first reaches {threshold:.2f} there"
    )
    print("loops   loss  right  mean q  |q - right|  AUC: right  AUC: deeper is better  stop here")
    for b in range(len(q)):
        mean_q, mean_right = calibration(q[b], right[b])
        deeper = losses[b:].min(0).values < losses[b]  # is there a better loop further on?
        print(
            f"{b + 1:5d} {losses[b].mean():6.3f} {right[b].mean():6.3f} {q[b].mean():7.3f} "
            f"{(mean_q - mean_right).abs().mean():12.3f} {auc(q[b], right[b]):11.3f} "
            f"{auc(-q[b], deeper.float()):22.3f} {(last == b).float().mean():10.3f}".replace(
                "nan", "  -"
            )
        )


# ---- accuracy.png: the tiny world ----------------------------------------------------------------


def draw_accuracy(found, path):
    """found: what tiny.report writes, for each model and budget the shares by steps needed."""
    budgets = [name for name in found if name.isdigit()]
    fig, axes = panels(3, 13, 3.8)
    by_steps, by_budget, stops = axes[0]
    draw_accuracy_by_steps(by_steps, found, budgets)
    draw_accuracy_by_budget(by_budget, found, budgets)
    stops.bar(range(len(found["loops"])), found["loops"], color="0.6")
    stops.set(
        xlabel="steps needed",
        ylabel="loops before q reaches the threshold",
        title=f"where it stops (rank correlation {found['rank_correlation']:.2f})",
    )
    finish(fig, path)


def draw_accuracy_by_steps(ax, found, budgets):
    ax.plot(found["base"], color="k", ls="-", lw=2, label="base")
    ax.plot(found["control"], color="0.5", ls="--", lw=2, label="control")
    shades = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(budgets)).numpy())
    for name, colour, marker in zip(budgets, shades, "os^Dvx", strict=False):
        label = tiny.loops_label(name)
        ax.plot(found[name], color=colour, marker=marker, ms=4, lw=1, label=label)
    ax.set(xlabel="steps needed", ylabel="problems solved", title="by steps needed")
    ax.set_ylim(-0.03, 1.05)
    ax.legend(fontsize=7)


def draw_accuracy_by_budget(ax, found, budgets):
    """Means over the step counts that the base solves, and over those that it fails."""
    solved = [share >= 0.6 for share in found["base"]]
    failed = [share < 0.6 for share in found["base"]]
    loops = [int(name) for name in budgets]
    kinds = {"base solves them": solved, "base fails (< 60 %)": failed}
    for (kind, chosen), line in zip(kinds.items(), LINES, strict=False):
        colour = line["color"]
        means = [mean_of(found[name], chosen) for name in budgets]
        ax.plot(loops, means, **line, label=kind)
        ax.axhline(mean_of(found["base"], chosen), color=colour, lw=1, alpha=0.6)
        ax.axhline(mean_of(found["control"], chosen), color=colour, lw=1, ls=":", alpha=0.9)
    ax.plot([], [], color="0.3", lw=1, label="base alone")
    ax.plot([], [], color="0.3", lw=1, ls=":", label="control alone")
    ax.set(xlabel="loops", ylabel="problems solved", title="by budget", ylim=(-0.03, 1.05))
    ticks_at(ax, loops)
    ax.legend(fontsize=7)


def mean_of(values, chosen):
    """Mean of the chosen values; 0 where none is."""
    kept = [value for value, wanted in zip(values, chosen, strict=True) if wanted]
    return sum(kept) / max(len(kept), 1)


# ---- budget.png, training.png, runs.png: losses --------------------------------------------------


def draw_budget(losses, reference_name, reference_loss, path):
    """Held-out losses {loops: nats a token}, and the loss without loops as a line across."""
    fig, axes = panels(1, 5.5, 3.8)
    ax = axes[0, 0]
    ax.plot(list(losses), list(losses.values()), color=BLUE, marker="o", label="looped")
    ax.axhline(reference_loss, color=ORANGE, ls="--", label=reference_name)
    ax.set(xlabel="loops", ylabel="held-out loss (nats a token)", title="loss by budget")
    ticks_at(ax, list(losses))
    ax.legend()
    finish(fig, path)


def draw_training(records, path):
    """Losses by step, of training and of every evaluation; records: those of a log.jsonl."""
    fig, axes = panels(2, 10, 3.8)
    training_ax, held_out_ax = axes[0]
    draw_training_losses(training_ax, [r for r in records if "loss" in r])
    draw_held_out_losses(held_out_ax, [r for r in records if "eval" in r])
    finish(fig, path)


def draw_training_losses(ax, records):
    steps = [r["step"] for r in records]
    labels = {"loss": "sum", "lm": "L_LM", "mono": "L_mono", "q": "L_Q"}
    for (name, label), line in zip(labels.items(), LINES, strict=False):
        losses = [r[name] for r in records]
        ax.plot(steps, losses, color=line["color"], ls=line["ls"], lw=1.1, label=label)
    ax.set(xlabel="optimizer step", ylabel="loss over supervised loops", title="training")
    ax.legend()


def draw_loops(records, path):
    """Fig. 6: each loss by loop, in four parts of training. records: those with "by_loop"."""
    fig, axes = panels(3, 12, 3.6)
    size = -(-len(records) // 4)  # rounded up
    parts = [records[i : i + size] for i in range(0, len(records), size)]
    for ax, (i, label) in zip(axes[0], enumerate(("L_LM", "L_mono", "L_Q")), strict=True):
        for part, line in zip(parts, LINES, strict=False):
            found = {}  # {loop: values}
            for record in part:
                for loop, losses in record["by_loop"].items():
                    if losses[i] is not None:  # null: it was not finite
                        found.setdefault(int(loop), []).append(losses[i])
            loops = sorted(found)
            means = [sum(found[loop]) / len(found[loop]) for loop in loops]
            steps = f"steps {part[0]['step']} to {part[-1]['step']}"
            ax.plot(loops, means, **line, ms=3, lw=1, label=steps)
        ax.set(xlabel="loop", ylabel="nats", title=label)
        whole_numbers(ax.xaxis)
    axes[0, 0].legend(fontsize=7)
    finish(fig, path)


def draw_held_out_losses(ax, records):
    """A line for the pretrained model, and one for each budget or for the control."""
    steps = [r["step"] for r in records]
    grey = {"color": "0.5", "ls": "-"}
    for name, line in zip(records[-1]["eval"], (grey, *LINES), strict=False):
        losses = [r["eval"][name] for r in records]
        ax.plot(steps, losses, **line, ms=4, label=tiny.loops_label(name))
    ax.set(xlabel="optimizer step", ylabel="held-out loss (nats a token)", title="held-out")
    logarithmic_losses(ax, "%.2f")
    ax.legend()


def draw_runs(runs, path):
    """Held-out loss by step of several runs {name: log records}, a panel for each budget.

    A control run has no budgets; its one line stands in every panel.
    """
    evals = {}
    budgets = {}  # the keys, in the order in which they are met
    for name, records in runs.items():
        evals[name] = [r for r in records if "eval" in r]
        budgets |= dict.fromkeys(key for key in evals[name][0]["eval"] if key.isdigit())
    budgets = list(budgets) or ["1"]
    fig, axes = panels(len(budgets), 3.2 * len(budgets), 3.6)
    for ax, budget in zip(axes[0], budgets, strict=True):
        draw_runs_at(ax, evals, budget)
    axes[0, 0].set_ylabel("held-out loss (nats a token)")
    axes[0, 0].legend()
    finish(fig, path)


def draw_runs_at(ax, evals, budget):
    """One panel of runs.png. evals {name of the run: its evaluations}."""
    for (name, records), line in zip(evals.items(), LINES, strict=False):
        key = "control" if "control" in records[0]["eval"] else budget
        losses = [r["eval"][key] for r in records]
        ax.plot([r["step"] for r in records], losses, **line, ms=4, label=name)
    first, *_ = evals.values()
    ax.axhline(first[0]["eval"]["pretrained"], color="0.6", lw=1, label="pretrained")
    ax.set(title=tiny.loops_label(budget), xlabel="optimizer step")
    logarithmic_losses(ax, "%.1f")


# ---- speed.png -----------------------------------------------------------------------------------


def draw_speed(found, path):
    """Fig. 11: seconds a token by context, a line a contender. found: what bench.py writes."""
    fig, axes = panels(1, 5.5, 3.8)
    ax = axes[0, 0]
    rows = found["contexts"]
    contexts = [row["context"] for row in rows]
    contenders = [name for name in rows[0] if name != "context"]
    for name, line in zip(contenders, LINES, strict=False):
        label = name if name == "uncached" else f"cached, {name}"
        ax.plot(contexts, [row[name] for row in rows], **line, label=label)
    ax.set(yscale="log", xlabel="tokens before", ylabel="seconds a token")
    ax.set_title(f"{found['shape']}, {found['budget']} loops")
    ticks_at(ax, contexts)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    finish(fig, path)


# ---- the command ---------------------------------------------------------------------------------


def parse_args():
    parser = FlagParser("Draw what the loops do.")
    add_model_flags(
        parser,
        "preset, directory or hub id (default: the newest checkpoint below out/, "
        "else the embedded tiny-loopus)",
    )
    add = parser.add_argument
    add("--prompt", action="append", help="repeatable (default: the paper's four)")
    add("--loops", type=number(int, 1), default=20)
    add(
        "--data",
        help="text for the stage profile and the loss by budget: "
        ".txt, .jsonl, .jsonl.gz, .jsonl.xz or .parquet",
    )
    add(
        "--sequences",
        type=number(int, 1),
        default=16,
        help="of 256 tokens, taken from the start of --data",
    )
    add("--out", type=Path, default=Path("figures"))
    add(
        "--runs",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="compare training runs by their log.jsonl (runs.png), and draw nothing else",
    )
    add(
        "--bench",
        type=Path,
        metavar="FILE",
        help="draw the numbers that bench.py wrote (speed.png), and nothing else",
    )
    return parser.parse_args()


@contextlib.contextmanager
def drawn_from(path):
    """Whatever is wrong with a file that a figure is drawn from becomes an InputError."""
    try:
        yield
    except (InputError, OSError):  # OSError: the figure cannot be written
        raise
    except Exception as error:  # of JSON, of a list where a number is meant, of matplotlib
        reason = f"{type(error).__name__}: {first_line(error):.200}"
        raise InputError(f"{path}: no figure can be drawn from what is in it ({reason})") from None


def read_log(path):
    """The records of a run's log.jsonl, an evaluation among them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    with drawn_from(path):
        records = [json.loads(line) for line in text.splitlines()]
        evaluated = any("eval" in record for record in records)
    require(evaluated, f"{path}: no evaluation in it yet")
    return records


def compare_runs(directories, out):
    require(
        len(directories) <= len(LINES),
        f"--runs: {len(directories)} runs; {len(LINES)} can be told apart in a figure",
    )
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    logs = [read_log(directory / "log.jsonl") for directory in directories]
    with drawn_from("log.jsonl of " + ", ".join(map(str, directories))):
        draw_runs(dict(zip(names, logs, strict=True)), out / "runs.png")


def show_speed(file, out):
    found = read_json(file)
    require(
        found.get("contexts"),
        f"--bench {file}: no times by context in it; expected what bench.py writes",
    )
    with drawn_from(file):
        draw_speed(found, out / "speed.png")


def show_accuracy(file, out):
    found = read_json(file)
    with drawn_from(file):
        draw_accuracy(found, out / "accuracy.png")


def encode_prompts(texts, tokenizer, config, device, special):
    """Texts -> [(text, ids (1, T))]. InputError where one is empty or too long."""
    most = config.max_position_embeddings
    prompts = []
    for text in texts:
        ids = tokenizer.encode(text, bos=tokenizer.add_bos, special=special)
        require(
            1 <= len(ids) <= most,
            f"--prompt {text[:30]!r}: {len(ids)} tokens; the model takes 1 to {most}",
        )
        prompts.append((text, torch.tensor([ids], device=device)))
    return prompts


def show_trajectories(model, prompts, loops, out):
    followed = []
    for text, ids in prompts:
        states, alphas = follow(model, ids, loops)
        followed.append((text, states, alphas))
        first, last = alphas[0], alphas[-1]
        print(
            f"{text!r}: mean α {first.mean():.3f} ± {first.std():.3f} over channels at loop 1, "
            f"{last.mean():.3f} ± {last.std():.3f} at loop {loops}"
        )
    draw_trajectories(followed, out / "trajectories.png")


def show_next(model, tokenizer, prompts, loops, count, out):
    """next.png, and text.html with continuations of `count` tokens."""
    followed = []
    texts = []
    budget = min(loops, 8)
    for text, ids in prompts:
        followed.append((text, next_shares(model, ids, loops)))
        texts.append(continue_for_page(model, tokenizer, text, ids, budget, count))
    draw_next(followed, tokenizer, out / "next.png")
    write_page(texts, budget, out / "text.html")


def show_profile(model, batches, out):
    config = model.config
    encoder, decoder = draw_profile(layer_states(model, batches), config, out / "profile.png")
    print(
        f"split in use {config.encoder_layers},{config.decoder_layers}; "
        f"proposed {encoder},{decoder} (leading and trailing layers "
        "that turn the state more than twice as far as the median layer)"
    )


def show_confidence(model, pairs, loops, out):
    facts = follow_tokens(model, pairs, loops)
    draw_confidence(facts, model.config.exit_threshold, out / "confidence.png")
    print_confidence(facts, model.config.exit_threshold)


def show_losses(model, held_out, loops, log, out):
    """budget.png and training.png, as far as there are losses to show.

    held_out: ids (N, T) of --data, or None. log: path of the training run's log; it may be absent.
    """
    records = read_log(log) if log.exists() else []
    if held_out is not None:
        losses = loss_by_budget(model, held_out, loops)
        pretrained = losses.pop("pretrained")
        draw_budget(losses, "one pass without the gate", pretrained, out / "budget.png")
        print("loss by loops: " + ", ".join(f"{b}: {loss:.3f}" for b, loss in losses.items()))
    with drawn_from(log):
        show_log(records, held_out is None, out)
    if not records:
        print(f"no training.png: no {log}")


def show_log(records, by_budget, out):
    """Of a run's log the losses by step; with by_budget its last evaluation's by budget, too."""
    evals = [record["eval"] for record in records if "eval" in record]
    if by_budget and evals and "1" in evals[-1]:
        losses = {int(name): loss for name, loss in evals[-1].items() if name.isdigit()}
        draw_budget(losses, "pretrained", evals[-1]["pretrained"], out / "budget.png")
    elif by_budget:
        print(
            "no budget.png: give --data, "
            "or a checkpoint of a training run with its log.jsonl beside"
        )
    if evals:
        draw_training(records, out / "training.png")
    looped = [record for record in records if record.get("by_loop")]
    if looped:
        draw_loops(looped, out / "loops.png")


def show_model(args):
    """All figures of one model."""
    name = args.model
    if name is None:
        name = str(newest_checkpoint())
        print(f"--model {name}", file=sys.stderr)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)  # for the gate of a model that is not trained yet
    model, tokenizer = load(name, split=args.split, device=device, dtype=dtype)
    require(tokenizer, f"--model {name}: no tokenizer.json in it, which prompts need")

    is_tiny = "tiny" in (model.config.base_model, name)
    texts = args.prompt or (tiny.examples() if is_tiny else PROMPTS)
    special = args.special_tokens
    prompts = encode_prompts(texts, tokenizer, model.config, device, special)
    held_out = None
    problems = None
    batches = [ids for _, ids in prompts]
    if args.data:
        length = min(256, model.config.max_position_embeddings)
        held_out = data.held_out(args.data, tokenizer, length, args.sequences, special)
        held_out = held_out.to(device)
        batches = held_out.split(2)
    elif is_tiny:
        problems = [x.to(device).split(52) for x in tiny.held_out(208)]

    show_trajectories(model, prompts, args.loops, args.out)
    count = 1 if is_tiny else WORDS  # a problem of the tiny world ends with its answer
    show_next(model, tokenizer, prompts, args.loops, count, args.out)
    show_profile(model, batches, args.out)
    if model.config.from_checkpoint and (args.data or is_tiny):
        pairs = zip(*problems, strict=True) if problems else [(x, next_tokens(x)) for x in batches]
        show_confidence(model, pairs, args.loops, args.out)
    # What a training run left stands beside its checkpoints.
    run_directory = find(name)[0].parent
    accuracy = run_directory / "accuracy.json"
    if is_tiny and accuracy.exists():
        show_accuracy(accuracy, args.out)
    show_losses(model, held_out, args.loops, run_directory / "log.jsonl", args.out)


def main():
    args = parse_args()
    if args.runs:
        compare_runs(args.runs, args.out)
    if args.bench:
        show_speed(args.bench, args.out)
    if not args.runs and not args.bench:
        show_model(args)


if __name__ == "__main__":
    run_main(main)

"""Text out, with the loops each token used.

    python sample.py --budget 8                  problems of the tiny world, or a continuation
    python sample.py --model DIR --budget 8 --prompt "The capital of France is"

In a terminal every token stands on a shade that darkens with its loops.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

import tiny
from appendix.errors import InputError, require, run_main
from appendix.fast import compile_decoding, require_compiler
from appendix.flags import FlagParser, add_model_flags, number, pick_device, pick_dtype
from appendix.hub import find, newest_checkpoint
from appendix.memory import announce, count
from load_weights import load
from loopus import PROBABILITIES, RULES, THRESHOLDS, cache_bytes

PROMPT = "The capital of France is"
# colours of a terminal, (background, text), from few loops to many
SHADES = ((231, 16), (195, 16), (153, 16), (111, 16), (69, 231), (27, 231), (20, 231), (17, 231))


@dataclass
class Made:
    """What a stream of tokens cost."""

    loops: list = field(default_factory=list)  # of each token
    confidence: list = field(default_factory=list)
    seconds: list = field(default_factory=list)  # the first one is the prompt's


def shade(text, loops, budget):
    """`text` on the shade of its loops, as terminal escape codes; line ends stay outside."""
    darkness = (loops - 1) / max(budget - 1, 1)
    back, front = SHADES[round(darkness * (len(SHADES) - 1))]
    lines = []
    for line in text.split("\n"):
        lines.append(f"\x1b[48;5;{back}m\x1b[38;5;{front}m{line}\x1b[0m" if line else "")
    return "\n".join(lines)


def stream(steps, tokenizer, prompt, budget, coloured):
    """Print a continuation of the ids `prompt` as its steps come. Ctrl-C ends it. -> Made"""
    made = Made()
    ids = list(prompt)
    printed = len(tokenizer.decode(ids))  # characters
    before = time.perf_counter()
    try:
        for step in steps:
            now = time.perf_counter()
            made.seconds.append(now - before)
            before = now
            made.loops.append(step.loops.item())
            made.confidence.append(step.confidence.item())
            token = step.tokens.item()
            if token in tokenizer.eos_ids:
                break
            ids.append(token)
            text = tokenizer.decode(ids)
            if text.endswith("\ufffd"):  # a character whose other bytes are still to come
                continue
            piece = text[printed:]
            print(shade(piece, made.loops[-1], budget) if coloured else piece, end="", flush=True)
            printed = len(text)
        print(tokenizer.decode(ids)[printed:])
    except KeyboardInterrupt:
        print()
    return made


def summary(made, budget):
    """Mean loops, a histogram of them, and the speed, in words."""
    tokens = len(made.loops)
    if tokens == 0:
        return "no token was generated"
    speed = "one token,"
    if tokens > 1:
        speed = f"{(tokens - 1) / sum(made.seconds[1:]):.1f} tokens/s after"
    lines = [
        f"{tokens} tokens, mean {sum(made.loops) / tokens:.2f} of {budget} loops, {speed} a prompt "
        f"pass of {made.seconds[0]:.2f} s, mean confidence {sum(made.confidence) / tokens:.2f}"
    ]
    counts = Counter(made.loops)
    for n in sorted(counts):
        name = "loop " if n == 1 else "loops"
        bar = "█" * -(-40 * counts[n] // max(counts.values()))  # rounded up
        lines.append(f"{n:5d} {name} {counts[n]:5d} {bar}")
    return "\n".join(lines)


def parse_args():
    parser = FlagParser("Continue a prompt with a looped model, and show the loops of each token.")
    add_model_flags(
        parser,
        "preset, directory or hub id (default: the newest checkpoint below out/, else the embedded "
        "tiny-loopus)",
    )
    add = parser.add_argument
    add(
        "--prompt",
        help="default: problems of rising difficulty for a model of the tiny world, else "
        f'"{PROMPT}"',
    )
    # how long to think
    add("--budget", type=number(int, 1), default=8, help="most loops a token may take")
    add("--halt", choices=RULES, default="confidence", help="when a token's loops end; none: never")
    add(
        "--threshold",
        type=number(float, 0),
        help="of the stopping rule: q or 1 - Π(1 - q), a distance, or nats (default: the "
        "checkpoint's for confidence and cdf, 10 for convergence, 0.01 for kl)",
    )
    add(
        "--kv",
        choices=["latest", "shared"],
        default="latest",
        help="keys and values: one set per loop, or one for all",
    )
    add(
        "--window",
        type=number(int, 1),
        help="tokens that a token attends to, itself included (default: the model's context)",
    )
    # which tokens to draw
    add("--max-new-tokens", type=number(int, 1), default=64)
    add("--temperature", type=number(float, 0), default=0.8, help="0: the most likely token")
    add("--top-k", type=number(int, 1), help="draw from the k most likely tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from those that hold p of the weight")
    # and beside that
    add(
        "--compare",
        nargs="?",
        const="",
        metavar="BASE",
        help="also the pretrained model's continuation (default: the backbone that the checkpoint "
        "names)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile decoding: a minute or more at first, then faster; the same tokens",
    )
    args = parser.parse_args()
    if args.halt in PROBABILITIES and args.threshold is not None and args.threshold > 1:
        parser.error(f"--threshold {args.threshold}: expected 0 to 1 with --halt {args.halt}")
    return args


def load_model(args):
    """The model and tokenizer that the flags ask for; what they need in memory is said before."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.compile:
        require_compiler(device)
    if args.model is None:
        args.model = newest_checkpoint()
        print(f"--model {args.model}", file=sys.stderr)

    def say_needs(config):
        columns = len(args.prompt or "") + args.max_new_tokens  # a token a character at most
        depths = args.budget if args.kv == "latest" else 1
        needs = {
            "weights": count(config)[0] * dtype.itemsize,
            "cache": columns * cache_bytes(config, depths, dtype),
        }
        advice = (
            "try --dtype bfloat16, --kv shared, a smaller --budget or --max-new-tokens, or another "
            "--device"
        )
        announce("sampling", needs, device, advice)

    model, tokenizer = load(
        str(args.model), split=args.split, device=device, dtype=dtype, plan=say_needs
    )
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which text needs")
    if not model.config.from_checkpoint:
        print(
            f"warning: {args.model} is a plain backbone; its gate and head are untrained, so "
            "expect no sense from it",
            file=sys.stderr,
        )
    if args.compile:
        compile_decoding(model)
    return model, tokenizer


def encode_prompt(args, tokenizer, context):
    """The prompt's ids; a word on stderr if text and answer are longer than the window."""
    ids = tokenizer.encode(args.prompt, bos=tokenizer.add_bos, special=args.special_tokens)
    require(
        ids,
        "--prompt: empty, and this tokenizer puts no token in front of a text; give at least one "
        "character",
    )
    window = args.window or context
    if len(ids) + args.max_new_tokens > window:
        print(
            f"note: {len(ids)} + {args.max_new_tokens} tokens, so the window slides: each attends "
            f"to the last {window}",
            file=sys.stderr,
        )
    return ids


def find_base(args, model):
    """The name of the backbone to compare with, known to be there."""
    name = args.compare or model.config.base_model
    try:
        require(name, "the checkpoint names no backbone")
        find(name)
    except InputError as error:
        raise InputError(f"--compare: {error}; or name its directory: --compare DIR") from None
    return name


def continue_prompt(args, model, tokenizer, options):
    """Print prompt and continuation, and what they cost; with --compare the backbone's too."""
    prompt = encode_prompt(args, tokenizer, model.config.max_position_embeddings)
    base_name = find_base(args, model) if args.compare is not None else None
    weight = model.decoder.norm.weight
    ids = torch.tensor([prompt], device=weight.device)
    drawing = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "eos_id": tokenizer.eos_ids or None,
    }
    coloured = sys.stdout.isatty()
    if coloured:
        legend = [shade(f" {n} ", n, args.budget) for n in range(1, args.budget + 1)]
        print(" ".join(legend), "loops\n")
    print(args.prompt, end="", flush=True)
    steps = model.generate(ids, args.max_new_tokens, **options, **drawing)
    made = stream(steps, tokenizer, prompt, args.budget, coloured)
    print("\n" + summary(made, args.budget))
    if base_name is None:
        return

    split = (model.config.encoder_layers, model.config.decoder_layers)
    base, _ = load(base_name, split=split, device=weight.device, dtype=weight.dtype)
    base.reasoning.gate.open_fully()
    print(f"\npretrained ({base_name}):\n{args.prompt}", end="", flush=True)
    steps = base.generate(ids, args.max_new_tokens, budget=1, halt="none", **drawing)
    stream(steps, tokenizer, prompt, 1, False)


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args)
    threshold = THRESHOLDS.get(args.halt, model.config.exit_threshold)
    options = {
        "budget": args.budget,
        "halt": args.halt,
        "exit_threshold": threshold if args.threshold is None else args.threshold,
        "kv": args.kv,
        "window": args.window,
    }
    if args.prompt is None and "tiny" in (model.config.base_model, args.model):
        require(
            args.compare is None,
            "--compare needs a --prompt: without one, a model of the tiny world is given its own "
            "problems",
        )
        tiny.show(model, args.seed, **options)
        return
    if args.prompt is None:
        args.prompt = PROMPT
    continue_prompt(args, model, tokenizer, options)


if __name__ == "__main__":
    run_main(main)

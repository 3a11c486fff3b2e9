"""Text out, with the loops each token used.

python sample.py --budget 8                                    problems of the tiny world, or a continuation
python sample.py --model DIR --budget 8 --prompt "The capital of France is"
"""

import argparse
import sys
import time
from collections import Counter

import torch

import tiny
from appendix.errors import InputError, require, run
from appendix.fast import compile_decoding
from appendix.flags import add_model_flags, number, pick_device, pick_dtype
from appendix.hub import find, newest_checkpoint
from appendix.memory import announce, count
from load_weights import load
from loopus import HALTS, Cache

SHADES = (
    (231, 16),
    (195, 16),
    (153, 16),
    (111, 16),
    (69, 231),
    (27, 231),
    (20, 231),
    (17, 231),
)  # background, text: light is few loops


def shade(text, loops, budget):
    """`text` on a background that darkens with the loops it took, as terminal escape codes; line ends stay outside."""
    back, front = SHADES[round((loops - 1) / max(budget - 1, 1) * (len(SHADES) - 1))]
    return "\n".join(
        f"\x1b[48;5;{back}m\x1b[38;5;{front}m{line}\x1b[0m" if line else ""
        for line in text.split("\n")
    )


def stream(model, tokenizer, prompt, args, colour, **options):
    """Print a continuation as it comes; -> [(loops, confidence)] of its tokens and the seconds of prompt and of the rest."""
    ids, given = list(prompt), len(tokenizer.decode(prompt))
    made, seconds, clock = [], [], time.perf_counter()
    try:
        for step in model.generate(
            torch.tensor([prompt], device=model.decoder.norm.weight.device),
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            eos_id=tokenizer.eos_id,
            **options,
        ):
            now = time.perf_counter()
            seconds.append(now - clock)
            clock = now
            loops, token = step.loops.item(), step.tokens.item()
            made.append((loops, step.confidence.item()))
            if token == tokenizer.eos_id:
                break
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # else a character whose other bytes are still to come
                print(
                    shade(text[given:], loops, options["budget"]) if colour else text[given:],
                    end="",
                    flush=True,
                )
                given = len(text)
        print(tokenizer.decode(ids)[given:])
    except KeyboardInterrupt:  # what was generated stands
        print()
    return made, seconds


def summary(made, seconds, budget):
    """Mean loops, a histogram of them, and the speed."""
    if not made:
        return "no token was generated"
    loops, rest = [n for n, _ in made], seconds[1:]
    counts = Counter(loops)
    speed = f"{len(rest) / sum(rest):.1f} tokens/s after" if rest else "one token,"
    lines = [
        f"{len(loops)} tokens, mean {sum(loops) / len(loops):.2f} of {budget} loops, {speed} a prompt pass of {seconds[0]:.2f} s, mean confidence {sum(q for _, q in made) / len(made):.2f}"
    ]
    lines += [
        f"{n:5d} loop{' ' if n == 1 else 's'} {counts[n]:5d} {'█' * -(-40 * counts[n] // max(counts.values()))}"
        for n in sorted(counts)
    ]
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(
        description="Continue a prompt with a looped model, and show how many loops each token took.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_flags(
        parser,
        "preset, directory or hub id (default: the newest checkpoint below out/, else the embedded tiny-loopus)",
    )
    parser.add_argument(
        "--prompt",
        help='default: problems of rising difficulty for a model of the tiny world, else "The capital of France is"',
    )
    parser.add_argument(
        "--budget", type=number(int, 1), default=8, help="most loops a token may take"
    )
    parser.add_argument(
        "--threshold",
        type=number(float, 0),
        help="of the stopping rule: q or 1 - Π(1 - q), a distance, or nats (default: the checkpoint's for confidence and cdf, 10 for convergence, 0.01 for kl)",
    )
    parser.add_argument(
        "--halt",
        choices=HALTS,
        default="confidence",
        help="stopping rule; none: always the whole budget",
    )
    parser.add_argument(
        "--kv",
        choices=["latest", "shared"],
        default="latest",
        help="keys and values: one set per loop, or one for all",
    )
    parser.add_argument(
        "--window",
        type=number(int, 1),
        help="tokens that a token attends to, itself included (default: the model's context)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile decoding: a minute or more at first (kept for later runs), then faster; the same tokens",
    )
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=64)
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.8, help="0: always the most likely token"
    )
    parser.add_argument("--top-k", type=number(int, 1))
    parser.add_argument("--top-p", type=number(float, 1e-9, 1))
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="BASE",
        help="also the pretrained model's continuation (default: the backbone that the checkpoint names)",
    )
    args = parser.parse_args()
    if args.threshold is not None and args.halt in ("confidence", "cdf") and args.threshold > 1:
        parser.error(f"--threshold {args.threshold}: expected 0 to 1 with --halt {args.halt}")
    return args


def main():
    args = parse_args()
    args.model = args.model or newest_checkpoint()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)

    def plan(config):
        slots, depths = (
            min(
                args.window or config.max_position_embeddings,
                len(args.prompt or "") + args.max_new_tokens,
            ),
            args.budget if args.kv == "latest" else 1,
        )
        announce(
            "sampling",
            {
                "weights": count(config)[0] * dtype.itemsize,
                "cache": slots * Cache.bytes_per_token(config, depths, dtype),
            },
            device,
            "try --dtype bfloat16, --kv shared, a smaller --budget, --max-new-tokens or --window, or another --device",
        )

    model, tokenizer = load(
        str(args.model), split=args.split, device=device, dtype=dtype, plan=plan
    )
    require(tokenizer, f"--model {args.model}: no tokenizer.json in it, which text needs")
    if not model.config.from_checkpoint:
        print(
            f"warning: {args.model} is a plain backbone; its gate and head are untrained, so expect no sense from it",
            file=sys.stderr,
        )
    default = {
        "confidence": model.config.exit_threshold,
        "cdf": model.config.exit_threshold,
        "convergence": 10.0,
    }.get(args.halt, 0.01)
    stopping = {
        "budget": args.budget,
        "halt": args.halt,
        "kv": args.kv,
        "window": args.window,
        "exit_threshold": default if args.threshold is None else args.threshold,
    }
    if args.compile:
        compile_decoding(model)
    if args.prompt is None and "tiny" in (model.config.base_model, args.model):
        require(
            args.compare is None,
            "--compare needs a --prompt: without one, a model of the tiny world is given its own problems",
        )
        tiny.show(model, args.seed, **stopping)
        return
    args.prompt = "The capital of France is" if args.prompt is None else args.prompt
    prompt = tokenizer.encode(args.prompt, bos=tokenizer.add_bos)
    require(
        prompt,
        "--prompt: empty, and this tokenizer puts no token in front of a text; give at least one character",
    )
    if len(prompt) + args.max_new_tokens > (
        window := args.window or model.config.max_position_embeddings
    ):
        print(
            f"note: {len(prompt)} + {args.max_new_tokens} tokens, so the window slides: each attends to the last {window}",
            file=sys.stderr,
        )
    source = args.compare or model.config.base_model
    if args.compare is not None:  # known to be there before anything is generated
        try:
            require(source, "the checkpoint names no backbone")
            find(source)
        except InputError as error:
            raise InputError(f"--compare: {error}; or name its directory: --compare DIR") from None
    colour = sys.stdout.isatty()
    if colour:
        print(
            " ".join(shade(f" {n} ", n, args.budget) for n in range(1, args.budget + 1)), "loops\n"
        )
    print(args.prompt, end="", flush=True)
    made, seconds = stream(model, tokenizer, prompt, args, colour, **stopping)
    print("\n" + summary(made, seconds, args.budget))
    if args.compare is not None:
        base, _ = load(
            source,
            split=(model.config.encoder_layers, model.config.decoder_layers),
            device=device,
            dtype=dtype,
        )
        base.reasoning.gate.A_log.data.fill_(
            -torch.inf
        )  # α = 1: one loop is the pretrained model exactly
        print(f"\npretrained ({source}):\n{args.prompt}", end="", flush=True)
        stream(base, tokenizer, prompt, args, False, budget=1, halt="none")


if __name__ == "__main__":
    run(main)

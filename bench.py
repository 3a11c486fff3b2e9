"""Speed and memory, side by side: contenders take turns in one process, and the medians of their times stand beside each other.

    python bench.py                                    SmolLM2-135M's shape, random weights
    python bench.py --shape tinyllama --compile        1.1B; a compiled contender too
    python bench.py --model DIR                        real weights
    python bench.py train --rounds 3                   training, beside the authors' recipe from transformers' layers

The bound is the least time a token can take: the bytes it must read (weights x loops, and cache) at the rate at which this machine,
in the same rounds, reads 1 GiB. `pip install transformers` adds it as a contender.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from appendix.errors import InputError, run
from appendix.fast import checkpoint_activations, compile_decoding, compile_layers
from appendix.files import write_text
from appendix.flags import DTYPES, number, pick_device, pick_dtype
from appendix.memory import keep_freed_memory
from appendix.optim import fp32_masters, update
from load_weights import backbone_name, load
from loopus import ADDED, Cache, LoopUS, LoopUSConfig
from train import training_step

SHAPES = {
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        encoder_layers=2,
    ),
    "tinyllama": dict(num_key_value_heads=4),  # LoopUSConfig's defaults are TinyLlama's
    "tiny": dict(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    ),
}


def seconds(work, device):
    """How long `work()` takes, the device's part of it too."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def in_turns(contenders, rounds, device, middle=statistics.median):
    """Median seconds of each contender {name: work}; all take one turn a round, after a round that does not count."""
    times, started = {name: [] for name in contenders}, time.perf_counter()
    for i in range(rounds + 1):
        for name, work in contenders.items():
            times[name].append(seconds(work, device))
        spent = time.perf_counter() - started
        print(
            f"\r  round {i} of {rounds}, {spent:.0f} s, {spent / (i + 1) * (rounds - i):.0f} s to go ",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return {name: middle(taken[1:]) for name, taken in times.items()}


def stepper(model, rows, context, rounds, **options):
    """Work that makes one token a row behind `context` tokens, the prompt already read."""
    ids = torch.randint(
        model.config.vocab_size, (rows, context), generator=torch.Generator().manual_seed(0)
    ).to(model.decoder.norm.weight.device)
    steps = model.generate(ids, rounds + 2, temperature=0, **{"halt": "none"} | options)
    next(steps)
    return lambda: next(steps)


def bytes_read(model, loops, context):
    """What one token must read: the weights of E, of M with its gate `loops` times, of D and its head, and the cache."""
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    weights = size(model.encoder.layers) + loops * size(model.reasoning) + size(model.decoder)
    return weights + context * Cache.bytes_per_token(
        model.config, loops, model.decoder.norm.weight.dtype
    )


def products(model, loops):
    """Work that is a token's matrix-vector products and nothing else: what eager decoding could reach if all else took no time."""
    parts = [model.encoder] + loops * [model.reasoning.layers] + [model.decoder]
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    x = {m.in_features: m.weight.new_ones(1, m.in_features) for m in linears}
    return torch.inference_mode()(lambda: [m(x[m.in_features]) for m in linears])


def peer_of(model):
    """transformers' model with the same weights; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no peer in the table (pip install transformers)")
        return None
    c = model.config
    fields = {
        name: getattr(c, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
        )
    }
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[c.model_type]
    with torch.device("meta"):
        peer = getattr(transformers, kind + "ForCausalLM")(
            getattr(transformers, kind + "Config")(
                **fields, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
            )
        )
    peer.load_state_dict(
        {
            backbone_name(name, c): p
            for name, p in model.state_dict().items()
            if not name.startswith(ADDED)
        },
        assign=True,
    )
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(
        model.decoder.norm.weight.device
    )  # its table is not among the weights
    return peer.eval()


def reference(model, context, rounds):
    """Median seconds of a token in transformers' generate with the same weights; None where it is not installed."""
    if (peer := peer_of(model)) is None:
        return None
    from transformers.generation import BaseStreamer

    ids, streamed = (
        torch.randint(
            model.config.vocab_size, (1, context), device=model.decoder.norm.weight.device
        ),
        [],
    )

    class Clock(BaseStreamer):  # called at every token: the times between calls are its steps
        def put(self, value):
            streamed.append(time.perf_counter())

        def end(self):
            pass

    peer.generate(
        ids,
        max_new_tokens=rounds + 3,
        min_new_tokens=rounds + 3,
        do_sample=False,
        streamer=Clock(),
        pad_token_id=0,
    )
    return statistics.median(b - a for a, b in zip(streamed[3:], streamed[4:]))


def line(name, taken, rows=1, bound=None, other=None):
    print(
        f"  {name:34} {taken * 1e3:9.2f} ms {rows / taken:9.1f} tokens/s"
        + (f"   {bound / taken:6.1%} of the bound" if bound else "")
        + (f"   {other[1] / taken:5.2f}x {other[0]}" if other else ""),
        flush=True,
    )


class Dice(nn.Module):
    """A confidence head whose q is uniform in 0 to 1: with a threshold t, a token stops at each loop with probability 1 - t."""

    def forward(self, delta):
        return torch.rand(len(delta), 1, device=delta.device).logit()


def decode(args, model, device):
    fast, found = (
        copy.copy(model),
        {
            "shape": args.model or args.shape,
            "dtype": str(model.decoder.norm.weight.dtype),
            "threads": torch.get_num_threads(),
            "budget": args.budget,
        },
    )
    if args.compile:
        compile_decoding(fast)
    models = {"eager": model} | ({"compiled": fast} if args.compile else {})
    read = torch.ones(2**28, device=device)  # 1 GiB
    rounds, B = args.rounds, args.budget

    print(
        f"1. decoding at batch 1, context 64, and the bound of {found['dtype']} on {device}, {found['threads']} threads"
    )
    work = {"read": read.sum} | {
        f"{name} {loops}": stepper(m, 1, 64, rounds, budget=loops)
        for name, m in models.items()
        for loops in (1, B)
    }
    work |= {f"products alone {loops}": products(model, loops) for loops in (1, B)}
    taken = in_turns(work, rounds, device)
    rate = read.numel() * read.element_size() / taken["read"]
    found["read_rate"] = rate
    peer = reference(model, 64, rounds)
    print(f"  the machine reads {rate / 1e9:.1f} GB/s")
    for loops in (1, B):
        need = bytes_read(model, loops, 64)
        print(
            f"  {loops} loop{'s' * (loops > 1)}: {need / 1e9:.3f} GB a token, at least {need / rate * 1e3:.2f} ms"
        )
        for name in (*models, "products alone"):
            line(
                f"{name}, {loops} loop{'s' * (loops > 1)}",
                taken[f"{name} {loops}"],
                bound=need / rate,
                other=("transformers", peer) if peer and loops == 1 and name in models else None,
            )
            found[f"{name} {loops}"] = taken[f"{name} {loops}"]
    if peer:
        line("transformers, plain backbone", peer, bound=bytes_read(model, 1, 64) / rate)
        found["transformers"] = peer

    print(f"2. a token at {B} loops by context, cached and not")
    contexts = [c for c in args.contexts if c + rounds + 2 <= model.config.max_position_embeddings]
    taken = in_turns(
        {
            f"{name} {c}": stepper(m, 1, c, rounds, budget=B)
            for name, m in models.items()
            for c in contexts
        },
        rounds,
        device,
    )
    again = in_turns(
        {
            c: lambda ids=torch.ones(1, c, dtype=torch.long, device=device): next(
                model.generate(ids, 1, budget=B, halt="none", temperature=0, use_cache=False)
            )
            for c in contexts
        },
        max(1, rounds // 5),
        device,
    )
    found["contexts"] = [
        {"context": c, "uncached": again[c]} | {name: taken[f"{name} {c}"] for name in models}
        for c in contexts
    ]
    for row in found["contexts"]:
        print(
            f"  {row['context']:5d} tokens   "
            + "   ".join(f"{name} {row[name] * 1e3:8.2f} ms" for name in models)
            + f"   uncached {row['uncached'] * 1e3:9.2f} ms ({row['uncached'] / row['eager']:.2f}x)"
        )
    if {64, 1024} <= set(contexts):
        print(
            "  1024 against 64 tokens: "
            + ", ".join(
                f"{name} {taken[f'{name} 1024'] / taken[f'{name} 64']:.2f}x" for name in models
            )
        )

    print(
        f"3. early exit at up to {B} loops, against the straight line through the fixed budgets 1 and {B}"
    )
    loops, head = {threshold: [] for threshold in (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)}, model.q_head

    def exits(threshold):
        step = stepper(
            model, 1, 64, 4 * rounds, budget=B, halt="confidence", exit_threshold=threshold
        )
        return lambda: loops[threshold].append(step().loops.item())

    model.q_head = Dice()
    taken = in_turns(
        {b: stepper(model, 1, 64, 4 * rounds, budget=b) for b in (1, B)}
        | {("exit", t): exits(t) for t in loops},
        4 * rounds,
        device,
        statistics.mean,
    )
    model.q_head = head
    found["exit"] = sorted((statistics.mean(loops[t][1:]), taken["exit", t]) for t in loops)
    for x, y in found["exit"]:
        print(
            f"  {x:5.2f} loops {y * 1e3:9.2f} ms   {y / (taken[1] + (taken[B] - taken[1]) * (x - 1) / (B - 1)):5.2f}x the line"
        )

    print("4. memory")
    for policy, depths in (("latest", B), ("shared", 1)):
        one = Cache.bytes_per_token(model.config, depths, model.decoder.norm.weight.dtype)
        print(f"  {policy}: {one} bytes a token, {one * 1024 / 1e6:.1f} MB at 1024 tokens")
    print(f"  peak so far {peak_memory(device) / 1e9:.2f} GB (the 1 GiB that is read among it)")

    print(f"5. prompts of 256 tokens, and batches, {B} loops")
    taken = in_turns(
        {n: stepper(model, n, 64, max(2, rounds // 3), budget=B) for n in args.batches}
        | {"prompt": lambda: stepper(model, 1, 256, 1, budget=B)},
        max(2, rounds // 3),
        device,
    )
    line("prompt, by token", taken["prompt"] / 256)
    for n in args.batches:
        line(f"batch {n}", taken[n], rows=n)
    found |= {"batches": {n: taken[n] for n in args.batches}, "prefill": 256 / taken["prompt"]}
    return found


# ---- training --------------------------------------------------------------------------------------------------------


def authors_step(model, peer, ids, loops, supervised):
    """The released recipe, from transformers' layers: at a supervised loop D twice, all logits at once, losses of the batch's means."""
    c, hidden = model.config, peer.model.embed_tokens(ids)
    angles = peer.model.rotary_emb(hidden, torch.arange(ids.shape[1], device=ids.device)[None])

    def run(h, first, last):
        for layer in peer.model.layers[first:last]:
            h = layer(h, position_embeddings=angles)
        return h

    end = c.num_hidden_layers - c.decoder_layers
    decode = lambda h: peer.lm_head(peer.model.norm(run(h, end, c.num_hidden_layers)))
    loss = lambda logits: F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    )

    def loop(h):
        m = run(h, c.encoder_layers, end)
        delta = (m - h).float()
        alpha = model.reasoning.gate(delta)
        return (alpha * m + (1 - alpha) * h).to(h.dtype), model.q_head(delta[:, -1]).squeeze(-1)

    with torch.no_grad():
        h = run(hidden, 0, c.encoder_layers)
    for b in range(loops):
        if b not in supervised:
            with torch.no_grad():
                h, _ = loop(h)
            continue
        with torch.no_grad():
            before = loss(decode(h))
        h, q = loop(h)
        logits = decode(h)
        lm, share = loss(logits), (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean(1)
        (
            (lm + F.silu(lm - before) + F.binary_cross_entropy_with_logits(q, share))
            / len(supervised)
        ).backward()
        h = h.detach()


THEIRS = "the authors' recipe"


def contender(name, args, pipe):
    """One way to train, in a process of its own: makes a step for each (ids, supervised loops) it is sent; for None, says its peak memory."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(args.device)
    dtype, empty, step = pick_dtype(args.dtype, device), peak_memory(device), training_step
    model = random_model(args.shape, dtype, device)
    if name == THEIRS:
        peer = peer_of(model)
        (
            peer.model.embed_tokens.requires_grad_(False),
            peer.model.layers[: model.config.encoder_layers].requires_grad_(False),
        )
        added = [*model.reasoning.gate.parameters(), *model.q_head.parameters()]
        pairs = {i: (p, p) for i, p in enumerate([*peer.parameters(), *added]) if p.requires_grad}
        step = lambda model, *rest: authors_step(model, peer, *rest)
    else:
        pairs = fp32_masters(model, dtype)
    if "--compile" in name:
        compile_layers(model)
    if "--checkpoint-activations" in name:
        checkpoint_activations(model)
    if name != THEIRS and device.type == "cpu":
        keep_freed_memory()
    optimizer = torch.optim.AdamW(
        [master for _, master in pairs.values()],
        lr=5e-5,
        weight_decay=0.0,
        fused=device.type in ("cuda", "cpu"),
    )
    while (job := pipe.recv()) is not None:
        step(model, job[0].to(device), args.loops, job[1])
        pipe.send(update(pairs, optimizer, 1.0))
    pipe.send(peak_memory(device) - empty)


def train(args, device, dtype):
    """Steps of the contenders on the same batches and supervised loops, in turns; FLOPs counted as 2 a weight and token forward, 6 with backward."""
    spawn, pipes, ours = (
        multiprocessing.get_context("spawn"),
        {},
        "LoopUS" + " --compile" * args.compile,
    )
    for name in [THEIRS] * bool(importlib.util.find_spec("transformers")) + [
        ours,
        f"{ours} --checkpoint-activations",
    ]:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=contender, args=(name, args, theirs), daemon=True).start()
        theirs.close()  # so that a contender that dies ends the wait for it
    with torch.device("meta"):
        model = LoopUS(LoopUSConfig(**SHAPES[args.shape]))
    E, M, D = (
        sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
        for part in (model.encoder, model.reasoning, model.decoder)
    )
    choice, flops, jobs, tokens, K = (
        random.Random(0),
        [],
        [],
        args.batch_size * args.seq_len,
        args.supervised,
    )
    for _ in range(args.rounds + 1):
        chosen = set(choice.sample(range(args.loops), K))
        alone = sum(
            b - 1 not in chosen for b in chosen
        )  # D runs once more where the loop before was not supervised
        flops.append(2 * tokens * (E + (max(chosen) + 1 + 2 * K) * M + (3 * K + alone) * D))
        jobs.append(
            (torch.randint(model.config.vocab_size, (args.batch_size, args.seq_len)), chosen)
        )

    def steps(pipe, left):
        def work():
            pipe.send(next(left))
            pipe.recv()

        return work

    a = torch.rand(
        2048 if device.type == "cpu" else 8192,
        2048 if device.type == "cpu" else 8192,
        device=device,
        dtype=dtype,
    )
    taken = in_turns(
        {name: steps(pipe, iter(jobs)) for name, pipe in pipes.items()}
        | {"product": lambda: [a @ a for _ in range(10)]},
        args.rounds,
        device,
        statistics.mean,
    )
    print(
        f"{args.shape}, {args.batch_size} x {args.seq_len} tokens, {args.loops} loops, {K} supervised, {dtype} on {device}, {torch.get_num_threads()} threads; the same {args.rounds} batches"
    )
    rate, peaks = 20 * len(a) ** 3 / taken["product"], {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
        against = (
            f"   {taken[THEIRS] / taken[name]:.2f}x and {peaks[name] / peaks[THEIRS]:.2f}x"
            if THEIRS in peaks
            else ""
        )
        print(
            f"  {name:42} {tokens / taken[name]:9.1f} tokens/s   peak memory {peaks[name] / 1e9:6.2f} GB{against}"
        )
    done = statistics.mean(flops[1:]) / taken[ours]
    print(
        f"  {ours} computes {done / 1e12:.3f} TFLOP/s, {done / rate:.1%} of the {rate / 1e12:.3f} of products of {len(a)} x {len(a)}"
    )


def peak_memory(device):
    """Most bytes that this process has held: on a GPU there, else resident."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def random_model(shape, dtype, device):
    with device:
        model = LoopUS(LoopUSConfig(**SHAPES[shape])).eval()
        gate, head = copy.deepcopy(model.reasoning.gate), copy.deepcopy(model.q_head)
        model.to(dtype).reasoning.gate, model.q_head = gate, head
    return model


def main():
    parser = argparse.ArgumentParser(
        description="Time decoding beside its bound, or training, and their peers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["decode", "train"], default="decode")
    parser.add_argument("--model", help="directory or hub id; default: random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--budget", type=number(int, 2), default=8, help="loops")
    parser.add_argument(
        "--rounds",
        type=number(int, 2),
        default=15,
        help="turns of each contender (of train: steps)",
    )
    parser.add_argument(
        "--contexts",
        type=number(int, 2),
        nargs="+",
        default=[4, 32, 64, 256, 512, 1024],
        help="tokens before the timed one",
    )
    parser.add_argument(
        "--batches", type=number(int, 1), nargs="+", default=[1, 8, 32], help="rows"
    )
    parser.add_argument(
        "--compile", action="store_true", help="a compiled contender too; of train: ours compiled"
    )
    parser.add_argument("--loops", type=number(int, 1), default=20, help="of train")
    parser.add_argument("--supervised", type=number(int, 1), default=5, help="of train")
    parser.add_argument("--batch-size", type=number(int, 1), default=4, help="of train")
    parser.add_argument("--seq-len", type=number(int, 2), default=512, help="of train")
    parser.add_argument("--threads", type=number(int, 1), help="of the CPU (default: PyTorch's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="float32")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench.json"),
        help="the numbers, for visualize.py --bench",
    )
    args = parser.parse_args()
    if args.what == "train" and (args.model or args.supervised > args.loops):
        parser.error(
            "train takes random weights of a --shape, no --model, and no more --supervised than --loops"
        )
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.what == "train":
        try:
            return train(args, device, dtype)
        except (EOFError, BrokenPipeError):
            raise InputError("a contender ended early; what it said stands above") from None
    model = (
        load(args.model, device=device, dtype=dtype)[0]
        if args.model
        else random_model(args.shape, dtype, device)
    )
    found = decode(args, model, device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(found) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)

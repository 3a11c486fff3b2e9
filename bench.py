"""Speed and memory, side by side: contenders take turns in one process, and medians are compared.

    python bench.py                                    SmolLM2-135M's shape, random weights
    python bench.py --shape tinyllama --compile        1.1B; a compiled contender too
    python bench.py --model DIR                        real weights
    python bench.py train --rounds 3                   training, beside the authors' recipe, built
                                                       from transformers' layers

Decoding one token at a time waits for memory, so it is held against a bound: the least time that
a token can take is that of the bytes it must read (weights times loops, and the cache) at the rate
at which this machine reads 1 GiB in the same rounds. transformers, where installed, takes part.

Reading order: how time is taken, who takes part, five tables of decoding, training, the command.
"""

import copy
import functools
import importlib.util
import itertools
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

from appendix.errors import InputError, run_main
from appendix.fast import (
    checkpoint_activations,
    compile_decoding,
    compile_layers,
    split_single_token_products,
)
from appendix.files import make_folder, write_text
from appendix.flags import DTYPES, FlagParser, number, pick_device, pick_dtype
from appendix.memory import keep_freed_memory
from appendix.optim import fp32_masters, update
from load_weights import backbone_name, load
from loopus import ADDED, LoopUS, LoopUSConfig, cache_bytes
from train import training_step

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "encoder_layers": 2,
    },
    "tinyllama": {"num_key_value_heads": 4},  # the other defaults of LoopUSConfig are TinyLlama's
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}

# ---- how time and memory are taken ---------------------------------------------------------------


def seconds(work, device):
    """How long `work()` takes, the device's part of it too."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(contenders, rounds, device, middle=statistics.median):
    """Seconds of each contender {name: work}, the median over the rounds (or another `middle`).

    All take one turn a round, so that what else the machine does falls on all of them alike. A
    round that does not count comes first.
    """
    times = {name: [] for name in contenders}
    started = time.perf_counter()
    for i in range(rounds + 1):
        for name, work in contenders.items():
            times[name].append(seconds(work, device))
        spent = time.perf_counter() - started
        left = spent / (i + 1) * (rounds - i)
        show_progress(f"\r  round {i} of {rounds}, {spent:.0f} s, {left:.0f} s to go ")
    show_progress("\r" + " " * 60 + "\r")
    return {name: middle(taken[1:]) for name, taken in times.items()}


def show_progress(text):
    print(text, end="", file=sys.stderr, flush=True)


def peak_memory(device):
    """Most bytes that this process has held: on a GPU there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_row(name, taken, rows=1, bound=None, peer=None):
    """A line of a table. taken: seconds in which each of the rows gets one token.

    bound: the least seconds that are possible; peer: the seconds that transformers takes.
    """
    line = f"  {name:34} {taken * 1e3:9.2f} ms {rows / taken:9.1f} tokens/s"
    if bound:
        line += f"   {bound / taken:6.1%} of the bound"
    if peer:
        line += f"   {peer / taken:5.2f}x transformers"
    print(line, flush=True)


def count_loops(loops):
    return "1 loop" if loops == 1 else f"{loops} loops"


# ---- who takes part ------------------------------------------------------------------------------


def random_model(shape, dtype, device):
    """A model of one of the SHAPES as load_weights.load would give it, but for random weights."""
    with device:
        model = LoopUS(LoopUSConfig(**SHAPES[shape])).eval()
    gate = copy.deepcopy(model.reasoning.gate)  # gate and head stay fp32
    head = copy.deepcopy(model.q_head)
    model.to(dtype)
    model.reasoning.gate = gate
    model.q_head = head
    split_single_token_products(model)
    return model


def compiled_twin(model):
    """A compiled model that shares the weights of `model`, which stays as it is."""
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared)
    compile_decoding(twin)
    return twin


def stepper(model, rows, context, rounds, **options):
    """Work that makes one token a row behind `context` tokens, the prompt already read."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, context), generator=generator)
    ids = ids.to(model.decoder.norm.weight.device)
    options = {"halt": "none"} | options
    steps = model.generate(ids, rounds + 2, temperature=0, **options)
    next(steps)
    return functools.partial(next, steps)


def products(model, loops):
    """Work that is a token's products of matrix and vector and nothing else.

    What eager decoding could reach if all else took no time.
    """
    parts = [model.encoder, *loops * [model.reasoning.layers], model.decoder]
    linears = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear)]
    inputs = {m.in_features: m.weight.new_ones(1, m.in_features) for m in linears}

    @torch.inference_mode()
    def multiply():
        for linear in linears:
            linear(inputs[linear.in_features])

    return multiply


def uncached_token(model, context, budget):
    """Make one token behind `context` tokens, all of them computed anew."""
    device = model.decoder.norm.weight.device
    ids = torch.ones(1, context, dtype=torch.long, device=device)
    options = {"halt": "none", "temperature": 0, "use_cache": False}
    next(model.generate(ids, 1, budget=budget, **options))


def peer_of(model):
    """transformers' model with the same weights; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no peer in the table (pip install transformers)")
        return None
    c = model.config
    same = (
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
    fields = {name: getattr(c, name) for name in same}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta}
    family = {"llama": "Llama", "qwen3": "Qwen3"}[c.model_type]
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.device("meta"):
        peer = getattr(transformers, f"{family}ForCausalLM")(config)
    state = model.state_dict().items()
    weights = {backbone_name(name, c): p for name, p in state if not name.startswith(ADDED)}
    peer.load_state_dict(weights, assign=True)
    # The table of rotary angles is not among the weights, so it is still on the meta device.
    rotary = type(peer.model.rotary_emb)(peer.config)
    peer.model.rotary_emb = rotary.to(model.decoder.norm.weight.device)
    return peer.eval()


class Clock:
    """What transformers' generate calls a streamer: it is told of every token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def time_peer(model, context, rounds):
    """Median seconds of a token in transformers' generate; None where it is not installed."""
    peer = peer_of(model)
    if peer is None:
        return None
    device = model.decoder.norm.weight.device
    ids = torch.randint(model.config.vocab_size, (1, context), device=device)
    clock = Clock()
    count = rounds + 3
    length = {"max_new_tokens": count, "min_new_tokens": count}
    peer.generate(ids, **length, do_sample=False, streamer=clock, pad_token_id=0)
    times = clock.times[3:]  # the prompt, and two tokens that do not count
    return statistics.median(after - before for before, after in itertools.pairwise(times))


class Dice(nn.Module):
    """A confidence head that draws q from 0 to 1.

    With a threshold t, a token stops at each loop with probability 1 - t.
    """

    def forward(self, delta):
        return torch.rand(len(delta), 1, device=delta.device).logit()


# ---- decoding: five tables -----------------------------------------------------------------------


def decode(args, model, device):
    """Print the five tables -> their numbers, for visualize.py."""
    contenders = {"eager": model}
    if args.compile:
        contenders["compiled"] = compiled_twin(model)
    found = {
        "shape": args.model or args.shape,
        "dtype": str(model.decoder.norm.weight.dtype),
        "threads": torch.get_num_threads(),
        "budget": args.budget,
    }
    found |= compare_with_bound(contenders, args.budget, args.rounds, device)
    contexts = [
        context
        for context in args.contexts
        if context + args.rounds + 2 <= model.config.max_position_embeddings
    ]
    found["contexts"] = compare_contexts(contenders, contexts, args.budget, args.rounds, device)
    found["exit"] = compare_exits(model, args.budget, args.rounds, device)
    show_memory(model, args.budget, device)
    found |= compare_batches(model, args.batches, args.budget, args.rounds, device)
    return found


def bytes_read(model, loops, context):
    """What a token must read: E's weights, M's and its gate's `loops` times, D's, and the cache."""
    size = 0
    for part, times in ((model.encoder.layers, 1), (model.reasoning, loops), (model.decoder, 1)):
        size += times * sum(p.numel() * p.element_size() for p in part.parameters())
    dtype = model.decoder.norm.weight.dtype
    return size + context * cache_bytes(model.config, loops, dtype)


def compare_with_bound(contenders, budget, rounds, device):
    """Table 1: a token at one loop and at `budget` loops, beside its bound and transformers."""
    model = contenders["eager"]
    dtype = model.decoder.norm.weight.dtype
    print(
        f"1. decoding at batch 1, context 64, and the bound of {dtype} on {device}, "
        f"{torch.get_num_threads()} threads"
    )
    gibibyte = torch.ones(2**28, device=device)
    work = {"read": gibibyte.sum}
    for name, contender in contenders.items():
        for loops in (1, budget):
            work[f"{name} {loops}"] = stepper(contender, 1, 64, rounds, budget=loops)
    for loops in (1, budget):
        work[f"products alone {loops}"] = products(model, loops)
    taken = in_turns(work, rounds, device)
    rate = gibibyte.nbytes / taken.pop("read")
    peer = time_peer(model, 64, rounds)

    print(f"  the machine reads {rate / 1e9:.1f} GB/s")
    found = {"read_rate": rate}
    for loops in (1, budget):
        needed = bytes_read(model, loops, 64)
        bound = needed / rate
        words = count_loops(loops)
        print(f"  {words}: {needed / 1e9:.3f} GB a token, at least {bound * 1e3:.2f} ms")
        for name in (*contenders, "products alone"):
            own = taken[f"{name} {loops}"]
            like = loops == 1 and name in contenders  # what transformers does is one loop
            print_row(f"{name}, {words}", own, bound=bound, peer=peer if like else None)
            found[f"{name} {loops}"] = own
    if peer:
        bound = bytes_read(model, 1, 64) / rate
        print_row("transformers, plain backbone", peer, bound=bound)
        found["transformers"] = peer
    return found


def compare_contexts(contenders, contexts, budget, rounds, device):
    """Table 2: a token behind more and more tokens, with a cache and without."""
    print(f"2. a token at {budget} loops by context, cached and not")
    cached = {}
    for name, contender in contenders.items():
        for context in contexts:
            cached[name, context] = stepper(contender, 1, context, rounds, budget=budget)
    cached = in_turns(cached, rounds, device)
    uncached = {}
    for context in contexts:
        work = functools.partial(uncached_token, contenders["eager"], context, budget)
        uncached[context] = work
    uncached = in_turns(uncached, max(1, rounds // 5), device)

    table = []
    for context in contexts:
        row = {"context": context, "uncached": uncached[context]}
        row |= {name: cached[name, context] for name in contenders}
        table.append(row)
        columns = "   ".join(f"{name} {row[name] * 1e3:8.2f} ms" for name in contenders)
        print(
            f"  {context:5d} tokens   {columns}   uncached {row['uncached'] * 1e3:9.2f} ms "
            f"({row['uncached'] / row['eager']:.2f}x)"
        )
    if {64, 1024} <= set(contexts):
        growth = {name: cached[name, 1024] / cached[name, 64] for name in contenders}
        words = ", ".join(f"{name} {factor:.2f}x" for name, factor in growth.items())
        print(f"  1024 against 64 tokens: {words}")
    return table


def compare_exits(model, budget, rounds, device):
    """Table 3: does a token that stops after x loops cost what x loops cost?

    -> pairs of mean loops and seconds, sorted, for several thresholds.
    """
    print(
        f"3. early exit at up to {budget} loops, "
        f"against the straight line through the fixed budgets 1 and {budget}"
    )
    rounds = 4 * rounds
    loops = {threshold: [] for threshold in (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)}

    def exit_stepper(threshold):
        options = {"halt": "confidence", "exit_threshold": threshold}
        step = stepper(model, 1, 64, rounds, budget=budget, **options)

        def step_and_count():
            loops[threshold].append(step().loops.item())

        return step_and_count

    head = model.q_head
    model.q_head = Dice()
    work = {f"budget {b}": stepper(model, 1, 64, rounds, budget=b) for b in (1, budget)}
    work |= {f"exit {threshold}": exit_stepper(threshold) for threshold in loops}
    taken = in_turns(work, rounds, device, statistics.mean)
    model.q_head = head

    pairs = []
    for threshold, counts in loops.items():
        pairs.append((statistics.mean(counts[1:]), taken[f"exit {threshold}"]))
    pairs.sort()
    first = taken["budget 1"]
    per_loop = (taken[f"budget {budget}"] - first) / (budget - 1)
    for mean, time_taken in pairs:
        line = first + per_loop * (mean - 1)
        print(
            f"  {mean:5.2f} loops {time_taken * 1e3:9.2f} ms   {time_taken / line:5.2f}x the line"
        )
    return pairs


def show_memory(model, budget, device):
    """Table 4: of the two kinds of cache, and of the process."""
    print("4. memory")
    for policy, depths in (("latest", budget), ("shared", 1)):
        size = cache_bytes(model.config, depths, model.decoder.norm.weight.dtype)
        print(f"  {policy}: {size} bytes a token, {size * 1024 / 1e6:.1f} MB at 1024 tokens")
    print(f"  peak so far {peak_memory(device) / 1e9:.2f} GB (the 1 GiB that is read among it)")


def compare_batches(model, batches, budget, rounds, device):
    """Table 5: a prompt, and several rows at a time."""
    print(f"5. prompts of 256 tokens, and batches, {budget} loops")
    rounds = max(2, rounds // 3)
    work = {rows: stepper(model, rows, 64, rounds, budget=budget) for rows in batches}
    work["prompt"] = functools.partial(stepper, model, 1, 256, 1, budget=budget)
    taken = in_turns(work, rounds, device)
    prompt = taken.pop("prompt")
    print_row("prompt, by token", prompt / 256)
    for rows in batches:
        print_row(f"batch {rows}", taken[rows], rows=rows)
    return {"batches": taken, "prefill": 256 / prompt}


# ---- training: the authors' recipe ---------------------------------------------------------------


def authors_step(model, peer, ids, loops, supervised):
    """The released recipe from transformers' layers, with the gate and head of `model`.

    At a supervised loop D runs twice, all logits are made at once, and the losses are the batch's
    means.
    """
    with torch.no_grad():
        h = peer_layers(peer, peer.model.embed_tokens(ids), 0, model.config.encoder_layers)
    for b in range(loops):
        if b not in supervised:
            with torch.no_grad():
                h, _ = authors_loop(model, peer, h)
            continue
        with torch.no_grad():
            lm_before = next_token_mean(authors_decode(model, peer, h), ids)
        h, q_logit = authors_loop(model, peer, h)
        logits = authors_decode(model, peer, h)
        lm = next_token_mean(logits, ids)
        accuracy = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean(1)
        loss_mono = F.silu(lm - lm_before)
        loss_q = F.binary_cross_entropy_with_logits(q_logit, accuracy)
        ((lm + loss_mono + loss_q) / len(supervised)).backward()
        h = h.detach()


def peer_layers(peer, h, first, last):
    """h (N, T, D) through some of transformers' layers -> (N, T, D)."""
    positions = torch.arange(h.shape[1], device=h.device)[None]
    angles = peer.model.rotary_emb(h, positions)
    for layer in peer.model.layers[first:last]:
        h = layer(h, position_embeddings=angles)
    return h


def authors_loop(model, peer, h):
    """h (N, T, D) -> the next h, and the confidence's logit (N,)."""
    c = model.config
    proposal = peer_layers(peer, h, c.encoder_layers, c.num_hidden_layers - c.decoder_layers)
    delta = (proposal - h).float()
    alpha = model.reasoning.gate(delta)
    mixed = alpha * proposal + (1 - alpha) * h
    return mixed.to(h.dtype), model.q_head(delta[:, -1]).squeeze(-1)


def authors_decode(model, peer, h):
    """h (N, T, D) -> logits (N, T, V)."""
    layers = model.config.num_hidden_layers
    h = peer_layers(peer, h, layers - model.config.decoder_layers, layers)
    return peer.lm_head(peer.model.norm(h))


def next_token_mean(logits, ids):
    """Mean loss of the whole batch, in nats a token."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


# ---- training: who takes part --------------------------------------------------------------------

THEIRS = "the authors' recipe"


def our_name(args):
    return "LoopUS --compile" if args.compile else "LoopUS"


def contender_names(args):
    """Ours with and without a flag that saves memory; theirs, where transformers is installed."""
    names = [our_name(args), f"{our_name(args)} --checkpoint-activations"]
    if importlib.util.find_spec("transformers"):
        names.insert(0, THEIRS)
    return names


def build_theirs(args, dtype, device):
    """-> the step of the authors' recipe, and what it trains, each parameter its own master."""
    model = random_model(args.shape, dtype, device)
    peer = peer_of(model)
    peer.model.embed_tokens.requires_grad_(False)
    peer.model.layers[: model.config.encoder_layers].requires_grad_(False)
    added = [*model.reasoning.gate.parameters(), *model.q_head.parameters()]
    trained = [p for p in (*peer.parameters(), *added) if p.requires_grad]
    pairs = {i: (p, p) for i, p in enumerate(trained)}
    return functools.partial(authors_step, model, peer), pairs


def build_ours(name, args, dtype, device):
    """-> the step of train.py with the flags in the contender's name, and what it trains."""
    model = random_model(args.shape, dtype, device)
    pairs = fp32_masters(model, dtype)
    if "--compile" in name:
        compile_layers(model)
    if "--checkpoint-activations" in name:
        checkpoint_activations(model)
    if device.type == "cpu":
        keep_freed_memory()
    return functools.partial(training_step, model), pairs


def train_on_demand(name, args, pipe):
    """A contender, in a process of its own, so that its peak memory is its own.

    It makes a step for each (ids, supervised loops) that it is sent. Sent None, it answers with its
    peak memory, and ends.
    """
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    empty = peak_memory(device)
    if name == THEIRS:
        step, pairs = build_theirs(args, dtype, device)
    else:
        step, pairs = build_ours(name, args, dtype, device)
    masters = [master for _, master in pairs.values()]
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(masters, lr=5e-5, weight_decay=0.0, fused=fused)
    while True:
        job = pipe.recv()
        if job is None:
            break
        ids, supervised = job
        step(ids.to(device), args.loops, supervised)
        pipe.send(update(pairs, optimizer, 1.0))
    pipe.send(peak_memory(device) - empty)


def start(name, args):
    """Start a contender -> our end of the pipe to it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=train_on_demand, args=(name, args, theirs), daemon=True).start()
    theirs.close()  # so that a contender that dies ends the wait for it
    return ours


def asker(pipe, jobs):
    """Work that has a contender make the next step."""
    waiting = iter(jobs)

    def ask():
        pipe.send(next(waiting))
        pipe.recv()

    return ask


# ---- training: the table -------------------------------------------------------------------------


def draw_jobs(args, config):
    """What all contenders are sent: rounds + 1 pairs of ids (N, T) and supervised loops."""
    choice = random.Random(0)
    jobs = []
    for _ in range(args.rounds + 1):
        supervised = set(choice.sample(range(args.loops), args.supervised))
        jobs.append((torch.randint(config.vocab_size, (args.batch_size, args.seq_len)), supervised))
    return jobs


def step_flops(model, tokens, supervised):
    """Operations of our training step: 2 a weight and token forward, 6 with backward."""
    E = linear_weights(model.encoder)
    M = linear_weights(model.reasoning)
    D = linear_weights(model.decoder)
    K = len(supervised)
    # D runs once more, without gradient, where the loop before was not supervised.
    alone = sum(b - 1 not in supervised for b in supervised)
    M_passes = max(supervised) + 1 + 2 * K
    D_passes = 3 * K + alone
    return 2 * tokens * (E + M_passes * M + D_passes * D)


def linear_weights(part):
    return sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))


def multiply_matrices(a):
    """Ten products of a (n, n): the rate of operations that a training step is held against."""
    for _ in range(10):
        torch.mm(a, a)


def train(args, device, dtype):
    """Steps of the contenders on the same batches and supervised loops, in turns."""
    pipes = {name: start(name, args) for name in contender_names(args)}
    with torch.device("meta"):
        model = LoopUS(LoopUSConfig(**SHAPES[args.shape]))
    jobs = draw_jobs(args, model.config)
    size = 2048 if device.type == "cpu" else 8192
    square = torch.rand(size, size, device=device, dtype=dtype)
    work = {name: asker(pipe, jobs) for name, pipe in pipes.items()}
    work["product"] = functools.partial(multiply_matrices, square)
    taken = in_turns(work, args.rounds, device, statistics.mean)
    product_rate = 20 * size**3 / taken["product"]

    print(
        f"{args.shape}, {args.batch_size} x {args.seq_len} tokens, {args.loops} loops, "
        f"{args.supervised} supervised, {dtype} on {device}, {torch.get_num_threads()} threads; "
        f"the same {args.rounds} batches"
    )
    tokens = args.batch_size * args.seq_len
    print_contenders(pipes, taken, tokens)
    ours = our_name(args)
    flops = [step_flops(model, tokens, supervised) for _, supervised in jobs[1:]]
    rate = statistics.mean(flops) / taken[ours]
    print(
        f"  {ours} computes {rate / 1e12:.3f} TFLOP/s, {rate / product_rate:.1%} "
        f"of the {product_rate / 1e12:.3f} of products of {size} x {size}"
    )


def print_contenders(pipes, taken, tokens):
    """End the contenders and print a line for each: speed, peak memory, and both against theirs."""
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    for name, peak in peaks.items():
        speed = tokens / taken[name]
        line = f"  {name:42} {speed:9.1f} tokens/s   peak memory {peak / 1e9:6.2f} GB"
        if THEIRS in peaks:
            line += f"   {taken[THEIRS] / taken[name]:.2f}x and {peak / peaks[THEIRS]:.2f}x"
        print(line)


# ---- the command ---------------------------------------------------------------------------------


def add_training_flags(parser):
    add = parser.add_argument
    add("--loops", type=number(int, 1), default=20, help="of train")
    add("--supervised", type=number(int, 1), default=5, help="of train")
    add("--batch-size", type=number(int, 1), default=4, help="of train")
    add("--seq-len", type=number(int, 2), default=512, help="of train")


def parse_args():
    parser = FlagParser("Time decoding beside its bound, or training, and their peers.")
    add = parser.add_argument
    add("what", nargs="?", choices=["decode", "train"], default="decode")
    add("--model", help="directory or hub id; default: random weights of --shape")
    add("--shape", choices=SHAPES, default="smollm2-135m")
    add("--budget", type=number(int, 2), default=8, help="loops")
    add(
        "--rounds",
        type=number(int, 2),
        default=15,
        help="turns of each contender (of train: steps)",
    )
    contexts = [4, 32, 64, 256, 512, 1024]
    add(
        "--contexts",
        type=number(int, 2),
        nargs="+",
        default=contexts,
        help="tokens before the timed one",
    )
    add("--batches", type=number(int, 1), nargs="+", default=[1, 8, 32], help="rows")
    add("--compile", action="store_true", help="a compiled contender too; of train: ours compiled")
    add_training_flags(parser)
    add("--threads", type=number(int, 1), help="of the CPU (default: PyTorch's)")
    add("--device", default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="float32")
    out = Path("out/bench.json")
    add("--out", type=Path, default=out, help="the numbers, for visualize.py --bench")
    args = parser.parse_args()
    if args.what == "train" and (args.model or args.supervised > args.loops):
        parser.error(
            "train takes random weights of a --shape, no --model, "
            "and no more --supervised than --loops"
        )
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.what == "train":
        try:
            train(args, device, dtype)
        except (EOFError, BrokenPipeError):
            raise InputError("a contender ended early; what it said stands above") from None
        return
    make_folder(args.out.parent)
    if args.model:
        model, _ = load(args.model, device=device, dtype=dtype)
    else:
        model = random_model(args.shape, dtype, device)
    found = decode(args, model, device)
    write_text(args.out, json.dumps(found) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)

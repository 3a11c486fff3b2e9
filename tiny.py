"""Trails: a tiny world whose answers need many dependent steps, and a small Llama pretrained on it.

    python tiny.py            make assets/tiny/base again, from a seed (eleven minutes)
    python tiny.py --check    train for a moment from the same seed, and compare with what is there

The language. A strip has rows of four cells. A letter is its own value. A digit has the value of
the cell that many places to its left, which stands in the row before. Three rows, and their values:

    d a h c    d a h c
    2 5 3 6    h d c a    2 places left of the 2 is h, 5 places left of the 5 is d, and so on
    1 5 5 5    a h d c    1 place left of the 1 is the 6, which is a; and so on

Then come a question mark and four questions. A question is one more digit, by the same rule; the
digits 5, 6, 7, 8 point at the four cells of the last row in turn, and the token behind each is the
answer, the value of that cell:

    d a h c 2 5 3 6 1 5 5 5 ? 5 a 6 h 7 d 8 c

Whoever answers goes from row to row until a letter is met: here in two steps, one for each row of
digits. That number is the steps that a problem needs. They cannot be taken at once, since each
starts where the one before has led. A real strip has 13 rows, of which the last 0 to 12 are digits.
Each row of digits is a shuffle of the row before, so the four letters all arrive, and only their
order has to be worked out; of the rows of letters, only the last one matters.

The base. A Llama of four layers learns the language by plain next-token training. The loss is taken
on the answers alone, as in instruction tuning, because the strip itself is random. One pass through
four layers can take only so many steps: the base is exact up to five and lost beyond seven.

What came of it. `python train.py` recasts the base and trains it with random deep supervision, and
`report` counts which problems the looped model solves that its base cannot (docs/tiny.md).

Reading order: top to bottom. The language, the base, what came of it, problems shown.
"""

import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from appendix.errors import require, run_main
from appendix.files import read_json, write_text, write_whole
from appendix.flags import FlagParser
from load_weights import backbone_name, load
from loopus import ADDED, LoopUS, LoopUSConfig

# ---- the language --------------------------------------------------------------------------------

SYMBOLS = "abcdefgh12345678?"  # a token's id is its place here
LETTERS = 8  # the ids from 0
QUESTION_MARK = len(SYMBOLS) - 1
ROWS = 13  # of a strip
LANES = 4  # cells of a row


def digit(value):
    """The id of the digit 1 to 8; of each, for a tensor of them."""
    return LETTERS - 1 + value


def spell(ids):
    """The text of some ids (T,)."""
    return "".join(SYMBOLS[i] for i in ids.tolist())


def problems(steps, questions, generator, rows=ROWS):
    """Random problems that need the given number of steps.

    steps (N,) -> ids (N, T), which end with the last question, and targets (N, T), which are the
    answer where a question stands and -100 elsewhere. questions: how many are asked, 1 to 4.
    """
    N = len(steps)
    letters = torch.randint(LETTERS, (N, rows, LANES), generator=generator)
    # Which lane of the row before a cell copies. Sorting random numbers shuffles the four lanes.
    source = torch.rand(N, rows, LANES, generator=generator).argsort(-1)
    digits = digit(LANES + torch.arange(LANES) - source)  # from 1 to 7 places to the left
    is_copy = torch.arange(rows) >= rows - steps[:, None]  # (N, rows): the last `steps` rows

    strip = torch.where(is_copy[..., None], digits, letters).flatten(1)  # (N, rows * LANES)
    answers = last_row(letters, source, is_copy)
    # Question i points at cell i of the last row. From one question to the next its place moves on
    # by two and the cell by one, so the digits are 5, 6, 7, 8.
    asked = digit(LANES + 1 + torch.arange(LANES)).expand(N, -1)
    dialogue = torch.stack((asked, answers), dim=-1).flatten(1)  # question, answer, question, …
    dialogue = dialogue[:, : 2 * questions - 1]  # the last answer is for the model to give
    ids = torch.cat((strip, torch.full((N, 1), QUESTION_MARK), dialogue), dim=1)

    targets = torch.full_like(ids, -100)
    targets[:, rows * LANES + 1 :: 2] = answers[:, :questions]
    return ids, targets


def last_row(letters, source, is_copy):
    """The values of the last row's cells (N, LANES): letters, or what the rows of digits copied."""
    values = letters[:, 0]
    for row in range(1, letters.shape[1]):
        copied = values.gather(1, source[:, row])
        values = torch.where(is_copy[:, row, None], copied, letters[:, row])
    return values


def batches(batch_size, seed):
    """Batches (ids, targets) without end: all numbers of steps alike, 1 to 4 questions in turn."""
    generator = torch.Generator().manual_seed(seed)
    for i in itertools.count():
        steps = torch.randint(ROWS, (batch_size,), generator=generator)
        yield problems(steps, i % LANES + 1, generator)


def held_out(count):
    """The same `count` problems (ids, targets) for every run; all numbers of steps alike."""
    return problems(torch.arange(count) % ROWS, LANES, torch.Generator().manual_seed(2025))


# ---- the base ------------------------------------------------------------------------------------

BASE = Path(__file__).resolve().parent / "assets" / "tiny" / "base"
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
STAGE = 4000  # batches of each of the two stages of pretraining
PEAK_SHORT, PEAK_WHOLE = 4e-3, 3e-3  # peak learning rates of the two
CHECKED = 100  # losses of the first stage that --check makes again


def new_backbone():
    """A LoopUS model whose backbone has random weights, always the same."""
    torch.manual_seed(0)
    known = LoopUSConfig.__dataclass_fields__
    fields = {name: value for name, value in CONFIG.items() if name in known}
    model = LoopUS(LoopUSConfig(**fields))
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.startswith(ADDED):
            # What is added to the residual stream starts at half the size.
            scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            nn.init.normal_(p, std=scale * CONFIG["hidden_size"] ** -0.5)
    return model


def short_strips(generator):
    """Batches of the first stage, without end: strips of nine rows, all numbers of steps alike."""
    while True:
        steps = torch.randint(9, (64,), generator=generator)
        yield problems(steps, LANES, generator, rows=9)


def whole_strips(generator):
    """Batches of the second stage, without end: whole strips, more of them with few steps."""
    while True:
        steps = torch.randint(ROWS, (2, 64), generator=generator).amin(0)
        yield problems(steps, LANES, generator)


def learning_rate(step, steps, peak):
    """Warm-up over 200 batches, and one cosine to a twentieth of the peak; step from 1."""
    warmup = min(1, step / 200)
    cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)
    return peak * warmup * cosine


def pretrain(model, batches, steps, peak):
    """Plain next-token training of the whole backbone -> the loss of every batch.

    `steps` is the length of the schedule; training ends there, or where the batches end.
    """
    parameters = [p for name, p in model.named_parameters() if not name.startswith(ADDED)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    started = time.perf_counter()
    losses = []
    for step, (ids, targets) in enumerate(itertools.islice(batches, steps), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        logits = model.forward_pretrained(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 500 == 0:
            spent = time.perf_counter() - started
            left = spent / step * (steps - step)
            shares = percent(right(model, None)[0])
            mean = sum(losses[-500:]) / 500
            print(
                f"{step:6d} {mean:6.3f}  {shares}  {spent:5.0f} s, {left:4.0f} s to go", flush=True
            )
    return losses


def make_base(directory):
    """Pretrain the base and write it as a Hugging Face directory, with what `check` compares."""
    started = time.perf_counter()
    model = new_backbone()
    generator = torch.Generator().manual_seed(0)
    print("  step   loss  accuracy (%) by steps needed, 0 to 12")
    first = pretrain(model, short_strips(generator), STAGE, PEAK_SHORT)
    second = pretrain(model, whole_strips(generator), STAGE, PEAK_WHOLE)
    record = {
        "first_losses": [round(loss, 4) for loss in first[:CHECKED]],
        "last_losses": [sum(losses[-500:]) / 500 for losses in (first, second)],
        "accuracy": right(model, None)[0].tolist(),
        "seconds": round(time.perf_counter() - started),
    }
    size = write_base(model, record, directory)
    print(f"wrote {directory}: {size} parameters, {time.perf_counter() - started:.0f} s")


def write_base(model, record, directory):
    """Write config, tokenizer, record and weights -> the number of parameters written."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": CONFIG,
        "tokenizer.json": describe_tokenizer(),
        "pretraining.json": record,
    }
    for name, content in contents.items():
        write_text(directory / name, json.dumps(content, indent=1) + "\n")

    tensors = {}
    for name, p in model.state_dict().items():
        if not name.startswith(ADDED):
            tensors[backbone_name(name, model.config)] = p

    def write(path):
        save_file(tensors, path, metadata={"format": "pt"})

    write_whole(directory / "model.safetensors", write)
    return sum(p.numel() for p in tensors.values())


def describe_tokenizer():
    """tokenizer.json: byte-level BPE without a merge, so that every symbol is a token."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    vocab = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def check(directory):
    """Does the shipped base come from this code? InputError if it does not.

    The first losses are made again from the same seed, and the accuracy from the shipped weights.
    """
    record = read_json(directory / "pretraining.json")
    model = new_backbone()
    shipped, tokenizer = load(str(directory), split=(1, 1))
    require(
        tokenizer.encode(SYMBOLS) == list(range(len(SYMBOLS))),
        f"{directory}: its tokenizer does not number {SYMBOLS} in this order",
    )
    require(shapes(model) == shapes(shipped), f"{directory}: other shapes than this code makes")

    batches = itertools.islice(short_strips(torch.Generator().manual_seed(0)), CHECKED)
    losses = torch.tensor(pretrain(model, batches, STAGE, PEAK_SHORT))
    apart = (losses / torch.tensor(record["first_losses"]) - 1).abs().max().item()
    print(
        f"first {CHECKED} losses {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"at most {apart:.2%} from the record; accuracy by steps needed now and then:"
    )
    now = right(shipped, None)[0]
    then = torch.tensor(record["accuracy"])
    print(f"  {percent(now)}\n  {percent(then)}")
    require(
        apart < 0.02 and (now - then).abs().max() < 0.02,
        f"{directory}: not what this code makes (limits: 2 % of a loss, 2 points of accuracy)",
    )
    print(f"{directory}: made by this code, in {record['seconds']} s")


def shapes(model):
    return {name: p.shape for name, p in model.state_dict().items()}


# ---- what came of it -----------------------------------------------------------------------------

# train.py's defaults for this world. docs/tiny.md says what they are worth.
RECIPE = {
    "steps": 600,
    "batch_size": 64,
    "accumulate": 1,
    "seq_len": 64,
    "lr": 2e-3,
    "warmup": 100,
    "gate_init": "open",
    "horizon": 4,
    "eval_every": 150,
    "eval_sequences": 208,
    "dtype": "float32",
}
BUDGETS = (1, 2, 4, 8, 16, 32)  # of the table in which `report` compares the models


@torch.no_grad()
def right(model, budget, threshold=None, count=200, seed=2026):
    """How many problems a model solves, all four answers right, and the loops that it takes.

    -> the share solved (13,) and the mean loops (13,) by steps needed, and the rank correlation of
    steps and loops over the problems, `count` for each number of steps. budget None: the backbone's
    one ungated pass. With a threshold a problem, as one block, stops once q of its last token
    reaches it.
    """
    steps = torch.arange(ROWS).repeat_interleave(count)
    ids, targets = problems(steps, LANES, torch.Generator().manual_seed(seed))
    device = model.decoder.norm.weight.device
    targets = targets.to(device)
    h = model.encode(ids.to(device))
    if budget is None:
        h = model.pretrained_loop(h)
        loops = torch.zeros(len(ids))
    else:
        h, loops = loop_until(model, h, budget, threshold)
    hits = (model.decode(h).argmax(-1) == targets) | (targets < 0)
    solved = hits.all(1).float().cpu()
    loops = loops.cpu()
    return (
        solved.view(ROWS, count).mean(1),
        loops.view(ROWS, count).mean(1),
        rank_correlation(steps, loops),
    )


def loop_until(model, h, budget, threshold):
    """Loop h (N, T, D) until each row's q reaches the threshold -> h, and each row's loops (N,).

    No row runs more than `budget` loops; threshold None: all run as many.
    """
    loops = torch.zeros(len(h), device=h.device)
    live = torch.ones(len(h), dtype=torch.bool, device=h.device)
    for _ in range(budget):
        new, q_logit = model.loop(h)
        h = torch.where(live[:, None, None], new, h)
        loops = loops + live
        if threshold is not None:
            live = live & (q_logit.sigmoid() < threshold)
    return h, loops


def rank_correlation(x, y):
    """Spearman's; 0 where one of the two never varies."""
    return torch.corrcoef(torch.stack((ranks(x), ranks(y)))).nan_to_num()[0, 1].item()


def ranks(values):
    """The rank of each value (N,) -> (N,); equal ones share their mean rank."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2
    return mean_rank[which]


def hard(shares):
    """Mean over the numbers of steps at which the base solves less than 60 %.

    shares {name: (13,)}, "base" among them -> {name: float}
    """
    fails = shares["base"] < 0.6
    return {name: share[fails].mean().item() for name, share in shares.items()}


def report(looped, control, directory):
    """Compare the looped model with its base and the control, problem by problem.

    Prints the table, and writes it as directory/accuracy.json.
    """
    base, _ = load("tiny")
    shares = {"base": right(base, None)[0], "control": right(control, None)[0]}
    for budget in BUDGETS:
        shares[str(budget)] = right(looped, budget)[0]
    threshold = looped.config.exit_threshold
    shares["exit"], loops, correlation = right(looped, 8, threshold)
    print_table(shares, loops, correlation, threshold)

    found = {name: [round(x, 4) for x in share.tolist()] for name, share in shares.items()}
    found["loops"] = [round(x, 2) for x in loops.tolist()]
    found["rank_correlation"] = round(correlation, 3)
    if int(os.environ.get("RANK", 0)) == 0:  # every process of torchrun finds the same
        write_text(directory / "accuracy.json", json.dumps(found) + "\n")


def print_table(shares, loops, correlation, threshold):
    print(
        "\nproblems with all four answers right (%), by steps needed; "
        f"hard: the {sum(shares['base'] < 0.6)} that the base solves less than 60 % of"
    )
    heading = " ".join(f"{steps:4d}" for steps in range(ROWS))
    print(f"{'':15}{heading}   mean  hard")
    means = hard(shares)
    for name, share in shares.items():
        label = f"exit, q >= {threshold:.2f}" if name == "exit" else loops_label(name)
        mean = share.mean() * 100
        print(f"{label:15}{percent(share)}  {mean:5.1f} {means[name] * 100:5.1f}")
    cells = " ".join(f"{n:4.1f}" for n in loops)
    print(
        f"{'  its loops':15}{cells}  {loops.mean():5.2f}        "
        f"rank correlation with the steps needed {correlation:.2f}"
    )


def percent(shares):
    return " ".join(f"{share * 100:4.0f}" for share in shares)


def loops_label(name):
    """A budget's name in a table or a legend: "1 loop", "8 loops". Other names stay as they are."""
    if not name.isdigit():
        return name
    return "1 loop" if name == "1" else f"{name} loops"


# ---- problems shown ------------------------------------------------------------------------------


def answer_questions(model, strip, budget, **options):
    """Greedy answers to the four questions behind a strip (T,) -> text, and the loops of each.

    Each answer is one call of `generate`, which takes the options.
    """
    ids = torch.cat((strip, strip.new_tensor([QUESTION_MARK])))[None]
    text = ""
    loops = []
    for question in range(LANES):
        asked = ids.new_tensor([[digit(LANES + 1 + question)]])
        ids = torch.cat((ids, asked), dim=1)
        (step,) = model.generate(ids, 1, budget=budget, temperature=0, **options)
        ids = torch.cat((ids, step.tokens[:, None]), dim=1)
        text += spell(step.tokens)
        loops.append(step.loops.item())
    return text, loops


def show(model, seed, budget, **options):
    """Print problems of rising difficulty, what the model answers at budget 1 and at `budget`."""
    steps = torch.tensor([1, 3, 5, 6, 7, 8, 10])
    ids, targets = problems(steps, LANES, torch.Generator().manual_seed(seed))
    ids = ids.to(model.decoder.norm.weight.device)
    print(f"steps  {'strip':{ROWS * (LANES + 1)}}right  at 1    at {budget:<4d} loops")
    for count, row, target in zip(steps.tolist(), ids, targets, strict=True):
        strip = row[: ROWS * LANES]
        cells = " ".join(spell(cell) for cell in strip.split(LANES))
        truth = spell(target[target >= 0])
        one, _ = answer_questions(model, strip, 1, **options)
        many, loops = answer_questions(model, strip, budget, **options)
        used = " ".join(str(n) for n in loops)
        print(
            f"{count:5d}  {cells} {truth:5}  {mark(one, truth)}  {mark(many, truth)}   {used}",
            flush=True,
        )


def mark(text, truth):
    return f"{text} ✓" if text == truth else f"{text} ✗"


def examples():
    """A few problems as text, each up to its first question."""
    steps = torch.tensor([2, 5, 7, 10])
    ids, _ = problems(steps, 1, torch.Generator().manual_seed(7))
    return [spell(row) for row in ids]


def main():
    parser = FlagParser("Pretrain the tiny base (assets/tiny/base), or check the shipped one.")
    parser.add_argument(
        "--check", action="store_true", help="train for a moment and compare with the shipped base"
    )
    parser.add_argument("--out", type=Path, default=BASE, help="folder of the base")
    args = parser.parse_args()
    if args.check:
        check(args.out)
    else:
        make_base(args.out)


if __name__ == "__main__":
    run_main(main)

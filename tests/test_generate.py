"""generate() against a plain reference: no cache tensors, token by token, lists of the keys of every depth."""

import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import small
from appendix.fast import compile_decoding, split_single_token_products
from loopus import RULES, Cache, InputError, cache_bytes, rotary_angles, rotate


def attend(attn, x, position, keys, values, config, window):
    """One token (D,) through one attention; its own key is appended first. Plain softmax over the list."""
    heads = lambda y: y.view(-1, config.head_dim)
    cos, sin = rotary_angles(torch.tensor([position]), config, x.dtype)
    turn = lambda y: rotate(y[None, :, None], cos, sin)[0, :, 0]
    q, k, v = (
        turn(attn.q_norm(heads(attn.q_proj(x)))),
        turn(attn.k_norm(heads(attn.k_proj(x)))),
        heads(attn.v_proj(x)),
    )
    keys, values = [*keys, k][-window:], [*values, v][-window:]
    out, share = [], config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        scores = torch.stack(
            [q[head] @ key[head // share] / math.sqrt(config.head_dim) for key in keys]
        ).softmax(0)
        out.append(sum(s * value[head // share] for s, value in zip(scores, values)))
    return attn.o_proj(torch.cat(out)), k, v


def stack(layers, x, position, past, config, window):
    """One token through layers; past[i] = (keys, values) of earlier tokens. -> output and this token's [(k, v)]"""
    made = []
    for layer, (keys, values) in zip(layers, past):
        y, k, v = attend(
            layer.self_attn, layer.input_layernorm(x), position, keys, values, config, window
        )
        x = x + y
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        made.append((k, v))
    return x, made


@torch.no_grad()
def reference(model, prompt, count, budget, threshold, halt, kv, window):
    """[(token, loops, confidence)]: DESIGN of the recurrence, spelt out. entries[b][j] is what token j shows at depth b."""
    c, gate = model.config, model.reasoning.gate
    rooms = {"E": [], "M": [[] for _ in range(budget)], "D": []}
    see = lambda entries, layers: [
        ([e[i][0] for e in entries], [e[i][1] for e in entries]) for i in range(layers)
    ]
    block, result = list(prompt), []
    for _ in range(count):
        start, states = len(rooms["E"]), []
        for i, token in enumerate(block):
            x, made = stack(
                model.encoder.layers,
                model.encoder.embed_tokens.weight[token],
                start + i,
                see(rooms["E"], c.encoder_layers),
                c,
                window,
            )
            rooms["E"].append(made)
            states.append(x)
        doubt, before, depths = 1.0, None, []
        for b in range(budget):
            shown, after, depths_b = list(rooms["M"][b]), [], []
            for i, h in enumerate(states):
                m, made = stack(
                    model.reasoning.layers, h, start + i, see(shown, c.reasoning_layers), c, window
                )
                shown.append(made)
                depths_b.append(made)
                delta = m - h
                alpha = gate(delta)
                after.append(alpha * m + (1 - alpha) * h)
            depths.append(depths_b)
            q = torch.sigmoid(model.q_head(delta)).item()
            moved, states = (after[-1] - states[-1]).norm().item(), after
            doubt *= 1 - q

            def decode():
                entries = list(rooms["D"])
                for i, h in enumerate(states):
                    x, made = stack(
                        model.decoder.layers,
                        h,
                        start + i,
                        see(entries, c.decoder_layers),
                        c,
                        window,
                    )
                    entries.append(made)
                return model.decoder.logits(x), entries

            logits, entries = decode()
            p = logits.log_softmax(-1)
            stop = {
                "confidence": q >= threshold,
                "convergence": moved <= threshold,
                "cdf": 1 - doubt >= threshold,
                "none": False,
                "argmax": before is not None and p.argmax() == before.argmax(),
                "kl": before is not None and (p.exp() * (p - before)).sum().item() <= threshold,
            }[halt]
            before = p
            if stop:
                break
        rooms["D"] = entries
        for d in range(
            budget
        ):  # deeper than it went, a token shows its last depth; shared: always its last depth
            rooms["M"][d] += depths[min(d, b) if kv == "latest" else b]
        result.append((logits.argmax().item(), b + 1, q))
        block = [result[-1][0]]
    return result


def spread(model, ids):
    """A threshold in the middle of the confidences that the model really has, so that rows stop at different depths."""
    qs = [
        q
        for b in (1, 2, 3)
        for s in model.generate(ids, 4, budget=b, halt="none", temperature=0)
        for q in s.confidence.tolist()
    ]
    qs.sort()
    return (qs[len(qs) // 2] + qs[len(qs) // 2 - 1]) / 2


@pytest.mark.parametrize("kv", ["latest", "shared"])
@pytest.mark.parametrize("halt", RULES)
@pytest.mark.parametrize("window", [64, 5])
def test_cache_equals_reference(halt, kv, window):
    model = small(3)
    prompt = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(2))
    threshold = {
        "confidence": spread(model, prompt),
        "cdf": 0.8,
        "convergence": 8.0,
        "kl": 0.3,
    }.get(halt, 0.0)
    expected = reference(model, prompt[0].tolist(), 6, 4, threshold, halt, kv, window)
    found = [
        (s.tokens.item(), s.loops.item(), s.confidence.item())
        for s in model.generate(
            prompt,
            6,
            budget=4,
            halt=halt,
            exit_threshold=threshold,
            kv=kv,
            temperature=0,
            window=window,
        )
    ]
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    assert [f[2] for f in found] == pytest.approx([e[2] for e in expected], abs=1e-6)
    if halt in ("confidence", "convergence"):
        assert len({e[1] for e in expected}) > 1  # else the test would not see early exit


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("window", [None, 4])
def test_fixed_budget_equals_no_cache(T, window):
    model, ids = small(1), torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(0))
    runs = [
        list(
            model.generate(
                ids, 12, budget=3, halt="none", temperature=0, window=window, use_cache=cache
            )
        )
        for cache in (True, False)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.confidence, b.confidence)
    if window is None:  # and the first token is that of forward
        assert torch.equal(runs[0][0].tokens, model(ids, loops=3)[:, -1].argmax(-1))


@pytest.mark.parametrize("kv", ["latest", "shared"])
@pytest.mark.parametrize("halt", RULES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_in_a_batch_gives_what_it_gives_alone(kv, halt, use_cache):
    model, lengths = small(3), [3, 11, 1, 7]
    ids = torch.randint(0, 50, (4, 11), generator=torch.Generator().manual_seed(4))
    options = dict(
        budget=4,
        halt=halt,
        exit_threshold=0.5
        if halt in ("confidence", "cdf")
        else 8.0
        if halt == "convergence"
        else 0.3,
        kv=kv,
        use_cache=use_cache,
        window=9,
        temperature=0.9,
        top_k=20,
        top_p=0.95,
    )
    eos = list(model.generate(ids[:1, :3], 4, seed=7, **options))[
        3
    ].tokens.item()  # so row 0 ends by its fourth token
    options["eos_id"] = eos
    together = list(model.generate(ids, 10, lengths=torch.tensor(lengths), seed=7, **options))
    ended = False
    for r, n in enumerate(lengths):
        alone = list(model.generate(ids[r : r + 1, :n], 10, seed=7 + r, **options))
        for i, a in enumerate(alone):
            assert (a.tokens.item(), a.loops.item()) == (
                together[i].tokens[r].item(),
                together[i].loops[r].item(),
            )
            assert a.confidence.item() == pytest.approx(together[i].confidence[r].item(), abs=1e-6)
        for i in range(len(alone), len(together)):
            ended = True
            assert (
                together[i].tokens[r].item(),
                together[i].loops[r].item(),
                together[i].confidence[r].item(),
            ) == (eos, 0, 0.0)
    assert ended


def test_sampling_follows_the_distribution():
    """Draws over many rows of one prompt match softmax(logits / temperature), cut by top_k and top_p."""
    model = small(0, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4]]).repeat(3000, 1)
    logits = model(ids[:1], loops=1)[0, -1] * 2 / 0.7
    model.decoder.lm_head.weight.data *= 2
    p = logits.softmax(-1)
    draw = lambda **cut: (
        next(
            iter(model.generate(ids, 1, budget=1, temperature=0.7, seed=0, **cut))
        ).tokens.bincount(minlength=50)
        / 3000
    )
    assert (draw() - p).abs().sum() < 0.12
    kept = p.topk(4).indices
    assert (draw(top_k=4)[kept] - p[kept] / p[kept].sum()).abs().max() < 0.04 and draw(top_k=4)[
        kept
    ].sum() == pytest.approx(1)
    order = p.argsort(descending=True)
    nucleus = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]
    assert (
        draw(top_p=0.5)[nucleus].sum() == pytest.approx(1) and (draw(top_p=0.5)[nucleus] > 0).all()
    )
    assert torch.equal(draw(top_k=1).argmax(), p.argmax())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"budget": 0}, "budget 0"),
        ({"budget": -3}, "budget -3"),
        ({"halt": "never"}, "halt"),
        ({"kv": "all"}, "kv"),
        ({"exit_threshold": 1.5}, "exit_threshold"),
        ({"exit_threshold": -0.1}, "exit_threshold"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"window": 0}, "window"),
        ({"lengths": [2, 9]}, "lengths"),
        ({"lengths": [2]}, "lengths"),
        ({"lengths": [0, 2]}, "lengths"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"ids": torch.tensor([[1, 50]])}, "vocabulary"),
        ({"ids": torch.tensor([[-1, 5]])}, "vocabulary"),
        ({"ids": torch.zeros(1, 0).long()}, "empty"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(change, words):
    with pytest.raises(InputError, match=words):
        small().generate(**{"ids": torch.ones(2, 3).long(), "max_new_tokens": 2} | change)


class Waits(TorchDispatchMode):
    """Notes every operation by which the host waits for one number of the device."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in self.WAITING:
            self.noted.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_pass_sees_one_token_a_row_and_runs_the_loops_of_its_slowest_row():
    """After the prompt every pass sees one token a row; it loops until its last row has stopped;
    the host never asks the device but by tolist."""
    model, seen = small(3), {"E": [], "M": []}

    def note(name):
        def hook(layers, inputs):
            seen[name].append(inputs[0].shape[:2])

        return hook

    model.encoder.layers.register_forward_pre_hook(note("E"))
    model.reasoning.layers.register_forward_pre_hook(note("M"))
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(4))
    threshold = spread(model, ids)
    options = {"lengths": [3, 6, 1, 5], "budget": 4, "temperature": 0}
    steps = model.generate(ids, 8, exit_threshold=threshold, **options)
    seen["E"].clear()
    seen["M"].clear()
    with Waits() as waits:
        steps = list(steps)
    assert not waits.noted
    assert seen["E"] == [(4, 6)] + [(4, 1)] * 7
    assert {rows for rows, _ in seen["M"]} == {4}
    slowest = [int(step.loops.max()) for step in steps]
    assert len(seen["M"]) == sum(slowest) < 8 * 4
    assert any(len(set(step.loops.tolist())) > 1 for step in steps)


def test_cache_is_of_the_size_that_is_said_and_refused_before_it_is_made():
    model = small(3)

    def size(depths):
        cache = Cache(model.config, 3, 7, depths, model.decoder.norm.weight)
        layers = [*cache.encoder, *cache.decoder]
        for b in range(depths):
            layers += cache.loop(b)
        return sum(x.numel() * x.element_size() for c in layers for x in (c.keys, c.values))

    latest = cache_bytes(model.config, 8, torch.float64)
    shared = cache_bytes(model.config, 1, torch.float64)
    assert (size(8), size(1)) == (3 * 7 * latest, 3 * 7 * shared)
    outside = cache_bytes(model.config, 0, torch.float64)
    assert shared - outside == (latest - outside) / 8
    with pytest.raises(InputError, match="GB are free"):
        next(model.generate(torch.ones(2, 3).long(), 10**12, window=10**12))


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_decoding_gives_the_same_tokens_and_loops():
    eager, compiled = (small(3, dtype=torch.float32, num_hidden_layers=3) for _ in "ec")
    split_single_token_products(compiled)
    compile_decoding(compiled)
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(2))
    for ids, options in (
        (ids[:1], {"kv": "latest"}),
        (ids, {"kv": "shared", "window": 9, "lengths": [2, 7, 5]}),
    ):  # one row is compiled as sums
        runs = [
            list(
                m.generate(
                    ids, 8, budget=4, exit_threshold=spread(eager, ids), temperature=0, **options
                )
            )
            for m in (eager, compiled)
        ]
        assert len({int(n) for step in runs[0] for n in step.loops}) > 1
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loops, b.loops)
            torch.testing.assert_close(a.confidence, b.confidence)

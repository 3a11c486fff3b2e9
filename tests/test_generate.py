"""generate() against a plain reference, and what a batch, a window and an early exit promise.

The reference at the top goes token by token and keeps lists instead of a cache: it is also the
shortest statement of who sees whom, and at which depth.
"""

import math
import shutil

import pytest
import torch
from conftest import small
from torch.utils._python_dispatch import TorchDispatchMode

from appendix.fast import compile_decoding, split_single_token_products
from loopus import RULES, Cache, InputError, cache_bytes, rotary_angles, rotate

# ---- the reference -------------------------------------------------------------------------------
# An entry is what a token shows to later ones: a (key, value), (G, K) each, for every layer of a
# stack.


def attend(attention, x, position, earlier, config, window):
    """One token x (D,) through one attention. earlier: [(key, value)] of the tokens before it.

    -> its output (D,) and its own (key, value).
    """
    H, K = config.num_attention_heads, config.head_dim
    cos, sin = rotary_angles(torch.tensor([position]), config, x.dtype)
    query = attention.q_norm(attention.q_proj(x).view(-1, K))
    key = attention.k_norm(attention.k_proj(x).view(-1, K))
    value = attention.v_proj(x).view(-1, K)
    query = rotate(query[None, :, None], cos, sin)[0, :, 0]
    key = rotate(key[None, :, None], cos, sin)[0, :, 0]

    seen = [*earlier, (key, value)][-window:]
    heads = []
    for head in range(H):
        group = head // (H // config.num_key_value_heads)
        scores = torch.stack([query[head] @ k[group] for k, _ in seen]) / math.sqrt(K)
        weights = scores.softmax(0)
        heads.append(sum(w * v[group] for w, (_, v) in zip(weights, seen, strict=True)))
    return attention.o_proj(torch.cat(heads)), (key, value)


def through(layers, x, position, earlier, config, window):
    """One token x (D,) through a stack of layers. earlier: the entries of the tokens before it.

    -> its output (D,) and its own entry.
    """
    entry = []
    for i, layer in enumerate(layers):
        shown = [other[i] for other in earlier]
        normed = layer.input_layernorm(x)
        y, key_value = attend(layer.self_attn, normed, position, shown, config, window)
        x = x + y
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        entry.append(key_value)
    return x, entry


def stops(halt, threshold, confidences, moved, log_probs):
    """Does a stopping rule end the pass?

    From q after every loop so far, how far the last one moved the state, and log p (V,) of the next
    token after every loop so far.
    """
    if halt == "confidence":
        return confidences[-1] >= threshold
    if halt == "cdf":
        return 1 - math.prod(1 - q for q in confidences) >= threshold
    if halt == "convergence":
        return moved <= threshold
    if halt == "none" or len(log_probs) == 1:
        return False
    old, new = log_probs[-2:]
    if halt == "argmax":
        return new.argmax() == old.argmax()
    assert halt == "kl"
    return (new.exp() * (new - old)).sum() <= threshold


class Reference:
    """One row of generate(), temperature 0, with what is promised spelt out."""

    def __init__(self, model, budget, threshold, halt, kv, window):
        self.model, self.window = model, window
        self.budget, self.threshold, self.halt, self.kv = budget, threshold, halt, kv
        self.encoder = []  # the entry of every token so far
        self.decoder = []
        self.loops = [[] for _ in range(budget)]  # what every token so far shows at loop b

    def stack(self, layers, states, earlier):
        """Neighbouring tokens, one after the other: states [(D,)] -> states and entries."""
        outputs, entries = [], []
        for x in states:
            seen = earlier + entries
            y, entry = through(layers, x, len(seen), seen, self.model.config, self.window)
            outputs.append(y)
            entries.append(entry)
        return outputs, entries

    def loop(self, states, b):
        """-> the states after loop b, what the tokens show at it, and q."""
        proposals, entries = self.stack(self.model.reasoning.layers, states, self.loops[b])
        new = []
        for old, proposal in zip(states, proposals, strict=True):
            delta = proposal - old
            alpha = self.model.reasoning.gate(delta)
            new.append(alpha * proposal + (1 - alpha) * old)
        q = torch.sigmoid(self.model.q_head(delta)).item()  # from the last token
        return new, entries, q

    def think(self, ids):
        """A pass over the prompt or a new token: -> log p (V,) of the next token, loops, q."""
        embedded = list(self.model.encoder.embed_tokens.weight[ids])
        states, entries = self.stack(self.model.encoder.layers, embedded, self.encoder)
        self.encoder += entries
        shown, confidences, log_probs = [], [], []
        for b in range(self.budget):
            old = states
            states, entries, q = self.loop(old, b)
            outputs, decoded = self.stack(self.model.decoder.layers, states, self.decoder)
            shown.append(entries)
            confidences.append(q)
            log_probs.append(self.model.decoder.logits(outputs[-1]).log_softmax(-1))
            moved = (states[-1] - old[-1]).norm().item()
            if stops(self.halt, self.threshold, confidences, moved, log_probs):
                break
        self.decoder += decoded
        for depth in range(self.budget):
            # latest: deeper than it went, a token shows its last loop. shared: always its last.
            self.loops[depth] += shown[min(depth, b) if self.kv == "latest" else b]
        return log_probs[-1], b + 1, q

    @torch.no_grad()
    def generate(self, prompt, count):
        """-> [(token, loops, confidence)]."""
        result, ids = [], prompt
        for _ in range(count):
            log_p, loops, q = self.think(ids)
            token = log_p.argmax().item()
            result.append((token, loops, q))
            ids = [token]
        return result


# ---- what the tests share ------------------------------------------------------------------------


def random_ids(*shape, seed):
    """Ids of small()'s vocabulary, the same at every call."""
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def row_of(steps, r=0):
    """[(token, loops)] and [confidence] of one row of generate()'s steps."""
    counts = [(step.tokens[r].item(), step.loops[r].item()) for step in steps]
    return counts, [step.confidence[r].item() for step in steps]


def spread(model, ids):
    """A threshold in the middle of the confidences that the model has on ids.

    With it some tokens stop early and others do not.
    """
    confidences = []
    for budget in (1, 2, 3):
        for step in model.generate(ids, 4, budget=budget, halt="none", temperature=0):
            confidences += step.confidence.tolist()
    confidences.sort()
    middle = len(confidences) // 2
    return (confidences[middle] + confidences[middle - 1]) / 2


# ---- the cache -----------------------------------------------------------------------------------


# Rules and thresholds; None: `spread`. Each kl lies between KL(new ‖ old) and KL(old ‖ new) of the
# prompt's second loop, the first with window 64 and the other with window 5.
STOPPING = [
    ("confidence", None),
    ("cdf", 0.8),
    ("convergence", 8.0),
    ("argmax", 0.0),
    ("kl", 0.26),
    ("kl", 0.21),
    ("none", 0.0),
]


@pytest.mark.parametrize("kv", ["latest", "shared"])
@pytest.mark.parametrize("halt, threshold", STOPPING)
@pytest.mark.parametrize("window", [64, 5])
def test_cache_equals_reference(halt, threshold, kv, window):
    model = small(3)
    prompt = random_ids(1, 7, seed=2)
    if threshold is None:
        threshold = spread(model, prompt)

    reference = Reference(model, 4, threshold, halt, kv, window)
    expected = reference.generate(prompt[0].tolist(), 6)
    options = {"budget": 4, "halt": halt, "exit_threshold": threshold, "kv": kv, "window": window}
    steps = list(model.generate(prompt, 6, temperature=0, **options))
    found, confidences = row_of(steps)

    assert found == [(token, loops) for token, loops, _ in expected]
    assert confidences == pytest.approx([q for _, _, q in expected], abs=1e-6)
    if halt in ("confidence", "convergence"):
        assert len({loops for _, loops, _ in expected}) > 1  # else no early exit would be seen


def test_every_stopping_rule_is_compared_with_the_reference():
    assert {halt for halt, _ in STOPPING} == set(RULES)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("window", [None, 4])
def test_fixed_budget_equals_no_cache(T, window):
    model = small(1)
    ids = random_ids(2, T, seed=0)
    options = {"budget": 3, "halt": "none", "temperature": 0, "window": window}
    cached = list(model.generate(ids, 12, **options))
    plain = list(model.generate(ids, 12, use_cache=False, **options))
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.confidence, b.confidence)
    if window is None:  # and the first token is that of forward
        assert torch.equal(cached[0].tokens, model(ids, loops=3)[:, -1].argmax(-1))


@pytest.mark.parametrize("kv", ["latest", "shared"])
@pytest.mark.parametrize("halt", RULES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_in_a_batch_gives_what_it_gives_alone(kv, halt, use_cache):
    model = small(3)
    lengths = [3, 11, 1, 7]
    ids = random_ids(4, 11, seed=4)
    thresholds = {"confidence": 0.5, "cdf": 0.5, "convergence": 8.0}
    options = {
        "budget": 4,
        "halt": halt,
        "exit_threshold": thresholds.get(halt, 0.3),
        "kv": kv,
        "use_cache": use_cache,
        "window": 9,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.95,
    }
    start = list(model.generate(ids[:1, :3], 4, seed=7, **options))
    eos = start[3].tokens.item()  # so row 0 ends by its fourth token
    options["eos_id"] = eos

    together = list(model.generate(ids, 10, lengths=torch.tensor(lengths), seed=7, **options))
    ended = 0
    for r, n in enumerate(lengths):
        alone = list(model.generate(ids[r : r + 1, :n], 10, seed=7 + r, **options))
        after = len(together) - len(alone)  # steps that others went on without this row
        expected, confidences = row_of(alone)
        found, found_confidences = row_of(together, r)
        assert found == expected + [(eos, 0)] * after
        assert found_confidences == pytest.approx(confidences + [0.0] * after, abs=1e-6)
        assert found_confidences[len(alone) :] == [0.0] * after
        ended += after
    assert ended > 0


class Waits(TorchDispatchMode):
    """Notes every operation by which the host waits for one number of the device."""

    WAITING = (
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::masked_select",
    )

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in self.WAITING:
            self.noted.append(function.name())
        return function(*args, **(kwargs or {}))


def note_shapes(layers):
    """-> a list that grows by the (rows, tokens) of every input that these layers get."""
    shapes = []

    def hook(layers, inputs):
        shapes.append(tuple(inputs[0].shape[:2]))

    layers.register_forward_pre_hook(hook)
    return shapes


def test_a_pass_sees_one_token_a_row_and_runs_the_loops_of_its_slowest_row():
    """And the host never asks the device but by tolist."""
    model = small(3)
    ids = random_ids(4, 6, seed=4)
    options = {"exit_threshold": spread(model, ids), "lengths": [3, 6, 1, 5], "budget": 4}
    steps = model.generate(ids, 8, temperature=0, **options)
    encoded = note_shapes(model.encoder.layers)
    looped = note_shapes(model.reasoning.layers)
    with Waits() as waits:
        steps = list(steps)

    assert not waits.noted
    assert encoded == [(4, 6)] + [(4, 1)] * 7
    assert {rows for rows, _ in looped} == {4}
    slowest = [step.loops.max().item() for step in steps]
    assert len(looped) == sum(slowest) < 8 * 4
    assert any(len(set(step.loops.tolist())) > 1 for step in steps)


def test_cache_is_of_the_size_that_is_said_and_refused_before_it_is_made():
    model = small(3)

    def size(depths):
        """Bytes of a cache of 3 rows and 7 columns."""
        cache = Cache(model.config, 3, 7, depths, model.decoder.norm.weight)
        layers = [*cache.encoder, *cache.decoder]
        for b in range(depths):
            layers += cache.loop(b)
        return sum(x.numel() * x.element_size() for c in layers for x in (c.keys, c.values))

    latest = cache_bytes(model.config, 8, torch.float64)
    shared = cache_bytes(model.config, 1, torch.float64)
    assert (size(8), size(1)) == (3 * 7 * latest, 3 * 7 * shared)

    outside = cache_bytes(model.config, 0, torch.float64)  # E and D
    assert shared - outside == (latest - outside) / 8

    with pytest.raises(InputError, match="GB are free"):
        next(model.generate(torch.ones(2, 3).long(), 10**12, window=10**12))


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_decoding_gives_the_same_tokens_and_loops():
    eager = small(3, dtype=torch.float32, num_hidden_layers=3)
    compiled = small(3, dtype=torch.float32, num_hidden_layers=3)
    split_single_token_products(compiled)
    compile_decoding(compiled)
    ids = random_ids(3, 7, seed=2)
    several_rows = {"kv": "shared", "window": 9, "lengths": [2, 7, 5]}
    for rows, options in ((ids[:1], {"kv": "latest"}), (ids, several_rows)):
        options |= {"budget": 4, "exit_threshold": spread(eager, rows), "temperature": 0}
        expected = list(eager.generate(rows, 8, **options))
        found = list(compiled.generate(rows, 8, **options))
        assert len({n for step in expected for n in step.loops.tolist()}) > 1
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.loops, b.loops)
            torch.testing.assert_close(a.confidence, b.confidence)


# ---- drawing, and arguments ----------------------------------------------------------------------


def test_sampling_follows_the_distribution():
    """Draws over many rows of one prompt match softmax(logits / temperature), cut or not."""
    model = small(0, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4]]).repeat(3000, 1)
    logits = 2 * model(ids[:1], loops=1)[0, -1]
    model.decoder.lm_head.weight.data *= 2
    p = (logits / 0.7).softmax(-1)

    def shares(**cut):
        """The share of each token among 3000 draws: (V,)."""
        steps = model.generate(ids, 1, budget=1, temperature=0.7, seed=0, **cut)
        return next(steps).tokens.bincount(minlength=50) / 3000

    assert (shares() - p).abs().sum() < 0.12

    likeliest = p.topk(4).indices
    found = shares(top_k=4)[likeliest]
    assert found.sum() == pytest.approx(1)
    assert (found - p[likeliest] / p[likeliest].sum()).abs().max() < 0.04
    assert torch.equal(shares(top_k=1).argmax(), p.argmax())

    order = p.argsort(descending=True)
    count = (p[order].cumsum(0) < 0.5).sum() + 1  # the fewest tokens that hold half of p
    found = shares(top_p=0.5)[order[:count]]
    assert found.sum() == pytest.approx(1)
    assert (found > 0).all()


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
    arguments = {"ids": torch.ones(2, 3).long(), "max_new_tokens": 2} | change
    with pytest.raises(InputError, match=words):
        small().generate(**arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "phi3", "partial_rotary_factor": 0.6},
        {
            "model_type": "llama",
            "rope_scaling": {
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ],
)
def test_other_rotary_positions_are_cached_as_well(changes):
    model = small(4, **changes)
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    options = {"lengths": [7, 4], "budget": 3, "halt": "none", "temperature": 0}
    cached, plain = (
        list(model.generate(ids, 12, use_cache=use_cache, **options)) for use_cache in (True, False)
    )
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.confidence, b.confidence)

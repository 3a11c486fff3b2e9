"""training_step against straight-line computations, and how weights move.

Gradients that cross loops are in tests/test_horizon.py, the command and its runs in
tests/test_runs.py.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import small
from torch.utils._python_dispatch import TorchDispatchMode

import train
from appendix import chunks
from appendix.fast import checkpoint_activations, compile_layers
from appendix.optim import fp32_masters, learning_rate, update
from loopus import InputError


def random_ids(*shape, seed=5, vocab_size=50):
    """Ids of small()'s vocabulary, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, shape, generator=generator)


def gradients(model):
    """{name: gradient} of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model, expected):
    """Assert that a model's gradients are these, but for the rounding of fp64."""
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def trained_parameters(model):
    """{name: parameter} of all but the encoder."""
    named = model.named_parameters()
    return {name: p for name, p in named if not name.startswith("encoder.")}


# ---- the method ----------------------------------------------------------------------------------


def loop_loss(model, h, targets):
    """L_LM + L_mono + L_Q (eq. 10-13) of one loop from h (1, T, D), for one sequence's targets."""
    before = F.cross_entropy(model.decode(h)[0, :-1], targets).detach()
    h, q_logit = model.loop(h)
    logits = model.decode(h)[0, :-1]
    lm = F.cross_entropy(logits, targets)
    mono = (lm - before) * torch.sigmoid(lm - before)
    right = (logits.argmax(-1) == targets).double().mean()
    q = torch.sigmoid(q_logit[0])
    return lm + mono - (right * q.log() + (1 - right) * (1 - q).log())


def straight_line(model, ids, supervised):
    """The loss of a training step, with nothing shared or reused.

    Every sequence is by itself, and every supervised loop is reached anew from the encoder.
    """
    total = 0
    for row in ids:
        for b in supervised:
            h = model.encode(row[None])
            for _ in range(b):
                h, _ = model.loop(h)
            total = total + loop_loss(model, h.detach(), row[1:])
    return total / len(ids) / len(supervised)


@pytest.mark.parametrize("supervised", [{0}, {1, 2}, {0, 3}, {0, 1, 2, 3}])
def test_gradients_equal_the_straight_line(supervised):
    model = small(2)
    ids = random_ids(3, 9)
    trained = trained_parameters(model)
    loss = straight_line(model, ids, supervised)
    expected = torch.autograd.grad(0.5 * loss, trained.values())

    records = train.training_step(model, ids, 4, supervised, scale=0.5)
    assert_gradients(model, dict(zip(trained, expected, strict=True)))  # and none of the encoder's
    assert [record["loop"] for record in records] == sorted(supervised)
    losses = [record["lm"] + record["mono"] + record["q"] for record in records]
    assert sum(losses) / len(losses) == pytest.approx(loss.item())


def test_targets_say_where_loss_is_taken():
    """The next tokens are the default; with fewer, a sequence's loss is the mean over its own."""
    ids = random_ids(3, 9, seed=8)
    targets = train.next_tokens(ids)
    plain, same, masked = small(2), small(2), small(2)
    train.training_step(plain, ids, 3, {0, 2})
    train.training_step(same, ids, 3, {0, 2}, targets=targets)
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(same)[name])

    targets[0, :6] = -100
    targets[2, 3:] = -100
    (record,) = train.training_step(masked, ids, 1, {0}, targets=targets)

    def losses(logits):
        """The loss of each sequence, target by target."""
        log_p = logits.log_softmax(-1)
        rows = []
        for row in range(3):
            counted = [i for i in range(9) if targets[row, i] >= 0]
            rows.append(sum(-log_p[row, i, targets[row, i]] for i in counted) / len(counted))
        return torch.stack(rows)

    with torch.no_grad():
        h = masked.encode(ids)
        before = losses(masked.decode(h))
        lm = losses(masked.decode(masked.loop(h)[0]))
    rise = lm - before
    assert record["lm"] == pytest.approx(lm.mean().item())
    assert record["mono"] == pytest.approx((rise * rise.sigmoid()).mean().item())


def test_gradients_equal_finite_differences():
    """One number of every trained tensor, moved a little up and down."""
    model = small(4)
    ids = random_ids(2, 6, seed=6)
    targets = train.next_tokens(ids)
    train.training_step(model, ids, 1, {0})
    with torch.no_grad():  # it carries no gradient: what it was at the unmoved weights
        lm_before, _ = train.next_token_loss(model, model.encode(ids), targets)

    @torch.no_grad()
    def loss():
        h, q_logit = model.loop(model.encode(ids))
        lm, right = train.next_token_loss(model, h, targets)
        right = right.double()
        q = F.binary_cross_entropy_with_logits(q_logit, right, reduction="none")
        return (lm + F.silu(lm - lm_before) + q).mean().item()

    generator = torch.Generator().manual_seed(0)
    for name, p in trained_parameters(model).items():
        i = torch.randint(p.numel(), (), generator=generator).item()
        numbers = p.data.view(-1)
        original = numbers[i].item()
        step = 1e-5
        numbers[i] = original + step
        up = loss()
        numbers[i] = original - step
        down = loss()
        numbers[i] = original
        slope = (up - down) / (2 * step)
        assert p.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_accumulation_two_times_one_equals_one_times_two():
    ids = random_ids(2, 9)
    whole, halves = small(2), small(2)
    train.training_step(whole, ids, 4, {0, 2})
    for row in ids:
        train.training_step(halves, row[None], 4, {0, 2}, scale=0.5)
    assert_gradients(halves, gradients(whole))


def test_gradient_never_crosses_a_loop():
    """Two supervised loops give the mean of what each gives alone: none flows between them."""
    ids = random_ids(1, 9)
    first, second, both = small(2), small(2), small(2)
    train.training_step(first, ids, 2, {0})
    train.training_step(second, ids, 2, {1})
    train.training_step(both, ids, 2, {0, 1})
    of_first, of_second = gradients(first), gradients(second)
    mean = {name: (of_first[name] + of_second[name]) / 2 for name in of_first}
    assert_gradients(both, mean)


@pytest.mark.parametrize("supervised", [set(), {4}, {-1}])
def test_supervised_loops_out_of_range(supervised):
    with pytest.raises(InputError, match="supervised"):
        train.training_step(small(), torch.ones(1, 4).long(), 4, supervised)


# ---- how weights move ----------------------------------------------------------------------------


def test_fp32_masters_collect_the_gradients_of_a_bf16_model():
    exact, model = small(2, dtype=torch.float32), small(2, dtype=torch.float32)
    ids = random_ids(2, 9)
    pairs = fp32_masters(model, torch.bfloat16)
    train.training_step(exact, ids, 4, {0, 2})
    train.training_step(model, ids, 4, {0, 2})

    expected = trained_parameters(exact)
    assert list(pairs) == list(expected)
    for name, (p, master) in pairs.items():
        assert master.dtype == torch.float32
        assert master.grad.dtype == torch.float32
        added = name.startswith(("reasoning.gate", "q_head"))  # these are fp32 themselves
        assert (p is master) == added
        assert added or p.dtype == torch.bfloat16
        gradient = expected[name].grad
        assert (master.grad - gradient).norm() < 0.1 * gradient.norm() + 1e-6, name
    assert not any(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_clipping_acts_on_the_mean_gradient_of_an_optimizer_step(max_norm):
    """Two halves of a batch accumulated, then a step of plain descent of length 1.

    The norm is that of the whole batch's mean gradient, and the step is that gradient, clipped.
    """
    model = small(2, dtype=torch.float32)
    ids = random_ids(2, 9)
    trained = list(trained_parameters(model).values())
    gradient = torch.autograd.grad(straight_line(model, ids, {0, 2}), trained)
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    share = min(1, max_norm / norm)
    expected = [p.detach() - share * g for p, g in zip(trained, gradient, strict=True)]

    pairs = fp32_masters(model, torch.float32)
    optimizer = torch.optim.SGD([master for _, master in pairs.values()], lr=1.0)
    for row in ids:
        train.training_step(model, row[None], 4, {0, 2}, scale=0.5)
    assert update(pairs, optimizer, max_norm) == pytest.approx(norm, rel=1e-5)
    for p, moved in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.detach(), moved, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_learning_rate_warms_up_and_follows_one_cosine():
    rates = [learning_rate(step, 1000, 2.0, 300) for step in range(1000)]
    warmup, cosine = rates[:100], rates[100:]  # 300 is cut to a tenth of the steps
    assert warmup[0] == pytest.approx(0.02)
    assert warmup[-1] == 2.0
    assert warmup == sorted(warmup)
    assert cosine[0] == 2.0
    assert cosine[450] == pytest.approx(1.0)
    assert cosine[-1] == pytest.approx(0, abs=1e-5)
    assert cosine == sorted(cosine, reverse=True)

    assert learning_rate(0, 1, 2.0, 300) == 2.0
    assert learning_rate(0, 100, 2.0, 0) == 2.0


# ---- memory --------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Notes how many numbers every tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.noted.append(x.numel())
        return made


def test_logits_are_made_a_chunk_at_a_time_and_memory_does_not_grow_with_loops(monkeypatch):
    """In chunks the gradients are the same, and no tensor of a step is larger than a chunk's."""
    ids = random_ids(4, 32, vocab_size=5000)
    whole, parts = small(2, vocab_size=5000), small(2, vocab_size=5000)
    train.training_step(whole, ids, 4, {0, 2})
    monkeypatch.setitem(chunks.LOGITS, "cpu", 10 * 5000)
    with Sizes() as sizes:
        train.training_step(parts, ids, 4, {0, 2})
    assert max(sizes.noted) == 5000 * 32  # the head's own weight; all logits are 4 x 32 x 5000
    assert_gradients(parts, gradients(whole))


def kept_for_the_gradient(model):
    """-> how many numbers autograd keeps for a supervised loop, and the gradients of a step."""
    sizes = {}

    def keep(x):
        sizes[x.data_ptr()] = x.numel()
        return x

    def give_back(x):
        return x

    ids = random_ids(2, 30)
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        model.loop(model.encode(ids).detach())
    train.training_step(model, ids, 3, {1})
    return sum(sizes.values()), gradients(model)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_layers_save_less_and_give_the_same_gradients():
    plain, compiled = small(2), small(2)
    compile_layers(compiled)
    kept, expected = kept_for_the_gradient(plain)
    kept_compiled, _ = kept_for_the_gradient(compiled)
    assert kept_compiled < 0.8 * kept
    assert_gradients(compiled, expected)


def test_checkpointed_layers_save_less_and_give_the_same_gradients():
    plain, checkpointed = small(2), small(2)
    checkpoint_activations(checkpointed)
    kept, expected = kept_for_the_gradient(plain)
    kept_checkpointed, found = kept_for_the_gradient(checkpointed)
    assert kept_checkpointed < 0.5 * kept
    for name in expected:
        assert torch.equal(found[name], expected[name])


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, data", [("stories15m", train.STORIES), ("tinyllama", train.FINEWEB), ("tiny", None)]
)
def test_a_preset_brings_its_text(model, data, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--model", model])
    assert train.parse_args().data == data


# ---- the exit threshold --------------------------------------------------------------------------


def outcome(losses, confidences, threshold):
    """Mean loops and mean loss where each token stops once its q reaches the threshold."""
    loops = []
    for q in confidences.T.tolist():
        enough = [b for b, x in enumerate(q) if x >= threshold]
        loops.append(min([*enough, len(q) - 1]) + 1)
    loss = [losses[n - 1, i].item() for i, n in enumerate(loops)]
    return sum(loops) / len(loops), sum(loss) / len(loss)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_needs_the_fewest_loops_of_all_that_cost_little(seed):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(4, 60, generator=generator).sort(0).values
    noise = 0.02 * torch.rand(4, 60, generator=generator)
    losses = (1 - confidences) * 0.1 + noise
    threshold, loops, loss = train.find_threshold(losses, confidences)
    assert (loops, loss) == pytest.approx(outcome(losses, confidences, threshold))

    every = [outcome(losses, confidences, t) for t in [*confidences.flatten().tolist(), 1.0]]
    best = min(loss for _, loss in every)
    assert loss <= best + train.COST
    assert loops == pytest.approx(min(n for n, loss in every if loss <= best + train.COST))


def test_a_head_that_knows_which_tokens_are_done_saves_their_loops():
    """Half of the tokens are as good after one loop; the other half need four."""
    losses = torch.full((4, 100), 1.0)
    losses[3] = 0.1
    losses[:, :50] = 0.1
    confidences = torch.where(losses < 0.5, 0.8, 0.3)
    threshold, loops, loss = train.find_threshold(losses, confidences)
    assert 0.3 < threshold <= 0.8 + 1e-6
    assert loops == 2.5
    assert loss == pytest.approx(0.1)


def test_loops_that_bring_nothing_are_left_out_whatever_the_head_says():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(100, generator=generator).expand(4, 100)
    confidences = torch.rand(4, 100, generator=generator)
    _, loops, _ = train.find_threshold(losses, confidences)
    assert loops == 1


def test_what_is_followed_is_what_generation_meets():
    """Loss and q of the last token, with a fixed budget, as generate finds them."""
    model, ids = small(3), torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    targets = train.next_tokens(ids)
    targets[:, -1] = 5
    losses, confidences = train.losses_and_confidences(model, ids, targets, 4)
    assert losses.shape == confidences.shape == (4, 3 * 7)
    for b in range(4):
        step = next(model.generate(ids, 1, budget=b + 1, halt="none", temperature=0))
        torch.testing.assert_close(confidences[b].view(3, 7)[:, -1], step.confidence)
        expected = F.cross_entropy(model(ids, loops=b + 1)[:, -1], targets[:, -1], reduction="none")
        torch.testing.assert_close(losses[b].view(3, 7)[:, -1].double(), expected)

"""Gradients that cross loops: training_step with a horizon against computations that know nothing
of it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small

import train
from loopus import InputError

LOOPS = 6


def prompt(rows=2):
    return torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(5))


def trained(model):
    return {n: p for n, p in model.named_parameters() if not n.startswith("encoder.")}


def losses_of(model, h, q_logit, before, ids):
    """L_LM + L_mono + L_Q of each row, written out with the whole logits."""
    total = 0
    for row in range(len(ids)):
        logits = model.decode(h)[row, :-1]
        lm = F.cross_entropy(logits, ids[row, 1:])
        lm_before = F.cross_entropy(model.decode(before)[row, :-1], ids[row, 1:]).detach()
        right = (logits.argmax(-1) == ids[row, 1:]).double().mean()
        q = torch.sigmoid(q_logit[row])
        step = lm - lm_before
        total = total + lm + step * torch.sigmoid(step)
        total = total - right * q.log() - (1 - right) * (1 - q).log()
    return total / len(ids)


def states(model, ids):
    """h⁰ … hᴮ, without gradient."""
    with torch.no_grad():
        found = [model.encode(ids)]
        for _ in range(LOOPS):
            found.append(model.loop(found[-1])[0])
    return found


def straight_line(model, ids, supervised, horizon):
    """For each supervised loop: begin at a constant state `horizon` loops earlier, or right behind
    the supervised loop before, and run on to the loss with everything attached."""
    fixed = states(model, ids)
    total = 0
    last = -1
    for s in sorted(supervised):
        first = max(s - horizon + 1, last + 1)
        h = fixed[first]
        for _ in range(first, s + 1):
            h, q_logit = model.loop(h)
        total = total + losses_of(model, h, q_logit, fixed[s], ids)
        last = s
    return total / len(supervised)


@pytest.mark.parametrize("horizon", [1, 2, 3, 100])
@pytest.mark.parametrize("supervised", [{0}, {3}, {1, 2, 5}, {0, 4}])
def test_gradients_with_a_horizon_equal_the_straight_line(supervised, horizon):
    model, ids = small(2), prompt()
    loss = straight_line(model, ids, supervised, horizon)
    expected = torch.autograd.grad(loss, trained(model).values())
    records = train.training_step(model, ids, LOOPS, supervised, scale=0.5, horizon=horizon)
    for (name, p), g in zip(trained(model).items(), expected, strict=True):
        torch.testing.assert_close(p.grad, 0.5 * g, rtol=1e-9, atol=1e-12, msg=name)
    assert all(p.grad is None for p in model.encoder.parameters())
    mean = sum(r["lm"] + r["mono"] + r["q"] for r in records) / len(records)
    assert mean == pytest.approx(loss.item())


def test_gradients_with_a_horizon_equal_finite_differences():
    """Loop 3 with a horizon of 2: h² is a constant, everything behind it moves."""
    model, ids = small(4), prompt()
    train.training_step(model, ids, LOOPS, {3}, horizon=2)
    fixed = states(model, ids)

    def loss():
        with torch.no_grad():
            h, _ = model.loop(fixed[2])
            h, q_logit = model.loop(h)
            lm, right = train.next_token_loss(model, h, train.next_tokens(ids))
            right = right.to(q_logit.dtype)
            q = F.binary_cross_entropy_with_logits(q_logit, right, reduction="none")
            return (lm + F.silu(lm - before) + q).mean().item()

    with torch.no_grad():  # of the unmoved weights, since it carries no gradient
        before, _ = train.next_token_loss(model, fixed[3], train.next_tokens(ids))
    generator = torch.Generator().manual_seed(0)
    for name, p in trained(model).items():
        i = torch.randint(p.numel(), (), generator=generator).item()
        flat, eps = p.data.view(-1), 1e-5
        flat[i] += eps
        up = loss()
        flat[i] -= 2 * eps
        down = loss()
        flat[i] += eps
        slope = (up - down) / (2 * eps)
        assert p.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_a_horizon_of_one_is_the_default_to_the_last_bit():
    a, b = small(2), small(2)
    train.training_step(a, prompt(), LOOPS, {1, 2, 5})
    train.training_step(b, prompt(), LOOPS, {1, 2, 5}, horizon=1)
    for (name, p), other in zip(trained(a).items(), trained(b).values(), strict=True):
        assert torch.equal(p.grad, other.grad), name


def test_accumulation_is_exact_with_a_horizon():
    whole, parts, ids = small(2), small(2), prompt(rows=2)
    train.training_step(whole, ids, LOOPS, {2, 5}, horizon=3)
    for row in ids:
        train.training_step(parts, row[None], LOOPS, {2, 5}, scale=0.5, horizon=3)
    for (name, p), other in zip(trained(whole).items(), trained(parts).values(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_what_a_step_keeps_grows_with_the_horizon_and_not_with_the_loops():
    """Numbers that autograd keeps, counted as they are packed and unpacked."""

    def most_kept(loops, horizon):
        model, ids = small(2), prompt()
        kept = {"now": 0, "most": 0}

        class Packed:
            """A tensor that autograd keeps, counted as long as it lives."""

            def __init__(self, x):
                self.x = x
                kept["now"] += x.numel()
                kept["most"] = max(kept["most"], kept["now"])

            def __del__(self):
                kept["now"] -= self.x.numel()

        def unpack(packed):
            return packed.x

        with torch.autograd.graph.saved_tensors_hooks(Packed, unpack):
            train.training_step(model, ids, loops, {loops - 1}, horizon=horizon)
        return kept["most"]

    one, four = most_kept(6, 1), most_kept(6, 4)
    assert one < four < 4.5 * one
    assert most_kept(20, 4) == four
    assert most_kept(20, 1) == one


def test_a_horizon_of_nothing_is_refused():
    with pytest.raises(InputError, match="horizon 0"):
        train.training_step(small(2), prompt(), LOOPS, {2}, horizon=0)

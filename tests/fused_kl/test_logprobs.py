"""Losses of sampled tokens against the dense definitions in fp64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_kl import (
    gradients,
    head,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    reference,
)


def leaves_of(tensors):
    leaves = (tensors.student_hidden, tensors.student_lm_head, tensors.student_bias)
    return [leaf for leaf in leaves if leaf is not None]


def allowed_ids(tensors):
    columns = tensors.allowed_columns.nonzero().squeeze(-1)
    return columns[tensors.token_ids % len(columns)]


def compare(function, tensors, token_ids, chunk_size=5, **options):
    """Every output and gradient of a loss, fused and dense."""
    args = (tensors.student_hidden, tensors.student_lm_head, token_ids)
    options["bias"] = tensors.student_bias
    out = globals()[function](*args, chunk_size=chunk_size, **options)
    loss, *details = getattr(reference, function)(*args, **options)
    leaves = leaves_of(tensors)
    assert_close(out.loss, loss)
    assert_close(out.logprobs, details[0].detach())
    assert_close(out.entropy, details[1].detach())
    gradients = torch.autograd.grad(out.loss * 0.7, leaves)
    for fused, dense in zip(gradients, torch.autograd.grad(loss * 0.7, leaves), strict=True):
        assert_close(fused, dense, rtol=1e-9, atol=1e-11)
    return out, gradients


@pytest.mark.parametrize("num_rows", [1, 13])
@pytest.mark.parametrize("logit_std", [1.0, 30.0])
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize("chunk_size", [5, "auto"])
def test_logprobs(case, num_rows, logit_std, banned, chunk_size):
    tensors = case.build(num_rows=num_rows, logit_std=logit_std, bias=True)
    args = (tensors.student_hidden, tensors.student_lm_head, allowed_ids(tensors).int())
    options: dict[str, Any] = dict(temperature=0.7, bias=tensors.student_bias)
    if banned:
        options["allowed_columns"] = tensors.allowed_columns
    out = linear_logprobs(*args, chunk_size=chunk_size, **options)
    logprobs, entropy = reference.linear_logprobs(*args, **options)
    assert_close(out.logprobs, logprobs)
    assert_close(out.entropy, entropy.detach())
    assert not out.entropy.requires_grad
    leaves = leaves_of(tensors)
    gradients = torch.autograd.grad(out.logprobs @ tensors.advantages.double(), leaves)
    expected = torch.autograd.grad(logprobs @ tensors.advantages.double(), leaves)
    for fused, dense in zip(gradients, expected, strict=True):
        assert_close(fused, dense, rtol=1e-9, atol=1e-11)


@pytest.fixture
def multiplied(monkeypatch):
    """N x V x H of every product, as it is made."""
    sizes = []
    original = head.product_

    def product_(out, a, b, **options):
        sizes.append(out.numel() * a.shape[1])
        original(out, a, b, **options)

    for module in (head, gradients):
        monkeypatch.setattr(module, "product_", product_)
    return sizes


# What is trained, rows at once, products of N x V x H in forward and in backward.
HIDDEN, HEAD, BIAS = range(3)
WORK = [
    ((HIDDEN, HEAD), "auto", 2, 1),
    ((HEAD,), "auto", 1, 1),
    ((HIDDEN,), "auto", 2, 0),
    ((HIDDEN,), 5, 2, 0),
    ((HIDDEN, HEAD), 5, 1, 3),
    ((HIDDEN, HEAD, BIAS), "auto", 1, 3),
    ((), "auto", 1, 0),
]


@pytest.mark.parametrize(("trained", "chunk_size", "forward", "backward"), WORK)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logprobs_make_what_backward_needs_once(
    case, multiplied, trained, chunk_size, forward, backward, softcap
):
    tensors = case.build(num_rows=13, bias=True)
    leaves = leaves_of(tensors)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number in trained)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    args = (tensors.student_hidden, tensors.student_lm_head, allowed_ids(tensors))
    options: dict[str, Any] = dict(
        bias=tensors.student_bias, softcap=softcap, allowed_columns=tensors.allowed_columns
    )

    product = args[0].numel() * len(args[1])
    logprobs = linear_logprobs(*args, chunk_size=chunk_size, **options).logprobs
    assert sum(multiplied) == forward * product
    expected, _ = reference.linear_logprobs(*args, **options)
    assert_close(logprobs.detach(), expected.detach())
    if not leaves:
        return
    torch.autograd.grad(logprobs.sum(), leaves, retain_graph=True)
    assert sum(multiplied) == (forward + backward) * product
    # Again, with other factors, some of them 0.
    weights = tensors.advantages.double() * (torch.arange(13) % 3)
    fused = torch.autograd.grad(logprobs @ weights, leaves)
    for actual, right in zip(fused, torch.autograd.grad(expected @ weights, leaves), strict=True):
        assert_close(actual, right, rtol=1e-9, atol=1e-11)


def test_more_rows_than_the_head_has_columns_are_recomputed(case, multiplied):
    """Their gradient would be larger than the head's."""
    for num_rows, kept in ((16, True), (17, False)):
        tensors = case.build(num_rows=num_rows, student_size=16)
        args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
        multiplied.clear()
        linear_logprobs(*args).logprobs.sum().backward()
        assert sum(multiplied) == (3 if kept else 4) * args[0].numel() * len(args[1])


@pytest.mark.parametrize("chunk_size", [2, "auto"])
@pytest.mark.parametrize("bias", [True, False])
def test_logprobs_gradcheck_and_a_second_backward(case, chunk_size, bias):
    tensors = case.build(num_rows=3, vocab=11, student_size=4, logit_std=1.0, bias=bias)

    def logprobs(hidden, lm_head, bias=None):
        ids = tensors.token_ids
        return linear_logprobs(hidden, lm_head, ids, bias=bias, chunk_size=chunk_size).logprobs

    assert torch.autograd.gradcheck(logprobs, leaves_of(tensors))


def test_large_vocabulary(case):
    tensors = case.build(num_rows=3, vocab=129_920, student_size=4)
    compare("linear_cross_entropy", tensors, tensors.token_ids)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [False, True])
def test_policy_loss(case, old, clip, weighted, penalty):
    tensors = case.build(num_rows=40, bias=True)
    ids = allowed_ids(tensors)
    options: dict[str, Any] = dict(allowed_columns=tensors.allowed_columns, temperature=1.3)
    if old:
        args = (tensors.student_hidden, tensors.student_lm_head, ids)
        now = reference.linear_logprobs(*args, bias=tensors.student_bias, **options)[0].detach()
        # Both sides of the interval, with both signs of the advantage.
        options["old_logprobs"] = now + 0.4 * torch.randn(40, dtype=torch.float64)
    if weighted:
        options["token_weights"] = tensors.token_weights
    if penalty:
        options["kl_coef"] = 0.3
        options["reference_logprobs"] = -tensors.token_weights
    compare("linear_policy_loss", tensors, ids, advantages=tensors.advantages, clip=clip, **options)


@pytest.mark.parametrize("logit_std", [1.0, 30.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_size", [5, "auto"])
def test_entropy_bonus(case, multiplied, logit_std, softcap, chunk_size):
    tensors = case.build(logit_std=logit_std, bias=True)
    weights = tensors.token_weights.double()
    weights[[2, 7]] = 0
    args = (tensors.student_hidden, tensors.student_lm_head, allowed_ids(tensors))
    options: dict[str, Any] = dict(
        advantages=tensors.advantages,
        token_weights=weights,
        entropy_coef=0.7,
        allowed_columns=tensors.allowed_columns,
        temperature=1.3,
        bias=tensors.student_bias,
        softcap=softcap,
        logit_scale=0.8,
    )
    out = linear_policy_loss(*args, chunk_size=chunk_size, **options)
    assert sum(multiplied) == 3 * args[0].numel() * len(args[1]), "products of N x V x H"
    with torch.no_grad():
        alone = linear_policy_loss(*args, chunk_size=chunk_size, **options)
        plain = linear_policy_loss(*args, **options | dict(entropy_coef=0.0))
    bonus = 0.7 * (weights * plain.entropy).sum()
    assert_close(plain.loss - bonus, out.loss.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(alone.loss, out.loss)
    loss, *_ = reference.linear_policy_loss(*args, **options)
    assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    leaves = leaves_of(tensors)
    exact = torch.autograd.grad(loss, leaves)
    for fused, dense in zip(torch.autograd.grad(out.loss, leaves), exact, strict=True):
        assert (fused - dense).norm() <= 1e-12 * dense.norm()


def test_entropy_bonus_of_two_columns():
    """p = (3/4, 1/4), for which dH/ds_0 = -p_0 p_1 log(p_0 / p_1) / temperature."""
    log_3 = torch.tensor(3.0, dtype=torch.float64).log()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    lm_head = torch.stack([2 * log_3, 0 * log_3])[:, None].requires_grad_()
    out = linear_policy_loss(
        hidden,
        lm_head,
        torch.tensor([0]),
        advantages=torch.zeros(1),
        token_weights=torch.tensor([0.5]),
        entropy_coef=0.1,
        temperature=2.0,
    )
    assert_close(out.loss.item(), -0.5 * 0.1 * 0.5623351446188083)
    out.loss.backward()
    slope = 0.5 * 0.1 * 3 / 16 * log_3 / 2
    assert lm_head.grad is not None
    assert_close(lm_head.grad[:, 0], torch.stack([slope, -slope]))


class Repeatable(torch.autograd.Function):
    """A policy loss that is computed again in each backward, which gradcheck repeats."""

    @staticmethod
    def forward(ctx, loss, *leaves):
        ctx.loss, ctx.leaves = loss, [leaf.detach().requires_grad_() for leaf in leaves]
        return loss(*leaves).detach()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.loss(*ctx.leaves) * grad, ctx.leaves)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_entropy_bonus_gradcheck(case, softcap):
    tensors = case.build(num_rows=3, vocab=11, student_size=4, logit_std=1.0, bias=True)

    def loss(hidden, lm_head, bias):
        return linear_policy_loss(
            hidden,
            lm_head,
            allowed_ids(tensors),
            advantages=tensors.advantages,
            old_logprobs=torch.full((3,), -2.0),
            token_weights=tensors.token_weights,
            entropy_coef=0.6,
            allowed_columns=tensors.allowed_columns,
            temperature=0.7,
            bias=bias,
            softcap=softcap,
            chunk_size=2,
        ).loss

    assert torch.autograd.gradcheck(partial(Repeatable.apply, loss), leaves_of(tensors))


def test_a_banned_token_keeps_the_entropy_bonus_of_its_row(case):
    tensors = case.build()
    allowed = torch.ones(1187, dtype=torch.bool)
    allowed[tensors.token_ids] = False
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    rules: dict[str, Any] = dict(allowed_columns=allowed, temperature=0.7)
    advantages = torch.ones(13)
    out = linear_policy_loss(*args, advantages=advantages, entropy_coef=0.5, **rules)
    _, entropy = reference.linear_logprobs(*args, **rules)
    exact = torch.autograd.grad(-0.5 * entropy.sum(), args[:2])
    for fused, dense in zip(torch.autograd.grad(out.loss, args[:2]), exact, strict=True):
        assert (fused - dense).norm() <= 1e-12 * dense.norm()


def test_clip_stops_the_gradient_only_where_it_makes_the_loss_worse(case):
    tensors = case.build(num_rows=4)
    ids = tensors.token_ids
    now = linear_logprobs(tensors.student_hidden, tensors.student_lm_head, ids).logprobs.detach()
    # rho:                 2     2    1/2   1/2
    old = now - torch.tensor([2.0, 2.0, 0.5, 0.5]).double().log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    _, (hidden_grad, _) = compare(
        "linear_policy_loss", tensors, ids, advantages=advantages, old_logprobs=old, clip=0.2
    )
    assert ((hidden_grad != 0).any(-1)).tolist() == [False, True, True, False]


def test_without_old_logprobs_the_value_is_minus_the_weighted_advantages(case):
    tensors = case.build()
    out = linear_policy_loss(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.token_ids,
        advantages=tensors.advantages,
        token_weights=tensors.token_weights,
    )
    assert_close(out.loss, -(tensors.token_weights * tensors.advantages).sum().double())


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(case, weighted):
    tensors = case.build(bias=True)
    options: dict[str, Any] = dict(token_weights=tensors.token_weights) if weighted else {}
    compare("linear_cross_entropy", tensors, tensors.token_ids, temperature=0.7, **options)


def test_cross_entropy_has_the_gradient_of_the_policy_loss_at_advantage_one(case):
    tensors = case.build()
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    entropy_loss = linear_cross_entropy(*args).loss
    policy_loss = linear_policy_loss(*args, advantages=torch.ones(13)).loss
    for left, right in zip(
        torch.autograd.grad(entropy_loss, args[:2]),
        torch.autograd.grad(policy_loss, args[:2]),
        strict=True,
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("function", [linear_policy_loss, linear_cross_entropy])
def test_masked_rows_may_hold_anything(case, function):
    tensors = case.build(bias=True)
    weights = torch.ones(13)
    weights[[0, 6, 12]] = 0
    bad = weights == 0
    extra: dict[str, Any] = {}
    if function is linear_policy_loss:
        extra = dict(advantages=tensors.advantages, old_logprobs=torch.full((13,), -7.0), clip=0.2)
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    options: dict[str, Any] = dict(bias=tensors.student_bias, token_weights=weights, chunk_size=5)
    leaves = leaves_of(tensors)
    expected = function(*args, **options, **extra)
    expected_gradients = torch.autograd.grad(expected.loss, leaves)
    with torch.no_grad():
        tensors.student_hidden[bad] = torch.nan
        tensors.token_ids[bad] = -100
        for name in extra.keys() - {"clip"}:
            extra[name][bad] = torch.nan
    out = function(*args, **options, **extra)
    assert torch.equal(out.loss, expected.loss)
    assert (out.logprobs[bad] == 0).all()
    assert (out.entropy[bad] == 0).all()
    for gradient, wanted in zip(
        torch.autograd.grad(out.loss, leaves), expected_gradients, strict=True
    ):
        assert torch.equal(gradient, wanted)


def test_a_banned_token_is_minus_inf_and_moves_nothing(case):
    tensors = case.build()
    allowed = torch.ones(1187, dtype=torch.bool)
    allowed[tensors.token_ids[3]] = False
    tensors.token_ids[5] = (tensors.token_ids[3] + 1) % 1187
    others = tensors.token_ids != tensors.token_ids[3]
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    masked = linear_cross_entropy(*args, allowed_columns=allowed, token_weights=others)
    wanted = torch.autograd.grad(masked.loss, args[:2])

    out = linear_logprobs(*args, allowed_columns=allowed)
    assert out.logprobs[~others].tolist() == [-torch.inf] * int((~others).sum())
    assert out.entropy.isfinite().all()
    losses = {
        "logprobs": -out.logprobs.sum(),
        "cross entropy": linear_cross_entropy(*args, allowed_columns=allowed).loss,
        "policy": linear_policy_loss(
            *args, advantages=torch.ones(13), allowed_columns=allowed
        ).loss,
        "ratio": linear_policy_loss(
            *args,
            advantages=torch.ones(13),
            old_logprobs=out.logprobs.detach(),
            allowed_columns=allowed,
        ).loss,
    }
    assert losses["cross entropy"] == torch.inf
    # The banned tokens have ratio 0, although log p - old is -inf + inf.
    assert_close(losses["ratio"].item(), -float(others.sum()))
    for loss in losses.values():
        for gradient, expected in zip(torch.autograd.grad(loss, args[:2]), wanted, strict=True):
            assert_close(gradient, expected)


@pytest.mark.parametrize("chunk_size", [5, "auto"])
def test_rows_that_the_loss_ignores_may_hold_nan(case, chunk_size):
    tensors = case.build()
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    with torch.no_grad():
        tensors.student_hidden[4] = torch.nan
    out = linear_logprobs(*args, chunk_size=chunk_size)
    assert out.logprobs.isnan().nonzero().tolist() == [[4]]
    assert out.entropy.isnan().nonzero().tolist() == [[4]]
    out.logprobs[:4].sum().backward(retain_graph=True)
    assert tensors.student_lm_head.grad.isfinite().all()
    assert (tensors.student_hidden.grad[4:] == 0).all()
    out.logprobs[4].backward()  # and one that it does not ignore is told
    assert tensors.student_lm_head.grad.isnan().any()
    assert tensors.student_hidden.grad[4].isnan().all()


def test_no_tokens(case):
    tensors = case.build(num_rows=0)
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    for loss in (
        linear_logprobs(*args).logprobs.sum(),
        linear_policy_loss(*args, advantages=torch.empty(0)).loss,
        linear_cross_entropy(*args).loss,
    ):
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, args[:2])
        assert [g.shape for g in gradients] == [(0, 16), (1187, 16)]
        assert (gradients[1] == 0).all()


def test_a_near_certain_token_keeps_its_gradient():
    """1 - p of a token at p = 1 - 2e-9 is 0 in fp32; the gradient must not be."""
    hidden = torch.ones(1, 1, requires_grad=True)
    lm_head = torch.tensor([[20.0], [0.0]])
    linear_cross_entropy(hidden, lm_head, torch.tensor([0])).loss.backward()
    assert hidden.grad is not None
    assert_close(hidden.grad.item(), -20 * 2.061e-9, rtol=1e-3, atol=0)


def test_policy_loss_hands_its_gradients_over_once(case):
    tensors = case.build()
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    loss = linear_policy_loss(*args, advantages=tensors.advantages).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^second backward through a fused loss: "):
        loss.backward()

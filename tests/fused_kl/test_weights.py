"""`token_weights` mean the same in every loss: factors of each token's loss and gradient.

A trainer that puts 1/denominator in them needs no pass over the head's gradient in backward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kl import (
    linear_cross_entropy,
    linear_policy_loss,
    linear_reverse_kl,
    reference,
    reverse_kl,
    topk_reverse_kl,
)

F32, F64 = torch.float32, torch.float64
N = 13
MASKED = [0, 6, 12]
LEAVES = ("student_hidden", "student_lm_head", "student_bias")
SIDES = ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head")
DETAILS = ("token_kl", "student_entropy", "teacher_entropy", "student_logprobs")
TOKEN_DETAILS = ("logprobs", "entropy")


def sides(tensors) -> list[Tensor]:
    return [getattr(tensors, name) for name in SIDES]


def biases(tensors) -> dict[str, Any]:
    return dict(student_bias=tensors.student_bias, teacher_bias=tensors.teacher_bias)


def divergence(function: Callable, **options: Any) -> tuple[Callable, Callable]:
    """A divergence, and its definition: loss and what has the loss's gradient."""

    def fused(tensors, weights):
        return function(
            *sides(tensors),
            **biases(tensors),
            **options,
            token_ids=tensors.token_ids,
            token_weights=weights,
        )

    def dense(tensors, weights):
        rules = {k: v for k, v in options.items() if k in ("beta", "k", "support", "tail")}
        loss, *_ = reference.linear_reverse_kl(
            *sides(tensors), **biases(tensors), **rules, token_weights=weights
        )
        return loss, loss

    return fused, dense


def sampled(tensors, weights):
    return reference.sampled_reverse_kl(
        *sides(tensors), tensors.token_ids, **biases(tensors), token_weights=weights
    )


def token_loss(function: Callable, constants: tuple[str, ...] = (), **options: Any):
    """A loss of sampled tokens, and its definition."""

    def arguments(tensors, weights) -> tuple[tuple, dict[str, Any]]:
        values: dict[str, Any] = {constant: getattr(tensors, constant) for constant in constants}
        tensors_of_student = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
        return tensors_of_student, values | options | dict(
            bias=tensors.student_bias, token_weights=weights
        )

    def fused(tensors, weights):
        positional, named = arguments(tensors, weights)
        return function(*positional, **named)

    def dense(tensors, weights):
        positional, named = arguments(tensors, weights)
        loss, *_ = getattr(reference, function.__name__)(*positional, **named)
        return loss, loss

    return fused, dense


PAST = ("advantages", "old_logprobs")
LOSSES = {
    "reverse": divergence(linear_reverse_kl),
    "forward": divergence(linear_reverse_kl, beta=0.0),
    "jsd": divergence(linear_reverse_kl, beta=0.3),
    "chunks": divergence(linear_reverse_kl, chunk_size=5),
    "lowmem": divergence(linear_reverse_kl, mode="lowmem"),
    "lowmem jsd": divergence(linear_reverse_kl, mode="lowmem", beta=0.3),
    "sampled": (divergence(linear_reverse_kl, estimator="sampled")[0], sampled),
    "topk": divergence(topk_reverse_kl, k=7),
    "topk tail": divergence(topk_reverse_kl, k=7, support="student", tail=True),
    "policy": token_loss(linear_policy_loss, ("advantages",)),
    "clip": token_loss(linear_policy_loss, PAST, clip=0.2),
    "penalty": token_loss(linear_policy_loss, (*PAST, "reference_logprobs"), clip=0.2, kl_coef=0.3),
    "bonus": token_loss(linear_policy_loss, PAST, clip=0.2, entropy_coef=0.3),
    "cross entropy": token_loss(linear_cross_entropy),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def build(case, **changes):
    tensors = case.build(num_rows=N, bias=True, **changes)
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    now, _ = reference.linear_logprobs(*args, bias=tensors.student_bias)
    noise = torch.randn(2, N, generator=torch.Generator().manual_seed(5), dtype=F64)
    tensors.old_logprobs, tensors.reference_logprobs = now.detach() + 0.4 * noise
    return tensors


def details_of(out) -> list[Tensor]:
    names = DETAILS if hasattr(out, "token_kl") else TOKEN_DETAILS
    return [getattr(out, name) for name in names]


def gradients_of(loss: Tensor, tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [getattr(tensors, name) for name in LEAVES])


@every_loss
def test_weights_scale_the_loss_and_its_gradients_and_nothing_else(case, loss):
    fused, dense = LOSSES[loss]
    tensors = build(case)
    weights = tensors.token_weights.masked_fill(torch.arange(N) == 4, -2.0)
    out = fused(tensors, weights)
    value, surrogate = dense(tensors, weights)
    assert_close(out.loss.detach(), value.detach())
    actual = gradients_of(out.loss, tensors)
    for gradient, exact in zip(actual, gradients_of(surrogate, tensors), strict=True):
        assert_close(gradient, exact, rtol=1e-9, atol=1e-11)
    for detail, plain in zip(
        details_of(out), details_of(fused(tensors, torch.ones(N))), strict=True
    ):
        assert not detail.requires_grad
        assert torch.equal(detail, plain)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bool, F32, F64], ids=str)
def test_a_masked_token_may_hold_anything(case, loss, dtype):
    fused, dense = LOSSES[loss]
    tensors = build(case)
    weights = torch.ones(N)
    weights[MASKED] = 0
    value, surrogate = dense(tensors, weights)
    exact = gradients_of(surrogate, tensors)
    with torch.no_grad():
        tensors.student_hidden[MASKED] = torch.nan
        tensors.teacher_hidden[MASKED] = torch.inf
    tensors.token_ids[MASKED] = -100
    for name in (*PAST, "reference_logprobs"):
        getattr(tensors, name)[MASKED] = torch.nan
    out = fused(tensors, weights.to(dtype))
    assert_close(out.loss.detach(), value.detach())
    for gradient, wanted in zip(gradients_of(out.loss, tensors), exact, strict=True):
        assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)
    for detail in details_of(out):
        assert (detail[MASKED] == 0).all() and detail.isfinite().all()


@every_loss
@pytest.mark.parametrize("input_dtype", [F32, torch.bfloat16], ids=str)
def test_a_denominator_in_the_weights_is_a_division_of_the_loss(case, loss, input_dtype):
    fused, _ = LOSSES[loss]
    outside, inside = build(case, dtype=input_dtype), build(case, dtype=input_dtype)
    divided = fused(outside, torch.ones(N)).loss / 7
    # fp64 weights change neither the dtype of the loss nor that of its gradients.
    weighted = fused(inside, torch.full((N,), 1 / 7, dtype=F64)).loss
    assert weighted.dtype == F32
    error = 1e-5 if input_dtype == F32 else 1e-2
    pairs = zip(gradients_of(weighted, inside), gradients_of(divided, outside), strict=True)
    for actual, wanted in ((weighted, divided), *pairs):
        assert actual.dtype == wanted.dtype
        difference = (actual.double() - wanted.double()).norm()
        assert difference <= error * wanted.double().norm()


class LargeResults(TorchDispatchMode):
    """Names of the operations, views apart, whose result is as large as the head."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and out.numel() >= self.numel:
            self.names.append(str(func))
        return out


# Those that recompute in backward write the head's gradient there, once.
AHEAD = [name for name in LOSSES if not name.startswith("lowmem")]


@pytest.mark.parametrize("loss", AHEAD)
@pytest.mark.parametrize(("factor", "passes"), [(1.0, 0), (0.5, 1)])
def test_a_gradient_of_one_costs_no_pass_over_the_heads_gradient(case, loss, factor, passes):
    fused, _ = LOSSES[loss]
    tensors = build(case, dtype=F32)
    out = fused(tensors, torch.full((N,), 1 / 7))
    with LargeResults(tensors.student_lm_head.numel()) as large:
        out.loss.backward(torch.tensor(factor))
    assert len(large.names) == passes, large.names
    assert tensors.student_lm_head.grad is not None


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_weights_of_another_dtype_leave_the_dtype_of_a_loss_of_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, generator=generator, dtype=dtype)
    for reduction in ("sum", "none"):
        out = reverse_kl(
            student.requires_grad_(),
            teacher,
            token_weights=torch.ones(5, dtype=F64),
            reduction=reduction,
        )
        assert out.loss.dtype == dtype

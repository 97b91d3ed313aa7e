"""reverse_kl and jsd from logits, against the dense definition in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_kl import jsd, reference, reverse_kl

BETAS = (0.0, 0.3, 1.0)


def logits_of(num_rows: int = 9, vocab: int = 1187, teacher_vocab: int = 1201, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = randn(num_rows, vocab).to(dtype).requires_grad_()
    allowed = torch.rand(vocab, generator=generator) > 0.3
    weights = torch.rand(num_rows, generator=generator) + 0.5
    return student, randn(num_rows, teacher_vocab).to(dtype), allowed, weights


def dense(student, teacher, beta, allowed=None, weights=None, temperature=1.0):
    """Loss per row and token_kl, by identity heads."""
    columns = min(student.shape[1], teacher.shape[1])
    eye = torch.eye(columns, dtype=torch.float64)
    loss, *details = reference.linear_reverse_kl(
        student.double()[:, :columns],
        eye,
        teacher.double()[:, :columns],
        eye,
        beta=beta,
        allowed_columns=None if allowed is None else allowed[:columns],
        token_weights=weights,
        temperature=temperature,
        reduction="none",
    )
    return loss, details


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("teacher_vocab", [1150, 1201])
def test_value_and_gradient(beta, reduction, teacher_vocab):
    student, teacher, allowed, weights = logits_of(teacher_vocab=teacher_vocab)
    weights[2] = 0
    before = student.detach().clone(), teacher.clone()
    rules: dict[str, Any] = dict(token_weights=weights, temperature=0.7)
    out = jsd(
        student,
        teacher,
        beta=beta,
        allowed_columns=allowed,
        reduction=reduction,
        chunk_size=4,
        **rules,
    )
    rows, details = dense(student, teacher, beta, allowed, weights, 0.7)
    direction = torch.linspace(-1, 2, 9, dtype=torch.float64)
    if reduction == "sum":
        assert_close(out.loss, rows.sum())
        actual, truth = (torch.autograd.grad(x, student)[0] for x in (out.loss, rows.sum()))
    else:
        assert_close(out.loss, rows)
        actual, truth = (torch.autograd.grad(x, student, direction)[0] for x in (out.loss, rows))
    for value, true in zip(
        (out.token_kl, out.student_entropy, out.teacher_entropy), details, strict=True
    ):
        assert_close(value, true.detach(), rtol=1e-9, atol=1e-10)
    assert_close(actual, truth, rtol=1e-9, atol=1e-11)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_masked_rows_may_hold_nan():
    student, teacher, _, weights = logits_of()
    with torch.no_grad():
        student[0], teacher[3] = torch.nan, torch.inf
    weights[[0, 3]] = 0
    loss = reverse_kl(student, teacher, token_weights=weights).loss
    loss.backward()
    assert loss.isfinite() and student.grad is not None
    assert (student.grad[[0, 3]] == 0).all() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_costs_one_rounding(dtype):
    student, teacher, _, _ = logits_of(dtype=dtype, teacher_vocab=1187)
    ids = torch.arange(9)
    out = reverse_kl(student, teacher, token_ids=ids)
    rows, _ = dense(student, teacher, 1.0)
    (actual,) = torch.autograd.grad(out.loss, student)
    (truth,) = torch.autograd.grad(rows.sum(), student)
    assert actual.dtype == dtype and out.loss.dtype == torch.float32
    error = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]
    assert (actual.double() - truth.double()).norm() < error * truth.double().norm()
    picked = student.double().log_softmax(-1)[ids, ids]
    assert out.student_logprobs is not None
    assert_close(out.student_logprobs.double(), picked.detach(), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_only_full_tensor(largest_tensor):
    student, teacher, _, _ = logits_of(num_rows=64)
    with largest_tensor:
        reverse_kl(student, teacher, chunk_size=8).loss.backward()
    assert largest_tensor.numel == student.numel()


def test_second_backward_raises():
    student, teacher, _, _ = logits_of()
    loss = reverse_kl(student, teacher).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^second backward through a fused loss"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(student_logits=torch.randn(3)), "student_logits has shape [3], expected [N, V]"),
        (
            dict(teacher_logits=torch.randn(4, 7)),
            "teacher_logits has 4 rows, expected 3 as student_logits",
        ),
        (
            dict(teacher_logits=torch.ones(3, 7, dtype=torch.int64)),
            "teacher_logits has dtype torch.int64, expected float16, bfloat16, float32 or float64",
        ),
        (
            dict(teacher_logits=torch.randn(3, 7, requires_grad=True)),
            "teacher_logits requires grad, expected a frozen teacher without grad (detach it)",
        ),
        (dict(temperature=0.0), "temperature is 0.0, expected a finite number > 0"),
        (dict(beta=-0.1), "beta is -0.1, expected a number in [0, 1]"),
        (dict(reduction="mean"), "reduction is 'mean', expected one of sum, none"),
        (dict(token_ids=torch.full((3,), 7)), "token_ids holds 7, expected ids in [0, 7)"),
    ],
)
def test_mistakes(change, message):
    arguments: dict[str, Any] = dict(
        student_logits=torch.randn(3, 7), teacher_logits=torch.randn(3, 7), beta=0.5
    )
    with pytest.raises(ValueError) as error:
        jsd(**(arguments | change))
    assert str(error.value) == message

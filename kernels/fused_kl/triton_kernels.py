"""Row programs in Triton: what `torch_kernels` computes, one program per row, in two reads of the
logits (three for JSD with its gradient). fp32 logits only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kl.tiles import row_program_shape
from fused_kl.torch_kernels import FLOOR, MAX_LOG_RATIO, Banned, TokenRows

NEGATIVE = tl.constexpr(FLOOR)
LIMIT = tl.constexpr(MAX_LOG_RATIO)
REVERSE, FORWARD, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(row, columns, num_columns, allowed, floor, HAS_BANNED: tl.constexpr):
    """Logits of a block, or of one column; banned ones and those past the end stand far below."""
    inside = columns < num_columns
    values = tl.load(row + columns, mask=inside, other=NEGATIVE)
    if HAS_BANNED:
        keep = tl.load(allowed + columns, mask=inside, other=1)
        values = tl.where(keep != 0, values, tl.load(floor))
    return values


@triton.jit
def _expm1(x):
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    # The rounding of 1 + x divides out of log(1 + x) x / ((1 + x) - 1).
    one = 1 + x
    same = one == 1
    return tl.where(same, x, tl.log(one) * (x / tl.where(same, 1.0, one - 1)))


@triton.jit
def _divergence_row(
    student,
    teacher,
    allowed,
    floor,
    token_ids,
    kl_out,
    student_entropy_out,
    teacher_entropy_out,
    logprob_out,
    num_columns,
    student_stride,
    teacher_stride,
    beta,
    KIND: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)  # rows times columns passes 2^31
    s_row, t_row = student + index * student_stride, teacher + index * teacher_stride

    # First read: maxima, normalisers, sum e^x x for the entropies, and sum e^x (x - y) for the mean
    # log ratio, all relative to the running maxima, so that neither maximum has to cancel later.
    zero, lowest = tl.full((), 0.0, tl.float32), tl.full((), NEGATIVE, tl.float32)
    s_max, t_max = lowest, lowest
    s_sum, t_sum, s_first, t_first, cross = zero, zero, zero, zero, zero
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(s_row, columns, num_columns, allowed, floor, HAS_BANNED)
        t = _load(t_row, columns, num_columns, allowed, floor, HAS_BANNED)
        s_new, t_new = tl.maximum(s_max, tl.max(s)), tl.maximum(t_max, tl.max(t))
        s_shift, t_shift = s_max - s_new, t_max - t_new
        s_scale, t_scale = tl.exp(s_shift), tl.exp(t_shift)
        x, y = s - s_new, t - t_new
        e, f = tl.exp(x), tl.exp(y)
        cross = s_scale * (cross + s_sum * (s_shift - t_shift)) + tl.sum(e * (x - y))
        s_first = s_scale * (s_first + s_sum * s_shift) + tl.sum(e * x)
        t_first = t_scale * (t_first + t_sum * t_shift) + tl.sum(f * y)
        s_sum, t_sum = s_scale * s_sum + tl.sum(e), t_scale * t_sum + tl.sum(f)
        s_max, t_max = s_new, t_new
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    mean = cross / s_sum - s_log + t_log
    tl.store(student_entropy_out + index, s_log - s_first / s_sum)
    tl.store(teacher_entropy_out + index, t_log - t_first / t_sum)
    if HAS_IDS:
        chosen = tl.load(token_ids + index)
        logit = _load(s_row, chosen, num_columns, allowed, floor, HAS_BANNED)
        logprob = logit - s_max - s_log
        tl.store(logprob_out + index, tl.where(logprob < NEGATIVE / 2, -float("inf"), logprob))

    # Second read: the value, term by term from r = log p - log q, and the gradient.
    value, student_part = zero, zero
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(s_row, columns, num_columns, allowed, floor, HAS_BANNED)
        t = _load(t_row, columns, num_columns, allowed, floor, HAS_BANNED)
        x, y = s - s_max - s_log, t - t_max - t_log
        p, q, r = tl.exp(x), tl.exp(y), x - y
        if KIND == REVERSE:
            value += tl.sum(p * r - p + q)
            grad = p * (r - mean)
        elif KIND == FORWARD:
            value += tl.sum(p - q - q * r)
            grad = p - q
        else:
            r = tl.minimum(tl.maximum(r, -LIMIT), LIMIT)
            value += tl.sum(-beta * q * _log1p((1 - beta) * _expm1(r)))
            student_part += tl.sum(-p * _log1p(beta * _expm1(-r)))
            grad = p
        if WITH_GRAD and KIND != JSD:
            tl.store(s_row + columns, grad, mask=columns < num_columns)
    value += (1 - beta) * student_part
    tl.store(kl_out + index, tl.where(value < 0, 0.0, value))

    if WITH_GRAD and KIND == JSD:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _load(s_row, columns, num_columns, allowed, floor, HAS_BANNED)
            t = _load(t_row, columns, num_columns, allowed, floor, HAS_BANNED)
            x, y = s - s_max - s_log, t - t_max - t_log
            r = tl.minimum(tl.maximum(x - y, -LIMIT), LIMIT)
            ratio = -_log1p(beta * _expm1(-r))
            grad = (1 - beta) * tl.exp(x) * (ratio - student_part)
            tl.store(s_row + columns, grad, mask=columns < num_columns)


@triton.jit
def _token_row(
    logits,
    allowed,
    floor,
    token_ids,
    logprob_out,
    entropy_out,
    num_columns,
    stride,
    HAS_BANNED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row, chosen = logits + index * stride, tl.load(token_ids + index)
    largest = tl.full((), NEGATIVE, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    total, first, others = zero, zero, zero
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(row, columns, num_columns, allowed, floor, HAS_BANNED)
        new = tl.maximum(largest, tl.max(z))
        shift = largest - new
        scale = tl.exp(shift)
        x = z - new
        e = tl.exp(x)
        first = scale * (first + total * shift) + tl.sum(e * x)
        total = scale * total + tl.sum(e)
        others = scale * others + tl.sum(tl.where(columns == chosen, 0.0, e))
        largest = new
    log_total = tl.log(total)
    logit = _load(row, chosen, num_columns, allowed, floor, HAS_BANNED)
    logprob = logit - largest - log_total
    tl.store(logprob_out + index, tl.where(logprob < NEGATIVE / 2, -float("inf"), logprob))
    tl.store(entropy_out + index, log_total - first / total)
    if WITH_GRAD:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _load(row, columns, num_columns, allowed, floor, HAS_BANNED)
            p = tl.exp(z - largest - log_total)
            # 1 - p of a near-certain token would cancel; the sum over the others does not.
            grad = tl.where(columns == chosen, others / total, -p)
            tl.store(row + columns, grad, mask=columns < num_columns)


def divergence_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    beta: float,
    banned: Banned | None,
    with_grad: bool,
) -> list[Tensor]:
    """`torch_kernels.divergence_rows_` on fp32 logits; `teacher_logits` is left as it was."""
    num_rows, num_columns = student_logits.shape
    stats = [student_logits.new_empty(num_rows) for _ in range(3 + (token_ids is not None))]
    block, num_warps = row_program_shape(num_columns)
    kind = {1.0: REVERSE, 0.0: FORWARD}.get(beta, JSD)
    if num_rows:
        launch: Any = _divergence_row[(num_rows,)]
        launch(
            student_logits,
            teacher_logits,
            *_allowed(banned, student_logits),
            student_logits if token_ids is None else token_ids,
            *stats[:3],
            stats[-1],
            num_columns,
            student_logits.stride(0),
            teacher_logits.stride(0),
            beta,
            KIND=kind.value,
            HAS_BANNED=banned is not None,
            HAS_IDS=token_ids is not None,
            WITH_GRAD=with_grad,
            BLOCK=block,
            num_warps=num_warps,
        )
    return stats


def token_rows_(
    logits: Tensor, token_ids: Tensor, *, banned: Banned | None, with_grad: bool
) -> TokenRows:
    """`torch_kernels.token_rows_` on fp32 logits."""
    num_rows, num_columns = logits.shape
    stats = TokenRows(logits.new_empty(num_rows), logits.new_empty(num_rows))
    block, num_warps = row_program_shape(num_columns)
    if num_rows:
        launch: Any = _token_row[(num_rows,)]
        launch(
            logits,
            *_allowed(banned, logits),
            token_ids,
            *stats,
            num_columns,
            logits.stride(0),
            HAS_BANNED=banned is not None,
            WITH_GRAD=with_grad,
            BLOCK=block,
            num_warps=num_warps,
        )
    return stats


def _allowed(banned: Banned | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns are allowed, as bytes, and what stands at the others."""
    if banned is None:
        return unused, unused
    return (~banned.columns).view(torch.uint8), banned.value

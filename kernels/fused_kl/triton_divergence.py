"""Triton programs of the divergences over rows of fp32 logits; `triton_rows` launches them.

Program (row, split) covers `split_columns` columns from split * split_columns on. Sums of the
splits merge by the rule of `rows.merge`. Row offsets are int64, because rows times columns can
exceed 2^31.
"""

# Triton's reductions are typed as if they returned tuples.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fused_kl.rows import MAX_LOG_RATIO
from fused_kl.triton_shared import NEGATIVE, load_logits

LIMIT = tl.constexpr(MAX_LOG_RATIO)
REVERSE, FORWARD, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _expm1(x):
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    # In log(1 + x) x / ((1 + x) - 1) the rounding of 1 + x cancels.
    one = 1 + x
    same = one == 1
    return tl.where(same, x, tl.log(one) * (x / tl.where(same, 1.0, one - 1)))


@triton.jit
def divergence_statistics(
    student,
    teacher,
    banned,
    floor,
    states,  # [splits, 8, rows], fields as in rows.merge
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    split_columns,
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s_row, t_row = student + index * student_stride, teacher + index * teacher_stride
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    # All sums are relative to the running maxima, so that no maximum has to cancel later. Threads
    # add up their own columns, and exchange only the maxima in every block.
    lowest, zeros = tl.full((), NEGATIVE, tl.float32), tl.zeros([BLOCK], tl.float32)
    s_max, t_max = lowest, lowest
    s_sum, t_sum, s_first, t_first, s_cross, t_cross = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = load_logits(s_row, columns, end, banned, floor, HAS_BANNED)
        t = load_logits(t_row, columns, end, banned, floor, HAS_BANNED)
        s_new, t_new = tl.maximum(s_max, tl.max(s)), tl.maximum(t_max, tl.max(t))
        s_shift, t_shift = s_max - s_new, t_max - t_new
        s_scale, t_scale = tl.exp(s_shift), tl.exp(t_shift)
        x, y = s - s_new, t - t_new
        e, f = tl.exp(x), tl.exp(y)
        gap = s_shift - t_shift
        s_cross = s_scale * (s_cross + s_sum * gap) + e * (x - y)
        t_cross = t_scale * (t_cross - t_sum * gap) + f * (y - x)
        s_first = s_scale * (s_first + s_sum * s_shift) + e * x
        t_first = t_scale * (t_first + t_sum * t_shift) + f * y
        s_sum, t_sum = s_scale * s_sum + e, t_scale * t_sum + f
        s_max, t_max = s_new, t_new
    out = states + split * 8 * num_rows + index
    tl.store(out, s_max)
    tl.store(out + num_rows, tl.sum(s_sum))
    tl.store(out + 2 * num_rows, tl.sum(s_first))
    tl.store(out + 3 * num_rows, t_max)
    tl.store(out + 4 * num_rows, tl.sum(t_sum))
    tl.store(out + 5 * num_rows, tl.sum(t_first))
    tl.store(out + 6 * num_rows, tl.sum(s_cross))
    tl.store(out + 7 * num_rows, tl.sum(t_cross))


@triton.jit
def divergence_summary(
    states,  # [splits, 8, rows]
    summary,  # [9, rows], fields as in rows.Summary
    num_rows,
    splits,
    BLOCK: tl.constexpr,
):
    """`rows.merge` and `rows.summarise` of one row; all its splits are read at once."""
    index, parts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = parts < splits
    state = states + parts * 8 * num_rows + index
    s_max = tl.load(state, mask=inside, other=NEGATIVE)
    t_max = tl.load(state + 3 * num_rows, mask=inside, other=NEGATIVE)
    s_sums = tl.load(state + num_rows, mask=inside, other=0.0)
    t_sums = tl.load(state + 4 * num_rows, mask=inside, other=0.0)
    s_top, t_top = tl.max(s_max), tl.max(t_max)
    s_shift, t_shift = s_max - s_top, t_max - t_top
    s_scale, t_scale = tl.exp(s_shift), tl.exp(t_shift)
    gap = s_shift - t_shift
    s_firsts = tl.load(state + 2 * num_rows, mask=inside, other=0.0) + s_sums * s_shift
    t_firsts = tl.load(state + 5 * num_rows, mask=inside, other=0.0) + t_sums * t_shift
    s_crosses = tl.load(state + 6 * num_rows, mask=inside, other=0.0) + s_sums * gap
    t_crosses = tl.load(state + 7 * num_rows, mask=inside, other=0.0) - t_sums * gap
    s_sum, t_sum = tl.sum(s_scale * s_sums), tl.sum(t_scale * t_sums)
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    reverse = tl.sum(s_scale * s_crosses) / s_sum - s_log + t_log
    forward = tl.sum(t_scale * t_crosses) / t_sum - t_log + s_log
    out = summary + index
    tl.store(out, s_top)
    tl.store(out + num_rows, s_log)
    tl.store(out + 2 * num_rows, t_top)
    tl.store(out + 3 * num_rows, t_log)
    tl.store(out + 4 * num_rows, reverse)
    tl.store(out + 5 * num_rows, s_log - tl.sum(s_scale * s_firsts) / s_sum)
    tl.store(out + 6 * num_rows, t_log - tl.sum(t_scale * t_firsts) / t_sum)
    # Not tl.maximum, which drops NaN.
    tl.store(out + 7 * num_rows, tl.where(reverse < 0, 0.0, reverse))
    tl.store(out + 8 * num_rows, tl.where(forward < 0, 0.0, forward))


@triton.jit
def divergence_gradient(
    student,
    teacher,
    banned,
    floor,
    student_max,
    student_log_sum,
    teacher_max,
    teacher_log_sum,
    means,
    student_parts,
    scales,
    grad,
    values,  # [splits, 2, rows]: the divergence, or for JSD KL(q || m) and KL(p || m)
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    grad_stride,
    beta,
    split_columns,
    KIND: tl.constexpr,
    HAS_BANNED: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s_row, t_row = student + index * student_stride, teacher + index * teacher_stride
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    beta = tl.cast(beta, tl.float32)  # torch.compile passes Python floats as fp64
    s_max, s_log = tl.load(student_max + index), tl.load(student_log_sum + index)
    t_max, t_log = tl.load(teacher_max + index), tl.load(teacher_log_sum + index)
    mean, scale = 0.0, 0.0
    if WITH_GRAD:
        mean, scale = tl.load(means + index), tl.load(scales + index)
        if KIND == JSD:
            mean, scale = tl.load(student_parts + index), scale * (1 - beta)
    value, student_part = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = load_logits(s_row, columns, end, banned, floor, HAS_BANNED)
        t = load_logits(t_row, columns, end, banned, floor, HAS_BANNED)
        x, y = s - s_max - s_log, t - t_max - t_log
        p, r = tl.exp(x), x - y
        if KIND == JSD:
            r = tl.minimum(tl.maximum(r, -LIMIT), LIMIT)
            ratio = -_log1p(beta * _expm1(-r))  # log(p/m)
            if WITH_VALUE:
                value += -tl.exp(y) * _log1p((1 - beta) * _expm1(r))
                student_part += p * ratio
            if WITH_GRAD:
                slope = p * (ratio - mean)
        else:
            q = tl.exp(y)
            if KIND == REVERSE:
                if WITH_VALUE:
                    value += p * r - p + q
                if WITH_GRAD:
                    slope = p * (r - mean)
            else:
                if WITH_VALUE:
                    value += p - q - q * r
                if WITH_GRAD:
                    slope = p - q
        if WITH_GRAD:
            tl.store(grad + index * grad_stride + columns, scale * slope, mask=columns < end)
    if WITH_VALUE:
        out = values + split * 2 * num_rows + index
        tl.store(out, tl.sum(value))
        tl.store(out + num_rows, tl.sum(student_part))

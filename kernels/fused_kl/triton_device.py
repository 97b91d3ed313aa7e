"""What runs on the GPU: programs over rows of fp32 logits. `triton_kernels` launches them.

Program (row, split) covers the columns from split * split_columns on. Sums of a split merge by
`rows.merge`. Row offsets are int64: rows times columns passes 2^31.
"""

# Triton's reductions are typed as if they returned tuples.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fused_kl.rows import FLOOR, MAX_LOG_RATIO

NEGATIVE = tl.constexpr(FLOOR)
LIMIT = tl.constexpr(MAX_LOG_RATIO)
REVERSE, FORWARD, JSD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(row, columns, num_columns, banned, floor, HAS_BANNED: tl.constexpr):
    """Logits of a block; banned ones and those past the end stand far below."""
    inside = columns < num_columns
    values = tl.load(row + columns, mask=inside, other=NEGATIVE)
    if HAS_BANNED:
        outside = tl.load(banned + columns, mask=inside, other=0)
        values = tl.where(outside != 0, tl.load(floor), values)
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
    # All sums are relative to the running maxima, so that neither maximum has to cancel later.
    zero, lowest = tl.full((), 0.0, tl.float32), tl.full((), NEGATIVE, tl.float32)
    s_max, t_max = lowest, lowest
    s_sum, t_sum, s_first, t_first, s_cross, t_cross = zero, zero, zero, zero, zero, zero
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(s_row, columns, end, banned, floor, HAS_BANNED)
        t = _load(t_row, columns, end, banned, floor, HAS_BANNED)
        s_new, t_new = tl.maximum(s_max, tl.max(s)), tl.maximum(t_max, tl.max(t))
        s_shift, t_shift = s_max - s_new, t_max - t_new
        s_scale, t_scale = tl.exp(s_shift), tl.exp(t_shift)
        x, y = s - s_new, t - t_new
        e, f = tl.exp(x), tl.exp(y)
        gap = s_shift - t_shift
        s_cross = s_scale * (s_cross + s_sum * gap) + tl.sum(e * (x - y))
        t_cross = t_scale * (t_cross - t_sum * gap) + tl.sum(f * (y - x))
        s_first = s_scale * (s_first + s_sum * s_shift) + tl.sum(e * x)
        t_first = t_scale * (t_first + t_sum * t_shift) + tl.sum(f * y)
        s_sum, t_sum = s_scale * s_sum + tl.sum(e), t_scale * t_sum + tl.sum(f)
        s_max, t_max = s_new, t_new
    out = states + split * 8 * num_rows + index
    tl.store(out, s_max)
    tl.store(out + num_rows, s_sum)
    tl.store(out + 2 * num_rows, s_first)
    tl.store(out + 3 * num_rows, t_max)
    tl.store(out + 4 * num_rows, t_sum)
    tl.store(out + 5 * num_rows, t_first)
    tl.store(out + 6 * num_rows, s_cross)
    tl.store(out + 7 * num_rows, t_cross)


@triton.jit
def divergence_summary(
    states,  # [splits, 8, rows]
    summary,  # [9, rows], fields as in rows.Summary
    num_rows,
    splits,
    BLOCK: tl.constexpr,
):
    """One row in `rows.merge` and `rows.summarise`; all its splits are read at once."""
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
def chosen_logprobs(
    logits,
    banned,
    floor,
    token_ids,
    maxima,
    log_sums,
    logprobs,
    num_rows,
    stride,
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The log-probability of one token per row, -inf for a banned one."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    chosen = tl.load(token_ids + index, mask=inside, other=0)
    norm = tl.load(maxima + index, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + index, mask=inside, other=0.0)
    value = tl.load(logits + index * stride + chosen, mask=inside, other=0.0) - norm - log_sum
    if HAS_BANNED:
        outside = tl.load(banned + chosen, mask=inside, other=0)
        # The floor is NaN where no column is allowed.
        value = tl.where(outside != 0, tl.load(floor) - norm - log_sum, value)
    value = tl.where(value < NEGATIVE / 2, float("-inf"), value)
    tl.store(logprobs + index, value, mask=inside)


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
    value, student_part = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(s_row, columns, end, banned, floor, HAS_BANNED)
        t = _load(t_row, columns, end, banned, floor, HAS_BANNED)
        x, y = s - s_max - s_log, t - t_max - t_log
        p, r = tl.exp(x), x - y
        if KIND == JSD:
            r = tl.minimum(tl.maximum(r, -LIMIT), LIMIT)
            ratio = -_log1p(beta * _expm1(-r))  # log(p/m)
            if WITH_VALUE:
                value += tl.sum(-tl.exp(y) * _log1p((1 - beta) * _expm1(r)))
                student_part += tl.sum(p * ratio)
            if WITH_GRAD:
                slope = p * (ratio - mean)
        else:
            q = tl.exp(y)
            if KIND == REVERSE:
                if WITH_VALUE:
                    value += tl.sum(p * r - p + q)
                if WITH_GRAD:
                    slope = p * (r - mean)
            else:
                if WITH_VALUE:
                    value += tl.sum(p - q - q * r)
                if WITH_GRAD:
                    slope = p - q
        if WITH_GRAD:
            tl.store(grad + index * grad_stride + columns, scale * slope, mask=columns < end)
    if WITH_VALUE:
        out = values + split * 2 * num_rows + index
        tl.store(out, value)
        tl.store(out + num_rows, student_part)


@triton.jit
def token_statistics(
    logits,
    banned,
    floor,
    token_ids,
    states,  # [splits, 4, rows]: max z, sum e^x, sum e^x x, sum e^x of all but the token
    num_rows,
    num_columns,
    stride,
    split_columns,
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, chosen = logits + index * stride, tl.load(token_ids + index)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    largest = tl.full((), NEGATIVE, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    total, first, others = zero, zero, zero
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(row, columns, end, banned, floor, HAS_BANNED)
        new = tl.maximum(largest, tl.max(z))
        shift = largest - new
        scale = tl.exp(shift)
        x = z - new
        e = tl.exp(x)
        first = scale * (first + total * shift) + tl.sum(e * x)
        total = scale * total + tl.sum(e)
        others = scale * others + tl.sum(tl.where(columns == chosen, 0.0, e))
        largest = new
    out = states + split * 4 * num_rows + index
    tl.store(out, largest)
    tl.store(out + num_rows, total)
    tl.store(out + 2 * num_rows, first)
    tl.store(out + 3 * num_rows, others)


@triton.jit
def token_summary(
    states,  # [splits, 4, rows]
    summary,  # [4, rows]: max z, log sum e^x, share of all but the token, entropy
    num_rows,
    splits,
    BLOCK: tl.constexpr,
):
    """One row of token_statistics; all its splits are read at once, and merge as in rows.merge."""
    index, parts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = parts < splits
    state = states + parts * 4 * num_rows + index
    maxima = tl.load(state, mask=inside, other=NEGATIVE)
    totals = tl.load(state + num_rows, mask=inside, other=0.0)
    firsts = tl.load(state + 2 * num_rows, mask=inside, other=0.0)
    others = tl.load(state + 3 * num_rows, mask=inside, other=0.0)
    largest = tl.max(maxima)
    shift = maxima - largest
    scale = tl.exp(shift)
    total = tl.sum(scale * totals)
    log_sum = tl.log(total)
    out = summary + index
    tl.store(out, largest)
    tl.store(out + num_rows, log_sum)
    tl.store(out + 2 * num_rows, tl.sum(scale * others) / total)
    tl.store(out + 3 * num_rows, log_sum - tl.sum(scale * (firsts + totals * shift)) / total)


@triton.jit
def token_gradient(
    logits,
    banned,
    floor,
    token_ids,
    maxima,
    log_sums,
    others,
    scales,
    grad,
    num_columns,
    stride,
    grad_stride,
    split_columns,
    HAS_BANNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, chosen = logits + index * stride, tl.load(token_ids + index)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    largest, log_sum = tl.load(maxima + index), tl.load(log_sums + index)
    rest, scale = tl.load(others + index), tl.load(scales + index)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load(row, columns, end, banned, floor, HAS_BANNED)
        # 1 - p of a near-certain token would cancel; the sum over the others does not.
        slope = tl.where(columns == chosen, rest, -tl.exp(z - largest - log_sum))
        tl.store(grad + index * grad_stride + columns, scale * slope, mask=columns < end)


@triton.jit
def scale_in_place(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor by a few programs that stride over the values, and no pass where the factor
    is 1, which the host never asks."""
    scale = tl.load(factor)
    if scale != 1.0:  # NaN is not 1 either
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(begin, count, step):
            places = start + tl.arange(0, BLOCK)
            inside = places < count
            tl.store(values + places, tl.load(values + places, mask=inside) * scale, mask=inside)

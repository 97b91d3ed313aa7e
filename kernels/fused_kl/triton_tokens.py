"""Triton programs of the given tokens over rows of fp32 logits; `triton_rows` launches them.

Rows are split over programs, and offsets are int64, as in `triton_divergence`.
"""

# Triton's reductions are typed as if they returned tuples.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fused_kl.triton_shared import NEGATIVE, load_logits


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
    zeros = tl.zeros([BLOCK], tl.float32)
    total, first, others = zeros, zeros, zeros
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(row, columns, end, banned, floor, HAS_BANNED)
        new = tl.maximum(largest, tl.max(z))
        shift = largest - new
        scale = tl.exp(shift)
        x = z - new
        e = tl.exp(x)
        first = scale * (first + total * shift) + e * x
        total = scale * total + e
        others = scale * others + tl.where(columns == chosen, 0.0, e)
        largest = new
    out = states + split * 4 * num_rows + index
    tl.store(out, largest)
    tl.store(out + num_rows, tl.sum(total))
    tl.store(out + 2 * num_rows, tl.sum(first))
    tl.store(out + 3 * num_rows, tl.sum(others))


@triton.jit
def token_summary(
    states,  # [splits, 4, rows]
    summary,  # [4, rows]: max z, log sum e^x, share of all but the token, entropy
    num_rows,
    splits,
    BLOCK: tl.constexpr,
):
    """Merge the splits of one row, which are read at once, by the rule of `rows.merge`."""
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
    entropies,
    entropy_scales,
    grad,
    num_columns,
    stride,
    grad_stride,
    split_columns,
    HAS_BANNED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, chosen = logits + index * stride, tl.load(token_ids + index)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    largest, log_sum = tl.load(maxima + index), tl.load(log_sums + index)
    rest, scale = tl.load(others + index), tl.load(scales + index)
    if WITH_ENTROPY:
        entropy, entropy_scale = tl.load(entropies + index), tl.load(entropy_scales + index)
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(row, columns, end, banned, floor, HAS_BANNED)
        # 1 - p would cancel for a near-certain token; the sum over all others does not.
        log_p = z - largest - log_sum
        p = tl.exp(log_p)
        value = scale * tl.where(columns == chosen, rest, -p)
        if WITH_ENTROPY:
            value -= entropy_scale * p * (log_p + entropy)
        tl.store(grad + index * grad_stride + columns, value, mask=columns < end)


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
    """Log-probability of one token per row, -inf for a banned one."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    chosen = tl.load(token_ids + index, mask=inside, other=0)
    norm = tl.load(maxima + index, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + index, mask=inside, other=0.0)
    value = tl.load(logits + index * stride + chosen, mask=inside, other=0.0) - norm - log_sum
    if HAS_BANNED:
        outside = tl.load(banned + chosen, mask=inside, other=0)
        # `floor` holds NaN if no column is allowed.
        value = tl.where(outside != 0, tl.load(floor) - norm - log_sum, value)
    value = tl.where(value < NEGATIVE / 2, float("-inf"), value)
    tl.store(logprobs + index, value, mask=inside)

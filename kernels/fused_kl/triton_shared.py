"""Triton: what the programs over rows of logits share, and the program that scales a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_kl.rows import FLOOR

NEGATIVE = tl.constexpr(FLOOR)


@triton.jit
def load_logits(row, columns, num_columns, banned, floor, HAS_BANNED: tl.constexpr):
    """Logits of a block; banned columns and those past the end get a value far below any logit."""
    inside = columns < num_columns
    values = tl.load(row + columns, mask=inside, other=NEGATIVE)
    if HAS_BANNED:
        outside = tl.load(banned + columns, mask=inside, other=0)
        values = tl.where(outside != 0, tl.load(floor), values)
    return values


@triton.jit
def scale_in_place(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor, by a few programs that stride over the values.

    The programs read the factor, so that the host need not wait for it, and do nothing where it
    is 1.
    """
    scale = tl.load(factor)
    if scale != 1.0:  # NaN differs from 1, too
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(begin, count, step):
            places = start + tl.arange(0, BLOCK)
            inside = places < count
            tl.store(values + places, tl.load(values + places, mask=inside) * scale, mask=inside)

"""Blocks of rows that fit into the cache: the row programs in plain torch work on them in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fused_kl.rows import Banned
from fused_kl.tiles import row_block_rows, slices


def blocks(
    num_scratch: int, banned: Banned | None, logits: Tensor, *others: Tensor
) -> Iterator[tuple]:
    """Yield, for each block: its rows, its logits and those of `others` with banned columns
    filled, and its scratch blocks."""
    num_rows, num_columns = logits.shape
    block = row_block_rows(num_columns, logits.element_size(), logits.device.type)
    scratch = logits.new_empty(num_scratch, min(block, num_rows), num_columns)
    for rows in slices(num_rows, block):
        parts = [tensor[rows] for tensor in (logits, *others)]
        if banned is not None:
            for part in parts:
                part.masked_fill_(banned.columns, banned.value)
        yield rows, *parts, *scratch[:, : len(parts[0])]

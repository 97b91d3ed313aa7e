"""Sizes of the pieces: token chunks, vocabulary tiles, row blocks."""

from __future__ import annotations

# Logits alive at once; larger chunks mean fewer passes over the head and over its gradient.
LOGITS_BYTES = 512 * 2**20
# A half-precision head is widened tile by tile, so that no widened copy of it ever exists.
HEAD_TILE_BYTES = 32 * 2**20
# Row programs make some fifteen passes over a block: on a CPU the block should stay in cache.
CPU_ROW_BLOCK_BYTES = 2 * 2**20
DEVICE_ROW_BLOCK_BYTES = 64 * 2**20


def token_chunks(
    num_rows: int, num_columns: int, num_buffers: int, itemsize: int, chunk_size: int | str
) -> list[slice]:
    """Cut `num_rows` into slices of `chunk_size` rows, or of near-equal size within the budget."""
    if isinstance(chunk_size, int):
        step = chunk_size
    else:
        limit = max(1, LOGITS_BYTES // (num_buffers * num_columns * itemsize))
        num_chunks = -(-num_rows // limit)
        step = -(-num_rows // num_chunks) if num_chunks else 1
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def head_tile_rows(hidden_size: int, itemsize: int) -> int:
    """Vocabulary rows of a head that are widened at once."""
    return max(1, HEAD_TILE_BYTES // max(1, hidden_size * itemsize))


def row_block_rows(num_columns: int, itemsize: int, device_type: str) -> int:
    """Logit rows that one round of row passes covers."""
    budget = CPU_ROW_BLOCK_BYTES if device_type == "cpu" else DEVICE_ROW_BLOCK_BYTES
    return max(1, budget // (num_columns * itemsize))


def row_program_shape(num_columns: int) -> tuple[int, int]:
    """Columns that a Triton row program reads at once, a power of two, and its warps."""
    block = min(4096, max(16, 1 << (num_columns - 1).bit_length()))
    return block, 8 if block >= 2048 else 4

"""Sizes of the pieces: what is alive at once, vocabulary tiles, row blocks, Triton blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from fused_kl.tuned import TUNED

T = TypeVar("T")

# Where a table has GPU names, those are measured (`fused_kl.tuned`), and "gpu" is for all others.
# Logits and their gradient alive at once. Larger chunks mean fewer passes over the head and over
# its gradient; on a GPU, 2.4 GB are some 1,500 rows of 150,000 columns.
FAST_BYTES = {"cpu": 160_000_000, "gpu": 2_400_000_000} | {
    name: sizes.fast_bytes for name, sizes in TUNED.items()
}
LOWMEM_BYTES = {"cpu": 64_000_000, "gpu": 450_000_000} | {
    name: sizes.lowmem_bytes for name, sizes in TUNED.items()
}
# Tiles narrower than this waste the products; rows are cut instead.
MIN_TILE_COLUMNS = 1024
# Where a head has to be widened, it is widened tile by tile: no widened copy of it ever exists.
HEAD_TILE_BYTES = 32 * 2**20
# Row programs in torch make some fifteen passes over a block: on a CPU each thread's rows should
# stay in its cache.
CPU_THREAD_BLOCK_BYTES = 2**20
DEVICE_ROW_BLOCK_BYTES = 64 * 2**20
# Columns that a Triton row program reads at once, with its warps. 4,096 would need over 100
# registers, and JSD would spill.
ROW_BLOCKS = {"gpu": {1024: 4, 2048: 8}} | {name: sizes.row_blocks for name, sizes in TUNED.items()}
# Programs that keep a large GPU busy; few rows are split over the vocabulary to reach them.
GPU_PROGRAMS = {"gpu": 528} | {name: sizes.programs for name, sizes in TUNED.items()}


@torch.compiler.assume_constant_result
def gpu_name() -> str:
    """Of the current device; "gpu" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"


@torch.compiler.assume_constant_result
def num_multiprocessors() -> int:
    """Of the current device; those of an H100 where there is none."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def entry(table: Mapping[str, T], device_type: str) -> T:
    """What a table has for the device."""
    if device_type == "cpu":
        return table["cpu"]
    return table.get(gpu_name(), table["gpu"])


class Plan(NamedTuple):
    """How a loss walks over its logits: blocks of `rows` tokens by `columns` of the vocabulary."""

    mode: str
    rows: int
    columns: int


def make_plan(
    mode: str,
    num_rows: int,
    num_columns: int,
    *,
    bytes_per_logit: int,
    freed_bytes: int = 0,
    gradient_rows: int = 0,
    device_type: str,
    chunk_size: int,
) -> Plan:
    """`chunk_size` rows at once, or with 0 as many as the budget holds. "fast" takes all columns of
    some rows, "lowmem" some columns of all rows.

    A single chunk gives back `freed_bytes` per logit, the teacher's, before the head's gradient is
    allocated; while there are no more rows than that has, `gradient_rows`, they cost nothing.
    """
    rows = max(1, num_rows)
    if mode == "fast":
        if chunk_size:
            return Plan(mode, min(chunk_size, rows), num_columns)
        budget = entry(FAST_BYTES, device_type)
        kept_bytes = bytes_per_logit - freed_bytes
        if rows <= min(gradient_rows, budget // (num_columns * kept_bytes)):
            return Plan(mode, rows, num_columns)
        limit = max(1, budget // (num_columns * bytes_per_logit))
        if rows > limit > 128:
            return Plan(mode, limit // 128 * 128, num_columns)  # whole tiles of the products
        return Plan(mode, -(-rows // -(-rows // limit)), num_columns)
    budget = entry(LOWMEM_BYTES, device_type) // bytes_per_logit
    rows = min(rows, chunk_size or max(1, budget // MIN_TILE_COLUMNS))
    columns = max(1, budget // rows)
    if columns < num_columns and columns > 128:
        columns = columns // 128 * 128
    return Plan(mode, rows, min(num_columns, columns))


def slices(total: int, step: int) -> list[slice]:
    """Cut `total` into slices of `step`."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def head_tile_rows(hidden_size: int, itemsize: int) -> int:
    """Vocabulary rows of a head that are widened at once."""
    return max(1, HEAD_TILE_BYTES // max(1, hidden_size * itemsize))


def row_block_rows(num_columns: int, itemsize: int, device_type: str) -> int:
    """Logit rows that one round of row passes covers: as many for each thread."""
    row_bytes = num_columns * itemsize
    if device_type == "cpu":
        return torch.get_num_threads() * max(1, CPU_THREAD_BLOCK_BYTES // row_bytes)
    return max(1, DEVICE_ROW_BLOCK_BYTES // row_bytes)


class RowProgram(NamedTuple):
    """The shape of a Triton row program: `block` columns are read at once, a power of two, by
    `num_warps`; a row is split over `splits` programs of `split_columns` each."""

    block: int
    num_warps: int
    splits: int
    split_columns: int


def row_program(num_rows: int, num_columns: int) -> RowProgram:
    """The smallest block that holds a row, or the largest; few rows are split until the programs
    are enough for the GPU."""
    blocks = entry(ROW_BLOCKS, "cuda")
    block = min((known for known in blocks if known >= num_columns), default=max(blocks))
    num_blocks = -(-num_columns // block)
    wanted = min(num_blocks, max(1, entry(GPU_PROGRAMS, "cuda") // max(1, num_rows)))
    split_columns = -(-num_blocks // wanted) * block
    splits = -(-num_columns // split_columns)
    return RowProgram(block, blocks[block], splits, split_columns)

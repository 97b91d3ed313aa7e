"""Sizes of chunks of rows, tiles of the vocabulary, blocks of row programs and Triton blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from fused_kl.tuned import TUNED

T = TypeVar("T")

# Each table has an entry "gpu", and one by name for each GPU that was measured (`fused_kl.tuned`).

# Bytes of logits and their gradient held at once. Larger chunks mean fewer passes over the head and
# its gradient; on a GPU, 2.4 GB are some 1,500 rows of 150,000 columns.
FAST_BYTES = {"cpu": 160_000_000, "gpu": 2_400_000_000} | {
    name: sizes.fast_bytes for name, sizes in TUNED.items()
}
LOWMEM_BYTES = {"cpu": 64_000_000, "gpu": 450_000_000} | {
    name: sizes.lowmem_bytes for name, sizes in TUNED.items()
}
# Narrower tiles make the products inefficient, so that the number of rows is cut instead.
MIN_TILE_COLUMNS = 1024
# A head that has to be widened is widened in tiles of this size, never as a whole.
HEAD_TILE_BYTES = 32 * 2**20
# Row programs in torch make some fifteen passes over a block, so that on a CPU each thread's rows
# should fit into its cache.
CPU_THREAD_BLOCK_BYTES = 2**20
DEVICE_ROW_BLOCK_BYTES = 64 * 2**20
# Columns that a Triton row program reads at once, and its warps. Each thread keeps sums of its own
# columns: of four it needs some 50 registers, of eight up to 108.
ROW_BLOCKS = {"gpu": {1024: 8}} | {name: sizes.row_blocks for name, sizes in TUNED.items()}
# Number of programs that keeps a large GPU busy; rows are split over the vocabulary to reach it.
GPU_PROGRAMS = {"gpu": 528} | {name: sizes.programs for name, sizes in TUNED.items()}


@torch.compiler.assume_constant_result
def gpu_name() -> str:
    """Name of the current GPU; "gpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"


@torch.compiler.assume_constant_result
def num_multiprocessors() -> int:
    """Number of multiprocessors of the current GPU; that of an H100 without one."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def entry(table: Mapping[str, T], device_type: str) -> T:
    """The entry of a table for the device: "cpu", the GPU's name, or else "gpu"."""
    if device_type == "cpu":
        return table["cpu"]
    return table.get(gpu_name(), table["gpu"])


class Plan(NamedTuple):
    """How a loss divides its logits: blocks of `rows` tokens by `columns` of the vocabulary."""

    mode: str
    rows: int
    columns: int


def budget(mode: str, device_type: str) -> int:
    """Bytes of logits that a mode holds at once."""
    return entry(LOWMEM_BYTES if mode == "lowmem" else FAST_BYTES, device_type)


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
    """Plan blocks of `chunk_size` rows, or with 0 of as many as the budget holds.

    Mode "fast" takes all columns of some rows, "lowmem" some columns of all rows.

    Args:
        freed_bytes: bytes per logit, the teacher's, that a single chunk frees before the head's
            gradient is allocated.
        gradient_rows: number of rows whose freed bytes the head's gradient then takes; up to that
            many they do not count against the budget.
    """
    rows = max(1, num_rows)
    if mode != "lowmem":
        if chunk_size:
            return Plan(mode, min(chunk_size, rows), num_columns)
        limit_bytes = budget(mode, device_type)
        kept_bytes = bytes_per_logit - freed_bytes
        if rows <= min(gradient_rows, limit_bytes // (num_columns * kept_bytes)):
            return Plan(mode, rows, num_columns)
        limit = max(1, limit_bytes // (num_columns * bytes_per_logit))
        if rows > limit > 128:
            return Plan(mode, limit // 128 * 128, num_columns)  # whole tiles of the products
        return Plan(mode, -(-rows // -(-rows // limit)), num_columns)
    logits = budget(mode, device_type) // bytes_per_logit
    rows = min(rows, chunk_size or max(1, logits // MIN_TILE_COLUMNS))
    columns = max(1, logits // rows)
    if columns < num_columns and columns > 128:
        columns = columns // 128 * 128
    return Plan(mode, rows, min(num_columns, columns))


def slices(total: int, step: int) -> list[slice]:
    """Consecutive slices of `step` that cover `total`; the last may be shorter."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def head_tile_rows(hidden_size: int, itemsize: int) -> int:
    """Number of rows of a head, columns of the vocabulary, that are widened at once."""
    return max(1, HEAD_TILE_BYTES // max(1, hidden_size * itemsize))


def row_block_rows(num_columns: int, itemsize: int, device_type: str) -> int:
    """Number of logit rows in one block of the torch row programs, the same for each thread."""
    row_bytes = num_columns * itemsize
    if device_type == "cpu":
        return torch.get_num_threads() * max(1, CPU_THREAD_BLOCK_BYTES // row_bytes)
    return max(1, DEVICE_ROW_BLOCK_BYTES // row_bytes)


class RowProgram(NamedTuple):
    """The shape of a Triton row program."""

    block: int  # columns that are read at once, a power of two
    num_warps: int
    splits: int  # programs that share a row
    split_columns: int  # columns of each of them


def row_program(num_rows: int, num_columns: int) -> RowProgram:
    """The smallest block that holds a row, or else the largest; few rows are split until there are
    enough programs for the GPU."""
    blocks = entry(ROW_BLOCKS, "cuda")
    block = min((size for size in blocks if size >= num_columns), default=max(blocks))
    num_blocks = -(-num_columns // block)
    max_splits = min(num_blocks, max(1, entry(GPU_PROGRAMS, "cuda") // max(1, num_rows)))
    split_columns = -(-num_blocks // max_splits) * block
    splits = -(-num_columns // split_columns)
    return RowProgram(block, blocks[block], splits, split_columns)

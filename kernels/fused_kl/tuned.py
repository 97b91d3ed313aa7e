"""Fastest sizes by GPU name. `python -m bench.gpu tune` measures them and `python -m
bench.kernels.tune` rewrites this table; `fused_kl.tiles` has defaults for all other GPUs."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Sizes for one GPU; `fused_kl.tiles` says what each is for."""

    row_blocks: dict[int, int]  # columns that a Triton row program reads at once -> its warps
    programs: int  # number of programs that few rows are split into
    fast_bytes: int  # of logits and their gradient, held at once in mode "fast"
    lowmem_bytes: int  # the same in mode "lowmem"


TUNED: dict[str, Sizes] = {}

"""What `python -m bench.gpu tune` found fastest, by the GPU's name; it writes this file. For other
GPUs `fused_kl.tiles` has defaults."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """`row_blocks`: columns that a Triton row program reads at once, with its warps; `programs`
    that few rows are split into; bytes alive at once in modes fast and lowmem."""

    row_blocks: dict[int, int]
    programs: int
    fast_bytes: int
    lowmem_bytes: int


TUNED: dict[str, Sizes] = {}

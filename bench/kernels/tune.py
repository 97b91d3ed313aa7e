"""Sizes of the kernels' pieces by measurement, for one GPU. `python -m bench.gpu tune` measures the
candidates, and

    python -m bench.kernels.tune bench/results/gpu_tune.json

writes the winners into the table of `fused_kl.tuned`. Every candidate must compute what fp64 does,
and is timed in turn with the default, the first one; it wins where it is faster by more than
`GAIN`.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from bench import SMOKE
from bench.kernels.losses import REVERSE_KL, Provider, kl
from bench.kernels.measure import DEVICE, VOCAB, Row, measure
from bench.kernels.problems import Problem, Shape
from bench.record import Refused, read
from fused_kl import tiles, tuned
from fused_kl.tuned import Sizes

TABLE = Path(tuned.__file__)
GAIN = 0.02  # of the default's time: less is noise
TABLES: dict[str, Any] = {
    "row_blocks": tiles.ROW_BLOCKS,
    "programs": tiles.GPU_PROGRAMS,
    "fast_bytes": tiles.FAST_BYTES,
    "lowmem_bytes": tiles.LOWMEM_BYTES,
}
# The first candidate is the default, and no budget is above it: it is what the memory promised in
# kernels/README.md allows. Blocks that need more registers or shared memory than
# tests/fused_kl/test_triton.py lets a program have are left out.
CANDIDATES: dict[str, Sequence[Any]] = {
    "row_blocks": ({1024: 8}, {1024: 4}, {2048: 16}, {2048: 8}, {4096: 32}),
    "programs": (528, 132, 264, 1056, 2112),
    "fast_bytes": (2_400_000_000, 600_000_000, 1_200_000_000, 1_800_000_000),
    "lowmem_bytes": (450_000_000, 112_500_000, 225_000_000),
}


def shapes(size: str) -> list[Shape]:
    """Where a size is measured. Those of row programs are measured with narrow heads, beside which
    the row programs take most of the time."""
    counts = {"row_blocks": (640, 1536), "programs": (1, 8, 32, 128)}.get(size, (16_384,))
    hidden = (64, 96) if size in ("row_blocks", "programs") else (2048, 4096)
    sizes = [(8, 4099, 32, 48) if SMOKE else (count, VOCAB, *hidden) for count in counts]
    names = [f"{count} tokens" for count in counts]
    return [Shape(name, *numbers) for name, numbers in zip(names, sizes, strict=True)]


@contextmanager
def trying(size: str, value: Any) -> Iterator[None]:
    """With another size for this device."""
    table = TABLES[size]
    key = "cpu" if DEVICE == "cpu" and "cpu" in table else tiles.gpu_name()
    with patch.dict(table, {key: value}):
        yield


@dataclass(frozen=True, kw_only=True)
class Candidate(Provider):
    """The reverse KL with another size."""

    size: str
    value: Any

    def step(self, problem: Problem) -> Tensor:
        with trying(self.size, self.value):
            return super().step(problem)


def measure_candidates(benchmark: Any, size: str, shape: Shape) -> dict[str, Row]:
    """The row of each candidate, by its value as JSON; `over_fast` is relative to the default."""
    loss = partial(kl, mode="lowmem" if size == "lowmem_bytes" else "fast")
    candidates = {
        json.dumps(value): Candidate(loss=loss, size=size, value=value)
        for value in CANDIDATES[size]
    }
    return measure(benchmark, REVERSE_KL, candidates, shape)


def winner(runs: Sequence[Mapping[str, Row]]) -> Any:
    """The fastest candidate over all shapes, unless the default, the first, is as fast."""
    names = [name for name in runs[0] if name != "gemms"]
    means = {
        name: math.prod(rows[name]["over_fast"] for rows in runs) ** (1 / len(runs))
        for name in names
        if not any("failed" in rows[name] for rows in runs)
    }
    best = min(means, key=means.__getitem__, default=names[0])
    value = json.loads(best if means.get(best, 1) < 1 - GAIN else names[0])
    if isinstance(value, dict):  # JSON has no numbers as keys
        return {int(block): warps for block, warps in value.items()}
    return value


def write_table(sizes: dict[str, Sizes], path: Path) -> None:
    """Rewrite the table that `fused_kl.tiles` reads; entries of other GPUs stay."""
    before, mark, _ = path.read_text().partition("TUNED: dict[str, Sizes] = {")
    lines = []
    for name, entry in sorted((tuned.TUNED | sizes).items()):
        lines += [f"    {json.dumps(name)}: Sizes(", f"        row_blocks={entry.row_blocks},"]
        rest = entry._asdict().items()
        lines += [f"        {key}={value:_}," for key, value in rest if key != "row_blocks"]
        lines.append("    ),")
    path.write_text("\n".join([before + mark, *lines, "}"]) + "\n")


def main(arguments: list[str]) -> None:
    """The command."""
    try:
        if len(arguments) != 1:
            raise Refused("usage: python -m bench.kernels.tune bench/results/gpu_tune.json")
        result = read(Path(arguments[0]))
        infos = [info for info in result["benchmarks"].values() if "candidates" in info]
        runs = {size: [i["candidates"] for i in infos if i["size"] == size] for size in CANDIDATES}
        if missing := [size for size, rows in runs.items() if not rows]:
            raise Refused(f"{arguments[0]}: not measured: {', '.join(missing)}")
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sizes = Sizes(**{size: winner(rows) for size, rows in runs.items()})
    write_table({result["hardware"]: sizes}, TABLE)
    print(f"{TABLE}: {sizes}")


if __name__ == "__main__":
    main(sys.argv[1:])

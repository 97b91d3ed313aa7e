"""Sizes of the kernels' pieces by measurement, for this GPU: python -m bench.gpu tune

One size after the other: blocks of the row programs, programs that few rows are split into, bytes
alive at once in modes fast and lowmem. A candidate must not spill, must compute what fp64 does and
must stay within the memory that the default takes; it is timed in turn with the default and becomes
the winner where it is faster by more than `GAIN`. The winners are written into
`fused_kl.tuned`, also from a result of another machine:

python -m bench.kernels.tune bench/results/gpu_tune.json
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.failures import attempt
from bench.kernels.measure import DEVICE, DTYPE, prove_equal, step
from bench.kernels.problems import Problem, Shape
from bench.kernels.providers import REVERSE_KL, Provider, fast, lowmem
from bench.kernels.registers import REGISTER_FILE, RESIDENT_THREADS, Blocks, usage_of
from bench.kernels.row_programs import Rows
from bench.timing import Times, interleaved, peak_bytes, ratio
from fused_kl import tiles, tuned
from fused_kl.tuned import Sizes

TABLE = Path(tuned.__file__)
REGISTERS = REGISTER_FILE // max(RESIDENT_THREADS.values())  # of a thread: the tests' limit
GAIN = 0.02  # of the default's time: less is noise
SHAPE = Shape("Qwen3-VL 2B from 8B, 16384 tokens", 16_384, 151_936, 2048, 4096)
TABLES = {
    "row_blocks": tiles.ROW_BLOCKS,
    "programs": tiles.GPU_PROGRAMS,
    "fast_bytes": tiles.FAST_BYTES,
    "lowmem_bytes": tiles.LOWMEM_BYTES,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is tried, and on what; here for a large GPU. The first candidate is the default, and no
    budget is above it: it is what the memory promised in the README allows."""

    blocks: Sequence[Blocks] = (
        (2048, 8),
        (1024, 4),
        (1024, 8),
        (2048, 4),
        (2048, 16),
        (4096, 8),
        (4096, 16),
        (8192, 16),
        (8192, 32),
    )
    programs: Sequence[int] = (528, 132, 264, 1056, 2112)
    fast_bytes: Sequence[int] = (2_400_000_000, 600_000_000, 1_200_000_000, 1_800_000_000)
    lowmem_bytes: Sequence[int] = (450_000_000, 112_500_000, 225_000_000)
    rows: Sequence[int] = (32, 640, 1536)  # of logits in a chunk
    few_rows: Sequence[int] = (1, 8, 32, 128)
    columns: int = 151_936
    shape: Shape = SHAPE
    rounds: int = 15


@contextmanager
def trying(size: str, value: Any) -> Iterator[None]:
    """With another size for this device."""
    table = TABLES[size]
    key = "cpu" if DEVICE == "cpu" and "cpu" in table else tiles.gpu_name()
    with patch.dict(table, {key: value}):
        yield


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one candidate: why it was not timed, or its time over the default's at each
    place, as `bench.timing.ratio` has it."""

    value: Any
    refused: str | None = None
    known: dict[str, Any] | None = None
    over_default: dict[str, dict[str, Any]] | None = None

    @property
    def mean(self) -> float:
        """Of the ratios at all places."""
        assert self.over_default is not None
        return geometric_mean([ratio["ratio"] for ratio in self.over_default.values()])


def chosen(trials: Sequence[Trial]) -> Any:
    """The fastest, unless the default, the first, is as fast."""
    timed = [trial for trial in trials if trial.over_default is not None]
    if not timed:
        refusals = "; ".join(f"{trial.value}: {trial.refused}" for trial in trials)
        raise ValueError(f"no candidate can be used: {refusals}")
    default, *others = timed
    best = min(others, key=lambda trial: trial.mean, default=default)
    return best.value if best.mean < 1 - GAIN else default.value


def timed(
    size: str, values: Sequence[Any], places: dict[str, Callable[[], Any]], rounds: int
) -> dict[Any, dict[str, dict[str, Any]]]:
    """Each value's time over that of the first, in turn, at every place."""
    found: dict[Any, dict[str, dict[str, Any]]] = {str(value): {} for value in values}
    for place, call in places.items():

        def one(value: Any, call: Callable[[], Any] = call) -> Callable[[int], None]:
            def run(_: int) -> None:
                with trying(size, value):
                    call()

            return run

        times: Times = interleaved({str(value): one(value) for value in values}, rounds)
        for value in values:
            found[str(value)][place] = ratio(times[str(value)], times[str(values[0])])
    return found


def row_trials(size: str, values: Sequence[Any], rows: Sequence[int], scale: Scale) -> list[Trial]:
    """Of a size of the row programs: right first, then timed."""
    tolerance = 1e-4 if DTYPE.itemsize == 4 else 1e-2  # of gradients written in bf16
    small = Rows(min(rows), scale.columns)
    errors, refused = {}, {}
    for value in values:
        with trying(size, value):
            error = attempt(refused, str(value), size, small.error, keep_errors=True)
        if error is None:
            continue
        errors[str(value)] = error
        if not error < tolerance:
            refused[str(value)] = f"wrong by {error:.1g}"
    right = [value for value in values if str(value) not in refused]
    made = {f"{count} rows": Rows(count, scale.columns) for count in rows}
    places = {
        name: lambda made=made: (made.divergence(), made.logprobs()) for name, made in made.items()
    }
    found = timed(size, right, places, scale.rounds)
    return [
        Trial(value=value, known={"error": errors[str(value)]}, over_default=found[str(value)])
        if value in right
        else Trial(value=value, refused=refused[str(value)])
        for value in values
    ]


def block_trials(scale: Scale) -> list[Trial]:
    """Of columns read at once and warps; first without a GPU's help: registers."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    used = usage_of(10 * capability[0] + capability[1], scale.blocks)
    fits = [b for b in scale.blocks if used[b]["registers"] <= REGISTERS and not used[b]["spilled"]]
    values = [{1024: 4} | {block: warps} for block, warps in fits]
    found = {
        str(trial.value): trial for trial in row_trials("row_blocks", values, scale.rows, scale)
    }
    trials = []
    for block, warps in scale.blocks:
        value, known = {1024: 4} | {block: warps}, used[block, warps]
        if (block, warps) not in fits:
            told = f"{known['registers']} registers, {known['spilled']} bytes spilled"
            trials.append(Trial(value=value, refused=told, known=dict(known)))
        else:
            trial = found[str(value)]
            trials.append(replace(trial, known={**known, **(trial.known or {})}))
    return trials


def budget_trials(size: str, values: Sequence[int], loss: Any, scale: Scale) -> list[Trial]:
    """Of bytes alive at once: right first, within the default's memory, then timed."""
    provider = Provider(loss)
    problem = Problem.of(scale.shape, dtype=DTYPE, device=DEVICE)
    peaks, losses = [], []
    for value in values:
        with trying(size, value):
            prove_equal(REVERSE_KL, {f"{size}={value}": provider}, scale.shape)
            losses.append(float(provider.step(problem)))
            problem.clear()
            peaks.append(peak_bytes(lambda: step(provider, problem)))
        if abs(losses[-1] / losses[0] - 1) > 1e-5:
            raise AssertionError(f"{size}={value}: loss {losses[-1]}, by default {losses[0]}")
    places = {scale.shape.name: lambda: step(provider, problem)}
    found = timed(size, values, places, scale.rounds)
    return [
        Trial(value=value, known={"peak_bytes": peak}, over_default=found[str(value)])
        for value, peak in zip(values, peaks, strict=True)
    ]


def tune(
    scale: Scale,
    earlier: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> tuple[Sizes, dict[str, Any]]:
    """The winners, and everything that was tried. `save` is given both after each search, and
    `earlier` is what it was given by a call that did not end: its searches are not repeated."""
    earlier = earlier or {}
    best: dict[str, Any] = dict(earlier.get("sizes", {}))
    told: dict[str, Any] = dict(earlier.get("searches", {}))
    if "row_blocks" in best:  # JSON has no numbers as keys
        best["row_blocks"] = {int(block): warps for block, warps in best["row_blocks"].items()}
    searches: dict[str, Callable[[], list[Trial]]] = {
        "row_blocks": lambda: block_trials(scale),
        "programs": lambda: row_trials("programs", scale.programs, scale.few_rows, scale),
        "fast_bytes": lambda: budget_trials("fast_bytes", scale.fast_bytes, fast, scale),
        "lowmem_bytes": lambda: budget_trials("lowmem_bytes", scale.lowmem_bytes, lowmem, scale),
    }
    with ExitStack() as settled:
        for size, search in searches.items():
            if size not in best:
                trials = search()
                best[size] = chosen(trials)
                told[size] = {
                    "default": trials[0].value,
                    "chosen": best[size],
                    "trials": [asdict(trial) for trial in trials],
                }
                print(f"{size}: {trials[0].value} -> {best[size]}", flush=True)
                save({"sizes": dict(best), "searches": dict(told)})
            settled.enter_context(trying(size, best[size]))  # the next ones build on it
    return Sizes(**best), told


def write_table(sizes: dict[str, Sizes], path: Path) -> None:
    """Rewrite the table that `fused_kl.tiles` reads; entries of other GPUs stay."""
    before, mark, _ = path.read_text().partition("TUNED: dict[str, Sizes] = {")
    if not mark:
        raise ValueError(f"{path}: no table")
    lines = []
    for name, entry in sorted((tuned.TUNED | sizes).items()):
        blocks = {int(block): warps for block, warps in entry.row_blocks.items()}
        lines += [f"    {json.dumps(name)}: Sizes(", f"        row_blocks={blocks},"]
        rest = entry._asdict().items()
        lines += [f"        {key}={value:_}," for key, value in rest if key != "row_blocks"]
        lines.append("    ),")
    path.write_text("\n".join([before + mark, *lines, "}"]) + "\n")


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m bench.kernels.tune bench/results/gpu_tune.json")
    result = json.loads(Path(arguments[0]).read_text())
    write_table({result["hardware"]: Sizes(**result["benchmarks"]["tune"]["sizes"])}, TABLE)
    print(TABLE)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Kernel benchmarks: reverse KL, policy loss and log-probabilities, forward and backward, by every
provider (`bench.kernels.measure` says how); gradient errors against fp64; sizes of the kernels'
pieces."""

from typing import Any

import pytest
import torch

from bench import SMOKE
from bench.kernels import measure, tune
from bench.kernels.measure import GPU
from bench.kernels.problems import Shape
from bench.tables import listed, provider_rows

CASES = {f"{task.name}-{shape.name}": (task, shape) for task, shape in measure.cases()}
SIZES = {f"{size}, {s.name}": (size, s) for size in tune.CANDIDATES for s in tune.shapes(size)}


@pytest.fixture(autouse=True)
def compiler() -> None:
    """What is compiled for one of a GPU's nine shapes counts against a limit, beyond which nothing
    is compiled any more. A smoke run on a CPU does not compile, which would take minutes."""
    if GPU:
        torch.compiler.reset()
    elif SMOKE:
        torch.compiler.set_stance("force_eager")


def keep(benchmark: Any, **info: Any) -> None:
    """Keep what was measured. Ours must have run, and a peer may only run out of memory."""
    benchmark.extra_info.update(info)
    rows = info.get("providers") or info["candidates"]
    print("\n".join(["", benchmark.name, *provider_rows(rows, info.get("skipped", {}))]))
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    ours = next(name for name in rows if name != "gemms")
    assert ours not in failed, failed
    assert all(reason == "out of memory" for reason in failed.values()), failed


@pytest.mark.parametrize("case", CASES)
def test_memory(benchmark: Any, case: str) -> None:
    """First in this file: `measure.memory` says why."""
    task, shape = CASES[case]
    providers, skipped = task.available()
    rows = benchmark.pedantic(measure.memory, (task, providers, shape), rounds=1)
    keep(benchmark, shape=shape.name, providers=rows, skipped=skipped)


@pytest.mark.parametrize("case", CASES)
def test_loss(benchmark: Any, case: str) -> None:
    task, shape = CASES[case]
    providers, skipped = task.available()
    rows = measure.measure(benchmark, task, providers, shape)
    keep(benchmark, shape=shape.name, providers=rows, skipped=skipped)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_precision(benchmark: Any, dtype: str) -> None:
    """A row per case with the error of each provider; smaller in a smoke run."""
    shape = Shape("smoke", 16, 2003, 32, 64) if SMOKE else measure.PRECISION
    rows = benchmark.pedantic(measure.precision, (getattr(torch, dtype), shape), rounds=1)
    benchmark.extra_info.update({"shape": str(shape), "rows": rows})
    print("\n".join(["", benchmark.name, *listed(rows)]))


@pytest.mark.skipif(not (GPU or SMOKE), reason="sizes of a GPU")
@pytest.mark.parametrize("case", SIZES)
def test_tune(benchmark: Any, case: str) -> None:
    size, shape = SIZES[case]
    rows = tune.measure_candidates(benchmark, size, shape)
    keep(benchmark, shape=shape.name, size=size, candidates=rows)

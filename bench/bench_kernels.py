"""Kernel benchmarks: reverse KL, policy loss and log-probabilities, forward and backward, by every
provider (`bench.kernels.measure` says how), and gradient errors against fp64."""

import warnings
from typing import Any

import pytest
import torch

from bench.kernels import measure as kernels
from bench.kernels import precision
from bench.kernels.measure import TASKS, Failures, Found
from bench.kernels.problems import Shape
from bench.kernels.providers import REVERSE_KL, Task
from bench.kernels.token_losses import LOGPROBS, POLICY_LOSS


def shapes(task: Task) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", kernels.here(task), ids=lambda shape: shape.name)


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Found, dict[str, str]]]:
    """What can be run, and why the rest cannot: pytest lists it when all is done."""
    made = {}
    for task in TASKS:
        made[task.name] = task.find(kernels.DEVICE)
        for name, reason in made[task.name][1].items():
            warnings.warn(f"{task.name}: {name} skipped: {reason}", stacklevel=1)
    return made


@pytest.fixture(scope="module")
def memory(found) -> dict[tuple[str, str], tuple[dict[str, int], Failures]]:
    """Peak bytes and who has none to spare, by task and shape, all of them before anything is
    timed: timing keeps freed memory inside the process."""
    made = {}
    for task in TASKS:
        for shape in kernels.here(task):
            forget_compiled()
            failures: Failures = {}
            peaks = kernels.peaks(task, found[task.name][0], shape, failures)
            made[task.name, shape.name] = peaks, failures
    return made


def forget_compiled() -> None:
    """What is compiled for one of a GPU's nine shapes counts against a limit, beyond which nothing
    is compiled any more."""
    if kernels.GPU:
        torch.compiler.reset()


def run(benchmark: Any, task: Task, shape: Shape, found: Any, memory: Any) -> None:
    """Measure one task at one shape, and keep what came out."""
    forget_compiled()
    providers, skipped = found[task.name]
    arguments = (task, providers, shape, *memory[task.name, shape.name])
    rows = benchmark.pedantic(kernels.measure, arguments, rounds=1)
    benchmark.extra_info.update(kernels.shown(task, shape, rows, skipped))
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    broken = {name: why for name, why in failed.items() if not why.startswith("out of memory")}
    assert not broken, broken


@shapes(REVERSE_KL)
def test_reverse_kl(benchmark, shape: Shape, found, memory) -> None:
    run(benchmark, REVERSE_KL, shape, found, memory)


@shapes(POLICY_LOSS)
def test_policy_loss(benchmark, shape: Shape, found, memory) -> None:
    run(benchmark, POLICY_LOSS, shape, found, memory)


@shapes(LOGPROBS)
def test_logprobs(benchmark, shape: Shape, found, memory) -> None:
    run(benchmark, LOGPROBS, shape, found, memory)


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
def test_precision(benchmark, dtype: torch.dtype) -> None:
    benchmark.extra_info.update(benchmark.pedantic(precision.measure, (dtype,), rounds=1))

"""Seconds and memory of calls side by side.

On a machine that others use too, only ratios within one round mean something: calls take turns.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

from opd.distributed import reuse_freed_memory
from opd.errors import raised

T = TypeVar("T")
Calls = Mapping[str, Callable[[int], object]]
Times = dict[str, list[float]]
Failures = dict[str, str]  # reasons by name
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def wait() -> None:
    """Until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attempt(failures: Failures, name: str, call: Callable[[], T]) -> T | None:
    """What the call returns once the device has finished. Its error is kept in `failures`, and a
    name with a failure is not called again; both return None."""
    if name in failures:
        return None
    try:
        value = call()
        wait()
        return value
    except Exception as error:
        memory = isinstance(error, MemoryError) or any(s in str(error) for s in OUT_OF_MEMORY)
        failures[name] = "out of memory" if memory else raised(error)
    gc.collect()  # outside of the handler, which holds the call's tensors
    if memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def interleaved(benchmark: Any, calls: Calls, rounds: int, warmup: int = 2) -> Times:
    """Seconds of each call in `rounds` rounds, in which the calls take turns; a call is given the
    number of its round, counted from the first of `warmup` rounds that are not kept.

    pytest-benchmark times the first call, this project's side, so that its statistics and
    `pytest-benchmark compare` are about that one.
    """
    reuse_freed_memory()  # page faults of fresh memory would drown a CPU's differences
    times: Times = {name: [] for name in calls}
    first, *others = calls
    numbers = count()

    def timed(name: str, number: int) -> None:
        wait()
        begun = time.perf_counter()
        calls[name](number)
        wait()
        times[name].append(time.perf_counter() - begun)

    def others_turn() -> tuple[tuple[str, int], dict[str, Any]]:
        number = next(numbers)
        for name in others:
            timed(name, number)
        return (first, number), {}

    benchmark.pedantic(timed, setup=others_turn, rounds=rounds, warmup_rounds=warmup)
    return {name: seconds[warmup:] for name, seconds in times.items()}


def ratio(first: list[float], second: list[float]) -> dict[str, Any]:
    """Median of the paired ratios first / second, and the bootstrap interval (95%) of it."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "rounds": len(ratios),
        "first_ms": 1000 * statistics.median(first),
        "second_ms": 1000 * statistics.median(second),
        "ratio": statistics.median(ratios),
        "ratio_interval": [medians[50], medians[-51]],
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that a call needs at most beyond what is held before it: the GPU's, or else the
    process's resident memory (Linux)."""
    if torch.cuda.is_available():
        wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        wait()
        return torch.cuda.max_memory_allocated() - before
    reuse_freed_memory(False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) * 1024

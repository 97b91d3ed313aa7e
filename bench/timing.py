"""Timing in turn: on a machine that others use too, only ratios within one round mean something."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench.failures import wait
from opd.distributed import reuse_freed_memory

Times = dict[str, list[float]]


def interleaved(
    calls: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 2
) -> Times:
    """Seconds of each call, `rounds` of them, one round after the other; `warmup` more come first.
    A call is given the number of its round."""
    reuse_freed_memory()  # page faults of fresh memory would drown a CPU's differences
    times: Times = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            begun = now()
            call(number)
            wait()
            if number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def now() -> float:
    """Seconds, when the device has finished."""
    wait()
    return time.perf_counter()


def ratio(first: list[float], second: list[float]) -> dict[str, object]:
    """Median of the paired ratios first / second, their quartiles, and the bootstrap interval (95%)
    of that median."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(2000))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "rounds": len(ratios),
        "first_ms": 1000 * statistics.median(first),
        "second_ms": 1000 * statistics.median(second),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ratio_interval": [medians[50], medians[-51]],
    }


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(value) * 1024


def held_bytes() -> int:
    """Memory that is held now: the GPU's, or else the process's (Linux)."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that a call needs at most beyond what is held before it: the GPU's, or else the
    process's resident memory (Linux)."""
    if torch.cuda.is_available():
        wait()
        before = held_bytes()
        torch.cuda.reset_peak_memory_stats()
        call()
        wait()
        return torch.cuda.max_memory_allocated() - before
    reuse_freed_memory(False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = held_bytes()
    call()
    return _status("VmHWM") - before

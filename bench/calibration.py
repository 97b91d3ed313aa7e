"""Seconds of a fixed piece of work on one thread: `python -m bench.calibration`.

A run's time on one machine says little about another. These two numbers do: products of matrices as
large as those of the embedded models' steps, and operations so small that their dispatch is what
takes the time. A step is about half of each.
"""

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS, PRODUCTS, OPERATIONS = 5, 100, 50_000


def products() -> None:
    """Forward and backward products of an MLP layer on 5,400 tokens, 80 GFLOP."""
    hidden, weight = torch.ones(5400, 96), torch.ones(96, 256)
    for _ in range(PRODUCTS):
        out = hidden @ weight
        _ = out @ weight.t(), hidden.t() @ out


def operations() -> None:
    """Additions to a vector of 96 numbers."""
    vector = torch.zeros(96)
    for _ in range(OPERATIONS):
        vector = vector + 1.0


def seconds(work: Callable[[], None]) -> float:
    """Median of a few rounds."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def calibration() -> dict[str, float]:
    """Both times, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"products_s": seconds(products), "operations_s": seconds(operations)}
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    print(", ".join(f"{name} {value:.2f}" for name, value in calibration().items()))

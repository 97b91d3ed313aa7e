"""Worker of `bench_kernels.py`: `torchrun sharded.py OUT ROUNDS SHAPE`, the reverse KL forward and
backward over a vocabulary that is divided over the ranks, in turn with rank 0 alone over all of it.

Each rank has one thread, and the others wait while rank 0 is alone. OUT receives the seconds of
both in each round, and the largest relative difference of a gradient.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.kernels.problems import Problem, Shape
from fused_kl import linear_reverse_kl
from opd.distributed import reuse_freed_memory


def gradients_of(sides: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Gradients of the student's hidden states and head."""
    loss = linear_reverse_kl(*sides, group=group).loss  # type: ignore[misc]
    return torch.autograd.grad(loss, sides[:2])


def seconds_of(call: Callable[[], object]) -> float:
    """From the time when all ranks are ready until all have finished."""
    dist.barrier()
    begun = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - begun


def main(out: Path, rounds: int, shape: Shape) -> None:
    """Measure on all ranks, and write the result on the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    reuse_freed_memory()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = Problem.of(shape, dtype=torch.float32, device="cpu").both
    edges = [shape.vocab * number // ranks for number in range(ranks + 1)]
    here = slice(edges[rank], edges[rank + 1])
    part = tuple(
        (x[here] if len(x) == shape.vocab else x).detach().clone().requires_grad_(x.requires_grad)
        for x in whole
    )
    if rank:
        whole = ()
    calls = {
        "sharded": lambda: gradients_of(part, dist.group.WORLD),
        "alone": lambda: None if rank else gradients_of(whole, None),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    results = {name: call() for name, call in calls.items()}
    if not rank:
        hidden, head = results["alone"]
        pairs = zip(results["sharded"], (hidden, head[here]), strict=True)
        error = max(float((mine - exact).norm() / exact.norm()) for mine, exact in pairs)
        result = {"error": error} | {name: values[1:] for name, values in times.items()}
        out.write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    path, rounds, *sizes = sys.argv[1:]
    main(Path(path), int(rounds), Shape("sharded", *map(int, sizes)))

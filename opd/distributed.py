"""Rank, world size and collectives; no-ops in a single process. Also the set-up of each rank's
process: its device, its threads, its progress bars."""

import atexit
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

TIMEOUT_S = 7200.0  # the first rank inspects every video while the others wait
T = TypeVar("T")


def rank() -> int:
    """Rank of this process, from 0, as torchrun or the deepspeed launcher sets it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is rank 0, which writes the run folder and prints messages."""
    return rank() == 0


def set_up(threads: int | None, seed: int) -> torch.device:
    """Prepare this process for a run (threads, seed, logging, allocator) and return its device."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers_logging.disable_progress_bar()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import
    reuse_freed_memory()
    return torch.device("cpu")


def start(alone_too: bool = False) -> None:
    """Initialise the process group of all ranks. A single process needs none, except for sharding
    engines: `alone_too` creates a group of one."""
    if dist.is_initialized() or (world_size() == 1 and not alone_too):
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=TIMEOUT_S)}
    if world_size() == 1:
        store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
        options |= {"store": store, "rank": 0, "world_size": 1}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
    dist.init_process_group(backend, **options)


def leave_at_exit() -> None:
    """Leave the process group before the interpreter ends; for ranks that end together, after their
    last collective."""
    if dist.is_initialized():
        atexit.unregister(_leave)  # of an earlier run in this process
        atexit.register(_leave)


def _leave() -> None:
    """A gloo thread that lets go of its last tensor needs the interpreter's lock, and aborts the
    process if that has ended meanwhile. DeepSpeed keeps groups, whose threads nothing joins: a
    pause is all they need."""
    dist.destroy_process_group()
    time.sleep(0.2)


def barrier() -> None:
    """Wait until every rank has reached this call."""
    all_max(0)


def all_sum(values: Sequence[float]) -> list[float]:
    """Sum of each value over all ranks, in fp64."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def all_max(value: int) -> int:
    """Maximum of the value over all ranks."""
    if world_size() == 1:
        return value
    maximum = torch.tensor(value)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)


def all_gather(value: T) -> list[T]:
    """Values of all ranks, in rank order; anything that pickles, with tensors on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_dict(entries: dict[Any, T]) -> dict[Any, T]:
    """Entries of all ranks in one dictionary."""
    return {key: value for part in all_gather(entries) for key, value in part.items()}


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on the first rank and return its result on every rank; an exception is raised on
    every rank, too."""
    if world_size() == 1:
        return make()
    message: list[Any] = [None, None]  # result, exception
    if is_first():
        try:
            message[0] = make()
        except Exception as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


@lru_cache
def announce(message: str) -> None:
    """Print a message to stderr from the first rank, once per process."""
    if is_first():
        print(message, file=sys.stderr)


def progress_bar(**options: Any) -> Any:
    """A tqdm progress bar on stderr, shown by the first rank only."""
    return tqdm(file=sys.stderr, disable=not is_first(), **options)


def reuse_freed_memory(reuse: bool = True) -> None:
    """Make glibc keep freed blocks inside the process; no effect with other C libraries.

    By default glibc returns every large block to the system, and each step pays the page faults for
    the same activations again: a fifth of a CPU step. `reuse=False` restores that default, for
    memory measurements.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # names of mallopt(3)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(mmap_max, 0 if reuse else 2**16)
        library.mallopt(trim_threshold, 2**30 if reuse else 2**17)
        library.mallopt(top_pad, 2**26 if reuse else 0)
        if not reuse:
            library.mallopt(mmap_threshold, 2**17)  # else it grows with what is freed
            library.malloc_trim(0)

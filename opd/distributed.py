"""The ranks of a run, as torchrun or the deepspeed launcher started them: who I am, and what we all
say. A process on its own answers for itself."""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from opd import distributed

TIMEOUT_S = 7200.0  # the first rank looks at every video while the others wait
T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes the run folder and speaks to the user."""
    return rank() == 0


def start(alone_too: bool = False) -> None:
    """Join the group of all ranks; `alone_too` makes one of a single process, which sharding
    engines ask for."""
    if dist.is_initialized() or (size() == 1 and not alone_too):
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    place: dict[str, Any] = {"timeout": timedelta(seconds=TIMEOUT_S)}
    if size() == 1:
        store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
        place |= {"store": store, "rank": 0, "world_size": 1}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
    dist.init_process_group(backend, **place)


def total(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, one for each value, in fp64."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def most(value: int) -> int:
    """The largest of all ranks' values."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def wait() -> None:
    """Until every rank has come here."""
    most(0)


def everyone(value: T) -> list[T]:
    """All ranks' values (anything that pickles, tensors on the CPU), in their order."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def merged(mine: dict[Any, T]) -> dict[Any, T]:
    """All ranks' entries in one dictionary."""
    return {key: value for part in everyone(mine) for key, value in part.items()}


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; an exception of it is raised on all."""
    if size() == 1:
        return make()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def reuse_freed_memory(reuse: bool = True) -> None:
    """Keep freed blocks inside the process where the C library is glibc; elsewhere do nothing.

    By default it gives every large block back to the system, and each step pays the page faults for
    the same activations again: a fifth of a CPU step. `reuse` False goes back to that, for whoever
    measures memory.
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


def set_up(threads: int | None, seed: int) -> torch.device:
    """Make the process ready for a run, and return its device."""
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


def progress_bar(**options: Any) -> Any:
    """On stderr, the first rank's alone."""
    return tqdm(file=sys.stderr, disable=not distributed.is_first(), **options)

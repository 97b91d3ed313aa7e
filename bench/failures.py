"""Who fails while others are measured: errors of one call, and errors after which the device is
lost to the whole process."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def wait() -> None:
    """Until the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class DeviceLost(RuntimeError):
    """A call broke the CUDA context: nothing runs in this process any more."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def attempt(
    failures: dict[str, str],
    name: str,
    shape: object,
    call: Callable[[], T],
    *,
    keep_errors: bool = False,
) -> T | None:
    """What the call returns, when the device has finished; None for who has failed, now or before.
    `failures` says of those who ran out of memory at which shape, and with `keep_errors` of the
    others with which error, where without it they raise.

    Raises DeviceLost, whatever `keep_errors`, for an error after which this process can run nothing
    on the device.
    """
    if name in failures:
        return None
    try:
        value = call()
        wait()
        return value
    except Exception as error:
        reason = one_line(error)
        if device_lost(error):
            raise DeviceLost(name, reason) from error
        if out_of_memory(error):
            reason = f"out of memory at {shape}"
        elif not keep_errors:
            raise
    # Outside of the handler, which holds the call's tensors.
    failures[name] = reason
    gc.collect()
    torch.cuda.empty_cache()
    return None


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


STICKY = (  # errors that leave a CUDA context unusable
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "hardware stack error",
    "invalid program counter",
    "launch timed out",
)


def device_lost(error: BaseException) -> bool:
    """Whether an error leaves the process's CUDA context unusable."""
    return any(words in str(error) for words in STICKY)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on either device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    told = str(error)
    names = (
        "DefaultCPUAllocator",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
    )
    return isinstance(error, RuntimeError) and any(name in told for name in names)

"""Helpers for tests of what runs on a GPU, without one: fake "cuda" tensors and graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BROKEN_PRODUCTS = torch.__version__ < "2.12"  # of torch 2.11: addmm(out_dtype=) on fake tensors


def shape_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on fake tensors, also where torch has no shape function for it."""
    if BROKEN_PRODUCTS and func == torch.ops.aten.addmm.dtype_out:
        out, (addend, left, right, *_) = kwargs["out"], args
        assert out.shape == addend.shape == (left.shape[0], right.shape[1])
        assert left.shape[1] == right.shape[0] and left.dtype == right.dtype
        return out
    return func(*args, **kwargs)


class _Recording(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(function: Callable[[], None]) -> Callable[[], None]:
    """What `opd.generation.recorded.cuda_graph` does, on a CPU: a replay runs the same operations
    on the same memory, with the numbers that were on the host while they were recorded."""
    with _Recording() as recording:
        function()
    replays = 0

    def replay() -> None:
        nonlocal replays
        replays += 1
        for func, args, kwargs, result in recording.calls if replays > 1 else ():
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not any(value.alias_info for value in func._schema.returns):  # else a view
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

    return replay

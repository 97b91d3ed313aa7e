"""Helpers for tests on fake "cuda" tensors."""

from typing import Any

import torch

BROKEN_PRODUCTS = torch.__version__ < "2.12"  # of torch 2.11: addmm(out_dtype=) on fake tensors


def shape_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on fake tensors, also where torch has no shape function for it."""
    if BROKEN_PRODUCTS and func == torch.ops.aten.addmm.dtype_out:
        out, (addend, left, right, *_) = kwargs["out"], args
        assert out.shape == addend.shape == (left.shape[0], right.shape[1])
        assert left.shape[1] == right.shape[0] and left.dtype == right.dtype
        return out
    return func(*args, **kwargs)

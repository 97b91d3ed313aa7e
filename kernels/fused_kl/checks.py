"""Argument checks: one line that names the argument, what it is, and what it should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_side(
    hidden_name: str,
    hidden: Tensor,
    head_name: str,
    lm_head: Tensor,
    bias_name: str,
    bias: Tensor | None,
) -> None:
    """One model's hidden states [N, H], head [V, H] and bias [V]."""
    for name, tensor, expected in (
        (hidden_name, hidden, "[N, H]"),
        (head_name, lm_head, "[V, H]"),
    ):
        if tensor.ndim != 2:
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected {expected}")
    if hidden.shape[1] != lm_head.shape[1]:
        raise ValueError(
            f"{head_name} has shape {_shape(lm_head)}, "
            f"expected [V, {hidden.shape[1]}] to match {hidden_name}"
        )
    if lm_head.shape[0] == 0:
        raise ValueError(f"{head_name} has shape {_shape(lm_head)}, expected at least one row")
    if bias is not None and bias.shape != lm_head.shape[:1]:
        raise ValueError(f"{bias_name} has shape {_shape(bias)}, expected [{lm_head.shape[0]}]")
    for name, tensor in ((hidden_name, hidden), (head_name, lm_head), (bias_name, bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            )


def check_same_device(anchor_name: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Every tensor lives where the anchor lives."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {anchor.device} as {anchor_name}"
            )


def check_frozen(what: str, **tensors: Tensor | None) -> None:
    """No gradient flows into these: asking for one is a mistake."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, expected {what} without grad (detach it)")


def check_rows(num_rows: int, **tensors: Tensor | None) -> None:
    """Per-token values: [N], floating, or bool where a mask is meant."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (num_rows,):
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected [{num_rows}]")
        if tensor.dtype not in (*FLOATS, torch.bool):
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float dtype or bool")


def check_columns(allowed_columns: Tensor | None, vocab: int, used: int) -> None:
    """allowed_columns [V] bool with one True at least among the `used` first columns."""
    if allowed_columns is None:
        return
    if allowed_columns.shape != (vocab,):
        raise ValueError(f"allowed_columns has shape {_shape(allowed_columns)}, expected [{vocab}]")
    if allowed_columns.dtype != torch.bool:
        raise ValueError(f"allowed_columns has dtype {allowed_columns.dtype}, expected bool")
    # Only on the CPU: elsewhere this would stop the host, and the loss becomes NaN instead.
    if allowed_columns.device.type == "cpu" and not allowed_columns[:used].any():
        raise ValueError("allowed_columns allows no column, expected at least one True")


def check_token_ids(token_ids: Tensor, num_rows: int) -> None:
    """token_ids [N] int64 or int32."""
    if token_ids.shape != (num_rows,):
        raise ValueError(f"token_ids has shape {_shape(token_ids)}, expected [{num_rows}]")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids has dtype {token_ids.dtype}, expected int64 or int32")


def check_token_range(token_ids: Tensor, vocab: int) -> None:
    """Every id names a column; on other devices torch's own device assertion says so."""
    if token_ids.device.type != "cpu" or token_ids.numel() == 0:
        return
    low, high = (int(x) for x in token_ids.aminmax())
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise ValueError(f"token_ids holds {bad}, expected ids in [0, {vocab})")


def check_temperature(temperature: float) -> None:
    """A finite number above zero."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")


def check_beta(beta: float) -> None:
    """A number in [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}, expected a number in [0, 1]")


def check_clip(clip: float | None) -> None:
    """None, or a number in (0, 1)."""
    if clip is not None and not 0.0 < clip < 1.0:
        raise ValueError(f"clip is {clip}, expected None or a number in (0, 1)")


def check_chunk_size(chunk_size: int | str) -> None:
    """'auto' or a positive integer."""
    if isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1:
        return
    if chunk_size != "auto":
        raise ValueError(f"chunk_size is {chunk_size!r}, expected 'auto' or an integer >= 1")

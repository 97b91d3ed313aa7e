"""Checks of arguments. A message names the argument, what it is, and what is expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kl.arguments import (
    DivergenceInputs,
    DivergenceOptions,
    HeadInputs,
    LogitOptions,
    TokenInputs,
    counted,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        expected = "float16, bfloat16, float32 or float64"
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {expected}")


def check_head(inputs: HeadInputs, prefix: str = "") -> None:
    """One model's hidden states [N, H], head [V, H] and bias [V]; `prefix` starts their names."""
    hidden, lm_head, bias = inputs
    hidden_name, head_name, bias_name = (prefix + field for field in inputs._fields)
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
        if tensor is not None:
            _check_float(name, tensor)
            if tensor.dtype != hidden.dtype:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}, expected {hidden.dtype} as {hidden_name}"
                )


def check_logit_options(options: LogitOptions) -> None:
    """Finite numbers above 0; `softcap` may be None."""
    for name, value in zip(options._fields, options, strict=True):
        check_positive(name, value)


def check_same_device(anchor_name: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Every tensor is on the device of the anchor."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {anchor.device} as {anchor_name}"
            )


def check_frozen(what: str, **tensors: Tensor | None) -> None:
    """The loss gives no gradient to these tensors, so that none may require one."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, expected {what} without grad (detach it)")


def check_rows(num_rows: int, **tensors: Tensor | None) -> None:
    """Values per token: [N], of a float dtype, or bool for a mask."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (num_rows,):
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected [{num_rows}]")
        if tensor.dtype not in (*FLOATS, torch.bool):
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float dtype or bool")


def check_columns(
    allowed_columns: Tensor | None, vocab: int, used: int, *, sharded: bool = False
) -> None:
    """allowed_columns [V] bool, with at least one True among the first `used` columns, or
    `sharded` among those of all ranks."""
    if allowed_columns is None:
        return
    if allowed_columns.shape != (vocab,):
        raise ValueError(f"allowed_columns has shape {_shape(allowed_columns)}, expected [{vocab}]")
    if allowed_columns.dtype != torch.bool:
        raise ValueError(f"allowed_columns has dtype {allowed_columns.dtype}, expected bool")
    # Only on the CPU: elsewhere the host would wait, and the loss becomes NaN instead.
    if sharded or allowed_columns.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not allowed_columns[:used].any():
        raise ValueError("allowed_columns allows no column, expected at least one True")


def check_token_ids(token_ids: Tensor, num_rows: int) -> None:
    """token_ids [N] int64 or int32."""
    if token_ids.shape != (num_rows,):
        raise ValueError(f"token_ids has shape {_shape(token_ids)}, expected [{num_rows}]")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids has dtype {token_ids.dtype}, expected int64 or int32")


def check_token_range(token_ids: Tensor, vocab: int, token_weights: Tensor | None = None) -> None:
    """Every id is a column of the vocabulary, except in rows of weight 0.

    Only on the CPU and outside torch.compile: elsewhere the host would wait, and torch's own
    assertion finds the mistake.
    """
    if token_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    token_ids = counted(token_ids, token_weights)
    if token_ids.numel() == 0:
        return
    low, high = (int(x) for x in token_ids.aminmax())
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise ValueError(f"token_ids holds {bad}, expected ids in [0, {vocab})")


def check_beta(beta: float) -> None:
    """A number in [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}, expected a number in [0, 1]")


def check_sparse(tolerance: float, capacity: int | None) -> None:
    """tolerance in [0, 1), capacity an integer of 1 or more, or None."""
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}, expected a number in [0, 1)")
    if capacity is not None and not (isinstance(capacity, int) and capacity >= 1):
        raise ValueError(f"capacity is {capacity!r}, expected None or an integer >= 1")


def check_coefficient(name: str, value: float) -> None:
    """A finite number of 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, expected a finite number >= 0")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the names."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_positive(name: str, value: float | None) -> None:
    """None, or a finite number above zero."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected a finite number > 0")


def chunk_rows(chunk_size: int | str) -> int:
    """The number of rows of a chunk, 0 for 'auto'."""
    if isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size >= 1:
        return chunk_size
    if chunk_size != "auto":
        raise ValueError(f"chunk_size is {chunk_size!r}, expected 'auto' or an integer >= 1")
    return 0


def check_finite(active: Tensor | None, **tensors: Tensor | None) -> None:
    """No NaN and no inf, except -inf in a bias; hidden states count in active rows only."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~tensor.isfinite()
        if name.endswith("bias"):
            bad &= ~tensor.isneginf()
        if active is not None and name.endswith("hidden"):
            bad &= active[:, None]
        if bad.any():
            place = bad.nonzero()[0].tolist()
            value = tensor[tuple(place)].item()
            raise ValueError(f"{name} holds {value} at {place}, expected finite values")


def _check_rows_and_columns(
    shape: tuple[int, int],
    teacher_vocab: int,
    token_weights: Tensor | None,
    token_ids: Tensor | None,
    allowed_columns: Tensor | None,
    *,
    sharded: bool = False,
) -> None:
    """Arguments of a divergence that describe its rows and columns, `shape` [N, V] of the
    student."""
    num_rows, vocab = shape
    num_columns = min(vocab, teacher_vocab)
    check_frozen("constants", token_weights=token_weights)
    check_rows(num_rows, token_weights=token_weights)
    check_columns(allowed_columns, vocab, num_columns, sharded=sharded)
    if token_ids is not None:
        check_token_ids(token_ids, num_rows)
        if not sharded:
            check_token_range(token_ids, num_columns, token_weights)


def check_divergence(
    inputs: DivergenceInputs, options: DivergenceOptions, check: bool, *, sharded: bool = False
) -> None:
    """All arguments of a divergence between two models; with `check` also their values. `sharded`
    are those of one rank of a group."""
    check_head(inputs.student, "student_")
    check_head(inputs.teacher, "teacher_")
    num_rows, vocab = inputs.num_rows, inputs.student_lm_head.shape[0]
    if inputs.teacher_hidden.shape[0] != num_rows:
        raise ValueError(
            f"teacher_hidden has {inputs.teacher_hidden.shape[0]} rows, "
            f"expected {num_rows} as student_hidden"
        )
    check_frozen(
        "a frozen teacher",
        teacher_hidden=inputs.teacher_hidden,
        teacher_lm_head=inputs.teacher_lm_head,
        teacher_bias=inputs.teacher_bias,
    )
    check_same_device("student_hidden", inputs.student_hidden, **inputs._asdict())
    weights = inputs.token_weights
    teacher_vocab = inputs.teacher_lm_head.shape[0]
    if sharded and teacher_vocab != vocab:
        raise ValueError(
            f"teacher_lm_head has {teacher_vocab} rows, expected {vocab} as the student"
        )
    _check_rows_and_columns(
        (num_rows, vocab),
        teacher_vocab,
        weights,
        inputs.token_ids,
        inputs.allowed_columns,
        sharded=sharded,
    )
    if check:
        check_finite(None, token_weights=weights)
        check_finite(
            None if weights is None else weights != 0,
            student_hidden=inputs.student_hidden,
            student_lm_head=inputs.student_lm_head,
            student_bias=inputs.student_bias,
            teacher_hidden=inputs.teacher_hidden,
            teacher_lm_head=inputs.teacher_lm_head,
            teacher_bias=inputs.teacher_bias,
        )


def check_tokens(inputs: TokenInputs, options: LogitOptions, *, sharded: bool = False) -> None:
    """Arguments that the losses of given tokens share, except for the range of the ids, which does
    not matter in rows of weight 0."""
    check_head(inputs.head)
    check_same_device(
        "hidden",
        inputs.hidden,
        lm_head=inputs.lm_head,
        token_ids=inputs.token_ids,
        allowed_columns=inputs.allowed_columns,
        bias=inputs.bias,
    )
    check_token_ids(inputs.token_ids, inputs.num_rows)
    vocab = inputs.num_columns
    check_columns(inputs.allowed_columns, vocab, vocab, sharded=sharded)
    check_logit_options(options)


def check_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_weights: Tensor | None,
    token_ids: Tensor | None,
    allowed_columns: Tensor | None,
) -> None:
    """All tensors of a divergence between logits."""
    for name, tensor in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected [N, V]")
        _check_float(name, tensor)
    num_rows, vocab = student_logits.shape
    if teacher_logits.shape[0] != num_rows:
        raise ValueError(
            f"teacher_logits has {teacher_logits.shape[0]} rows, "
            f"expected {num_rows} as student_logits"
        )
    check_frozen("a frozen teacher", teacher_logits=teacher_logits)
    check_same_device(
        "student_logits",
        student_logits,
        teacher_logits=teacher_logits,
        token_weights=token_weights,
        token_ids=token_ids,
        allowed_columns=allowed_columns,
    )
    _check_rows_and_columns(
        (num_rows, vocab), teacher_logits.shape[1], token_weights, token_ids, allowed_columns
    )

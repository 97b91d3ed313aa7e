"""Row programs in Triton: the functions of `torch_kernels`, in two reads of the logits (three for
JSD with its gradient). fp32 logits only; gradients in the dtype of the tensor that receives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kl import triton_device
from fused_kl.rows import (
    Banned,
    Norms,
    TokenRows,
    TokenScale,
    as_logprobs,
    chosen_logits,
    merge,
    summarise,
)
from fused_kl.tiles import RowProgram, row_program

SCALE_BLOCK = 8192


def _launch(kernel: Any, program: RowProgram, num_rows: int, *arguments: Any, **flags: Any) -> None:
    if num_rows:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
            kernel[(num_rows, program.splits)](
                *arguments,
                program.split_columns,
                **flags,
                BLOCK=program.block,
                num_warps=program.num_warps,
            )


def _allowed(banned: Banned | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns are allowed, as bytes, and what stands at the others."""
    if banned is None:
        return unused, unused
    return (~banned.columns).view(torch.uint8), banned.value


def divergence_statistics(
    student_logits: Tensor, teacher_logits: Tensor, *, banned: Banned | None
) -> Tensor:
    """`torch_kernels.divergence_statistics`; both logits are left as they were."""
    num_rows, num_columns = student_logits.shape
    program = row_program(num_rows, num_columns)
    states = student_logits.new_empty(program.splits, 8, num_rows)
    _launch(
        triton_device.divergence_statistics,
        program,
        num_rows,
        student_logits,
        teacher_logits,
        *_allowed(banned, student_logits),
        states,
        num_rows,
        num_columns,
        student_logits.stride(0),
        teacher_logits.stride(0),
        HAS_BANNED=banned is not None,
    )
    return states[0] if program.splits == 1 else merge(states)


def _gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    norms: Norms,
    *,
    beta: float,
    banned: Banned | None,
    student_part: Tensor | None = None,
    scale: Tensor | None = None,
    grad: Tensor | None = None,
    with_value: bool,
) -> Tensor:
    """One read of both logits; returns the two values `[2, n]`, if they are asked for."""
    num_rows, num_columns = student_logits.shape
    program = row_program(num_rows, num_columns)
    values = student_logits.new_empty(program.splits if with_value else 0, 2, num_rows)
    kinds = {1.0: triton_device.REVERSE, 0.0: triton_device.FORWARD}
    unused = student_logits
    _launch(
        triton_device.divergence_gradient,
        program,
        num_rows,
        student_logits,
        teacher_logits,
        *_allowed(banned, student_logits),
        *norms,
        unused if student_part is None else student_part,
        unused if scale is None else scale,
        unused if grad is None else grad,
        values if with_value else unused,
        num_rows,
        num_columns,
        student_logits.stride(0),
        teacher_logits.stride(0),
        0 if grad is None else grad.stride(0),
        beta,
        KIND=kinds.get(beta, triton_device.JSD).value,
        HAS_BANNED=banned is not None,
        WITH_VALUE=with_value,
        WITH_GRAD=grad is not None,
    )
    return values.sum(0)


def jsd_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    norms: Norms,
    *,
    beta: float,
    banned: Banned | None,
) -> Tensor:
    """`torch_kernels.jsd_parts`; both logits are left as they were."""
    return _gradient(
        student_logits, teacher_logits, norms, beta=beta, banned=banned, with_value=True
    )


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    norms: Norms,
    *,
    beta: float,
    student_part: Tensor,
    banned: Banned | None,
    scale: Tensor,
    grad: Tensor,
) -> None:
    """`torch_kernels.divergence_gradient_`; logits that are not `grad` are left as they were."""
    _gradient(
        student_logits,
        teacher_logits,
        norms,
        beta=beta,
        banned=banned,
        student_part=student_part,
        scale=scale,
        grad=grad,
        with_value=False,
    )


def divergence_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    beta: float,
    banned: Banned | None,
    scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """`torch_kernels.divergence_rows_`; logits that are not `grad` are left as they were."""
    state = divergence_statistics(student_logits, teacher_logits, banned=banned)
    norms, student_entropy, teacher_entropy, *_ = summarise(state)
    logprobs = []
    if token_ids is not None:
        chosen = chosen_logits(student_logits, token_ids, banned)
        logprobs.append(as_logprobs(chosen - norms.student_max - norms.student_log_sum))
    rules: dict[str, Any] = dict(beta=beta, banned=banned)
    logits = student_logits, teacher_logits
    if beta in (0.0, 1.0):
        kl, _ = _gradient(*logits, norms, **rules, scale=scale, grad=grad, with_value=True)
    else:
        teacher_part, student_part = jsd_parts(*logits, norms, **rules)
        kl = beta * teacher_part + (1 - beta) * student_part
        if grad is not None and scale is not None:
            divergence_gradient_(
                *logits, norms, **rules, student_part=student_part, scale=scale, grad=grad
            )
    return [kl.clamp_min(0), student_entropy, teacher_entropy, *logprobs]


def token_rows_(
    logits: Tensor,
    token_ids: Tensor,
    *,
    banned: Banned | None,
    scale: TokenScale | None = None,
    grad: Tensor | None = None,
) -> TokenRows:
    """`torch_kernels.token_rows_`; logits that are not `grad` are left as they were."""
    num_rows, num_columns = logits.shape
    program = row_program(num_rows, num_columns)
    states = logits.new_empty(program.splits, 4, num_rows)
    allowed = _allowed(banned, logits)
    _launch(
        triton_device.token_statistics,
        program,
        num_rows,
        logits,
        *allowed,
        token_ids,
        states,
        num_rows,
        num_columns,
        logits.stride(0),
        HAS_BANNED=banned is not None,
    )
    # Parts of the vocabulary merge as in rows.merge.
    maxima, totals, firsts, others = states.unbind(1)
    largest = maxima.amax(0)
    shift = maxima - largest
    total = (shift.exp() * totals).sum(0)
    first = (shift.exp() * (firsts + totals * shift)).sum(0)
    rest = (shift.exp() * others).sum(0) / total
    log_sum = total.log()
    logprobs = as_logprobs(chosen_logits(logits, token_ids, banned) - largest - log_sum)
    if grad is not None and scale is not None:
        _launch(
            triton_device.token_gradient,
            program,
            num_rows,
            logits,
            *allowed,
            token_ids,
            largest,
            log_sum,
            rest,
            scale(slice(0, num_rows), logprobs),
            grad,
            num_columns,
            logits.stride(0),
            grad.stride(0),
            HAS_BANNED=banned is not None,
        )
    return TokenRows(logprobs, log_sum - first / total)


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values` times the 0-dim `factor`, in place; a factor of 1 costs no pass over them."""
    kernel: Any = triton_device.scale_in_place
    grid = (-(-values.numel() // SCALE_BLOCK),)
    with torch.cuda.device_of(values):
        kernel[grid](values, factor, values.numel(), BLOCK=SCALE_BLOCK, num_warps=8)

"""Row programs in Triton: the functions of `torch_kernels`, in two reads of the logits (three for
JSD with its gradient). fp32 logits only; gradients in the dtype of the tensor that receives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kl import triton_device
from fused_kl.rows import Banned, Norms, Summary, TokenRows, TokenScale
from fused_kl.tiles import RowProgram, num_multiprocessors, row_program

# `scale_` keeps this many programs on each multiprocessor; `bench.registers` holds the registers
# of a thread to what lets them stay.
SCALE_PROGRAMS = 4
SCALE_BLOCK, SCALE_WARPS = 8192, 8
CHOSEN_BLOCK, CHOSEN_WARPS = 128, 4
# Splits of a row that a summary reads at least; more than that are rare.
SUMMARY_BLOCK = 32


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
    """Every launch goes through here."""
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        kernel[grid](*arguments, **flags)


def _launch(kernel: Any, program: RowProgram, num_rows: int, *arguments: Any, **flags: Any) -> None:
    if num_rows:
        flags |= {"BLOCK": program.block, "num_warps": program.num_warps}
        _start(kernel, (num_rows, program.splits), *arguments, program.split_columns, **flags)


def summary_program(splits: int) -> dict[str, int]:
    """How a program reads all splits of a row at once, at most four by each thread."""
    block = max(SUMMARY_BLOCK, 1 << (splits - 1).bit_length())
    return {"BLOCK": block, "num_warps": max(1, block // 128)}


def _summary(kernel: Any, states: Tensor, num_fields: int) -> Tensor:
    """`[num_fields, n]` of the states `[splits, ..., n]`."""
    splits, _, num_rows = states.shape
    out = states.new_empty(num_fields, num_rows)
    if num_rows:
        _start(kernel, (num_rows,), states, out, num_rows, splits, **summary_program(splits))
    return out


def _banned(banned: Banned | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns are banned, as bytes, and what stands there."""
    if banned is None:
        return unused, unused
    return banned.columns.view(torch.uint8), banned.value


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, maxima: Tensor, log_sums: Tensor, banned: Banned | None
) -> Tensor:
    """`torch_kernels.chosen_logprobs` in one launch."""
    num_rows = len(logits)
    logprobs = logits.new_empty(num_rows)
    if num_rows:
        _start(
            triton_device.chosen_logprobs,
            (-(-num_rows // CHOSEN_BLOCK),),
            logits,
            *_banned(banned, logits),
            token_ids,
            maxima,
            log_sums,
            logprobs,
            num_rows,
            logits.stride(0),
            HAS_BANNED=banned is not None,
            BLOCK=CHOSEN_BLOCK,
            num_warps=CHOSEN_WARPS,
        )
    return logprobs


def summarise(states: Tensor) -> Summary:
    """`torch_kernels.summarise` in one launch."""
    fields = _summary(triton_device.divergence_summary, states, 9).unbind()
    return Summary(Norms(*fields[:5]), *fields[5:])


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
        *_banned(banned, student_logits),
        states,
        num_rows,
        num_columns,
        student_logits.stride(0),
        teacher_logits.stride(0),
        HAS_BANNED=banned is not None,
    )
    return states


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
        *_banned(banned, student_logits),
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
    return values[0] if with_value and program.splits == 1 else values.sum(0)


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
    states = divergence_statistics(student_logits, teacher_logits, banned=banned)
    norms, student_entropy, teacher_entropy, *_ = summarise(states)
    logprobs = []
    if token_ids is not None:
        sizes = norms.student_max, norms.student_log_sum
        logprobs.append(chosen_logprobs(student_logits, token_ids, *sizes, banned))
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
    banned_columns = _banned(banned, logits)
    _launch(
        triton_device.token_statistics,
        program,
        num_rows,
        logits,
        *banned_columns,
        token_ids,
        states,
        num_rows,
        num_columns,
        logits.stride(0),
        HAS_BANNED=banned is not None,
    )
    largest, log_sum, rest, entropy = _summary(triton_device.token_summary, states, 4).unbind()
    logprobs = chosen_logprobs(logits, token_ids, largest, log_sum, banned)
    if grad is not None and scale is not None:
        _launch(
            triton_device.token_gradient,
            program,
            num_rows,
            logits,
            *banned_columns,
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
    return TokenRows(logprobs, entropy)


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values` times the 0-dim `factor`, in place; a factor of 1 costs no pass over them."""
    count = values.numel()
    programs = min(-(-count // SCALE_BLOCK), SCALE_PROGRAMS * num_multiprocessors())
    if programs:
        flags = {"BLOCK": SCALE_BLOCK, "num_warps": SCALE_WARPS}
        _start(triton_device.scale_in_place, (programs,), values, factor, count, **flags)

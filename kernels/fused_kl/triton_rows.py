"""Row programs in Triton, for fp32 logits on a GPU: see `rows.RowPrograms`.

It launches the programs of `triton_divergence`, `triton_tokens` and `triton_shared`. A
divergence reads the logits twice, and the JSD with its gradient three times. Gradients are written
in the dtype of the tensor that receives them. Logits that are not `grad` are left unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_kl import triton_divergence, triton_shared, triton_tokens
from fused_kl.rows import Banned, Norms, Summary, TokenNorms, TokenRows, TokenScale
from fused_kl.tiles import RowProgram, num_multiprocessors, row_program

# Programs of `scale_` on each multiprocessor; a test limits the registers of a thread, so that all
# of them are resident at once.
SCALE_PROGRAMS = 4
SCALE_BLOCK, SCALE_WARPS = 8192, 8
CHOSEN_BLOCK, CHOSEN_WARPS = 128, 4
# Fewest splits of a row that a summary reads at once; more splits are rare.
SUMMARY_BLOCK = 32


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
    """Launch a program; every launch goes through here."""
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device.
        kernel[grid](*arguments, **flags)


def _launch(kernel: Any, program: RowProgram, num_rows: int, *arguments: Any, **flags: Any) -> None:
    """Launch a program over rows of logits, each of which may be split over several programs."""
    if num_rows:
        flags |= {"BLOCK": program.block, "num_warps": program.num_warps}
        _start(kernel, (num_rows, program.splits), *arguments, program.split_columns, **flags)


def summary_program(splits: int) -> dict[str, int]:
    """Launch options of a program that reads all splits of a row at once, at most four per
    thread."""
    block = max(SUMMARY_BLOCK, 1 << (splits - 1).bit_length())
    return {"BLOCK": block, "num_warps": max(1, block // 128)}


def _summary(kernel: Any, states: Tensor, num_fields: int) -> Tensor:
    """Summarise the states `[splits, ..., n]`: `[num_fields, n]`."""
    splits, _, num_rows = states.shape
    out = states.new_empty(num_fields, num_rows)
    if num_rows:
        _start(kernel, (num_rows,), states, out, num_rows, splits, **summary_program(splits))
    return out


def _banned(banned: Banned | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """The banned columns, as bytes, and the value of their logits; `unused` stands for both where
    nothing is banned."""
    if banned is None:
        return unused, unused
    return banned.columns.view(torch.uint8), banned.value


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, maxima: Tensor, log_sums: Tensor, banned: Banned | None
) -> Tensor:
    num_rows = len(logits)
    logprobs = logits.new_empty(num_rows)
    if num_rows:
        _start(
            triton_tokens.chosen_logprobs,
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
    fields = _summary(triton_divergence.divergence_summary, states, 9).unbind()
    return Summary(Norms(*fields[:5]), *fields[5:])


def divergence_statistics(
    student_logits: Tensor, teacher_logits: Tensor, *, banned: Banned | None
) -> Tensor:
    num_rows, num_columns = student_logits.shape
    program = row_program(num_rows, num_columns)
    states = student_logits.new_empty(program.splits, 8, num_rows)
    _launch(
        triton_divergence.divergence_statistics,
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
    """Read both logits once; write the gradient, and return the two values `[2, n]`
    `with_value`."""
    num_rows, num_columns = student_logits.shape
    program = row_program(num_rows, num_columns)
    values = student_logits.new_empty(program.splits if with_value else 0, 2, num_rows)
    kind_of_beta = {1.0: triton_divergence.REVERSE, 0.0: triton_divergence.FORWARD}
    unused = student_logits
    _launch(
        triton_divergence.divergence_gradient,
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
        KIND=kind_of_beta.get(beta, triton_divergence.JSD).value,
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
    states = divergence_statistics(student_logits, teacher_logits, banned=banned)
    norms, student_entropy, teacher_entropy, *_ = summarise(states)
    logprobs = []
    if token_ids is not None:
        sizes = norms.student_max, norms.student_log_sum
        logprobs.append(chosen_logprobs(student_logits, token_ids, *sizes, banned))
    options: dict[str, Any] = dict(beta=beta, banned=banned)
    logits = student_logits, teacher_logits
    if beta in (0.0, 1.0):
        kl, _ = _gradient(*logits, norms, **options, scale=scale, grad=grad, with_value=True)
    else:
        teacher_part, student_part = jsd_parts(*logits, norms, **options)
        kl = beta * teacher_part + (1 - beta) * student_part
        if grad is not None and scale is not None:
            divergence_gradient_(
                *logits, norms, **options, student_part=student_part, scale=scale, grad=grad
            )
    return [kl.clamp_min(0), student_entropy, teacher_entropy, *logprobs]


def token_rows_(
    logits: Tensor,
    token_ids: Tensor,
    *,
    banned: Banned | None,
    scale: TokenScale | None = None,
    entropy_scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> TokenRows:
    states = token_statistics(logits, token_ids, banned=banned)
    norms = TokenNorms(*_summary(triton_tokens.token_summary, states, 4))
    logprobs = chosen_logprobs(logits, token_ids, norms.largest, norms.log_sum, banned)
    if grad is not None and scale is not None:
        scales = scale(slice(0, len(logits)), logprobs)
        options: dict[str, Any] = {"entropy_scale": entropy_scale, "grad": grad}
        token_gradient_(logits, token_ids, norms, banned=banned, scale=scales, **options)
    return TokenRows(logprobs, norms.entropy)


def token_statistics(logits: Tensor, token_ids: Tensor, *, banned: Banned | None) -> Tensor:
    num_rows, num_columns = logits.shape
    program = row_program(num_rows, num_columns)
    states = logits.new_empty(program.splits, 4, num_rows)
    _launch(
        triton_tokens.token_statistics,
        program,
        num_rows,
        logits,
        *_banned(banned, logits),
        token_ids,
        states,
        num_rows,
        num_columns,
        logits.stride(0),
        HAS_BANNED=banned is not None,
    )
    return states


def token_gradient_(
    logits: Tensor,
    token_ids: Tensor,
    norms: TokenNorms,
    *,
    banned: Banned | None,
    scale: Tensor,
    entropy_scale: Tensor | None = None,
    grad: Tensor,
) -> None:
    num_rows, num_columns = logits.shape
    _launch(
        triton_tokens.token_gradient,
        row_program(num_rows, num_columns),
        num_rows,
        logits,
        *_banned(banned, logits),
        token_ids,
        *norms[:3],
        scale,
        norms.entropy,
        logits if entropy_scale is None else entropy_scale,
        grad,
        num_columns,
        logits.stride(0),
        grad.stride(0),
        HAS_BANNED=banned is not None,
        WITH_ENTROPY=entropy_scale is not None,
    )


def scale_(values: Tensor, factor: Tensor) -> None:
    count = values.numel()
    programs = min(-(-count // SCALE_BLOCK), SCALE_PROGRAMS * num_multiprocessors())
    if programs:
        flags = {"BLOCK": SCALE_BLOCK, "num_warps": SCALE_WARPS}
        _start(triton_shared.scale_in_place, (programs,), values, factor, count, **flags)

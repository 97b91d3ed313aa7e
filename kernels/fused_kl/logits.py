"""Divergences of logits that exist already, where hidden states and heads are not at hand."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import checks, head
from fused_kl.arguments import LinearKLOutput
from fused_kl.gradients import SECOND_BACKWARD
from fused_kl.head import compute_dtype, keep_active
from fused_kl.rows import Banned
from fused_kl.tiles import Plan, make_plan, slices


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearKLOutput:
    """loss = sum_n w_n KL(p_S || p_T)_n, p = softmax(logits / temperature): `jsd` with beta 1."""
    return jsd(
        student_logits,
        teacher_logits,
        beta=1.0,
        token_weights=token_weights,
        token_ids=token_ids,
        allowed_columns=allowed_columns,
        temperature=temperature,
        reduction=reduction,
        chunk_size=chunk_size,
    )


@torch.compiler.disable()  # breaks the graph cleanly: this loss has no custom op
def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    token_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearKLOutput:
    """The generalised JSD of `linear_reverse_kl`, from logits instead of hidden states.

    The gradient is computed with the loss and is the only `[N, V]` tensor allocated; backward
    scales it and hands it over, once.

    Args:
        student_logits: `[N, V]` fp16, bf16, fp32 or fp64; they are not changed.
        teacher_logits: `[N, V']`, without grad; if V' differs from V, the larger is cut.

    All other arguments, the result and the errors are those of `linear_reverse_kl`.
    """
    checks.check_choice("reduction", reduction, ("sum", "none"))
    checks.check_beta(beta)
    checks.check_positive("temperature", temperature)
    checks.check_logits(student_logits, teacher_logits, token_weights, token_ids, allowed_columns)
    num_rows = student_logits.shape[0]
    num_columns = min(student_logits.shape[1], teacher_logits.shape[1])
    dtype = compute_dtype(student_logits, teacher_logits)
    plan = make_plan(
        "fast",
        num_rows,
        num_columns,
        bytes_per_logit=2 * dtype.itemsize,
        device_type=student_logits.device.type,
        chunk_size=checks.chunk_rows(chunk_size),
    )
    active = None if token_weights is None else token_weights != 0
    ids = None if token_ids is None else keep_active(token_ids.long(), active)
    banned = (
        None if allowed_columns is None else Banned.outside(allowed_columns[:num_columns], dtype)
    )
    token_kl, *stats = _LogitDivergence.apply(
        student_logits, teacher_logits, ids, active, banned, float(beta), temperature, plan
    )
    loss = token_kl if token_weights is None else token_kl * token_weights.to(dtype)
    return LinearKLOutput(
        loss=loss.sum() if reduction == "sum" else loss,
        token_kl=token_kl.detach(),
        student_entropy=stats[0],
        teacher_entropy=stats[1],
        student_logprobs=stats[2] if ids is not None else None,
        plan=plan,
    )


class _LogitDivergence(torch.autograd.Function):
    """Divergence and statistics of each row; forward computes the gradient of the logits, too."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx,
        student_logits: Tensor,
        teacher_logits: Tensor,
        token_ids: Tensor | None,
        active: Tensor | None,
        banned: Banned | None,
        beta: float,
        temperature: float,
        plan: Plan,
    ):
        dtype = compute_dtype(student_logits, teacher_logits)
        num_rows, columns = len(student_logits), slice(0, plan.columns)
        make = student_logits.new_empty
        gradient = torch.zeros_like(student_logits) if ctx.needs_input_grad[0] else None
        stats = [make(num_rows, dtype=dtype) for _ in range(3 + (token_ids is not None))]
        buffers = make(2, min(plan.rows, num_rows), plan.columns, dtype=dtype)
        scale = make(num_rows, dtype=dtype).fill_(1 / temperature)
        programs = head.row_programs(buffers)
        for rows in slices(num_rows, plan.rows):
            s, t = buffers[:, : rows.stop - rows.start]
            for out, logits in ((s, student_logits), (t, teacher_logits)):
                torch.mul(logits[rows, columns].to(dtype), 1 / temperature, out=out)
                if active is not None:
                    out.masked_fill_(~active[rows, None], 0)  # such rows may hold NaN
            values = programs.divergence_rows_(
                s,
                t,
                None if token_ids is None else token_ids[rows],
                beta=beta,
                banned=banned,
                scale=None if gradient is None else scale[rows],
                grad=None if gradient is None else s,
            )
            if gradient is not None:
                gradient[rows, columns] = s
            for stat, value in zip(stats, values, strict=True):
                stat[rows] = value
        ctx.gradient, ctx.active = gradient, active
        stats = tuple(keep_active(stat, active) for stat in stats)
        ctx.mark_non_differentiable(*stats[1:])
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl: Tensor, *_):  # pyright: ignore
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(SECOND_BACKWARD)
        gradient.mul_(keep_active(grad_kl, ctx.active)[:, None])
        return gradient, *[None] * 7

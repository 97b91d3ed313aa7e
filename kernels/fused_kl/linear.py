"""Full-vocabulary divergence between student and teacher, straight from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fused_kl import checks
from fused_kl.chunks import (
    Gradients,
    LossWithGradients,
    Needs,
    Side,
    compute_dtype,
    keep_active,
    row_programs,
)
from fused_kl.tiles import token_chunks
from fused_kl.torch_kernels import Banned


@dataclass(frozen=True, kw_only=True)
class LinearKLOutput:
    """What `linear_reverse_kl` returns; fp32, or fp64 for fp64 inputs; values in nats.

    `loss` is a differentiable scalar. The others are [N], detached, not weighted, and 0 in rows of
    weight 0; `student_logprobs`, of the given tokens, is None where none were given.
    """

    loss: Tensor
    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor | None = None


def linear_reverse_kl(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    token_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearKLOutput:
    """loss = sum_n w_n KL(p_S || p_T)_n, p = softmax((hidden @ lm_head.T + bias) / temperature).

    Gradients are computed in forward, chunk by chunk over tokens: `[N, V]` never exists, and only
    one backward is possible.

    Args:
        student_hidden: `[N, Hs]` fp16, bf16, fp32 or fp64, after the final norm.
        student_lm_head: `[V, Hs]`; its gradient is skipped when it does not require grad.
        teacher_hidden: `[N, Ht]`, without grad.
        teacher_lm_head: `[V', Ht]`, without grad; if V' differs from V, both heads are cut to the
            smaller.
        token_weights: `[N]`, default ones. A row of weight 0 is left out and may hold NaN.
        token_ids: `[N]` int, below both vocabulary sizes: their log-probabilities under the student
            come with the result, at no further product.
        allowed_columns: `[V]` bool; other columns get probability 0 on both sides before
            normalisation.
        temperature: divides both logits; the loss is not multiplied by its square.
        beta: 1 is the reverse KL, 0 the forward KL KL(p_T || p_S), and between them
            beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = (1 - beta) p_S + beta p_T.
        student_bias: `[V]`, may require grad.
        teacher_bias: `[V']`, without grad.
        chunk_size: tokens per chunk; "auto" keeps the two logit buffers within 512 MiB.

    Raises:
        ValueError: on a wrong shape, dtype, device or range, or a teacher that requires grad.
        RuntimeError: on a second backward.

    Source: the generalised JSD of GKD (arXiv 2306.13649), with beta as in TRL and Liger-Kernel.
    """
    _check(
        student_hidden,
        student_lm_head,
        teacher_hidden,
        teacher_lm_head,
        token_weights,
        allowed_columns,
        temperature,
        beta,
        student_bias,
        teacher_bias,
        chunk_size,
    )
    num_rows = student_hidden.shape[0]
    num_columns = min(student_lm_head.shape[0], teacher_lm_head.shape[0])
    if token_ids is not None:
        checks.check_token_ids(token_ids, num_rows)
        checks.check_same_device("student_hidden", student_hidden, token_ids=token_ids)
        checks.check_token_range(token_ids, num_columns)
    dtype = compute_dtype(
        student_hidden, student_lm_head, teacher_hidden, teacher_lm_head, student_bias, teacher_bias
    )
    active = None if token_weights is None else token_weights != 0
    student, teacher = (
        Side(
            hidden,
            lm_head,
            bias,
            num_columns=num_columns,
            temperature=temperature,
            active=active,
            dtype=dtype,
        )
        for hidden, lm_head, bias in (
            (student_hidden, student_lm_head, student_bias),
            (teacher_hidden, teacher_lm_head, teacher_bias),
        )
    )
    weights = (
        student_hidden.new_ones(num_rows, dtype=dtype)
        if token_weights is None
        else token_weights.to(dtype)
    )
    banned = (
        None if allowed_columns is None else Banned.outside(allowed_columns[:num_columns], dtype)
    )
    chunks = token_chunks(num_rows, num_columns, 2, dtype.itemsize, chunk_size)
    needs = Needs.of(student_hidden, student_lm_head, student_bias)

    programs = row_programs(weights)

    def run() -> tuple[Tensor, tuple[Tensor, ...], Gradients]:
        gradients = Gradients(student, needs, num_rows, student_lm_head.shape[0])
        stats = tuple(weights.new_empty(num_rows) for _ in range(3 + (token_ids is not None)))
        chunk_rows = max((rows.stop - rows.start for rows in chunks), default=0)
        buffers = weights.new_empty(2, chunk_rows, num_columns)
        for rows in chunks:
            size = rows.stop - rows.start
            student_rows = student.rows(rows)
            student_logits, teacher_logits = buffers[0, :size], buffers[1, :size]
            student.project(student_rows, student_logits)
            teacher.project(teacher.rows(rows), teacher_logits)
            values = programs.divergence_rows_(
                student_logits,
                teacher_logits,
                None if token_ids is None else token_ids[rows],
                beta=beta,
                banned=banned,
                with_grad=any(needs),
            )
            for stat, value in zip(stats, values, strict=True):
                stat[rows] = value
            if any(needs):
                gradients.add(rows, student_rows, student_logits, weights[rows])
        stats = tuple(keep_active(stat, active) for stat in stats)
        return (weights * stats[0]).sum(), stats, gradients

    if any(needs):
        loss, *stats = LossWithGradients.apply(run, student_hidden, student_lm_head, student_bias)
    else:
        loss, stats, _ = run()
    token_kl, student_entropy, teacher_entropy, *logprobs = stats
    return LinearKLOutput(
        loss=loss,
        token_kl=token_kl,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_logprobs=logprobs[0] if logprobs else None,
    )


def _check(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    token_weights: Tensor | None,
    allowed_columns: Tensor | None,
    temperature: float,
    beta: float,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    chunk_size: int | str,
) -> None:
    for name, hidden, lm_head, bias in (
        ("student", student_hidden, student_lm_head, student_bias),
        ("teacher", teacher_hidden, teacher_lm_head, teacher_bias),
    ):
        checks.check_side(
            f"{name}_hidden", hidden, f"{name}_lm_head", lm_head, f"{name}_bias", bias
        )
    num_rows = student_hidden.shape[0]
    if teacher_hidden.shape[0] != num_rows:
        raise ValueError(
            f"teacher_hidden has {teacher_hidden.shape[0]} rows, "
            f"expected {num_rows} as student_hidden"
        )
    checks.check_frozen(
        "a frozen teacher",
        teacher_hidden=teacher_hidden,
        teacher_lm_head=teacher_lm_head,
        teacher_bias=teacher_bias,
    )
    checks.check_frozen("constants", token_weights=token_weights)
    checks.check_rows(num_rows, token_weights=token_weights)
    checks.check_same_device(
        "student_hidden",
        student_hidden,
        student_lm_head=student_lm_head,
        teacher_hidden=teacher_hidden,
        teacher_lm_head=teacher_lm_head,
        token_weights=token_weights,
        allowed_columns=allowed_columns,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
    )
    checks.check_columns(
        allowed_columns,
        student_lm_head.shape[0],
        min(student_lm_head.shape[0], teacher_lm_head.shape[0]),
    )
    checks.check_temperature(temperature)
    checks.check_beta(beta)
    checks.check_chunk_size(chunk_size)

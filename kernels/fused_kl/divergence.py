"""Divergences of two models, block by block, by one of two algorithms.

fast    all columns of some rows at a time, gradients computed with the loss: 4 GEMM units
        (`fused_kl.sparse`, on some columns: 1 unit and a share of 3).
lowmem  some columns of all rows at a time, statistics first, logits recomputed in backward: 6 GEMM
        units (JSD: 8), differentiable per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl import head
from fused_kl.arguments import NO_GRAD, DivergenceInputs, DivergenceOptions, NeedsGrad
from fused_kl.gradients import ComputedLoss, GradientSums, HeadGradients
from fused_kl.head import HeadProjection, keep_active
from fused_kl.rows import Banned, Norms, as_logprobs, chosen_logits
from fused_kl.tiles import Plan, make_plan, slices
from fused_kl.torch_rows import topk_rows_


def plan_of(inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad) -> Plan:
    """The blocks of rows and columns in which a divergence is computed."""
    hidden, lm_head, _ = inputs.student
    itemsize = head.compute_dtype(*inputs.student, *inputs.teacher).itemsize
    half = head.multiplies_half(hidden, lm_head)
    extra_bytes = torch.bfloat16.itemsize if half else 0
    if options.softcap is not None:
        extra_bytes += itemsize
    # Number of rows whose teacher logits are as large as the head's gradient.
    head_itemsize = torch.bfloat16.itemsize if half else itemsize
    gradient_rows = lm_head.shape[1] * head_itemsize // itemsize
    return make_plan(
        options.mode,
        inputs.num_rows,
        inputs.num_columns,
        bytes_per_logit=2 * itemsize + extra_bytes,
        freed_bytes=itemsize,
        gradient_rows=gradient_rows if needs_grad.lm_head else 0,
        device_type=hidden.device.type,
        chunk_size=options.chunk_size,
    )


class ModelPair:
    """Student and teacher, and the buffers that hold their logits of one block."""

    def __init__(
        self, inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad
    ) -> None:
        self.inputs, self.options, self.needs_grad = inputs, options, needs_grad
        self.num_rows, self.num_columns = inputs.num_rows, inputs.num_columns
        self.dtype = head.compute_dtype(*inputs.student, *inputs.teacher)
        weights = inputs.token_weights
        self.active = None if weights is None else weights != 0
        self.weights = (
            inputs.student_hidden.new_ones(self.num_rows, dtype=self.dtype)
            if weights is None
            else weights.to(self.dtype)
        )
        self.student, self.teacher = (
            HeadProjection(
                side,
                options.logits,
                num_columns=self.num_columns,
                active=self.active,
                dtype=self.dtype,
            )
            for side in (inputs.student, inputs.teacher)
        )
        self.token_ids = None if inputs.token_ids is None else inputs.token_ids.long()
        if self.token_ids is not None and self.active is not None:
            self.token_ids = self.token_ids * self.active
        allowed = inputs.allowed_columns
        self.banned = (
            None if allowed is None else Banned.outside(allowed[: self.num_columns], self.dtype)
        )
        self.programs = head.row_programs(self.weights)
        self.plan = plan_of(inputs, options, needs_grad)
        self._shape = shape = min(self.plan.rows, self.num_rows), self.plan.columns
        self._student_logits = head.logit_buffer(self.weights, shape)
        self._teacher_logits: Tensor | None = None
        # Where products take bf16, the gradient of the logits is bf16, in a buffer of its own.
        self._logits_grad = None
        if self.student.half and any(needs_grad):
            self._logits_grad = head.logit_buffer(self.weights, shape, torch.bfloat16)

    def banned_at(self, columns: slice) -> Banned | None:
        """The ban on a tile of the vocabulary."""
        return None if self.banned is None else self.banned.part(columns)

    def blocks(self) -> list[tuple[slice, list[slice]]]:
        """Slices of rows, each with the slices of columns that cover the vocabulary."""
        columns = slices(self.num_columns, self.plan.columns)
        return [(rows, columns) for rows in slices(self.num_rows, self.plan.rows)]

    def project(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The student's hidden rows, both logits, and the derivative of the student's softcap."""
        hidden_rows, s, derivative = self.project_student(rows, columns)
        return hidden_rows, s, self.project_teacher(rows, columns), derivative

    def project_student(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `project`, without the teacher."""
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        s = self._student_logits[:num_rows, :num_columns]
        hidden_rows = self.student.hidden_rows(rows)
        return hidden_rows, s, self.student.project(hidden_rows, s, columns)

    def project_teacher(self, rows: slice, columns: slice) -> Tensor:
        """The teacher's logits."""
        if self._teacher_logits is None:
            self._teacher_logits = head.logit_buffer(self.weights, self._shape)
        t = self._teacher_logits[: rows.stop - rows.start, : columns.stop - columns.start]
        self.teacher.project(self.teacher.hidden_rows(rows), t, columns)
        return t

    def free_teacher(self) -> None:
        """Free the teacher's logits if this block, which holds all rows, was the last to use
        them."""
        if self.plan.rows >= self.num_rows:
            self._teacher_logits = None

    def grad_of(self, s: Tensor) -> Tensor:
        """The tensor that receives the gradient of the student's logits `s`."""
        grad = self._logits_grad
        return s if grad is None else grad[: s.shape[0], : s.shape[1]]

    def gradient_sums(self) -> GradientSums:
        """Sums of the gradients of the student's inputs, before the first block."""
        vocab = len(self.inputs.student_lm_head)
        return GradientSums(self.student, self.needs_grad, vocab=vocab, block_rows=self.plan.rows)


@torch.no_grad()
def fast(
    inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad
) -> ComputedLoss:
    """The weighted sum and its gradients; the details are, per row, the divergence, the entropies
    of student and teacher and, with `token_ids`, the student's log-probabilities."""
    pair = ModelPair(inputs, options, needs_grad)
    sums = pair.gradient_sums()
    stats = pair.weights.new_empty(4 + (pair.token_ids is not None), pair.num_rows)
    slope = pair.student.slope
    scales = pair.weights if slope == 1.0 else pair.weights * slope
    for rows, (columns,) in pair.blocks():
        hidden_rows, s, t, derivative = pair.project(rows, columns)
        grad = pair.grad_of(s) if any(needs_grad) else None
        torch.stack(fast_rows(pair, rows, s, t, scales[rows], grad), out=stats[:, rows])
        del t
        pair.free_teacher()
        if grad is not None:
            if derivative is not None:
                grad.mul_(derivative)
            sums.add(rows, columns, hidden_rows, grad)
    if pair.active is not None:
        stats.masked_fill_(~pair.active, 0)
    losses, *details = stats.unbind()
    return ComputedLoss((pair.weights * losses).sum(), tuple(details), sums.take())


def fast_rows(
    pair: ModelPair, rows: slice | Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """The loss of each row, then its statistics; `grad` receives the gradient of the logits."""
    options, banned = pair.options, pair.banned
    ids = None if pair.token_ids is None else pair.token_ids[rows]
    if options.estimator == "sampled":
        assert ids is not None
        return _sampled_rows(pair, ids, s, t, scale, grad)
    if options.k:
        values = topk_rows_(
            s,
            t,
            ids,
            k=options.k,
            student_support=options.support == "student",
            tail=options.tail,
            banned=banned,
            scale=scale,
            grad=grad,
        )
    else:
        values = pair.programs.divergence_rows_(
            s, t, ids, beta=options.beta, banned=banned, scale=scale, grad=grad
        )
    return [values[0], *values]


def _sampled_rows(
    pair: ModelPair, ids: Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """As `fast_rows`, with the loss log p(y) - log q(y) of the token y, whose gradient is that
    value times the gradient of log p(y)."""
    programs, banned = pair.programs, pair.banned
    summary = programs.summarise(programs.divergence_statistics(s, t, banned=banned))
    norms = summary.norms
    teacher_logprobs = programs.chosen_logprobs(
        t, ids, norms.teacher_max, norms.teacher_log_sum, banned
    )

    def log_ratio(part: slice, logprobs: Tensor) -> Tensor:
        # The logprob of a banned token is constant, so its gradient is 0.
        return torch.where(logprobs.isneginf(), 0, logprobs - teacher_logprobs[part])

    logprobs, _ = programs.token_rows_(
        s,
        ids,
        banned=banned,
        scale=lambda part, logprobs: scale[part] * log_ratio(part, logprobs),
        grad=grad,
    )
    details = [summary.reverse_kl, summary.student_entropy, summary.teacher_entropy, logprobs]
    return [log_ratio(slice(None), logprobs), *details]


class RowDivergences(NamedTuple):
    """Result of lowmem's forward, `[N]` each; `student_logprobs` is empty without `token_ids`.

    `saved` `[6, N]` is what its backward needs: the fields of `Norms`, and KL(p || m).
    """

    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor
    saved: Tensor


def lowmem(inputs: DivergenceInputs, options: DivergenceOptions) -> RowDivergences:
    """Statistics from all tiles, and for the JSD its value from all tiles again; only numbers per
    row are kept."""
    pair = ModelPair(inputs, options, NO_GRAD)
    new_empty = pair.weights.new_empty
    kl, student_entropy, teacher_entropy = (new_empty(pair.num_rows) for _ in range(3))
    logprobs = new_empty(0 if pair.token_ids is None else pair.num_rows)
    saved = pair.weights.new_zeros(6, pair.num_rows)
    for rows, tiles in pair.blocks():
        states, chosen = [], None
        for columns in tiles:
            _, s, t, _ = pair.project(rows, columns)
            banned = pair.banned_at(columns)
            states.append(pair.programs.divergence_statistics(s, t, banned=banned))
            if pair.token_ids is not None:
                place = pair.token_ids[rows] - columns.start
                here = chosen_logits(s, place.clamp(0, s.shape[1] - 1), banned)
                inside = (place >= 0) & (place < s.shape[1])
                chosen = here if chosen is None else torch.where(inside, here, chosen)
        summary = pair.programs.summarise(torch.cat(states))
        norms = summary.norms
        saved[:5, rows] = torch.stack(norms)
        student_entropy[rows] = summary.student_entropy
        teacher_entropy[rows] = summary.teacher_entropy
        if chosen is not None:
            logprobs[rows] = as_logprobs(chosen - norms.student_max - norms.student_log_sum)
        if options.beta == 1.0:
            kl[rows] = summary.reverse_kl
        elif options.beta == 0.0:
            kl[rows] = summary.forward_kl
        else:
            parts = torch.zeros_like(saved[:2, rows])
            for columns in tiles:
                _, s, t, _ = pair.project(rows, columns)
                banned = pair.banned_at(columns)
                parts += pair.programs.jsd_parts(s, t, norms, beta=options.beta, banned=banned)
            saved[5, rows] = parts[1]
            kl[rows] = (options.beta * parts[0] + (1 - options.beta) * parts[1]).clamp_min(0)
    if pair.token_ids is not None:
        logprobs = keep_active(logprobs, pair.active)
    kl, student_entropy, teacher_entropy = (
        keep_active(values, pair.active) for values in (kl, student_entropy, teacher_entropy)
    )
    return RowDivergences(kl, student_entropy, teacher_entropy, logprobs, saved)


def lowmem_gradients(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    needs_grad: NeedsGrad,
    saved: Tensor,
    grad_kl: Tensor,
) -> HeadGradients:
    """Gradients of sum_n grad_kl_n token_kl_n, `grad_kl` `[N]`, from every tile once more."""
    pair = ModelPair(inputs, options, needs_grad)
    sums = pair.gradient_sums()
    scales = keep_active(grad_kl.to(pair.dtype) * pair.student.slope, pair.active)
    for rows, tiles in pair.blocks():
        *norms, student_part = saved[:, rows]
        for columns in tiles:
            hidden_rows, s, t, derivative = pair.project(rows, columns)
            grad = pair.grad_of(s)
            pair.programs.divergence_gradient_(
                s,
                t,
                Norms(*norms),
                beta=options.beta,
                student_part=student_part,
                banned=pair.banned_at(columns),
                scale=scales[rows],
                grad=grad,
            )
            if derivative is not None:
                grad.mul_(derivative)
            sums.add(rows, columns, hidden_rows, grad)
    return sums.take()

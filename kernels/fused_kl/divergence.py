"""The two algorithms behind the divergences of two heads: fast, and lowmem.

fast    all columns of some rows at a time, gradients made with the loss: 4 GEMM units.
lowmem  some columns of all rows at a time, statistics first, recomputed in backward: 6 GEMM units
        (JSD: 8), differentiable per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl.chunks import (
    Gradients,
    HeadRules,
    Needs,
    Side,
    compute_dtype,
    keep_active,
    multiplies_half,
    row_programs,
)
from fused_kl.rows import Banned, Norms, as_logprobs, chosen_logits, merge, summarise
from fused_kl.tiles import Plan, make_plan, slices
from fused_kl.torch_kernels import topk_rows_


class Inputs(NamedTuple):
    """The tensors of `linear_reverse_kl`."""

    student_hidden: Tensor
    student_lm_head: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_lm_head: Tensor
    teacher_bias: Tensor | None
    token_weights: Tensor | None
    token_ids: Tensor | None
    allowed_columns: Tensor | None


class Rules(NamedTuple):
    """Its numbers. `topk` 0 means the full vocabulary, `chunk_size` 0 "auto"."""

    temperature: float
    softcap: float | None
    logit_scale: float
    beta: float
    sampled: bool
    topk: int
    student_support: bool
    tail: bool
    mode: str
    chunk_size: int


def plan_of(inputs: Inputs, rules: Rules) -> Plan:
    """The blocks in which these inputs are walked over."""
    hidden, lm_head = inputs.student_hidden, inputs.student_lm_head
    bytes_per_logit = 2 * compute_dtype(*inputs[:6]).itemsize
    if rules.softcap is not None:
        bytes_per_logit += bytes_per_logit // 2
    if multiplies_half(hidden, lm_head):
        bytes_per_logit += torch.bfloat16.itemsize
    return make_plan(
        rules.mode,
        hidden.shape[0],
        min(lm_head.shape[0], inputs.teacher_lm_head.shape[0]),
        bytes_per_logit=bytes_per_logit,
        device_type=hidden.device.type,
        chunk_size=rules.chunk_size,
    )


class Walk:
    """Both sides of a divergence, and the blocks in which they are walked over."""

    def __init__(self, inputs: Inputs, rules: Rules, needs: Needs) -> None:
        self.inputs, self.rules, self.needs = inputs, rules, needs
        self.num_rows = len(inputs.student_hidden)
        self.num_columns = min(len(inputs.student_lm_head), len(inputs.teacher_lm_head))
        self.dtype = compute_dtype(*inputs[:6])
        weights = inputs.token_weights
        self.active = None if weights is None else weights != 0
        self.weights = (
            inputs.student_hidden.new_ones(self.num_rows, dtype=self.dtype)
            if weights is None
            else weights.to(self.dtype)
        )
        self.student, self.teacher = (
            Side(
                *side,
                num_columns=self.num_columns,
                rules=HeadRules(rules.temperature, rules.softcap, rules.logit_scale),
                active=self.active,
                dtype=self.dtype,
            )
            for side in (inputs[:3], inputs[3:6])
        )
        self.token_ids = None if inputs.token_ids is None else inputs.token_ids.long()
        if self.token_ids is not None:
            self.token_ids = keep_active(self.token_ids, self.active)
        allowed = inputs.allowed_columns
        self.banned = (
            None if allowed is None else Banned.outside(allowed[: self.num_columns], self.dtype)
        )
        self.programs = row_programs(self.weights)
        self.plan = plan_of(inputs, rules)
        rows, columns = self.plan.rows, self.plan.columns
        # Rows start on 32-byte boundaries, which the products want.
        width = -(-columns // 8) * 8 if self.weights.is_cuda else columns
        self._logits = self.weights.new_empty(2, min(rows, self.num_rows), width)[..., :columns]
        # Gradients of bf16 products leave the row programs in bf16, into a buffer of their own.
        self._grad = None
        if self.student.half and any(needs):
            shape = self._logits.shape[1], width
            self._grad = self._logits.new_empty(shape, dtype=torch.bfloat16)[:, :columns]

    def blocks(self) -> list[tuple[slice, list[slice]]]:
        """Row slices, each with the column slices of a whole vocabulary."""
        columns = slices(self.num_columns, self.plan.columns)
        return [(rows, columns) for rows in slices(self.num_rows, self.plan.rows)]

    def project(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The student's hidden rows, both logits, and the derivative of the student's softcap."""
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        s, t = self._logits[:, :num_rows, :num_columns]
        hidden = self.student.rows(rows)
        derivative = self.student.project(hidden, s, columns)
        self.teacher.project(self.teacher.rows(rows), t, columns)
        return hidden, s, t, derivative

    def grad_of(self, s: Tensor) -> Tensor:
        """Where the gradient of the logits `s` goes."""
        return s if self._grad is None else self._grad[: s.shape[0], : s.shape[1]]

    def gradients(self) -> Gradients:
        """Empty ones."""
        vocab = len(self.inputs.student_lm_head)
        return Gradients(self.student, self.needs, self.num_rows, vocab, self.plan.rows)


def fast(inputs: Inputs, rules: Rules, needs: Needs) -> tuple[Tensor, tuple, Gradients]:
    """The weighted sum, then per row the divergence, student's and teacher's entropy and, with
    `token_ids`, the student's log-probability, `[N]` each; and the gradients of the sum."""
    walk = Walk(inputs, rules, needs)
    gradients = walk.gradients()
    losses, *stats = (
        walk.weights.new_empty(walk.num_rows) for _ in range(4 + (walk.token_ids is not None))
    )
    scales = walk.weights * walk.student.slope
    for rows, (columns,) in walk.blocks():
        hidden, s, t, derivative = walk.project(rows, columns)
        grad = walk.grad_of(s) if any(needs) else None
        losses[rows], values = _rows(walk, rows, s, t, scales[rows], grad)
        for stat, value in zip(stats, values, strict=True):
            stat[rows] = value
        if grad is not None:
            if derivative is not None:
                grad.mul_(derivative)
            gradients.add(rows, columns, hidden, grad)
    losses, *stats = (keep_active(stat, walk.active) for stat in (losses, *stats))
    return (walk.weights * losses).sum(), tuple(stats), gradients


def _rows(
    walk: Walk, rows: slice, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """What each row adds to the loss, and its statistics; the gradient goes into `grad`."""
    rules, banned, programs = walk.rules, walk.banned, walk.programs
    ids = None if walk.token_ids is None else walk.token_ids[rows]
    if rules.sampled:
        assert ids is not None
        return _sampled_rows(walk, ids, s, t, scale, grad)
    if rules.topk:
        values = topk_rows_(
            s,
            t,
            ids,
            k=rules.topk,
            student_support=rules.student_support,
            tail=rules.tail,
            banned=banned,
            scale=scale,
            grad=grad,
        )
    else:
        values = programs.divergence_rows_(
            s, t, ids, beta=rules.beta, banned=banned, scale=scale, grad=grad
        )
    return values[0], values


def _sampled_rows(
    walk: Walk, ids: Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """log p(y) - log q(y) of the token y, whose gradient is that times that of log p(y)."""
    state = walk.programs.divergence_statistics(s, t, banned=walk.banned)
    summary = summarise(state)
    norms = summary.norms
    chosen = chosen_logits(t, ids, walk.banned)
    teacher = as_logprobs(chosen - norms.teacher_max - norms.teacher_log_sum)

    def log_ratio(part: slice, logprobs: Tensor) -> Tensor:
        # The logprob of a banned token is constant, so it moves nothing.
        return torch.where(logprobs.isneginf(), 0, logprobs - teacher[part])

    logprobs, _ = walk.programs.token_rows_(
        s,
        ids,
        banned=walk.banned,
        scale=lambda part, logprobs: scale[part] * log_ratio(part, logprobs),
        grad=grad,
    )
    details = [summary.reverse_kl, summary.student_entropy, summary.teacher_entropy, logprobs]
    return log_ratio(slice(None), logprobs), details


class Rowwise(NamedTuple):
    """What the first sweep of lowmem leaves: per row the divergence, student's and teacher's
    entropy, the student's log-probability (empty without `token_ids`), and what the second sweep
    needs, `Norms` and KL(p || m), `[6, N]`."""

    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor
    saved: Tensor


def lowmem(inputs: Inputs, rules: Rules) -> Rowwise:
    """Statistics of all tiles (JSD: then its value), nothing kept but numbers per row."""
    walk = Walk(inputs, rules, Needs(False, False, False))
    make = walk.weights.new_empty
    kl, student_entropy, teacher_entropy = (make(walk.num_rows) for _ in range(3))
    logprobs = make(0 if walk.token_ids is None else walk.num_rows)
    saved = walk.weights.new_zeros(6, walk.num_rows)
    for rows, tiles in walk.blocks():
        states, chosen = [], None
        for columns in tiles:
            _, s, t, _ = walk.project(rows, columns)
            banned = None if walk.banned is None else walk.banned.part(columns)
            states.append(walk.programs.divergence_statistics(s, t, banned=banned))
            if walk.token_ids is not None:
                place = walk.token_ids[rows] - columns.start
                here = chosen_logits(s, place.clamp(0, s.shape[1] - 1), banned)
                inside = (place >= 0) & (place < s.shape[1])
                chosen = here if chosen is None else torch.where(inside, here, chosen)
        summary = summarise(merge(torch.stack(states)))
        norms = summary.norms
        saved[:5, rows] = torch.stack(norms)
        student_entropy[rows] = summary.student_entropy
        teacher_entropy[rows] = summary.teacher_entropy
        if chosen is not None:
            logprobs[rows] = as_logprobs(chosen - norms.student_max - norms.student_log_sum)
        if rules.beta == 1.0:
            kl[rows] = summary.reverse_kl
        elif rules.beta == 0.0:
            kl[rows] = summary.forward_kl
        else:
            parts = torch.zeros_like(saved[:2, rows])
            for columns in tiles:
                _, s, t, _ = walk.project(rows, columns)
                banned = None if walk.banned is None else walk.banned.part(columns)
                parts += walk.programs.jsd_parts(s, t, norms, beta=rules.beta, banned=banned)
            saved[5, rows] = parts[1]
            kl[rows] = (rules.beta * parts[0] + (1 - rules.beta) * parts[1]).clamp_min(0)
    if walk.token_ids is not None:
        logprobs = keep_active(logprobs, walk.active)
    return Rowwise(
        keep_active(kl, walk.active),
        keep_active(student_entropy, walk.active),
        keep_active(teacher_entropy, walk.active),
        logprobs,
        saved,
    )


def lowmem_gradients(
    inputs: Inputs, rules: Rules, needs: Needs, saved: Tensor, grad_kl: Tensor
) -> Gradients:
    """Gradients of sum_n grad_kl_n token_kl_n, `grad_kl` [N]: every tile once more."""
    walk = Walk(inputs, rules, needs)
    gradients = walk.gradients()
    scales = keep_active(grad_kl.to(walk.dtype) * walk.student.slope, walk.active)
    for rows, tiles in walk.blocks():
        *norms, student_part = saved[:, rows]
        for columns in tiles:
            hidden, s, t, derivative = walk.project(rows, columns)
            grad = walk.grad_of(s)
            walk.programs.divergence_gradient_(
                s,
                t,
                Norms(*norms),
                beta=rules.beta,
                student_part=student_part,
                banned=None if walk.banned is None else walk.banned.part(columns),
                scale=scales[rows],
                grad=grad,
            )
            if derivative is not None:
                grad.mul_(derivative)
            gradients.add(rows, columns, hidden, grad)
    return gradients

"""The arguments of a divergence between two heads, and the blocks in which it walks over them."""

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
    logit_buffer,
    multiplies_half,
    row_programs,
)
from fused_kl.rows import Banned
from fused_kl.tiles import Plan, make_plan, slices


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


def plan_of(inputs: Inputs, rules: Rules, needs: Needs) -> Plan:
    """The blocks in which these inputs are walked over."""
    hidden, lm_head = inputs.student_hidden, inputs.student_lm_head
    itemsize = compute_dtype(*inputs[:6]).itemsize
    half = multiplies_half(hidden, lm_head)
    extra = torch.bfloat16.itemsize if half else 0
    # Rows whose teacher's logits are no larger than the gradient of the head.
    head_rows = lm_head.shape[1] * (torch.bfloat16.itemsize if half else itemsize) // itemsize
    if rules.softcap is not None:
        extra += itemsize
    return make_plan(
        rules.mode,
        hidden.shape[0],
        min(lm_head.shape[0], inputs.teacher_lm_head.shape[0]),
        bytes_per_logit=2 * itemsize + extra,
        freed_bytes=itemsize,
        gradient_rows=head_rows if needs.lm_head else 0,
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
        if self.token_ids is not None and self.active is not None:
            self.token_ids = self.token_ids * self.active
        allowed = inputs.allowed_columns
        self.banned = (
            None if allowed is None else Banned.outside(allowed[: self.num_columns], self.dtype)
        )
        self.programs = row_programs(self.weights)
        self.plan = plan_of(inputs, rules, needs)
        shape = min(self.plan.rows, self.num_rows), self.plan.columns
        self._student_logits = logit_buffer(self.weights, shape)
        self._teacher_logits: Tensor | None = logit_buffer(self.weights, shape)
        # Gradients of bf16 products leave the row programs in bf16, into a buffer of their own.
        self._grad = None
        if self.student.half and any(needs):
            self._grad = logit_buffer(self.weights, shape, torch.bfloat16)

    def banned_at(self, columns: slice) -> Banned | None:
        """The ban on a tile of the vocabulary."""
        return None if self.banned is None else self.banned.part(columns)

    def blocks(self) -> list[tuple[slice, list[slice]]]:
        """Row slices, each with the column slices of a whole vocabulary."""
        columns = slices(self.num_columns, self.plan.columns)
        return [(rows, columns) for rows in slices(self.num_rows, self.plan.rows)]

    def project(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The student's hidden rows, both logits, and the derivative of the student's softcap."""
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        assert self._teacher_logits is not None
        s = self._student_logits[:num_rows, :num_columns]
        t = self._teacher_logits[:num_rows, :num_columns]
        hidden = self.student.rows(rows)
        derivative = self.student.project(hidden, s, columns)
        self.teacher.project(self.teacher.rows(rows), t, columns)
        return hidden, s, t, derivative

    def free_teacher(self) -> None:
        """Where one block holds all rows: nobody needs the teacher's logits any more."""
        if self.plan.rows >= self.num_rows:
            self._teacher_logits = None

    def grad_of(self, s: Tensor) -> Tensor:
        """Where the gradient of the logits `s` goes."""
        return s if self._grad is None else self._grad[: s.shape[0], : s.shape[1]]

    def gradients(self) -> Gradients:
        """Empty ones."""
        vocab = len(self.inputs.student_lm_head)
        return Gradients(self.student, self.needs, self.num_rows, vocab, self.plan.rows)

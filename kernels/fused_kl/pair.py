"""Student and teacher of a divergence, and the buffers of one block of their logits."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fused_kl import head
from fused_kl.arguments import DivergenceInputs, DivergenceOptions, NeedsGrad, Shard
from fused_kl.gradients import ComputedLoss, GradientSums
from fused_kl.head import HeadProjection
from fused_kl.rows import Banned, merge
from fused_kl.tiles import Plan, budget, make_plan, slices


def bytes_per_logit(inputs: DivergenceInputs, options: DivergenceOptions) -> int:
    """Bytes of both models' logits of a row and column, and of what is kept beside them."""
    itemsize = head.compute_dtype(*inputs.student, *inputs.teacher).itemsize
    half = head.multiplies_half(*inputs.student[:2])
    capped = options.softcap is not None or options.teacher_softcap is not None
    return (2 + capped) * itemsize + (torch.bfloat16.itemsize if half else 0)


def plan_of(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    needs_grad: NeedsGrad,
    shard: Shard | None = None,
) -> Plan:
    """The blocks of rows and columns in which a divergence is computed; all ranks of a group have
    the same rows."""
    hidden, lm_head, _ = inputs.student
    itemsize = head.compute_dtype(*inputs.student, *inputs.teacher).itemsize
    # Number of rows whose teacher logits are as large as the head's gradient.
    head_itemsize = torch.bfloat16.itemsize if head.multiplies_half(hidden, lm_head) else itemsize
    gradient_rows = lm_head.shape[1] * head_itemsize // itemsize
    return make_plan(
        options.mode,
        inputs.num_rows,
        inputs.num_columns if shard is None else shard.widest,
        bytes_per_logit=bytes_per_logit(inputs, options),
        freed_bytes=itemsize,
        gradient_rows=gradient_rows if needs_grad.lm_head else 0,
        device_type=hidden.device.type,
        chunk_size=options.chunk_size,
    )


def is_tied(inputs: DivergenceInputs, options: DivergenceOptions) -> bool:
    """Whether both models have the same head, and turn its product into logits alike: then one
    product has the logits of both."""
    student, teacher = inputs.sides
    rules, teacher_rules = options.sides
    return (
        options.mode != "sparse"
        and rules == teacher_rules
        and _is_same(student.lm_head, teacher.lm_head)
        and student.hidden.dtype == teacher.hidden.dtype
        and (student.bias is None) == (teacher.bias is None)
        and (student.bias is None or teacher.bias is None or _is_same(student.bias, teacher.bias))
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, read in the same way."""
    if one.shape != other.shape or one.stride() != other.stride() or one.dtype != other.dtype:
        return False
    same_storage = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return bool(same_storage and one.storage_offset() == other.storage_offset())


class ModelPair:
    """Student and teacher, and the buffers that hold their logits of one block."""

    def __init__(
        self,
        inputs: DivergenceInputs,
        options: DivergenceOptions,
        needs_grad: NeedsGrad,
        shard: Shard | None = None,
    ) -> None:
        self.inputs, self.options, self.needs_grad = inputs, options, needs_grad
        self.shard = shard
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
                rules,
                num_columns=self.num_columns,
                active=self.active,
                dtype=self.dtype,
            )
            for side, rules in zip(inputs.sides, options.sides, strict=True)
        )
        self.token_ids = None if inputs.token_ids is None else inputs.token_ids.long()
        if self.token_ids is not None and self.active is not None:
            self.token_ids = self.token_ids * self.active
        allowed = inputs.allowed_columns
        self.banned = None
        if allowed is not None:
            allowed = allowed[: self.num_columns]
            self.banned = Banned.outside(allowed, self.dtype, part=shard is not None)
        self.programs = head.row_programs(self.weights)
        self.plan = plan_of(inputs, options, needs_grad, shard)
        self._shape = shape = min(self.plan.rows, self.num_rows), self.plan.columns
        # With a tied head, the first rows are the student's and those after them the teacher's. A
        # block that is so large because it frees the teacher's logits first has no such buffer.
        block_bytes = self.plan.rows * self.plan.columns * bytes_per_logit(inputs, options)
        device_type = inputs.student_hidden.device.type
        self.tied = is_tied(inputs, options) and block_bytes <= budget(options.mode, device_type)
        size = (1 + self.tied) * shape[0], shape[1]
        self._student_logits = head.logit_buffer(self.weights, size)
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
        logits = self._student_logits[: (1 + self.tied) * num_rows, :num_columns]
        hidden_rows = inputs = self.student.hidden_rows(rows)
        if self.tied:
            inputs = torch.cat([hidden_rows, self.teacher.hidden_rows(rows)])
            self._teacher_logits = logits[num_rows:]
        derivative = self.student.project(inputs, logits, columns)
        if derivative is not None:
            derivative = derivative[:num_rows]
        return hidden_rows, logits[:num_rows], derivative

    def project_teacher(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """The teacher's logits, after the student's."""
        if self.tied:
            assert self._teacher_logits is not None
            return self._teacher_logits
        hidden_rows = self.teacher.hidden_rows(rows)
        if self._teacher_logits is None:
            self._teacher_logits = head.logit_buffer(self.weights, self._shape)
        t = self._teacher_logits[: len(hidden_rows), : columns.stop - columns.start]
        self.teacher.project(hidden_rows, t, columns)
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

    @cached_property
    def scales(self) -> Tensor:
        """Factor `[N]` of each row's gradient by its logits."""
        slope = self.student.slope
        return self.weights if slope == 1.0 else self.weights * slope

    def new_stats(self) -> Tensor:
        """Uninitialised, of each row: its loss and the details of `fast`."""
        return self.weights.new_empty(4 + (self.token_ids is not None), self.num_rows)

    def computed(self, stats: Tensor, sums: GradientSums) -> ComputedLoss:
        """The loss, once every row is in both."""
        if self.active is not None:
            stats.masked_fill_(~self.active, 0)
        losses, *details = stats.unbind()
        loss = (self.weights * losses).sum()
        return ComputedLoss(loss, tuple(details), sums.take(self.shard))

    def everywhere(self, states: Tensor, *chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States of the whole vocabulary, and the logits of tokens, from those of its parts.

        Args:
            states: `[parts, k, n]` of this rank's columns.
            chosen: `[n]` each, 0 where another rank has the token.
        """
        if self.shard is None:
            return states, list(chosen)
        state = states[0] if len(states) == 1 else merge(states)
        every = self.shard.gather(torch.stack((*state, *chosen)))
        fields = len(state)
        return every[:, :fields].contiguous(), [*every[:, fields:].sum(0)]

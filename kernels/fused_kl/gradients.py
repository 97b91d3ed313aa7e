"""Gradients of one head's inputs, summed over blocks, and their way to autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl.arguments import HeadInputs, NeedsGrad, Shard
from fused_kl.head import HeadProjection, product_, row_programs

SECOND_BACKWARD = (
    "second backward through a fused loss: its gradients were computed in forward and handed over "
    "by the first backward; compute the loss again"
)


HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden, lm_head, bias


class GradientSums:
    """Gradients of one head's inputs, summed over blocks; those not needed are not allocated.

    Sums are in the dtype of the logits. Where a GPU multiplies bf16 and one block holds all rows,
    the head's gradient is rounded to bf16 as it is written, and no fp32 copy of it exists.

    Args:
        vocab: rows of the head, of which the projection may use fewer.
        block_rows: rows of the largest block.
    """

    def __init__(
        self,
        projection: HeadProjection,
        needs_grad: NeedsGrad,
        *,
        vocab: int,
        block_rows: int,
    ) -> None:
        self._projection, self._needs_grad = projection, needs_grad
        like, dtype = projection.hidden, projection.dtype
        num_rows, hidden_size = like.shape
        # fp32 also where the head's is bf16: a sum split over tiles would be rounded at each.
        self.hidden = like.new_empty(like.shape, dtype=dtype) if needs_grad.hidden else None
        self.bias = like.new_zeros(vocab, dtype=dtype) if needs_grad.bias else None
        self.lm_head: Tensor | None = None
        self._head_shape = vocab, hidden_size
        self._head_dtype = torch.bfloat16 if projection.half and block_rows >= num_rows else dtype

    def _allocate_head(self) -> Tensor:
        """Called lazily: with one block, the teacher's logits are freed by then."""
        return self._projection.hidden.new_empty(self._head_shape, dtype=self._head_dtype)

    def add(
        self, rows: slice | Tensor, columns: slice, hidden_rows: Tensor, logits_grad: Tensor
    ) -> None:
        """Add one block, given its gradient `[n, columns]` by h W^T + b; blocks come in order.
        Rows given by their indices have all columns at once."""
        if isinstance(rows, Tensor):
            if self.hidden is not None:
                part = self.hidden.new_empty(len(rows), self.hidden.shape[1])
                self._hidden_(part, columns, logits_grad)
                self.hidden[rows] = part
        elif self.hidden is not None:
            self._hidden_(self.hidden[rows], columns, logits_grad)
        if self._needs_grad.lm_head:
            begun = self.lm_head is not None
            if self.lm_head is None:
                self.lm_head = self._allocate_head()
                # The first block overwrites the columns in use, which saves a pass of zeros.
                if self._projection.num_columns < len(self.lm_head):
                    self.lm_head[self._projection.num_columns :].zero_()
            accumulate = begun if isinstance(rows, Tensor) else rows.start > 0
            product_(
                self.lm_head[columns],
                logits_grad.t(),
                hidden_rows.to(logits_grad.dtype),
                alpha=1,
                accumulate=accumulate,
            )
        if self.bias is not None:
            self.bias[columns] += logits_grad.sum(0, dtype=self.bias.dtype)

    def _hidden_(self, out: Tensor, columns: slice, logits_grad: Tensor) -> None:
        """Add a block's gradient of hidden states to `out`; the first columns overwrite it."""
        for tile, head in self._projection.head_tiles(columns):
            product_(
                out,
                logits_grad[:, tile],
                head.to(logits_grad.dtype),
                alpha=1,
                accumulate=columns.start + tile.start > 0,
            )

    def add_some(
        self, rows: Tensor, index: Tensor, hidden_rows: Tensor, logits_grad: Tensor
    ) -> None:
        """As `add`, given the gradient `[n, k]` at columns `index` `[k]`, and 0 at all others."""
        projection = self._projection
        if projection.half:
            logits_grad = logits_grad.bfloat16()
        if self.hidden is not None:
            head = projection.lm_head.index_select(0, index).to(logits_grad.dtype)
            part = self.hidden.new_empty(len(rows), self.hidden.shape[1])
            product_(part, logits_grad, head, alpha=1, accumulate=False)
            self.hidden[rows] = part
        if self._needs_grad.lm_head:
            if self.lm_head is None:
                self.lm_head = self._allocate_head().zero_()
            part = self.lm_head.new_empty(len(index), self.lm_head.shape[1])
            product_(
                part, logits_grad.t(), hidden_rows.to(logits_grad.dtype), alpha=1, accumulate=False
            )
            self.lm_head.index_add_(0, index, part)
        if self.bias is not None:
            self.bias.index_add_(0, index, logits_grad.sum(0, dtype=self.bias.dtype))

    def take(self, shard: Shard | None = None) -> HeadGradients:
        """Gradients of hidden states, head and bias; that of hidden states over all ranks, where
        these have a shard of the vocabulary each."""
        if self._needs_grad.lm_head and self.lm_head is None:
            self.lm_head = self._allocate_head().zero_()  # there were no rows
        if shard is not None and self.hidden is not None:
            shard.sum_(self.hidden)
        return self.hidden, self.lm_head, self.bias


def cast_to_inputs(gradients: HeadGradients, inputs: HeadInputs) -> list[Tensor | None]:
    """The gradients, each in the dtype of its input."""
    pairs = zip(gradients, inputs, strict=True)
    return [None if grad is None or x is None else grad.to(x.dtype) for grad, x in pairs]


class ComputedLoss(NamedTuple):
    """A scalar loss, per-row values `[N]` that come with it, and its gradients."""

    loss: Tensor
    details: tuple[Tensor, ...]
    gradients: HeadGradients


class LossWithGradients(torch.autograd.Function):
    """Attach a computed loss to autograd: backward scales its gradients and hands them over."""

    @staticmethod
    def forward(ctx, computed: ComputedLoss, hidden: Tensor, lm_head: Tensor, bias: Tensor | None):  # pyright: ignore
        ctx.gradients = computed.gradients
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, lm_head, bias))
        ctx.mark_non_differentiable(*computed.details)
        return computed.loss, *computed.details

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):  # pyright: ignore
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(SECOND_BACKWARD)
        scaled = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None:
                row_programs(grad_loss).scale_(gradient, grad_loss)
                gradient = gradient.to(dtype)
            scaled.append(gradient)
        return None, *scaled

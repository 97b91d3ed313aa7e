"""One model's head: logits of a block, gradients summed over blocks, and their way to autograd."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import torch_rows
from fused_kl.arguments import HeadInputs, LogitOptions, NeedsGrad
from fused_kl.rows import FLOOR, RowPrograms
from fused_kl.tiles import head_tile_rows, slices

SECOND_BACKWARD = (
    "second backward through a fused loss: its gradients were computed in forward and handed over "
    "by the first backward; compute the loss again"
)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of logits and statistics: fp64 if any tensor is fp64, else fp32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def row_programs(like: Tensor) -> RowPrograms:
    """The row programs for logits of the device and dtype of `like`: Triton for fp32 on a GPU,
    where Triton is installed, else plain torch."""
    if like.is_cuda and like.dtype == torch.float32:
        try:
            from fused_kl import triton_rows
        except ImportError as error:
            warnings.warn(
                f"fused_kl: Triton cannot be imported ({error}); plain torch does its work, more "
                "slowly",
                stacklevel=3,
            )
        else:
            return triton_rows
    return torch_rows


def multiplies_half(*tensors: Tensor) -> bool:
    """Whether products of these tensors take bf16 inputs as they are and give fp32 results, by
    CUDA's `mm(out_dtype=)`.

    fp16 is widened instead: gradients that include 1/denominator would underflow in it.
    """
    return all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in tensors)


def product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, accumulate: bool) -> None:
    """out = alpha a @ b, or out += alpha a @ b, accumulated in fp32 or wider."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=accumulate, alpha=alpha)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=accumulate, alpha=alpha, out=out)


def logit_buffer(like: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised `[rows, columns]` tensor on the device of `like`.

    On a GPU its rows start at multiples of eight elements, as matrix products require for speed.
    """
    rows, columns = shape
    width = -(-columns // 8) * 8 if like.is_cuda else columns
    return like.new_empty(rows, width, dtype=dtype or like.dtype)[:, :columns]


def keep_active(values: Tensor, active: Tensor | None) -> Tensor:
    """`values` with 0 in rows that are not active."""
    return values if active is None else torch.where(active, values, 0)


class HeadProjection:
    """Projection of one model's hidden states `[N, H]` by its head `[V, H]`, block by block.

    Args:
        num_columns: columns of the vocabulary in use; the rest of the head is ignored.
        active: `[N]` bool; rows that are not active may hold NaN and count as 0.
        dtype: of the logits.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        options: LogitOptions,
        *,
        num_columns: int,
        active: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden = inputs.hidden.detach()
        self.lm_head = inputs.lm_head.detach()[:num_columns]
        self.num_columns = num_columns
        self.active = active
        self.dtype = dtype
        # Whether products take the inputs as they are instead of widened ones.
        self.half = dtype == torch.float32 and multiplies_half(inputs.hidden, inputs.lm_head)
        self._softcap, self._temperature = options.softcap, options.temperature
        # d logit / d(h W^T + b), but for the derivative of a softcap's tanh.
        self.slope = options.logit_scale / (1.0 if options.softcap else options.temperature)
        self.bias = None
        if inputs.bias is not None:
            # A bias of -inf bans a column on one side; FLOOR keeps it from turning into NaN.
            scaled = inputs.bias.detach()[:num_columns].to(dtype) * self.slope
            self.bias = scaled.clamp_min(FLOOR)

    def hidden_rows(self, rows: slice) -> Tensor:
        """`hidden[rows]` in the dtype of the products, 0 in rows that are not active."""
        hidden = self.hidden[rows]
        if not self.half:
            hidden = hidden.to(self.dtype)
        if self.active is None:
            return hidden
        return torch.where(self.active[rows, None], hidden, 0)

    def head_tiles(self, columns: slice) -> list[tuple[slice, Tensor]]:
        """The head at `columns`, in tiles; each comes with its place, counted from the start of
        `columns`.

        A head whose dtype the products take is one tile; otherwise the caller widens one tile at
        a time.
        """
        head = self.lm_head[columns]
        if self.half or head.dtype == self.dtype:
            return [(slice(0, len(head)), head)]
        step = head_tile_rows(head.shape[1], self.dtype.itemsize)
        return [(tile, head[tile]) for tile in slices(len(head), step)]

    def project(self, hidden_rows: Tensor, out: Tensor, columns: slice) -> Tensor | None:
        """Write the logits of `hidden_rows` [n, H] at `columns` into `out` [n, columns].

        Returns the derivative of the tanh `[n, columns]` under a softcap, else None.
        """
        for tile, head in self.head_tiles(columns):
            part = out[:, tile]
            bias = None if self.bias is None else self.bias[columns][tile]
            self._product_(part, hidden_rows, head, bias)
        return self._cap_(out)

    def project_some(self, hidden_rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `project`, at columns `index` `[k]`: logits `[n, k]` and derivative."""
        out = logit_buffer(hidden_rows, (len(hidden_rows), len(index)), self.dtype)
        bias = None if self.bias is None else self.bias[index]
        self._product_(out, hidden_rows, self.lm_head.index_select(0, index), bias)
        return out, self._cap_(out)

    def _product_(
        self, out: Tensor, hidden_rows: Tensor, head: Tensor, bias: Tensor | None
    ) -> None:
        if bias is not None:
            out.copy_(bias.expand_as(out))
        product_(
            out,
            hidden_rows,
            head.to(hidden_rows.dtype).t(),
            alpha=self.slope,
            accumulate=bias is not None,
        )

    def _cap_(self, out: Tensor) -> Tensor | None:
        if self._softcap is None:
            return None
        out.div_(self._softcap).tanh_()
        derivative = torch.mul(out, out).neg_().add_(1)
        out.mul_(self._softcap / self._temperature)
        return derivative.div_(self._temperature)


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

    def add(self, rows: slice, columns: slice, hidden_rows: Tensor, logits_grad: Tensor) -> None:
        """Add one block, given its gradient `[n, columns]` by h W^T + b; blocks come in order."""
        if self.hidden is not None:
            for tile, head in self._projection.head_tiles(columns):
                product_(
                    self.hidden[rows],
                    logits_grad[:, tile],
                    head.to(logits_grad.dtype),
                    alpha=1,
                    accumulate=columns.start + tile.start > 0,
                )
        if self._needs_grad.lm_head:
            if self.lm_head is None:
                self.lm_head = self._allocate_head()
                # The first block overwrites the columns in use, which saves a pass of zeros.
                if self._projection.num_columns < len(self.lm_head):
                    self.lm_head[self._projection.num_columns :].zero_()
            product_(
                self.lm_head[columns],
                logits_grad.t(),
                hidden_rows.to(logits_grad.dtype),
                alpha=1,
                accumulate=rows.start > 0,
            )
        if self.bias is not None:
            self.bias[columns] += logits_grad.sum(0, dtype=self.bias.dtype)

    def add_some(
        self, rows: slice, index: Tensor, hidden_rows: Tensor, logits_grad: Tensor
    ) -> None:
        """As `add`, given the gradient `[n, k]` at columns `index` `[k]`, and 0 at all others."""
        projection = self._projection
        if projection.half:
            logits_grad = logits_grad.bfloat16()
        if self.hidden is not None:
            head = projection.lm_head.index_select(0, index).to(logits_grad.dtype)
            product_(self.hidden[rows], logits_grad, head, alpha=1, accumulate=False)
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

    def take(self) -> HeadGradients:
        """Gradients of hidden states, head and bias."""
        if self._needs_grad.lm_head and self.lm_head is None:
            self.lm_head = self._allocate_head().zero_()  # there were no rows
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

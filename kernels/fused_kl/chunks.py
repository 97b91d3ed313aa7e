"""What the fused losses share: projecting a block, gathering its gradients, handing them over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import torch_kernels
from fused_kl.rows import FLOOR
from fused_kl.tiles import head_tile_rows, slices

SECOND_BACKWARD = (
    "second backward through a fused loss: its gradients were computed in forward and handed over "
    "by the first backward; compute the loss again"
)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def row_programs(like: Tensor) -> ModuleType:
    """What turns logits of this device and dtype into statistics and gradients: Triton for fp32 on
    a GPU, where it is installed; else plain torch."""
    if like.is_cuda and like.dtype == torch.float32:
        try:
            from fused_kl import triton_kernels
        except ImportError as error:
            warnings.warn(f"fused_kl: plain torch does the work of Triton ({error})", stacklevel=3)
        else:
            return triton_kernels
    return torch_kernels


def multiplies_half(*tensors: Tensor) -> bool:
    """Whether products of these keep their bf16 inputs and give fp32: `mm(out_dtype=)` of CUDA.

    fp16 is widened: gradients with 1/denominator in them fall below its range.
    """
    return all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in tensors)


def product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, accumulate: bool) -> None:
    """out = alpha a @ b, or out += alpha a @ b, summed in fp32 at least."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=accumulate, alpha=alpha)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=accumulate, alpha=alpha, out=out)


def logit_buffer(like: Tensor, shape: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty `[rows, columns]` where `like` is; on a GPU its rows start on boundaries of eight
    elements, which the products want."""
    rows, columns = shape
    width = -(-columns // 8) * 8 if like.is_cuda else columns
    return like.new_empty(rows, width, dtype=dtype or like.dtype)[:, :columns]


class HeadRules(NamedTuple):
    """How hidden states become logits: z = logit_scale (h W^T + b), with a softcap
    z = softcap tanh(z / softcap), then z / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Side:
    """One model, `hidden` [N, H] and head [V, H], and its logits block by block."""

    def __init__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        *,
        num_columns: int,
        rules: HeadRules,
        active: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden = hidden.detach()
        self.lm_head = lm_head.detach()[:num_columns]
        self.num_columns = num_columns
        self.rules = rules
        self.active = active
        self.dtype = dtype
        # Whether products take the inputs as they are, instead of widened ones.
        self.half = dtype == torch.float32 and multiplies_half(hidden, lm_head)
        # d logit / d(h W^T + b), up to the tanh.
        self.slope = rules.logit_scale / (1.0 if rules.softcap else rules.temperature)
        self.bias = None
        if bias is not None:
            # A bias of -inf is a ban on one side; FLOOR keeps it from turning into NaN.
            scaled = bias.detach()[:num_columns].to(dtype) * self.slope
            self.bias = scaled.clamp_min(FLOOR)

    def rows(self, rows: slice) -> Tensor:
        """`hidden[rows]` as products take it, zero where a row is not active (it may hold NaN)."""
        hidden = self.hidden[rows]
        if not self.half:
            hidden = hidden.to(self.dtype)
        if self.active is None:
            return hidden
        return torch.where(self.active[rows, None], hidden, 0)

    def weights(self, columns: slice) -> list[tuple[slice, Tensor]]:
        """Slices of `columns`, counted from their start, and the head there as products take it:
        one view, or tiles that are widened one at a time."""
        head = self.lm_head[columns]
        if self.half or head.dtype == self.dtype:
            return [(slice(0, len(head)), head)]
        step = head_tile_rows(head.shape[1], self.dtype.itemsize)
        return [(tile, head[tile]) for tile in slices(len(head), step)]

    def project(self, rows: Tensor, out: Tensor, columns: slice) -> Tensor | None:
        """Write the logits of `rows` [n, H] at `columns` into `out` [n, columns].

        Returns the tanh's derivative [n, columns] under a softcap.
        """
        for tile, head in self.weights(columns):
            part = out[:, tile]
            if self.bias is not None:
                part.copy_(self.bias[columns][tile].expand_as(part))
            product_(
                part,
                rows,
                head.to(rows.dtype).t(),
                alpha=self.slope,
                accumulate=self.bias is not None,
            )
        cap = self.rules.softcap
        if cap is None:
            return None
        out.div_(cap).tanh_()
        derivative = torch.mul(out, out).neg_().add_(1)
        out.mul_(cap / self.rules.temperature)
        return derivative.div_(self.rules.temperature)


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    lm_head: bool
    bias: bool

    @staticmethod
    def of(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> Needs:
        """Nothing when grad is disabled."""
        enabled = torch.is_grad_enabled()
        return Needs(
            enabled and hidden.requires_grad,
            enabled and lm_head.requires_grad,
            enabled and bias is not None and bias.requires_grad,
        )


class Gradients:
    """Gradients summed over blocks; those not needed are not allocated.

    Sums are kept in the compute dtype. Where a GPU multiplies bf16 and one block holds all rows,
    the head's gradient is rounded as it is written, and no fp32 copy of it exists.
    """

    def __init__(
        self, side: Side, needs: Needs, num_rows: int, vocab: int, block_rows: int
    ) -> None:
        self._side, self._needs = side, needs
        make = side.hidden.new_empty
        hidden_size = side.hidden.shape[1]
        # The sum over a whole vocabulary stays fp32: a split product would be added up in bf16.
        self.hidden = make(num_rows, hidden_size, dtype=side.dtype) if needs.hidden else None
        self.bias = side.hidden.new_zeros(vocab, dtype=side.dtype) if needs.bias else None
        head_dtype = torch.bfloat16 if side.half and block_rows >= num_rows else side.dtype
        # Not yet: where one block holds all rows, the teacher's logits are gone when it comes.
        self._new_head = lambda: make(vocab, hidden_size, dtype=head_dtype)
        self.lm_head: Tensor | None = None

    def add(self, rows: slice, columns: slice, hidden_rows: Tensor, logits_grad: Tensor) -> None:
        """Take one block's gradient [n, columns] by the product h W^T + b; blocks come in order."""
        if self.hidden is not None:
            for tile, head in self._side.weights(columns):
                product_(
                    self.hidden[rows],
                    logits_grad[:, tile],
                    head.to(logits_grad.dtype),
                    alpha=1,
                    accumulate=columns.start + tile.start > 0,
                )
        if self._needs.lm_head:
            if self.lm_head is None:
                self.lm_head = self._new_head()
                # The first block overwrites the columns in use: a pass of zeros is saved.
                if self._side.num_columns < len(self.lm_head):
                    self.lm_head[self._side.num_columns :].zero_()
            product_(
                self.lm_head[columns],
                logits_grad.t(),
                hidden_rows.to(logits_grad.dtype),
                alpha=1,
                accumulate=rows.start > 0,
            )
        if self.bias is not None:
            self.bias[columns] += logits_grad.sum(0, dtype=self.bias.dtype)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hidden, head and bias gradient."""
        if self._needs.lm_head and self.lm_head is None:
            self.lm_head = self._new_head().zero_()  # there were no rows
        return self.hidden, self.lm_head, self.bias


Run = Callable[[], tuple[Tensor, tuple[Tensor, ...], Gradients]]


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values` times the 0-dim `factor`, in place, and without a pass over them where it is 1."""
    programs = row_programs(factor)
    if programs is not torch_kernels:
        programs.scale_(values, factor)
    # Asking a CPU scalar for its value is free, a pass over the head's gradient is not.
    elif factor.device.type != "cpu" or factor.item() != 1.0:
        values.mul_(factor)


class LossWithGradients(torch.autograd.Function):
    """A scalar loss whose gradients were computed with it; backward scales and hands them over."""

    @staticmethod
    def forward(ctx, run: Run, hidden: Tensor, lm_head: Tensor, bias: Tensor | None):  # pyright: ignore
        loss, details, gradients = run()
        ctx.gradients = gradients.take()
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, lm_head, bias))
        ctx.mark_non_differentiable(*details)
        return loss, *details

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):  # pyright: ignore
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(SECOND_BACKWARD)
        handed = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None:
                scale_(gradient, grad_loss)
                gradient = gradient.to(dtype)
            handed.append(gradient)
        return None, *handed


def keep_active(values: Tensor, active: Tensor | None) -> Tensor:
    """`values` with 0 in rows that are not active."""
    return values if active is None else torch.where(active, values, 0)

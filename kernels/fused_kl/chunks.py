"""What the fused losses share: projecting a chunk, gathering its gradients, handing them over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import torch_kernels
from fused_kl.tiles import head_tile_rows
from fused_kl.torch_kernels import FLOOR

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


class Side:
    """One model, `hidden` [N, H] and head [V, H]: (hidden @ head.T + bias) / temperature."""

    def __init__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        *,
        num_columns: int,
        temperature: float,
        active: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.hidden = hidden.detach()
        self.lm_head = lm_head.detach()[:num_columns]
        self.num_columns = num_columns
        self.inverse_temperature = 1.0 / temperature
        self.active = active
        self.dtype = dtype
        self.bias = None
        if bias is not None:
            # A bias of -inf is a ban on one side; FLOOR keeps it from turning into NaN.
            scaled = bias.detach()[:num_columns].to(dtype) * self.inverse_temperature
            self.bias = scaled.clamp_min(FLOOR)
        self._tile = (
            num_columns
            if lm_head.dtype == dtype
            else head_tile_rows(lm_head.shape[1], dtype.itemsize)
        )

    def rows(self, rows: slice) -> Tensor:
        """`hidden[rows]` in the compute dtype, zero where a row is not active (it may hold NaN)."""
        hidden = self.hidden[rows].to(self.dtype)
        if self.active is None:
            return hidden
        return torch.where(self.active[rows, None], hidden, 0)

    def tiles(self) -> list[slice]:
        """Vocabulary slices in which the head is widened to the compute dtype."""
        return [
            slice(start, min(start + self._tile, self.num_columns))
            for start in range(0, self.num_columns, self._tile)
        ]

    def project(self, hidden_rows: Tensor, out: Tensor) -> None:
        """Write the logits of `hidden_rows` [n, H] into `out` [n, V]."""
        for tile in self.tiles():
            weight = self.lm_head[tile].to(self.dtype).t()
            if self.bias is None:
                out[:, tile].addmm_(hidden_rows, weight, beta=0, alpha=self.inverse_temperature)
            else:
                torch.addmm(
                    self.bias[tile],
                    hidden_rows,
                    weight,
                    alpha=self.inverse_temperature,
                    out=out[:, tile],
                )


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
    """Gradients summed over chunks in the compute dtype; those not needed are not allocated."""

    def __init__(self, side: Side, needs: Needs, num_rows: int, vocab: int) -> None:
        self._side = side
        hidden_size = side.hidden.shape[1]
        make = side.hidden.new_empty
        self.hidden = make(num_rows, hidden_size, dtype=side.dtype) if needs.hidden else None
        self.lm_head = make(vocab, hidden_size, dtype=side.dtype) if needs.lm_head else None
        self.bias = side.hidden.new_zeros(vocab, dtype=side.dtype) if needs.bias else None
        self._empty = True
        if self.lm_head is not None:
            # The first chunk overwrites the columns in use: a pass of zeros over them is saved.
            self.lm_head[side.num_columns if num_rows else 0 :].zero_()

    def add(self, rows: slice, hidden_rows: Tensor, logits_grad: Tensor, scale: Tensor) -> None:
        """Take one chunk's `logits_grad` [n, V] and row `scale` [n].

        The scale and 1/temperature go onto the `[n, H]` factors: a pass over `[n, V]` is saved.
        """
        side = self._side
        scale = (scale * side.inverse_temperature)[:, None]
        if self.hidden is not None:
            out = self.hidden[rows]
            for index, tile in enumerate(side.tiles()):
                weight = side.lm_head[tile].to(side.dtype)
                out.addmm_(logits_grad[:, tile], weight, beta=0 if index == 0 else 1)
            out.mul_(scale)
        if self.lm_head is not None:
            self.lm_head[: side.num_columns].addmm_(
                logits_grad.t(), hidden_rows * scale, beta=0 if self._empty else 1
            )
        if self.bias is not None:
            self.bias[: side.num_columns].addmv_(logits_grad.t(), scale.squeeze(-1))
        self._empty = False

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hidden, head and bias gradient."""
        return self.hidden, self.lm_head, self.bias


Run = Callable[[], tuple[Tensor, tuple[Tensor, ...], Gradients]]


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
        # Asking a CPU scalar for its value is free, a pass over the head's gradient is not.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        cast = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, *cast


def keep_active(values: Tensor, active: Tensor | None) -> Tensor:
    """`values` with 0 in rows that are not active."""
    return values if active is None else torch.where(active, values, 0)

"""One model's head: its logits, block by block, and the dtypes of its products."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fused_kl import torch_rows
from fused_kl.arguments import HeadInputs, LogitOptions
from fused_kl.rows import FLOOR, RowPrograms
from fused_kl.tiles import head_tile_rows, slices


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

    def hidden_rows(self, rows: slice | Tensor) -> Tensor:
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

"""torch's fused attention kernels with the log-sum-exp of each row, and the masks they take."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from opd.device import send

MASK_ALIGNMENT = 16  # on a GPU, sdpa copies a mask whose rows are not aligned, at every call
aten = torch.ops.aten


def added_to_scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel adds to the scores for a boolean mask: 0 where it is True, -inf elsewhere."""
    *rows, columns = mask.shape
    align = MASK_ALIGNMENT if _is_cuda(mask) else 1
    shape = *rows, -(-columns // align) * align
    added = torch.full(shape, -torch.inf, dtype=dtype, device=mask.device)
    return added[..., :columns].masked_fill_(mask, 0.0)


def fused_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by torch's fused kernels, as they are behind `scaled_dot_product_attention`.

    Args:
        query: `[S, heads, L, D]`; key and value: `[S, heads, n, D]`.
        mask: added to the scores, `[S, 1, 1 or L, n]`.
        causal: of square attention, L = n.

    Returns: `[S, heads, L, D]`, and the natural log-sum-exp of each row's scores, `[S, heads, L]`,
        at least fp32.
    """
    inputs = query, key, value
    if not _is_cuda(query):
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(*inputs, 0.0, causal, scale=scale)[:2]
    if mask is not None:  # as large as the scores, without a copy
        mask = mask.expand(*query.shape[:3], key.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(*inputs, mask, True, 0.0, causal, scale=scale)
    return out, lse[..., : query.shape[2]]  # whose length is rounded up


def fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `fused_forward` without a mask in query, key and value, for any `out` and `lse`
    of its rows. On a GPU for fp32."""
    inputs = grad, query, key, value
    if not _is_cuda(query):
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(*inputs, out, lse, 0.0, causal, scale=scale)
    efficient = aten._scaled_dot_product_efficient_attention_backward
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))
    seed, offset = _no_dropout(query)
    options = out, lse, seed, offset, 0.0, [True, True, True, False], causal
    return efficient(*inputs, None, *options, scale=scale)[:3]


def _is_cuda(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _no_dropout(query: torch.Tensor) -> torch.Tensor:
    """Seed and offset of dropout, which is off."""
    return torch.zeros(2, dtype=torch.uint64, device=query.device)


@dataclass(frozen=True)
class Ranges:
    """Packed attention: the rows of the i-th range attend to the keys of the i-th range, `causal`
    where both are as long. All rows are in a range; keys that none has are in a range without rows.
    """

    row_edges: tuple[int, ...]
    key_edges: tuple[int, ...]
    causal: bool
    device: torch.device

    @classmethod
    def of(
        cls,
        ranges: Iterable[tuple[int, int, int]],
        keys: int,
        causal: bool,
        device: torch.device,
    ) -> "Ranges":
        """Ranges in ascending order, each a number of rows, and start and stop of their keys.

        Args:
            keys: number of all keys.
        """
        row_edges, key_edges = [0], [0]
        for rows, start, stop in [*ranges, (0, keys, keys)]:
            if start > key_edges[-1]:
                row_edges.append(row_edges[-1])
                key_edges.append(start)
            row_edges.append(row_edges[-1] + rows)
            key_edges.append(stop)
        return cls(tuple(row_edges), tuple(key_edges), causal, device)

    @cached_property
    def pairs(self) -> list[tuple[slice, slice]]:
        """Rows and keys of each range that has rows."""
        edges = zip(pairwise(self.row_edges), pairwise(self.key_edges), strict=True)
        return [(slice(*rows), slice(*keys)) for rows, keys in edges if rows[0] < rows[1]]

    @cached_property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Edges of rows and of keys, int32 on the device, and the longest range of each."""
        edges = send(torch.tensor([self.row_edges, self.key_edges], dtype=torch.int32), self.device)
        longest = [max(b - a for a, b in pairwise(x)) for x in (self.row_edges, self.key_edges)]
        return edges[0], edges[1], longest[0], longest[1]


def ranges_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Ranges,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed rows to packed keys; query heads may share key/value heads.

    Args:
        query: `[S, heads, D]`; key and value: `[n, kv_heads, D]`.

    Returns: `[S, heads, D]`, and the natural log-sum-exp of each row's scores, `[S, heads]`, at
        least fp32.
    """
    if _takes_flash(query):
        flash = aten._flash_attention_forward
        if len(ranges.pairs) > 1:
            options = *ranges.packed, 0.0, ranges.causal, False
            out, lse, *_ = flash(query, key, value, *options, scale=scale)
            return out, lse.transpose(0, 1)
        ((_, keys),) = ranges.pairs  # without edges, few rows share out their keys over the GPU
        inputs = query[None], key[keys][None], value[keys][None]
        options = None, None, len(query), keys.stop - keys.start, 0.0, ranges.causal, False
        out, lse, *_ = flash(*inputs, *options, scale=scale)
        return out[0], lse[0].transpose(0, 1)
    heads, per_head = query.shape[1], query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    at_least_fp32 = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(len(query), heads, dtype=at_least_fp32)
    for rows, keys in ranges.pairs:
        inputs = _by_head(query[rows], per_head), *_shared(key[keys], value[keys], per_head)
        own_out, own_lse = fused_forward(*inputs, None, ranges.causal, scale)
        out[rows], lse[rows] = _by_row(own_out), _by_row(own_lse)
    return out, lse


def ranges_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Ranges,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `ranges_forward` in query, key and value, for any `out` and `lse` of its
    rows."""
    if _takes_flash(query):
        flash, causal = aten._flash_attention_backward, ranges.causal
        options = 0.0, causal, _no_dropout(query), query.new_empty(0)
        of_heads = lse.transpose(0, 1).contiguous()
        if len(ranges.pairs) > 1:
            inputs = grad, query, key, value, out, of_heads, *ranges.packed
            return flash(*inputs, *options, scale=scale)
        ((_, keys),) = ranges.pairs
        inputs = [x[None] for x in (grad, query, key[keys], value[keys], out, of_heads)]
        lengths = None, None, len(query), keys.stop - keys.start
        d_query, *d_keys = flash(*inputs, *lengths, *options, scale=scale)
        around = 0, 0, 0, 0, keys.start, len(key) - keys.stop
        d_key, d_value = (torch.nn.functional.pad(x[0], around) for x in d_keys)
        return d_query[0], d_key, d_value
    d_query = torch.empty_like(query)
    d_key, d_value = (x.new_zeros(x.shape) for x in (key, value))
    per_head = query.shape[1] // key.shape[1]
    for rows, keys in ranges.pairs:
        d_out, q, o, log = (_by_head(x[rows], per_head) for x in (grad, query, out, lse))
        k, v = _shared(key[keys], value[keys], per_head)
        own = fused_backward(d_out, q, o, log, k, v, ranges.causal, scale)
        d_query[rows] = _by_row(own[0])
        for sums, each in zip((d_key, d_value), own[1:], strict=True):
            sums[keys] = each.sum(0).transpose(0, 1)
    return d_query, d_key, d_value


def _takes_flash(query: torch.Tensor) -> bool:
    """Whether the GPU's FlashAttention takes such rows."""
    return _is_cuda(query) and query.dtype != torch.float32 and query.shape[-1] % 8 == 0


def _by_head(rows: torch.Tensor, per_head: int) -> torch.Tensor:
    """Arrange `[S, kv_heads * per_head, ...]` as `[per_head, kv_heads, S, ...]`, a batch of query
    heads that share nothing; without a copy."""
    return rows.unflatten(1, (-1, per_head)).transpose(0, 2)


def _by_row(heads: torch.Tensor) -> torch.Tensor:
    """Undo `_by_head`."""
    return heads.transpose(0, 2).flatten(1, 2)


def _shared(
    key: torch.Tensor, value: torch.Tensor, per_head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[n, kv_heads, D]` for each of `per_head` query heads, without a copy:
    `[per_head, kv_heads, n, D]`."""
    key, value = (x.transpose(0, 1).expand(per_head, -1, -1, -1) for x in (key, value))
    return key, value

"""torch's fused attention kernels with the log-sum-exp of each row, and the masks they take."""

import torch

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
    efficient = aten._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(*inputs, _spread(mask, query, key), True, 0.0, causal, scale=scale)
    return out, lse[..., : query.shape[2]]  # whose length is rounded up


def fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `fused_forward` in query, key and value, for any `out` and `lse` of its rows."""
    inputs = grad, query, key, value
    if not _is_cuda(query):
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(*inputs, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    no_seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is off
    if mask is None and query.dtype != torch.float32:
        flash = aten._scaled_dot_product_flash_attention_backward
        lengths = None, None, query.shape[2], key.shape[2]
        options = 0.0, causal, no_seed, no_seed
        return flash(*inputs, out, lse.contiguous(), *lengths, *options, scale=scale)
    efficient = aten._scaled_dot_product_efficient_attention_backward
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))
    wanted = [True, True, True, False]
    options = out, lse, no_seed[0], no_seed[0], 0.0, wanted, causal
    return efficient(*inputs, _spread(mask, query, key), *options, scale=scale)[:3]


def _is_cuda(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _spread(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The mask with the shape of the scores, without a copy."""
    return None if mask is None else mask.expand(*query.shape[:3], key.shape[2])

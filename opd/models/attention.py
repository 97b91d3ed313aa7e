"""Attention: one function for the language model, and a vision attention that batches equal
segments."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "opd"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k' scale + mask) v with grouped queries and without a copy of keys or values per
    query head.

    Args: query: `[B, heads, L, D]`; key and value: `[B, kv_heads, K, D]`. attention_mask: `[B, 1,
        L, K]`, boolean (True attends) or added to the scores; None is causal where L = K.

    Returns:
        `[B, L, heads, D]` and None, as transformers expects.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None:
        causal = length == key.shape[2] and length > 1
        out = scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).contiguous(), None
    # Query groups fold into the length: every key/value head is read once and never repeated.
    folded = query.reshape(batch, heads // groups, groups * length, dim)
    mask = attention_mask if groups == 1 else attention_mask.repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, length, dim).transpose(1, 2).contiguous(), None


def vision_attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """The stock vision attention over packed segments, one batched call per distinct segment
    length.

    Args:
        hidden_states: `[S, H]`, segments one after the other; cu_seqlens: their boundaries.

    The stock module calls attention once a segment: hundreds of calls a layer for a batch of
    videos.
    """
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
    size = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(size, 3, self.num_heads, -1).unbind(1)
    query, key = rotate(query, key, *position_embeddings)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    distinct = lengths.unique().tolist()
    out = torch.empty_like(query) if len(distinct) > 1 else None
    for length in distinct:
        rows = None
        if out is not None:
            starts = cu_seqlens[:-1][lengths == length]
            rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        q, k, v = (
            (x if rows is None else x[rows])
            .view(-1, length, self.num_heads, x.shape[-1])
            .transpose(1, 2)
            for x in (query, key, value)
        )
        part = (
            scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(0, 1)
        )
        out = part if rows is None or out is None else out.index_copy(0, rows, part)
    assert out is not None
    return self.proj(out.reshape(size, -1))


def install(model: PreTrainedModel) -> None:
    """Make `model` use `attend` in its language model and `vision_attention` in its vision
    tower."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    for block in model.model.visual.blocks:
        block.attn.forward = vision_attention.__get__(block.attn)

"""One decoder layer of a language model, with a mask and a cache of our own."""

from functools import cache
from inspect import signature
from typing import Any

import torch

KeyValue = tuple[torch.Tensor, torch.Tensor]  # of one layer, each [G, kv_heads, P, D]


MASK_ALIGNMENT = 16  # on a GPU, sdpa copies a mask whose rows are not aligned, at every call


def prepared_mask(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask once for all layers, which then share it in forward and backward.

    Args:
        mask: boolean `[B, 1, L, K]`, True attends.
        groups: number of query heads per key/value head.

    Returns: `[B, 1, groups, L, K]` of dtype `dtype`: 0 where a token attends, -inf elsewhere.
    """
    batch, _, length, width = mask.shape
    align = MASK_ALIGNMENT if mask.device.type == "cuda" else 1
    shape = (batch, 1, groups, length, -(-width // align) * align)
    added = torch.full(shape, -torch.inf, dtype=dtype, device=mask.device)[..., :width]
    return added.masked_fill_(mask[:, :, None], 0.0)


def run_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    layer_cache: Any,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward `hidden` `[B, T, H]` through one decoder layer, which calls `layer_cache.update` with
    its new keys and values and attends to what that returns."""
    options = {"attention_mask": attention_mask, _cache_argument(type(layer)): layer_cache}
    return layer(hidden, position_embeddings=rotary, **options)


@cache
def _cache_argument(layer_class: type[torch.nn.Module]) -> str:
    """Name of the cache argument of a class of decoder layers; transformers 5.24 renamed it."""
    return "cache" if "cache" in signature(layer_class.forward).parameters else "past_key_values"


class LayerCache:
    """One layer's cache: keeps the new keys and values, and returns them appended to the past's."""

    def __init__(self, past: KeyValue | None = None) -> None:
        self.past = past
        self.key = self.value = torch.empty(0)

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> KeyValue:
        self.key, self.value = key, value
        if self.past is None:
            return key, value
        return torch.cat([self.past[0], key], 2), torch.cat([self.past[1], value], 2)

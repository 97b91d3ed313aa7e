"""The decoder layers of a language model, with masks, caches and recomputation of our own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from opd.models.branches import Branches, NextTokens
from opd.models.fused_attention import added_to_scores

KeyValue = tuple[torch.Tensor, torch.Tensor]  # of one layer, each [G, kv_heads, P, D]


def prepared_mask(mask: torch.Tensor, language_model: Any, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask once for all layers, which then share it in forward and backward.

    Args:
        mask: boolean `[B, 1, L, K]`, True attends.

    Returns: `[B, 1, groups, L, K]` of dtype `dtype`: 0 where a token attends, -inf elsewhere;
        `groups` is the number of query heads per key/value head.
    """
    groups = query_groups(language_model)
    return added_to_scores(mask[:, :, None].expand(-1, -1, groups, -1, -1), dtype)


def query_groups(language_model: Any) -> int:
    """Number of query heads per key/value head."""
    config = language_model.config
    return config.num_attention_heads // config.num_key_value_heads


def run_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    layer_cache: Any,
    attention_mask: torch.Tensor | Branches | NextTokens | None = None,
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
    """One layer's cache: keeps the new keys and values, and returns them appended to the past's;
    with `apart`, beside them."""

    def __init__(self, past: KeyValue | None = None, apart: bool = False) -> None:
        self.past, self.apart = past, apart
        self.key = self.value = torch.empty(0)

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.key, self.value = key, value
        if self.past is None:
            return key, value
        if self.apart:
            return (self.past[0], key), (self.past[1], value)
        return torch.cat([self.past[0], key], 2), torch.cat([self.past[1], value], 2)


def recomputed_layers(mode: str, num_layers: int) -> int:
    """Number of layers, counted from the first, that `prefix.recompute` runs again in backward."""
    named = {"none": 0, "all": num_layers}
    return named[mode] if mode in named else min(int(mode), num_layers)


def forward_layers(
    language_model: Any,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | Branches | None,
    past: Sequence[KeyValue] | None = None,
    recompute: str = "none",
    again: Callable[[], AbstractContextManager[Any]] = nullcontext,
    after: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, hidden: hidden,
) -> tuple[torch.Tensor, list[KeyValue]]:
    """Forward embedded tokens through all decoder layers.

    Args:
        hidden: `[G, T, H]`; with branches all tokens are packed into one row, `[1, S, H]`.
        position_ids: int64 `[3, G, T]`.
        attention_mask: boolean `[G, 1, T, P + T]`, or of the last rows alone; see `attend`. For
            branches, their layout.
        past: keys and values of each layer, `[G, kv_heads, P, D]`, which the tokens attend to.
        recompute: `none`, `all`, or the number of layers whose activations are dropped and
            recomputed in backward; keys and values stay on the graph in every mode.
        again: context of the recomputation.
        after: applied to the result of each layer, with the layer's index.

    Returns: hidden states before the final norm, and each layer's keys and values of the tokens,
        `[G, kv_heads, T, D]`.
    """
    layers, mask = language_model.layers, attention_mask
    rotary = language_model.rotary_emb(hidden, position_ids)
    if isinstance(mask, torch.Tensor):
        mask = prepared_mask(mask, language_model, hidden.dtype)

    def run(
        layer: Any, hidden: torch.Tensor, past: KeyValue | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer_cache = LayerCache(past, apart=isinstance(mask, Branches))
        out = run_layer(layer, hidden, rotary, layer_cache, mask)
        return out, layer_cache.key, layer_cache.value

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), again()

    num_recomputed = recomputed_layers(recompute, len(layers)) if torch.is_grad_enabled() else 0
    new: list[KeyValue] = []
    for index, layer in enumerate(layers):
        arguments = layer, hidden, past[index] if past else None
        if index < num_recomputed:
            result = checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts)
            assert result is not None
        else:
            result = run(*arguments)
        hidden, key, value = result
        hidden = after(index, hidden)
        new.append((key, value))
    return hidden, new

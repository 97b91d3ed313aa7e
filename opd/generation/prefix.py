"""The prefix: a prompt forwarded once, which sampling, scoring and training continue.

    encode   the vision tokens of a batch's videos
    prefill  one forward of the prompts; keeps each layer's keys and values, on the autograd graph
    extend   forward completions against them, so that one backward also reaches the prompt
    forward  prefill of prompts of different lengths, without gradients

`Decoder` (opd/generation/decoder.py) samples from a detached prefix. The completions of one prompt
are packed along the sequence, and each attends to the prompt and to itself: the prompt's keys and
values exist once, whatever the number of rollouts.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from opd import distributed
from opd.data.batch import PromptBatch
from opd.device import send
from opd.generation.layer_counter import LayerCounter
from opd.models.video_lm import Video, VideoLM

KeyValue = tuple[torch.Tensor, torch.Tensor]  # of one layer, each [B, kv_heads, P, D]


@dataclass(frozen=True)
class Prefix:
    """Result of forwarding B prompts: each layer's keys and values `[B, kv_heads, P, D]`.

    `mask` is boolean `[B, P]`, False at left padding. `last_hidden` `[B, H]` is the last token's
    hidden state after the final norm, which predicts the first completion token. `next_position`
    int64 `[B]` is the position id of that token.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    last_hidden: torch.Tensor
    next_position: torch.Tensor

    @property
    def layers(self) -> list[KeyValue]:
        """Key and value of each layer."""
        return list(zip(self.keys, self.values, strict=True))

    def detach(self) -> "Prefix":
        """The same prefix without its graph; shares memory."""
        return replace(
            self,
            keys=[k.detach() for k in self.keys],
            values=[v.detach() for v in self.values],
            last_hidden=self.last_hidden.detach(),
        )

    @classmethod
    def join(cls, parts: Sequence["Prefix"]) -> "Prefix":
        """Concatenate along the batch, left-padded to the longest; each part keeps its graph."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)

        def padded(values: torch.Tensor, dim: int) -> torch.Tensor:
            missing = width - values.shape[dim]
            after = [0, 0] * (values.dim() - 1 - dim)
            return torch.nn.functional.pad(values, [*after, missing, 0])

        def layers(name: str) -> list[torch.Tensor]:
            by_layer = zip(*(getattr(part, name) for part in parts), strict=True)
            return [torch.cat([padded(values, 2) for values in layer]) for layer in by_layer]

        return cls(
            keys=layers("keys"),
            values=layers("values"),
            mask=torch.cat([padded(part.mask, 1) for part in parts]),
            last_hidden=torch.cat([part.last_hidden for part in parts]),
            next_position=torch.cat([part.next_position for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch in parts without padding (`PromptBatch.parts`), and the prefix of each part."""

    parts: list[PromptBatch]
    prefixes: list[Prefix]

    def take(self, indices: Sequence[int]) -> "Prefilled":
        """The parts at these indices."""
        return Prefilled([self.parts[i] for i in indices], [self.prefixes[i] for i in indices])


def encode(lm: VideoLM, batch: PromptBatch) -> Video:
    """Vision tokens of a batch's videos, one after the other.

    A frozen tower encodes each video on its own, so that the result depends on nothing else. It is
    then stored in `Prompt.features` of the prompts that have an entry for this model; their next
    batch comes without frames.
    """
    if lm.trains_vision:
        return lm.encode_video(batch.pixel_values, batch.video_grid_thw)
    videos = []
    for prompt, pixels, grid in zip(batch.prompts, batch.pixels, batch.video_grid_thw, strict=True):
        video = prompt.features.get(lm)
        if video is None:
            video = lm.encode_video(pixels, grid[None])
            if lm in prompt.features:
                prompt.features[lm] = video
        videos.append(video)
    embeds, levels = zip(*videos, strict=True)
    return torch.cat(embeds), [torch.cat(level) for level in zip(*levels, strict=True)]


def recomputed_layers(mode: str, num_layers: int) -> int:
    """Number of layers, counted from the first, that `prefix.recompute` runs again in backward."""
    named = {"none": 0, "all": num_layers}
    return named[mode] if mode in named else min(int(mode), num_layers)


def prefill(
    lm: VideoLM,
    batch: PromptBatch,
    video: Video,
    recompute: str = "none",
    counter: LayerCounter | None = None,
) -> Prefix:
    """Forward prompts of equal length (`PromptBatch.parts`) once. Under autograd the prefix keeps
    its graph, which `extend` continues.

    Args:
        video: vision tokens from `encode`.
        recompute: `none`, `all`, or the number of layers whose activations are dropped and
            recomputed in backward; keys and values stay on the graph in every mode.
    """
    assert batch.input_ids.numel() == batch.num_tokens, "padded prompts"
    counter = counter or LayerCounter()
    language_model = lm.language_model
    embeds, deepstack = video
    hidden = language_model.embed_tokens(batch.input_ids)
    rows = batch.video_rows(lm.model.config.video_token_id)
    assert len(rows) == len(embeds), "as many vision tokens as video tokens in the prompts"
    rows, shape = send(rows, hidden.device), hidden.shape
    hidden = hidden.flatten(0, 1).index_copy(0, rows, embeds.to(hidden.dtype)).view(shape)
    rotary = language_model.rotary_emb(hidden, batch.position_ids)

    def run(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer_cache = _LayerCache()
        out = run_layer(layer, hidden, rotary, layer_cache)
        return out, layer_cache.key, layer_cache.value

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), counter.label("recompute")

    num_recomputed = (
        recomputed_layers(recompute, len(language_model.layers)) if torch.is_grad_enabled() else 0
    )
    keys, values = [], []
    with counter.label("prompt"):
        for index, layer in enumerate(language_model.layers):
            if index < num_recomputed:
                result = checkpoint(run, layer, hidden, use_reentrant=False, context_fn=contexts)
                assert result is not None
                hidden, key, value = result
            else:
                hidden, key, value = run(layer, hidden)
            keys.append(key)
            values.append(value)
            if index < len(deepstack):
                level = deepstack[index].to(hidden.dtype)
                hidden = hidden.flatten(0, 1).index_add(0, rows, level).view(shape)
    last_hidden = language_model.norm(hidden[:, -1])
    return Prefix(keys, values, batch.mask, last_hidden, batch.next_position)


@torch.no_grad()
def forward(lm: VideoLM, batch: PromptBatch) -> Prefix:
    """Encode and prefill prompts of any lengths, without gradients; returns one padded prefix.

    With sharded weights every rank must run as many forwards as the others: a rank with fewer parts
    forwards its last one again.
    """
    parts = batch.parts(alone=lm.sharded)
    extra = distributed.all_max(len(parts)) - len(parts) if lm.sharded else 0
    prefixes = [prefill(lm, part, encode(lm, part)) for part in [*parts, *parts[-1:] * extra]]
    return Prefix.join(prefixes[: len(parts)])


def extend(
    lm: VideoLM, prefix: Prefix, completion_ids: torch.Tensor, counter: LayerCounter | None = None
) -> torch.Tensor:
    """Forward completions against a prefix and return the hidden states that predict each of their
    tokens, after the final norm.

    Args:
        completion_ids: int64 `[B, R, T]`, R completions per prompt, right-padded.

    Returns: `[B, R, T, H]`. Position 0 is the prompt's last hidden state, so only the first T - 1
        tokens of each completion run through the layers.
    """
    batch, rollouts, length = completion_ids.shape
    first = prefix.last_hidden[:, None, None].expand(-1, rollouts, 1, -1)
    if length == 1:
        if not lm.sharded:
            return first
        # Another rank may have longer completions, for which this one must gather weights, too.
        return extend(lm, prefix, completion_ids.expand(-1, -1, 2), counter)[:, :, :1]
    steps = length - 1
    inputs = completion_ids[:, :, :-1].reshape(batch, rollouts * steps)
    offsets = torch.arange(steps, device=inputs.device).repeat(rollouts)
    rollout = torch.arange(rollouts, device=inputs.device).repeat_interleave(steps)
    block = (rollout[:, None] == rollout) & (offsets[:, None] >= offsets)
    attention_mask = torch.cat(
        [prefix.mask[:, None].expand(-1, rollouts * steps, -1), block.expand(batch, -1, -1)], dim=2
    )[:, None]
    positions = (prefix.next_position[:, None] + offsets).expand(3, -1, -1)
    with (counter or LayerCounter()).label("completion"):
        hidden, _ = forward_against(lm, prefix.layers, inputs, positions, attention_mask)
    return torch.cat([first, hidden.view(batch, rollouts, steps, -1)], dim=2)


def forward_against(
    lm: VideoLM,
    past: Sequence[KeyValue],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> tuple[torch.Tensor, list[KeyValue]]:
    """Forward new text tokens against an existing KV cache.

    Args:
        past: keys and values of each layer, `[B, kv_heads, P, D]`.
        input_ids: int64 `[B, T]`.
        position_ids: int64 `[3, B, T]`.
        attention_mask: boolean, broadcast to `[B, heads, T, P + T]`.

    Returns: hidden states `[B, T, H]` after the final norm, and each layer's new keys and values
        `[B, kv_heads, T, D]`.
    """
    language_model = lm.language_model
    hidden = language_model.embed_tokens(input_ids)
    rotary = language_model.rotary_emb(hidden, position_ids)
    new = []
    for layer, past_of_layer in zip(language_model.layers, past, strict=True):
        layer_cache = _LayerCache(past_of_layer)
        hidden = run_layer(layer, hidden, rotary, layer_cache, attention_mask)
        new.append((layer_cache.key, layer_cache.value))
    return language_model.norm(hidden), new


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


class _LayerCache:
    """One layer's cache: keeps the new keys and values, and returns them appended to the past's."""

    def __init__(self, past: KeyValue | None = None) -> None:
        self.past = past
        self.key = self.value = torch.empty(0)

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> KeyValue:
        self.key, self.value = key, value
        if self.past is None:
            return key, value
        return torch.cat([self.past[0], key], 2), torch.cat([self.past[1], value], 2)

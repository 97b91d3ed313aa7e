"""The prefix: a prompt forwarded once, and what is built on it.

`prefill` runs a prompt batch through the layers once and keeps keys and values, with their graph
when gradients are on. `Decoder` samples from a detached copy. `extend` runs completions against the
kept keys and values with gradients, so that one backward reaches the prompt too. Completions of one
prompt lie side by side in the sequence, each seeing the prompt and itself: the prompt's keys and
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


@dataclass(frozen=True)
class Prefix:
    """What a forwarded prompt leaves behind: per layer keys and values `[B, kv_heads, P, D]`.

    `mask` is boolean `[B, P]` (False at left padding), `last_hidden` `[B, H]` is after the final
    norm and `next_position` int64 `[B]` is where each completion starts.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    last_hidden: torch.Tensor
    next_position: torch.Tensor

    def detach(self) -> "Prefix":
        """The same numbers without the graph; shares memory."""
        return replace(
            self,
            keys=[k.detach() for k in self.keys],
            values=[v.detach() for v in self.values],
            last_hidden=self.last_hidden.detach(),
        )

    @classmethod
    def join(cls, parts: Sequence["Prefix"]) -> "Prefix":
        """Several as one, left-padded to the longest; each part keeps its own graph."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)

        def padded(values: torch.Tensor, dim: int) -> torch.Tensor:
            missing = width - values.shape[dim]
            after = [0, 0] * (values.dim() - 1 - dim)
            return torch.nn.functional.pad(values, [*after, missing, 0])

        def layers(name: str) -> list[torch.Tensor]:
            found = zip(*(getattr(part, name) for part in parts), strict=True)
            return [torch.cat([padded(values, 2) for values in layer]) for layer in found]

        return cls(
            keys=layers("keys"),
            values=layers("values"),
            mask=torch.cat([padded(part.mask, 1) for part in parts]),
            last_hidden=torch.cat([part.last_hidden for part in parts]),
            next_position=torch.cat([part.next_position for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts that were forwarded, in parts of one length, and the prefix of each part."""

    parts: list[PromptBatch]
    prefixes: list[Prefix]

    def take(self, places: Sequence[int]) -> "Prefilled":
        """The parts at these places."""
        return Prefilled([self.parts[i] for i in places], [self.prefixes[i] for i in places])


@cache
def _cache_argument(kind: type[torch.nn.Module]) -> str:
    """The name by which a class of decoder layers takes its cache; it changed in transformers
    5.24."""
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def run_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slot: Any,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward `hidden` `[B, T, H]` through one decoder layer, whose keys and values go through
    `slot.update`."""
    options = {"attention_mask": attention_mask, _cache_argument(type(layer)): slot}
    return layer(hidden, position_embeddings=rotary, **options)


class _Slot:
    """Stands where a layer expects its cache: joins the prefix's keys and values with the new ones,
    and keeps the new."""

    def __init__(self, before: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.before = before
        self.key = self.value = torch.empty(0)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.key, self.value = key, value
        if self.before is None:
            return key, value
        return torch.cat([self.before[0], key], 2), torch.cat([self.before[1], value], 2)


def encode(lm: VideoLM, batch: PromptBatch) -> Video:
    """The vision tokens of a batch's videos.

    A frozen tower sees each video alone: what it makes then depends on nothing else, and is kept
    with the prompts that have room for it, whose next batch comes without frames.
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
    return join(videos)


def join(videos: Sequence[Video]) -> Video:
    """The vision tokens of several, one after the other."""
    embeds, levels = zip(*videos, strict=True)
    return torch.cat(embeds), [torch.cat(level) for level in zip(*levels, strict=True)]


def recomputed_layers(mode: str, num_layers: int) -> int:
    """How many layers, from the first, are recomputed in backward."""
    named = {"none": 0, "all": num_layers}
    return named[mode] if mode in named else min(int(mode), num_layers)


def prefill(
    lm: VideoLM,
    batch: PromptBatch,
    video: Video,
    recompute: str = "none",
    counter: LayerCounter | None = None,
) -> Prefix:
    """One forward of prompts of one length (`PromptBatch.parts`). Under autograd the graph is kept,
    for `extend` to continue.

    Args: video: what `encode` made of the batch's frames. recompute: none, all, or how
        many layers drop their activations and run again in backward; keys and values stay on the
        graph in every mode.
    """
    assert batch.input_ids.numel() == batch.num_tokens, "padded prompts"
    counter = counter or LayerCounter()
    language_model = lm.language_model
    embeds, deepstack = video
    hidden = language_model.embed_tokens(batch.input_ids)
    rows = batch.video_rows(lm.model.config.video_token_id)
    assert len(rows) == len(embeds), "a vision token for each place in the prompts"
    rows, shape = send(rows, hidden.device), hidden.shape
    hidden = hidden.flatten(0, 1).index_copy(0, rows, embeds.to(hidden.dtype)).view(shape)
    rotary = language_model.rotary_emb(hidden, batch.position_ids)

    def run(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slot = _Slot()
        out = run_layer(layer, hidden, rotary, slot)
        return out, slot.key, slot.value

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), counter.label("recompute")

    again = (
        recomputed_layers(recompute, len(language_model.layers)) if torch.is_grad_enabled() else 0
    )
    keys, values = [], []
    with counter.label("prompt"):
        for index, layer in enumerate(language_model.layers):
            if index < again:
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
    """The prefix of a batch of any lengths, without a graph.

    Sharded weights are gathered as often on every rank: one with fewer prompts forwards its last
    one again.
    """
    parts = batch.parts(alone=lm.sharded)
    again = distributed.all_max(len(parts)) - len(parts) if lm.sharded else 0
    made = [prefill(lm, part, encode(lm, part)) for part in [*parts, *parts[-1:] * again]]
    return Prefix.join(made[: len(parts)])


def run_behind(
    lm: VideoLM,
    before: Sequence[tuple[torch.Tensor, torch.Tensor]],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Text tokens through the layers, behind keys and values that are there.

    Args:
        before: of each layer, `[B, kv_heads, P, D]`; input_ids: `[B, T]`; position_ids: `[3, B,
            T]`; attention_mask: boolean, broadcast to `[B, heads, T, P + T]`.

    Returns: hidden states `[B, T, H]` after the final norm; each layer's new keys and values.
    """
    language_model = lm.language_model
    hidden = language_model.embed_tokens(input_ids)
    rotary = language_model.rotary_emb(hidden, position_ids)
    new = []
    for layer, pair in zip(language_model.layers, before, strict=True):
        slot = _Slot(pair)
        hidden = run_layer(layer, hidden, rotary, slot, attention_mask)
        new.append((slot.key, slot.value))
    return language_model.norm(hidden), new


def extend(
    lm: VideoLM, prefix: Prefix, completion_ids: torch.Tensor, counter: LayerCounter | None = None
) -> torch.Tensor:
    """Hidden states that predict each completion token, after the final norm.

    Args:
        completion_ids: int64 `[B, R, T]`, R completions per prompt, right-padded.

    Returns: `[B, R, T, H]`; position 0 is the prompt's last hidden state, so only T - 1 tokens run
        through the layers.
    """
    batch, rollouts, length = completion_ids.shape
    first = prefix.last_hidden[:, None, None].expand(-1, rollouts, 1, -1)
    if length == 1:
        if not lm.sharded:
            return first
        # Another rank may have longer ones, and gathers the layers' weights.
        return extend(lm, prefix, completion_ids.expand(-1, -1, 2), counter)[:, :, :1]
    steps = length - 1
    inputs = completion_ids[:, :, :-1].reshape(batch, rollouts * steps)
    offsets = torch.arange(steps, device=inputs.device).repeat(rollouts)
    own = torch.arange(rollouts, device=inputs.device).repeat_interleave(steps)
    block = (own[:, None] == own) & (offsets[:, None] >= offsets)
    attention_mask = torch.cat(
        [prefix.mask[:, None].expand(-1, rollouts * steps, -1), block.expand(batch, -1, -1)], dim=2
    )[:, None]
    positions = (prefix.next_position[:, None] + offsets).expand(3, -1, -1)
    before = list(zip(prefix.keys, prefix.values, strict=True))
    with (counter or LayerCounter()).label("completion"):
        hidden, _ = run_behind(lm, before, inputs, positions, attention_mask)
    return torch.cat([first, hidden.view(batch, rollouts, steps, -1)], dim=2)

"""The prefix: a prompt forwarded once, and what is built on it.

`prefill` runs a prompt batch through the layers once and keeps keys and values, with their graph
when gradients are on. `Decoder` samples from a detached copy. `extend` runs completions against the
kept keys and values with gradients, so that one backward reaches the prompt too. Completions of one
prompt lie side by side in the sequence, each seeing the prompt and itself: the prompt's keys and
values exist once, whatever the number of rollouts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from opd.data.loader import PromptBatch
from opd.models.load import Video, VideoLM


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


@dataclass
class LayerCounter:
    """Counts at the decoder layers which tokens passed through them, by what the pass was for.

    `tokens[label]` is the sum over layers of batch times length. Passes outside any label count as
    `other`.
    """

    num_layers: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    current: str = "other"

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def attach(self, lm: VideoLM) -> "LayerCounter":
        self.num_layers = len(lm.language_model.layers)
        for layer in lm.language_model.layers:
            layer.register_forward_pre_hook(self._count)
        return self

    def _count(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batch, length, _hidden = inputs[0].shape
        self.tokens[self.current] = self.tokens.get(self.current, 0) + batch * length

    def passes(self, label: str, prompt_tokens: int) -> float:
        """Passes through the whole stack per prompt token."""
        return self.tokens.get(label, 0) / (self.num_layers * prompt_tokens)


class _Slot:
    """Stands where a layer expects its cache: joins the prefix's keys and values with the new ones,
    and keeps the new."""

    def __init__(self, before: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.before = before
        self.key = self.value = torch.empty(0)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any
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
    patches = [0 if p.pixel_values is None else len(p.pixel_values) for p in batch.prompts]
    for prompt, pixels, grid in zip(
        batch.prompts, batch.pixel_values.split(patches), batch.video_grid_thw, strict=True
    ):
        video = prompt.features.get(lm)
        if video is None:
            video = lm.encode_video(pixels, grid[None])
            if lm in prompt.features:
                prompt.features[lm] = video
        videos.append(video)
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
    """One forward of a prompt batch. Under autograd the graph is kept, for `extend` to continue.

    Args: video: what `encode` made of the batch's frames. recompute: none, all, or how
        many layers drop their activations and run again in backward; keys and values stay on the
        graph in every mode.
    """
    counter = counter or LayerCounter()
    language_model = lm.language_model
    embeds, deepstack = video
    hidden = language_model.embed_tokens(batch.input_ids)
    is_video = batch.input_ids == lm.model.config.video_token_id
    hidden = hidden.masked_scatter(is_video[..., None], embeds.to(hidden.dtype))
    levels = [
        torch.zeros_like(hidden).masked_scatter(is_video[..., None], d.to(hidden.dtype))
        for d in deepstack
    ]
    rotary = language_model.rotary_emb(hidden, batch.position_ids)
    attention_mask = None if batch.mask.all() else _prompt_mask(batch.mask)

    def run(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slot = _Slot()
        out = layer(
            hidden, attention_mask=attention_mask, position_embeddings=rotary, past_key_values=slot
        )
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
            if index < len(levels):
                hidden = hidden + levels[index]
    last_hidden = language_model.norm(hidden[:, -1])
    return Prefix(keys, values, batch.mask, last_hidden, batch.next_position)


def _prompt_mask(mask: torch.Tensor) -> torch.Tensor:
    """`[B, 1, P, P]`: causal, no padding; padding rows see themselves, because an empty softmax is
    NaN."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None]) | diagonal)[:, None]


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
        return first
    steps = length - 1
    inputs = completion_ids[:, :, :-1].reshape(batch, rollouts * steps)
    offsets = torch.arange(steps, device=inputs.device).repeat(rollouts)
    own = torch.arange(rollouts, device=inputs.device).repeat_interleave(steps)
    block = (own[:, None] == own) & (offsets[:, None] >= offsets)
    attention_mask = torch.cat(
        [prefix.mask[:, None].expand(-1, rollouts * steps, -1), block.expand(batch, -1, -1)], dim=2
    )[:, None]
    language_model = lm.language_model
    hidden = language_model.embed_tokens(inputs)
    positions = (prefix.next_position[:, None] + offsets).expand(3, -1, -1)
    rotary = language_model.rotary_emb(hidden, positions)
    with (counter or LayerCounter()).label("completion"):
        for layer, key, value in zip(
            language_model.layers, prefix.keys, prefix.values, strict=True
        ):
            slot = _Slot((key, value))
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=rotary,
                past_key_values=slot,
            )
    hidden = language_model.norm(hidden).view(batch, rollouts, steps, -1)
    return torch.cat([first, hidden], dim=2)


class Decoder:
    """Token-by-token continuation of a prefix, R completions per prompt, in one preallocated cache
    per layer.

    The prompt's keys and values are copied in once; step t appends its R tokens, so the cache is
    read without gaps.
    """

    def __init__(self, lm: VideoLM, prefix: Prefix, rollouts: int, max_steps: int) -> None:
        self.lm, self.rollouts, self.step_index = lm, rollouts, 0
        self.mask, self.next_position = prefix.mask, prefix.next_position
        self.prompt_length = prefix.mask.shape[1]
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        for key, value in zip(prefix.keys, prefix.values, strict=True):
            shape = (*key.shape[:2], self.prompt_length + rollouts * max_steps, key.shape[3])
            pair = key.new_empty(shape), value.new_empty(shape)
            for buffer, source in zip(pair, (key, value), strict=True):
                buffer[:, :, : self.prompt_length] = source.detach()
            self.cache.append(pair)

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, counter: LayerCounter | None = None) -> torch.Tensor:
        """Append one token to each completion, int64 `[B, R]`; returns the next hidden states `[B,
        R, H]`."""
        language_model = self.lm.language_model
        hidden = language_model.embed_tokens(token_ids)
        positions = (self.next_position + self.step_index)[:, None].expand(3, -1, self.rollouts)
        rotary = language_model.rotary_emb(hidden, positions)
        start = self.prompt_length + self.rollouts * self.step_index
        self.step_index += 1
        own = torch.eye(self.rollouts, dtype=torch.bool, device=hidden.device).repeat(
            1, self.step_index
        )
        attention_mask = torch.cat(
            [
                self.mask[:, None].expand(-1, self.rollouts, -1),
                own.expand(len(hidden), -1, -1),
            ],
            dim=2,
        )[:, None]
        with (counter or LayerCounter()).label("decode"):
            for layer, buffers in zip(language_model.layers, self.cache, strict=True):
                slot = _Appending(buffers, start)
                hidden = layer(
                    hidden,
                    attention_mask=attention_mask,
                    position_embeddings=rotary,
                    past_key_values=slot,
                )
        return language_model.norm(hidden)


class _Appending:
    """A layer's cache in decoding: writes the new keys and values in place and returns the filled
    part."""

    def __init__(self, buffers: tuple[torch.Tensor, torch.Tensor], start: int) -> None:
        self.buffers, self.start = buffers, start

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.start + key.shape[2]
        for buffer, new in zip(self.buffers, (key, value), strict=True):
            buffer[:, :, self.start : end] = new
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

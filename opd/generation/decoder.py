"""Token-by-token decoding from a prefix, without gradients."""

from typing import Any

import torch

from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.layers import prepared_mask, run_layer
from opd.models.video_lm import VideoLM


class Decoder:
    """Decodes R completions per prompt, one token at a time, into a preallocated cache per layer.

    The prefix is copied into the cache once. Step t appends the `K * R` new tokens of each group of
    prompts behind those of step t - 1, so that the filled part of the cache is contiguous:
    `P + K * R * (t + 1)` columns, of which each completion attends to its prompt's and to its own.
    """

    def __init__(self, lm: VideoLM, prefix: Prefix, rollouts: int, max_steps: int) -> None:
        self.lm, self.prefix, self.rollouts, self.step_index = lm, prefix, rollouts, 0
        self.branches = prefix.width * rollouts  # of a group
        self.mask = prefix.by_group(prefix.mask).repeat_interleave(rollouts, 1)
        self.next_position = prefix.by_group(prefix.next_position).repeat_interleave(rollouts, 1)
        self.prompt_length = prefix.mask.shape[1]
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        for key, value in zip(prefix.keys, prefix.values, strict=True):
            shape = (*key.shape[:2], self.prompt_length + self.branches * max_steps, key.shape[3])
            pair = key.new_empty(shape), value.new_empty(shape)
            for buffer, source in zip(pair, (key, value), strict=True):
                buffer[:, :, : self.prompt_length] = source.detach()
            self.cache.append(pair)

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, counter: LayerCounter | None = None) -> torch.Tensor:
        """Append one token to each completion and return the hidden states that predict the next.

        Args:
            token_ids: int64 `[N, R]`.

        Returns: `[N, R, H]`, after the final norm.
        """
        language_model = self.lm.language_model
        hidden = language_model.embed_tokens(self.prefix.by_group(token_ids).flatten(1))
        positions = (self.next_position + self.step_index).expand(3, -1, -1)
        rotary = language_model.rotary_emb(hidden, positions)
        start = self.prompt_length + self.branches * self.step_index
        self.step_index += 1
        # Column b of every step belongs to branch b: the identity, once per step.
        own = torch.eye(self.branches, dtype=torch.bool, device=hidden.device).repeat(
            1, self.step_index
        )
        own = own.expand(len(hidden), -1, -1)
        attention_mask = torch.cat([self.mask, own], dim=2)[:, None]
        mask = prepared_mask(attention_mask, language_model, hidden.dtype)
        with (counter or LayerCounter()).label("decode"):
            for layer, buffers in zip(language_model.layers, self.cache, strict=True):
                layer_cache = _PreallocatedCache(buffers, start)
                hidden = run_layer(layer, hidden, rotary, layer_cache, mask)
        hidden = language_model.norm(hidden).unflatten(1, (-1, self.rollouts))
        return self.prefix.by_prompt(hidden)


class _PreallocatedCache:
    """One layer's cache while decoding: writes new keys and values from column `start` on and
    returns the filled part."""

    def __init__(self, buffers: tuple[torch.Tensor, torch.Tensor], start: int) -> None:
        self.buffers, self.start = buffers, start

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.start + key.shape[2]
        for buffer, new in zip(self.buffers, (key, value), strict=True):
            buffer[:, :, self.start : end] = new
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

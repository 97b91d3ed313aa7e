"""Token-by-token decoding from a prefix, without gradients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.branches import NextTokens, are_cheaper
from opd.models.fused_attention import added_to_scores
from opd.models.layers import KeyValue, prepared_mask, query_groups, run_layer
from opd.models.video_lm import VideoLM

# Tokens by which the part of the cache that a step reads grows. A GPU reads the same part in many
# steps, so that one recorded step serves for all of them; what is not filled yet is masked.
GROWTH = {"cuda": 256}
# Long completions share a cache with their prefix while B * B * T is at most this: then the columns
# that a mask hides cost less than a second call of the kernel does.
MOST_MASKED = {"cpu": 32_768}


class Decoder:
    """Decodes R completions per prompt, one token at a time, into a preallocated cache per layer.

    A group of prompts has B = K * R completions, arranged `[G, B]` (`by_group`). Where they have
    caches of their own (`apart`), the prefix is not copied, and the cost of a step grows with what
    a completion may see. Otherwise one masked attention is as fast: the prefix is copied into the
    cache once, and step t writes the B new tokens of each group behind those of step t - 1, to
    columns `P + B * t` and following.

    `columns`, int64 on the device, are those of the next tokens in the cache. A step moves them and
    `next_position` in place; two steps of the same `window` differ in nothing else.
    """

    @torch.no_grad()
    def __init__(self, lm: VideoLM, prefix: Prefix, rollouts: int, max_steps: int) -> None:
        self.lm, self.max_steps = lm, max_steps
        self.growth = GROWTH.get(lm.device.type, 1)
        self.prompt_length = prefix.mask.shape[1]
        self.next_position = prefix.by_group(prefix.next_position).repeat_interleave(rollouts, 1)
        self.mask = prefix.by_group(prefix.mask).repeat_interleave(rollouts, 1)  # [G, B, P]
        self.whole, self.dtype = prefix.whole, prefix.last_hidden.dtype
        self.is_long = are_cheaper(self.branches * max_steps, lm.device_type)
        self.prefix: list[KeyValue | None] = []  # of each layer, unless it is in the cache
        self.cache: list[KeyValue] = []
        self._lay_out(0)
        for pair in zip(prefix.keys, prefix.values, strict=True):
            self.prefix.append(pair if self.apart else None)
            self.cache.append(self._allocated(pair))

    @property
    def branches(self) -> int:
        """B, the number of completions of a group."""
        return self.next_position.shape[1]

    def _lay_out(self, filled: int) -> None:
        """Choose a layout for caches that hold so many tokens of each completion."""
        work = self.branches**2 * self.max_steps
        self.apart = self.is_long and work > MOST_MASKED.get(self.lm.device_type, 0)
        layout = NextTokens(self.branches, None if self.whole else self.mask)
        self.layout = layout.prepared(self.dtype, query_groups(self.lm.language_model))
        first, count = filled, 1
        if not self.apart:
            first, count = self.prompt_length + self.branches * filled, self.branches
        self.columns = torch.arange(first, first + count, device=self.mask.device)

    def _allocated(self, prefix: KeyValue, own: Sequence[torch.Tensor] = ()) -> KeyValue:
        """A layer's cache, with the prefix `[G, heads, P, D]`, unless it stays apart, and the keys
        and values that completions have already, `[G, B, heads, t, D]`."""
        groups, heads, _, size = prefix[0].shape
        shape = groups * self.branches, heads, self.max_steps, size
        if not self.apart:
            length = self.prompt_length + self.branches * self.max_steps
            shape = groups, heads, length, size
        # Masked columns have a weight of 0, which must not meet a number that is not finite.
        key, value = prefix[0].new_zeros(shape), prefix[1].new_zeros(shape)
        for buffer, source in zip((key, value), prefix, strict=True):
            if not self.apart:
                buffer[:, :, : self.prompt_length] = source
        for buffer, source in zip((key, value), own, strict=False):
            self._own(buffer, source.shape[3]).copy_(source)
        return key, value

    def _own(self, buffer: torch.Tensor, filled: int) -> torch.Tensor:
        """The tokens of completions in a cache: `[G, B, heads, filled, D]`."""
        if self.apart:
            return buffer[:, :, :filled].unflatten(0, (-1, self.branches))
        last = self.prompt_length + self.branches * filled
        own = buffer[:, :, self.prompt_length : last]
        return own.unflatten(2, (filled, self.branches)).movedim(3, 1)

    def window(self, steps: int) -> int:
        """Number of tokens of each completion that a step reads which is the `steps`-th."""
        return min(-(-steps // self.growth) * self.growth, self.max_steps)

    @torch.no_grad()
    def step(
        self, token_ids: torch.Tensor, window: int, counter: LayerCounter | None = None
    ) -> torch.Tensor:
        """Append one token to each completion and return the hidden states that predict the next.

        Args:
            token_ids: int64 `[G, B]`.
            window: from `self.window`.

        Returns: `[G, B, H]`, after the final norm.
        """
        language_model = self.lm.language_model
        hidden = language_model.embed_tokens(token_ids)
        rotary = language_model.rotary_emb(hidden, self.next_position.expand(3, -1, -1))
        mask = self._next_tokens(window) if self.apart else self._mask(window)
        read = window if self.apart else self.prompt_length + self.branches * window
        with (counter or LayerCounter()).label("decode"):
            for index, layer in enumerate(language_model.layers):
                cache = self.cache[index], self.columns, read, self.prefix[index], self.layout
                hidden = run_layer(layer, hidden, rotary, _PreallocatedCache(*cache), mask)
        self.next_position += 1
        self.columns += len(self.columns)
        return language_model.norm(hidden)

    @torch.no_grad()
    def keep(self, groups: torch.Tensor, branches: torch.Tensor, filled: int) -> None:
        """Go on with these completions alone.

        Args:
            groups: int64 `[G']`, the groups that stay.
            branches: int64 `[G', B']`, of each of them the completions that stay.
            filled: number of tokens that each completion has in the cache.
        """
        chosen, fewer = (groups[:, None], branches), len(groups) < len(self.mask)
        owns = [[self._own(buffer, filled) for buffer in pair] for pair in self.cache]
        self.next_position, self.mask = self.next_position[chosen], self.mask[chosen]
        self._lay_out(filled)
        for layer, (key, value) in enumerate(self.cache):
            length = self.prompt_length
            prefix = self.prefix[layer] or (key[:, :, :length], value[:, :, :length])
            if fewer:
                prefix = prefix[0].index_select(0, groups), prefix[1].index_select(0, groups)
            own = [side[chosen] for side in owns.pop(0)]
            self.cache[layer] = self._allocated(prefix, own)
            self.prefix[layer] = prefix if self.apart else None

    def _filled(self, columns: torch.Tensor) -> torch.Tensor:
        """False at columns of the cache that later tokens will fill."""
        return columns <= self.columns[-1:]

    def _next_tokens(self, window: int) -> NextTokens:
        if self.growth == 1:
            return self.layout
        filled = self._filled(torch.arange(window, device=self.columns.device))
        return replace(self.layout, own=added_to_scores(filled[None, None, None], self.dtype))

    def _mask(self, window: int) -> torch.Tensor:
        # Column b of every step belongs to branch b: the identity, once per step.
        own = torch.eye(self.branches, dtype=torch.bool, device=self.mask.device).repeat(1, window)
        if self.growth > 1:
            first, last = self.prompt_length, self.prompt_length + own.shape[1]
            own = own & self._filled(torch.arange(first, last, device=own.device))
        attention_mask = torch.cat([self.mask, own.expand(len(self.mask), -1, -1)], dim=2)[:, None]
        return prepared_mask(attention_mask, self.lm.language_model, self.dtype)


class _PreallocatedCache:
    """One layer's cache while decoding: writes new keys and values to `columns`, int64 on the
    device, and returns the first `read` ones; apart, beside the prefix."""

    def __init__(
        self,
        buffers: KeyValue,
        columns: torch.Tensor,
        read: int,
        prefix: KeyValue | None,
        layout: NextTokens,
    ) -> None:
        self.buffers, self.columns, self.read = buffers, columns, read
        self.prefix, self.layout = prefix, layout

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        new = key, value
        if self.prefix is not None:
            new = self.layout.by_branch(key), self.layout.by_branch(value)
        for buffer, tensor in zip(self.buffers, new, strict=True):
            buffer.index_copy_(2, self.columns, tensor)
        key, value = (buffer[:, :, : self.read] for buffer in self.buffers)
        if self.prefix is None:
            return key, value
        return (self.prefix[0], key), (self.prefix[1], value)

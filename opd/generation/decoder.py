"""Token-by-token decoding from a prefix, without gradients."""

from dataclasses import replace
from typing import Any

import torch

from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.branches import Branches, are_cheaper
from opd.models.fused_attention import added_to_scores
from opd.models.layers import KeyValue, prepared_mask, query_groups, run_layer
from opd.models.video_lm import VideoLM

# Tokens by which the part of the cache that a step reads grows. A GPU reads the same part in many
# steps, so that one recorded step serves for all of them; what is not filled yet is masked.
GROWTH = {"cuda": 256}


class Decoder:
    """Decodes R completions per prompt, one token at a time, into a preallocated cache per layer.

    A group of prompts has B = K * R completions, arranged `[G, B]` (`by_group`). Long completions
    have caches of their own, beside the prefix, which is not copied; those that go on can then be
    kept alone. For short ones, one masked attention is as fast: the prefix is copied into the cache
    once, and step t writes the B new tokens of each group behind those of step t - 1, to columns
    `P + B * t` and following.

    `columns`, int64 on the device, are those of the next tokens in the cache. A step moves them and
    `next_position` in place; two steps of the same `window` differ in nothing else.
    """

    @torch.no_grad()
    def __init__(self, lm: VideoLM, prefix: Prefix, rollouts: int, max_steps: int) -> None:
        self.lm, self.max_steps = lm, max_steps
        self.growth = GROWTH.get(lm.device.type, 1)
        self.branches, self.prompt_length = prefix.width * rollouts, prefix.mask.shape[1]
        self.next_position = prefix.by_group(prefix.next_position).repeat_interleave(rollouts, 1)
        self.mask = prefix.by_group(prefix.mask).repeat_interleave(rollouts, 1)  # [G, B, P]
        self.whole, self.dtype = prefix.whole, prefix.last_hidden.dtype
        self.apart = are_cheaper(self.branches, max_steps)
        self.prefix: list[KeyValue] = []  # of each layer, unless it is in the cache
        self.layout = self._layout()
        first, count = (0, 1) if self.apart else (self.prompt_length, self.branches)
        self.columns = torch.arange(first, first + count, device=self.mask.device)
        self.cache: list[KeyValue] = []
        for key, value in zip(prefix.keys, prefix.values, strict=True):
            groups, heads, _, size = key.shape
            if self.apart:
                shape = groups * self.branches, heads, max_steps, size
            else:
                shape = groups, heads, self.prompt_length + self.branches * max_steps, size
            # Masked columns have a weight of 0, which must not meet a number that is not finite.
            pair = key.new_zeros(shape), value.new_zeros(shape)
            if self.apart:
                self.prefix.append((key, value))
            else:
                for buffer, source in zip(pair, (key, value), strict=True):
                    buffer[:, :, : self.prompt_length] = source
            self.cache.append(pair)

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
        mask = self._branches(window) if self.apart else self._mask(window)
        read = window if self.apart else self.prompt_length + self.branches * window
        with (counter or LayerCounter()).label("decode"):
            for index, layer in enumerate(language_model.layers):
                prefix = self.prefix[index] if self.apart else None
                cache = self.cache[index], self.columns, read, prefix, self.layout
                hidden = run_layer(layer, hidden, rotary, _PreallocatedCache(*cache), mask)
        self.next_position += 1
        self.columns += len(self.columns)
        return language_model.norm(hidden)

    @torch.no_grad()
    def keep(self, groups: torch.Tensor, branches: torch.Tensor) -> None:
        """Go on with these completions alone; only where they have caches of their own (`apart`).

        Args:
            groups: int64 `[G']`, the groups that stay.
            branches: int64 `[G', B']`, of each of them the completions that stay.
        """
        rows = (groups[:, None] * self.branches + branches).flatten()
        self.branches = branches.shape[1]

        def kept(values: torch.Tensor) -> torch.Tensor:
            """`[G, B, ...]` as `[G', B', ...]`."""
            return values.flatten(0, 1).index_select(0, rows).unflatten(0, branches.shape)

        self.next_position, self.mask = kept(self.next_position), kept(self.mask)
        self.layout = self._layout()
        for layer, pair in enumerate(self.cache):
            self.cache[layer] = pair[0].index_select(0, rows), pair[1].index_select(0, rows)
            if len(groups) < len(self.prefix[layer][0]):
                key, value = self.prefix[layer]
                self.prefix[layer] = key.index_select(0, groups), value.index_select(0, groups)

    def _layout(self) -> Branches:
        """The completions as branches, of which each sees the prefix as its prompt does."""
        layout = Branches(self.branches, 1, 1, None if self.whole else self.mask)
        return layout.prepared(self.dtype, query_groups(self.lm.language_model))

    def _filled(self, columns: torch.Tensor) -> torch.Tensor:
        """False at columns of the cache that later tokens will fill."""
        return columns <= self.columns[-1:]

    def _branches(self, window: int) -> Branches:
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
    device, and returns the first `read` ones; for branches, beside the prefix."""

    def __init__(
        self,
        buffers: KeyValue,
        columns: torch.Tensor,
        read: int,
        prefix: KeyValue | None,
        branches: Branches,
    ) -> None:
        self.buffers, self.columns, self.read = buffers, columns, read
        self.prefix, self.branches = prefix, branches

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        new = key, value
        if self.prefix is not None:
            new = self.branches.by_branch(key), self.branches.by_branch(value)
        for buffer, tensor in zip(self.buffers, new, strict=True):
            buffer.index_copy_(2, self.columns, tensor)
        key, value = (buffer[:, :, : self.read] for buffer in self.buffers)
        if self.prefix is None:
            return key, value
        return (self.prefix[0], key), (self.prefix[1], value)

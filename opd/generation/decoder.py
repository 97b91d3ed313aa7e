"""Token-by-token decoding from a prefix, without gradients."""

from typing import Any

import torch

from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.branches import Branches, are_cheaper
from opd.models.layers import KeyValue, prepared_mask, query_groups, run_layer
from opd.models.video_lm import VideoLM


class Decoder:
    """Decodes R completions per prompt, one token at a time, into a preallocated cache per layer.

    A group of prompts has B = K * R completions, arranged `[G, B]` (`by_group`). Long completions
    have caches of their own, beside the prefix, which is not copied; those that go on can then be
    kept alone. For short ones, one masked attention is as fast: the prefix is copied into the cache
    once, and step t appends the B new tokens of each group behind those of step t - 1, so that the
    filled part is contiguous: `P + B * (t + 1)` columns.
    """

    def __init__(self, lm: VideoLM, prefix: Prefix, rollouts: int, max_steps: int) -> None:
        self.lm, self.step_index = lm, 0
        self.branches, self.prompt_length = prefix.width * rollouts, prefix.mask.shape[1]
        self.next_position = prefix.by_group(prefix.next_position).repeat_interleave(rollouts, 1)
        self.mask = prefix.by_group(prefix.mask).repeat_interleave(rollouts, 1)  # [G, B, P]
        self.whole, self.dtype = prefix.whole, prefix.last_hidden.dtype
        self.apart = are_cheaper(self.branches, max_steps)
        prefix = prefix.detach()
        self.prefix = prefix.layers if self.apart else []  # else it is in the cache
        self.layout = self._layout()
        self.cache: list[KeyValue] = []
        for key, value in prefix.layers:
            groups, heads, _, size = key.shape
            if self.apart:
                shape = groups * self.branches, heads, max_steps, size
            else:
                shape = groups, heads, self.prompt_length + self.branches * max_steps, size
            pair = key.new_empty(shape), value.new_empty(shape)
            if not self.apart:
                for buffer, source in zip(pair, (key, value), strict=True):
                    buffer[:, :, : self.prompt_length] = source
            self.cache.append(pair)

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor, counter: LayerCounter | None = None) -> torch.Tensor:
        """Append one token to each completion and return the hidden states that predict the next.

        Args:
            token_ids: int64 `[G, B]`.

        Returns: `[G, B, H]`, after the final norm.
        """
        language_model = self.lm.language_model
        hidden = language_model.embed_tokens(token_ids)
        positions = (self.next_position + self.step_index).expand(3, -1, -1)
        rotary = language_model.rotary_emb(hidden, positions)
        mask = self._mask()
        with (counter or LayerCounter()).label("decode"):
            for index, layer in enumerate(language_model.layers):
                hidden = run_layer(layer, hidden, rotary, self._layer_cache(index, mask), mask)
        self.step_index += 1
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

    def _mask(self) -> torch.Tensor | Branches:
        if self.apart:
            return self.layout
        # Column b of every step belongs to branch b: the identity, once per step.
        own = torch.eye(self.branches, dtype=torch.bool, device=self.mask.device)
        own = own.repeat(1, self.step_index + 1).expand(len(self.mask), -1, -1)
        attention_mask = torch.cat([self.mask, own], dim=2)[:, None]
        return prepared_mask(attention_mask, self.lm.language_model, self.dtype)

    def _layer_cache(self, index: int, mask: torch.Tensor | Branches) -> "_PreallocatedCache":
        if isinstance(mask, Branches):
            return _PreallocatedCache(self.cache[index], self.step_index, self.prefix[index], mask)
        start = self.prompt_length + self.branches * self.step_index
        return _PreallocatedCache(self.cache[index], start)


class _PreallocatedCache:
    """One layer's cache while decoding: writes new keys and values from column `start` on and
    returns the filled part; for branches, beside the prefix."""

    def __init__(
        self,
        buffers: KeyValue,
        start: int,
        prefix: KeyValue | None = None,
        branches: Branches | None = None,
    ) -> None:
        self.buffers, self.start, self.prefix, self.branches = buffers, start, prefix, branches

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        new = key, value
        if self.branches is not None:
            new = self.branches.by_branch(key), self.branches.by_branch(value)
        end = self.start + new[0].shape[2]
        for buffer, tensor in zip(self.buffers, new, strict=True):
            buffer[:, :, self.start : end] = tensor
        filled = self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]
        if self.prefix is None:
            return filled
        return (self.prefix[0], filled[0]), (self.prefix[1], filled[1])

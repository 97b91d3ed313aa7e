"""The prefix: a prompt forwarded once, which sampling, scoring and training continue.

    encode   the vision tokens of a batch's videos
    prefill  one forward of the prompts; keeps each layer's keys and values, on the autograd graph
    forward  prefill of prompts of different lengths, without gradients

`Decoder` (opd/generation/decoder.py) samples from a detached prefix, and `extend`
(opd/generation/extend.py) forwards completions behind one.

A row of a prefix is a group of prompts about one video: a tree, whose trunk is the video, with a
branch for each query and further branches for the completions behind it. All branches are packed
along the sequence, and each token attends to the path from the root to itself. So the keys and
values of a video exist once, whatever the number of its queries and of their rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch

from opd import distributed
from opd.data.batch import PromptBatch
from opd.device import send
from opd.generation.layer_counter import LayerCounter
from opd.models.branches import Paths
from opd.models.layers import KeyValue, forward_layers
from opd.models.video_lm import Video, VideoLM


@dataclass(frozen=True)
class Prefix:
    """Result of forwarding N prompts in G groups: each layer's keys and values `[G, kv_heads, P,
    D]`.

    `mask` is boolean `[N, P]`, True at the columns of its group that a prompt sees. `last_hidden`
    `[N, H]` is the last token's hidden state after the final norm, which predicts the first
    completion token. `next_position` int64 `[N]` is the position id of that token. `paths` say the
    same as `mask` on the host, for each group before its padding.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    mask: torch.Tensor
    last_hidden: torch.Tensor
    next_position: torch.Tensor
    paths: tuple[Paths, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of prompts in each group."""
        return tuple(len(group.own) for group in self.paths)

    @property
    def whole(self) -> bool:
        """Whether each prompt sees all columns of its group."""
        width = self.mask.shape[1]
        return all(group.are_whole and group.length == width for group in self.paths)

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

    def take(self, indices: Sequence[int]) -> "Prefix":
        """The prompts at these indices of a prefix with one group; the keys stay as they are."""
        if len(indices) == len(self.last_hidden):
            return self
        (group,) = self.paths
        own = tuple(group.own[index] for index in indices)
        rows = send(torch.tensor(indices), self.mask.device)
        names = ("mask", "last_hidden", "next_position")
        chosen = {name: getattr(self, name).index_select(0, rows) for name in names}
        return replace(self, paths=(replace(group, own=own),), **chosen)

    @property
    def width(self) -> int:
        """K, the number of prompts in the largest group."""
        return max(self.counts)

    def by_group(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange `values` `[N, ...]` of the prompts by group: `[G, K, ...]`, where a smaller group
        repeats its last prompt."""
        if min(self.counts) < self.width:
            values = values.index_select(0, self._slots[0])
        return values.unflatten(0, (len(self.counts), self.width))

    def by_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """Undo `by_group`: `[G, K, ...]` become `[N, ...]`."""
        values = values.flatten(0, 1)
        return values if len(values) == len(self.mask) else values.index_select(0, self._slots[1])

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt in each of the `G * K` slots, and the slot of each prompt; on the device."""
        prompts, slots, first = [], [], 0
        for row, count in enumerate(self.counts):
            prompts += [first + min(i, count - 1) for i in range(self.width)]
            slots += [row * self.width + i for i in range(count)]
            first += count
        device = self.mask.device
        return send(torch.tensor(prompts), device), send(torch.tensor(slots), device)

    @classmethod
    def join(cls, parts: Sequence["Prefix"], by_layer: bool = False) -> "Prefix":
        """Concatenate groups, left-padded to the longest; each part keeps its graph.

        Args:
            by_layer: join the keys and values of a layer whenever they are read. For a single use,
                so that at no time all layers exist twice.
        """
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)
        keys, values = (
            _Joined([getattr(part, name) for part in parts], width) for name in ("keys", "values")
        )
        return cls(
            keys=keys if by_layer else list(keys),
            values=values if by_layer else list(values),
            mask=torch.cat([_left_padded(part.mask, 1, width) for part in parts]),
            last_hidden=torch.cat([part.last_hidden for part in parts]),
            next_position=torch.cat([part.next_position for part in parts]),
            paths=tuple(group for part in parts for group in part.paths),
        )


def _left_padded(values: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """Left-pad a dimension with zeros."""
    after = [0, 0] * (values.dim() - 1 - dim)
    return torch.nn.functional.pad(values, [*after, width - values.shape[dim], 0])


class _Joined(Sequence[torch.Tensor]):
    """Keys or values of each layer, joined from those of several prefixes when they are read."""

    def __init__(self, parts: Sequence[Sequence[torch.Tensor]], width: int) -> None:
        self.parts, self.width = parts, width

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, layer: Any) -> Any:
        # In memory a token's heads are neighbours, as in the parts.
        parts = [_left_padded(part[layer].transpose(1, 2), 1, self.width) for part in self.parts]
        return torch.cat(parts).transpose(1, 2)


def encode(lm: VideoLM, batch: PromptBatch) -> Video:
    """Vision tokens of a batch's videos, one after the other.

    A frozen tower encodes each video on its own, so that the result depends on nothing else. It is
    then stored in `Prompt.features` of the prompts that have an entry for this model; their next
    batch comes without frames.
    """
    if lm.trains_vision:
        return lm.encode_video(batch.pixel_values, batch.video_grid_thw)
    videos = []
    for group, pixels, grid in zip(batch.groups, batch.pixels, batch.video_grid_thw, strict=True):
        features = group.prompts[0].features  # the same for all prompts about a video
        video = features.get(lm)
        if video is None:
            video = lm.encode_video(pixels, grid[None])
            if lm in features:
                features[lm] = video
        videos.append(video)
    embeds, levels = zip(*videos, strict=True)
    return torch.cat(embeds), [torch.cat(level) for level in zip(*levels, strict=True)]


def prefill(
    lm: VideoLM,
    batch: PromptBatch,
    video: Video,
    recompute: str = "none",
    counter: LayerCounter | None = None,
) -> Prefix:
    """Forward groups of one layout (`PromptBatch.parts`) once. Under autograd the prefix keeps its
    graph, which `extend` continues.

    Args:
        video: vision tokens from `encode`.
        recompute: see `forward_layers`.
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
    own_mask = batch.own_mask()

    def add_deepstack(index: int, hidden: torch.Tensor) -> torch.Tensor:
        if index >= len(deepstack):
            return hidden
        level = deepstack[index].to(hidden.dtype)
        return hidden.flatten(0, 1).index_add(0, rows, level).view(shape)

    with counter.label("prompt"):
        hidden, new = forward_layers(
            language_model,
            hidden,
            batch.position_ids,
            own_mask,
            recompute=recompute,
            again=partial(counter.label, "recompute"),
            after=add_deepstack,
        )
    keys, values = map(list, zip(*new, strict=True))
    last_hidden = language_model.norm(hidden.index_select(1, batch.last_columns()).flatten(0, 1))
    own = [tuple(pairwise(group.edges)) for group in batch.groups]
    paths = [Paths(g.num_tokens, g.shared, each) for g, each in zip(batch.groups, own, strict=True)]
    return Prefix(keys, values, batch.mask, last_hidden, batch.next_position, tuple(paths))


@torch.no_grad()
def forward(lm: VideoLM, batch: PromptBatch) -> Prefix:
    """Encode and prefill prompts of any lengths, without gradients; returns one padded prefix.

    With sharded weights every rank must run as many forwards as the others: a rank with fewer parts
    forwards its last one again.
    """
    parts = batch.parts(alone=lm.sharded)
    extra = distributed.all_max(len(parts)) - len(parts) if lm.sharded else 0
    prefixes = [prefill(lm, part, encode(lm, part)) for part in [*parts, *parts[-1:] * extra]]
    return Prefix.join(prefixes[: len(parts)], by_layer=True)

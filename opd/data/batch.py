"""Prompts as model inputs: alone, packed with others about the same video, and in padded batches.

Where the chat template puts the video before the query, the prompts about one video begin with the
same tokens. A `Group` of them is one sequence in which these tokens occur once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch

from opd.data.examples import Example
from opd.device import send


@dataclass(frozen=True, eq=False)
class Prompt:
    """One example as model inputs.

    Attributes:
        input_ids: int64 `[P]`.
        position_ids: int64 `[3, P]`.
        next_position: position id of the first token behind the prompt.
        pixel_values: `[patches, patch_dim]`; None where `features` replace them.
        grid_thw: size of the video in patches.
        frame_indices, timestamps_s: of the sampled frames and of the temporal patches.
        completion_ids: int64, the reference answer with its end token; empty where there is none.
        features: an entry for each model whose vision tokens are to be kept; None until they are
            computed.
    """

    example: Example
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    pixel_values: torch.Tensor | None
    grid_thw: tuple[int, int, int]
    frame_indices: tuple[int, ...]
    timestamps_s: tuple[float, ...]
    completion_ids: torch.Tensor
    features: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        """Rows of `pixel_values`, 0 where it is None."""
        return 0 if self.pixel_values is None else len(self.pixel_values)


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts about one video, packed into one sequence: the first `shared` tokens, which are the
    same in all of them, and then the other tokens of each prompt, one prompt after the other.

    Each prompt sees the shared tokens and its own. A prompt alone shares all of its tokens.
    """

    prompts: tuple[Prompt, ...]
    shared: int

    @cached_property
    def own_lengths(self) -> tuple[int, ...]:
        """Number of tokens of each prompt behind the shared ones."""
        return tuple(len(prompt.input_ids) - self.shared for prompt in self.prompts)

    @property
    def layout(self) -> tuple[int, ...]:
        """Groups of equal layout are forwarded as one batch."""
        return self.shared, *self.own_lengths

    @property
    def num_tokens(self) -> int:
        """Length of the packed sequence."""
        return sum(self.layout)

    @property
    def edges(self) -> list[int]:
        """Boundaries of the prompts' own tokens in the packed sequence."""
        return list(accumulate(self.layout))

    def packed(self, name: str) -> torch.Tensor:
        """Pack an attribute of the prompts whose last dimension are the tokens."""
        values = [getattr(prompt, name) for prompt in self.prompts]
        own = [tensor[..., self.shared :] for tensor in values]
        return torch.cat([values[0][..., : self.shared], *own], -1)

    @property
    def visible(self) -> torch.Tensor:
        """The tokens of the packed sequence that each prompt sees: boolean `[K, tokens]`."""
        visible = torch.zeros(len(self.prompts), self.num_tokens, dtype=torch.bool)
        visible[:, : self.shared] = True
        for row, (start, end) in enumerate(pairwise(self.edges)):
            visible[row, start:end] = True
        return visible


def shared_tokens(prompts: Sequence[Prompt], video_token_id: int) -> int:
    """Number of leading tokens that the prompts have in common, at most one less than the shortest
    has; 0 unless these contain the whole video, decoded to the same frames."""
    first = prompts[0]
    width = min(len(prompt.input_ids) for prompt in prompts) - 1
    if any(prompt.frame_indices != first.frame_indices for prompt in prompts):
        return 0
    same = torch.ones(width, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt.input_ids[:width] == first.input_ids[:width]
    shared = int(same.cumprod(0).sum())
    is_video = first.input_ids == video_token_id
    return shared if int(is_video[:shared].sum()) == int(is_video.sum()) else 0


def group_prompts(
    prompts: Sequence[Prompt], queries_per_video: int | None, video_token_id: int | None
) -> list[Group]:
    """Group neighbours about one video, at most `queries_per_video` (None: any number) each.
    Prompts that do not share the whole video stay alone."""
    groups = []
    for _, same_video in groupby(prompts, key=lambda prompt: prompt.example.footage):
        neighbours = list(same_video)
        size = queries_per_video or len(neighbours)
        for start in range(0, len(neighbours), size):
            some = tuple(neighbours[start : start + size])
            shared = 0
            if len(some) > 1 and video_token_id is not None:
                shared = shared_tokens(some, video_token_id)
            alone = [Group((prompt,), len(prompt.input_ids)) for prompt in some]
            groups += [Group(some, shared)] if shared else alone
    return groups


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """N prompts in G groups, whose packed sequences are left-padded to the longest, P tokens.

    On the device: `input_ids` int64 `[G, P]`, `position_ids` int64 `[3, G, P]`; `mask` boolean
    `[N, P]`, the tokens of its group's sequence that each prompt sees; `next_position` int64 `[N]`.

    `pixel_values` and `video_grid_thw`, one video per group, stay on the host: a vision tower
    fetches the patches of a few videos at a time, and sizes are only read there.
    """

    groups: tuple[Group, ...]
    input_ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    pixel_values: torch.Tensor
    video_grid_thw: torch.Tensor

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of all groups, in their order."""
        return tuple(prompt for group in self.groups for prompt in group.prompts)

    @property
    def examples(self) -> list[Example]:
        """The examples of the prompts."""
        return [prompt.example for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Number of tokens to forward: those that prompts share once, and no padding."""
        return sum(group.num_tokens for group in self.groups)

    @property
    def pixels(self) -> tuple[torch.Tensor, ...]:
        """The patches of each group's video; empty where its vision tokens are kept."""
        return self.pixel_values.split([group.prompts[0].num_patches for group in self.groups])

    def video_rows(self, video_token_id: int) -> torch.Tensor:
        """Return the rows of the flattened `input_ids` `[G * P]` that are vision tokens.

        int64, on the host. Only for batches without padding.
        """
        ids = torch.cat([group.packed("input_ids") for group in self.groups])
        return (ids == video_token_id).nonzero().flatten()

    def own_mask(self) -> torch.Tensor | None:
        """Return which tokens the prompts' own tokens attend to: boolean `[1, 1, own, P]`, on the
        device; the shared tokens before them are causal. None where every prompt is alone.

        Only for a batch of `parts`, whose groups have one layout.
        """
        group = self.groups[0]
        own_lengths = torch.tensor(group.own_lengths)
        if not own_lengths.any():
            return None
        visible = group.visible.repeat_interleave(own_lengths, 0)
        return send(visible.tril(group.shared)[None, None], self.input_ids.device)

    def last_columns(self) -> torch.Tensor:
        """Return the column of each prompt's last token: int64 `[K]`, on the device. Only for a
        batch of `parts`, whose groups have one layout."""
        ends = torch.tensor(self.groups[0].edges[1:]) - 1
        return send(ends, self.input_ids.device)

    def parts(self, alone: bool = False) -> "list[PromptBatch]":
        """Split into batches without padding, whose shared tokens need no mask.

        A part is a run of neighbouring groups of one layout, or with `alone` a single group.
        """
        layouts = [group.layout for group in self.groups]
        edges = [i for i, x in enumerate(layouts) if alone or i == 0 or x != layouts[i - 1]]
        patches = [0, *accumulate(group.prompts[0].num_patches for group in self.groups)]
        counts = [0, *accumulate(len(group.prompts) for group in self.groups)]
        parts = []
        for start, end in pairwise([*edges, len(layouts)]):
            rows, columns = slice(start, end), slice(-self.groups[start].num_tokens, None)
            prompts = slice(counts[start], counts[end])
            part = PromptBatch(
                groups=self.groups[rows],
                input_ids=self.input_ids[rows, columns],
                mask=self.mask[prompts, columns],
                position_ids=self.position_ids[:, rows, columns],
                next_position=self.next_position[prompts],
                pixel_values=self.pixel_values[patches[start] : patches[end]],
                video_grid_thw=self.video_grid_thw[rows],
            )
            parts.append(part)
        return parts

    def divided(self, num_groups: int) -> "PromptBatch":
        """Return the same prompts in this number of groups, at least as many as there are: large
        groups are divided, each part with the whole video."""
        groups = list(self.groups)
        while len(groups) < num_groups:
            at = max(range(len(groups)), key=lambda i: len(groups[i].prompts))
            prompts = groups[at].prompts
            middle, divided = len(prompts) // 2, []
            for half in (prompts[:middle], prompts[middle:]):
                lengths = [len(prompt.input_ids) for prompt in half]
                divided.append(Group(half, groups[at].shared if len(half) > 1 else lengths[0]))
            groups[at : at + 1] = divided
        if len(groups) == len(self.groups):
            return self
        return pack(groups, 0, self.input_ids.device, self.pixel_values.dtype)

    def references(self, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference completions, right-padded: ids `[B, 1, T]` on the batch's device and
        lengths `[B, 1]` on the host."""
        rows = [prompt.completion_ids for prompt in self.prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        lengths = torch.tensor([[len(row)] for row in rows])
        return send(ids[:, None], self.input_ids.device), lengths


def collate(
    prompts: Sequence[Prompt],
    pad_token_id: int,
    device: torch.device | str = "cpu",
    pixel_dtype: torch.dtype | None = None,
    *,
    queries_per_video: int | None = 1,
    video_token_id: int | None = None,
) -> PromptBatch:
    """Group prompts, left-pad the packed sequences to the longest and concatenate their videos.

    Token tensors go to `device`. Pixels and sizes stay on the host; pixels are converted to
    `pixel_dtype` where it is given.

    Args:
        queries_per_video: most neighbouring prompts about one video that share its tokens; None is
            any number. More than 1 needs `video_token_id`.
    """
    groups = group_prompts(prompts, queries_per_video, video_token_id)
    return pack(groups, pad_token_id, device, pixel_dtype)


def pack(
    groups: Sequence[Group],
    pad_token_id: int,
    device: torch.device | str = "cpu",
    pixel_dtype: torch.dtype | None = None,
) -> PromptBatch:
    """Return a batch of these groups; arguments are those of `collate`."""
    width = max(group.num_tokens for group in groups)
    ids = torch.full((len(groups), width), pad_token_id)
    masks = []
    positions = torch.zeros(3, len(groups), width, dtype=torch.long)
    for row, group in enumerate(groups):
        start = width - group.num_tokens
        ids[row, start:] = group.packed("input_ids")
        masks.append(torch.nn.functional.pad(group.visible, (start, 0)))
        positions[:, row, start:] = group.packed("position_ids")
    videos = [group.prompts[0].pixel_values for group in groups]
    pixels = [video.to(pixel_dtype) for video in videos if video is not None]
    host = PromptBatch(
        groups=tuple(groups),
        input_ids=ids,
        mask=torch.cat(masks),
        position_ids=positions,
        next_position=torch.tensor([p.next_position for group in groups for p in group.prompts]),
        pixel_values=torch.cat(pixels or [torch.empty(0)]),
        video_grid_thw=torch.tensor([group.prompts[0].grid_thw for group in groups]),
    )
    return to_device(host, device)


def to_device(batch: PromptBatch, device: torch.device | str) -> PromptBatch:
    """Return the batch on a device, without waiting; pixels and sizes stay on the host."""
    names = ("input_ids", "mask", "position_ids", "next_position")
    return replace(batch, **{name: send(getattr(batch, name), device) for name in names})

"""Prompts as model inputs, alone and in left-padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
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
class PromptBatch:
    """Prompts left-padded to the longest: `input_ids` int64 and `mask` boolean `[B, P]`,
    `position_ids` `[3, B, P]`, `next_position` `[B]`.

    `pixel_values` and `video_grid_thw` stay on the host: a vision tower fetches the patches of a
    few videos at a time, and sizes are only read there.
    """

    prompts: tuple[Prompt, ...]
    input_ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    pixel_values: torch.Tensor
    video_grid_thw: torch.Tensor

    @property
    def examples(self) -> list[Example]:
        """The examples of the prompts."""
        return [prompt.example for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens, without padding."""
        return sum(len(prompt.input_ids) for prompt in self.prompts)

    @property
    def pixels(self) -> tuple[torch.Tensor, ...]:
        """The patches of each prompt; empty where its vision tokens are kept."""
        return self.pixel_values.split([prompt.num_patches for prompt in self.prompts])

    def video_rows(self, video_token_id: int) -> torch.Tensor:
        """Return the rows of the flattened `input_ids` `[B * P]` that are vision tokens.

        int64, on the host. Only for batches without padding.
        """
        ids = torch.cat([prompt.input_ids for prompt in self.prompts])
        return (ids == video_token_id).nonzero().flatten()

    def parts(self, alone: bool = False) -> "list[PromptBatch]":
        """Split into batches without padding, whose attention needs no mask.

        A part is a run of neighbours of one length, or with `alone` a single prompt.
        """
        lengths = [len(prompt.input_ids) for prompt in self.prompts]
        edges = [i for i, n in enumerate(lengths) if alone or i == 0 or n != lengths[i - 1]]
        patches = [0, *accumulate(prompt.num_patches for prompt in self.prompts)]
        parts = []
        for start, end in pairwise([*edges, len(lengths)]):
            rows, columns = slice(start, end), slice(-lengths[start], None)
            part = PromptBatch(
                prompts=self.prompts[rows],
                input_ids=self.input_ids[rows, columns],
                mask=self.mask[rows, columns],
                position_ids=self.position_ids[:, rows, columns],
                next_position=self.next_position[rows],
                pixel_values=self.pixel_values[patches[start] : patches[end]],
                video_grid_thw=self.video_grid_thw[rows],
            )
            parts.append(part)
        return parts

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
) -> PromptBatch:
    """Left-pad prompts to the longest and concatenate their videos.

    Token tensors go to `device`. Pixels and sizes stay on the host; pixels are converted to
    `pixel_dtype` where it is given.
    """
    width = max(len(p.input_ids) for p in prompts)
    batch = len(prompts)
    videos = [p.pixel_values for p in prompts if p.pixel_values is not None]
    ids = torch.full((batch, width), pad_token_id)
    mask = torch.zeros(batch, width, dtype=torch.bool)
    positions = torch.zeros(3, batch, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.input_ids)
        ids[row, start:] = prompt.input_ids
        mask[row, start:] = True
        positions[:, row, start:] = prompt.position_ids
    host = PromptBatch(
        prompts=tuple(prompts),
        input_ids=ids,
        mask=mask,
        position_ids=positions,
        next_position=torch.tensor([p.next_position for p in prompts]),
        pixel_values=torch.cat([v.to(pixel_dtype) for v in videos] or [torch.empty(0)]),
        video_grid_thw=torch.tensor([p.grid_thw for p in prompts]),
    )
    return to_device(host, device)


def to_device(batch: PromptBatch, device: torch.device | str) -> PromptBatch:
    """Return the batch on a device, without waiting; pixels and sizes stay on the host."""
    names = ("input_ids", "mask", "position_ids", "next_position")
    return replace(batch, **{name: send(getattr(batch, name), device) for name in names})

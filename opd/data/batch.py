"""Prompts as the models see them, one and many side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from opd.data.examples import Example


@dataclass(frozen=True, eq=False)
class Prompt:
    """One example as the models see it.

    `input_ids` int64 `[P]`, `position_ids` int64 `[3, P]`, `pixel_values` `[patches, patch_dim]`,
    `grid_thw` in patches, `frame_indices` and `timestamps_s` of what was decoded, and the reference
    answer's `completion_ids`, end token included (empty where the example has no span). `features`
    has an entry for each model whose vision tokens are to be kept, None until they are made; where
    all are, `pixel_values` is None.
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


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts side by side, left-padded to the longest: `input_ids` `[B, P]`, `mask` boolean,
    `position_ids` `[3, B, P]`."""

    prompts: tuple[Prompt, ...]
    input_ids: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    pixel_values: torch.Tensor
    video_grid_thw: torch.Tensor

    @property
    def examples(self) -> list[Example]:
        return [prompt.example for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts, without padding."""
        return sum(len(prompt.input_ids) for prompt in self.prompts)

    @property
    def pixels(self) -> tuple[torch.Tensor, ...]:
        """Each prompt's patches; none of those whose vision tokens are kept."""
        patches = [0 if p.pixel_values is None else len(p.pixel_values) for p in self.prompts]
        return self.pixel_values.split(patches)

    def parts(self, alone: bool = False) -> "list[PromptBatch]":
        """Neighbours of one length together, or every prompt alone: batches without padding, whose
        attention needs no mask."""
        lengths = [len(prompt.input_ids) for prompt in self.prompts]
        edges = [i for i, n in enumerate(lengths) if alone or i == 0 or n != lengths[i - 1]]
        found = []
        for start, end in pairwise([*edges, len(lengths)]):
            rows, columns = slice(start, end), slice(-lengths[start], None)
            part = PromptBatch(
                prompts=self.prompts[rows],
                input_ids=self.input_ids[rows, columns],
                mask=self.mask[rows, columns],
                position_ids=self.position_ids[:, rows, columns],
                next_position=self.next_position[rows],
                pixel_values=torch.cat(self.pixels[rows]),
                video_grid_thw=self.video_grid_thw[rows],
            )
            found.append(part)
        return found

    def references(self, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference completions, right-padded: ids and mask `[B, 1, T]`."""
        rows = [prompt.completion_ids for prompt in self.prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.input_ids.device
        return ids[:, None].to(device), mask[:, None].to(device)


def collate(
    prompts: Sequence[Prompt], pad_token_id: int, device: torch.device | str = "cpu"
) -> PromptBatch:
    """Left-pad prompts to the longest of them and join their videos."""
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
    return PromptBatch(
        prompts=tuple(prompts),
        input_ids=ids.to(device),
        mask=mask.to(device),
        position_ids=positions.to(device),
        next_position=torch.tensor([p.next_position for p in prompts]).to(device),
        pixel_values=torch.cat(videos or [torch.empty(0)]).to(device),
        video_grid_thw=torch.tensor([p.grid_thw for p in prompts]).to(device),
    )


def to_device(batch: PromptBatch, device: torch.device | str) -> PromptBatch:
    """The batch's tensors on a device."""
    tensors = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, **tensors)

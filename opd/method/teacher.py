"""The frozen teacher: scores the student's tokens behind the same prompt, at the same positions."""

from dataclasses import dataclass
from functools import cached_property

import torch

from opd.data.batch import PromptBatch
from opd.generation.extend import extend
from opd.generation.prefix import Prefix, forward
from opd.models.sharded import gathered
from opd.models.video_lm import VideoLM


@dataclass(frozen=True)
class Teacher:
    """A stronger model of the student's family; no gradient ever reaches it."""

    lm: VideoLM

    def __post_init__(self) -> None:
        self.lm.model.requires_grad_(False)

    @cached_property
    def head_weight(self) -> torch.Tensor:
        """Weight of the head, `[V, H_T]`; gathered if the model is sharded, because the loss runs
        inside the forward of the student's head."""
        if not self.lm.sharded:
            return self.lm.head.weight
        with gathered([self.lm.head.weight]):
            return self.lm.head.weight.detach().clone()

    def prefill(self, batch: PromptBatch) -> Prefix:
        """Forward the prompts once, without a graph."""
        return forward(self.lm, batch)

    @torch.no_grad()
    def extend(
        self, prefix: Prefix, completion_ids: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states `[B, R, T, H_T]` that predict each completion token `[B, R, T]`, or the
        first ones of each completion (`lengths`, see `extend`)."""
        return extend(self.lm, prefix, completion_ids, lengths=lengths)

"""The frozen teacher: scores the student's tokens, with the student's prompt, template and
positions."""

from dataclasses import dataclass

import torch

from opd.data.batch import PromptBatch
from opd.models.load import VideoLM
from opd.prefix import Prefix, extend, forward


@dataclass(frozen=True)
class Teacher:
    """A stronger model of the student's family; no gradient ever reaches it."""

    lm: VideoLM

    def __post_init__(self) -> None:
        self.lm.model.requires_grad_(False)

    def prefill(self, batch: PromptBatch) -> Prefix:
        """Forward the prompt once; keys and values only."""
        return forward(self.lm, batch)

    @torch.no_grad()
    def extend(self, prefix: Prefix, completion_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, R, T, H]` that predict each completion token."""
        return extend(self.lm, prefix, completion_ids)

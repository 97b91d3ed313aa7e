"""Counts the tokens that pass through the decoder layers, by purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from opd import distributed
from opd.models.video_lm import VideoLM


@dataclass
class LayerCounter:
    """Counts at the decoder layers which tokens passed through them, by what the pass was for.

    `tokens[label]` is the sum over layers of batch times length. Passes outside any label count as
    `other`.
    """

    num_layers: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    current: str = "other"

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def attach(self, lm: VideoLM) -> "LayerCounter":
        self.num_layers = len(lm.language_model.layers)
        for layer in lm.language_model.layers:
            layer.register_forward_pre_hook(self._count)
        return self

    def _count(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batch, length, _hidden = inputs[0].shape
        self.tokens[self.current] = self.tokens.get(self.current, 0) + batch * length

    def passes(self, label: str, prompt_tokens: int) -> float:
        """Passes through the whole stack, on all ranks, per prompt token."""
        (tokens,) = distributed.all_sum([self.tokens.get(label, 0)])
        return tokens / (self.num_layers * prompt_tokens)

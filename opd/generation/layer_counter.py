"""Counts of the tokens that pass through a model's decoder layers, by the purpose of the pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from opd import distributed
from opd.models.video_lm import VideoLM


@dataclass
class LayerCounter:
    """Counts the tokens that pass through the decoder layers, by the purpose of the pass.

    `tokens[label]` is the sum over layers of batch size times length; passes outside any label
    count as `other`.
    """

    num_layers: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    current: str = "other"

    def attach(self, lm: VideoLM) -> "LayerCounter":
        """Count every pass through the layers of `lm` from now on; returns itself."""
        self.num_layers = len(lm.language_model.layers)
        for layer in lm.language_model.layers:
            layer.register_forward_pre_hook(self._count)
        return self

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Context in which passes count under this label."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def passes(self, label: str, prompt_tokens: int) -> float:
        """Number of passes through the whole stack per prompt token, over all ranks."""
        return self.totals().get(label, 0) / (self.num_layers * prompt_tokens)

    def totals(self) -> dict[str, int]:
        """`tokens`, summed over all ranks."""
        counts = distributed.all_gather(self.tokens)
        return {label: sum(c.get(label, 0) for c in counts) for label in set().union(*counts)}

    def _count(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batch, length, _hidden = inputs[0].shape
        self.tokens[self.current] = self.tokens.get(self.current, 0) + batch * length

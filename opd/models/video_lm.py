"""A Qwen-VL model and its parts by one set of names, whatever the family."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd.device import send
from opd.models.positions import qwen2_5_vl_positions, qwen3_vl_positions
from opd.models.tower import tower_arguments

Video = tuple[
    torch.Tensor, list[torch.Tensor]
]  # vision tokens [tokens, H], and one such tensor per deepstack level


class Head(nn.Linear):
    """The language-model head. With `loss`, computes it here, so that a sharding engine has
    gathered the weight."""

    def forward(self, hidden: torch.Tensor, loss: Any = None) -> Any:
        """`hidden @ weight.T`, or `loss(hidden, weight)` without ever building the logits."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


@dataclass(frozen=True)
class VideoLM:
    """A Qwen-VL model and its parts by one set of names, whatever the family."""

    model: Any

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    @property
    def language_model(self) -> Any:
        return self.model.model.language_model

    @property
    def head(self) -> Any:
        return self.model.lm_head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def trains_vision(self) -> bool:
        return any(p.requires_grad for p in self.visual.parameters())

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 gathers its weights layer by layer: then all ranks must go through the
        same forwards, as many times."""
        return getattr(self.model, "is_sharded", False)

    def video_bytes(self, grid_thw: tuple[int, int, int]) -> int:
        """Memory of what `encode_video` makes of one video."""
        config = self.model.config.vision_config
        tokens = math.prod(grid_thw) // config.spatial_merge_size**2
        levels = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
        return tokens * levels * config.out_hidden_size * self.head.weight.element_size()

    def encode_video(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Video:
        """One call of the vision tower for a batch of videos; no graph where the tower is frozen.

        Args:
            pixel_values: `[patches, patch_dim]`, on the host or the device; grid_thw: int64 `[B,
                3]` on the host, in patches.

        Returns: Embeddings `[vision tokens, H]`, and one such tensor per deepstack level (none for
            Qwen2.5-VL).
        """
        pixels = send(pixel_values, self.device).to(self.head.weight.dtype)
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            out = self.visual(pixels, **tower_arguments(self.visual, grid_thw, self.device))
        return out.pooler_output, list(getattr(out, "deepstack_features", None) or [])

    def positions(
        self, input_ids: torch.Tensor, grid_thw: tuple[int, int, int], seconds_per_pair: float
    ) -> tuple[torch.Tensor, int]:
        """Position ids `[3, P]` of one unpadded prompt, and the position of its first completion
        token."""
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        grid = (grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge)
        if self.family == "qwen3_vl":
            return qwen3_vl_positions(input_ids, config.video_token_id, grid)
        step = config.vision_config.tokens_per_second * seconds_per_pair
        return qwen2_5_vl_positions(input_ids, config.video_token_id, grid, step)

    def train_only(self, trainable: str) -> None:
        """Freeze everything but the language model and its head (`language`), or nothing
        (`all`)."""
        self.model.requires_grad_(trainable == "all")
        self.language_model.requires_grad_(True)
        self.head.requires_grad_(True)


def end_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The tokenizer's end token and those of a checkpoint's generation config, if it has one."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return tuple({tokenizer.eos_token_id, *ends})

"""VideoLM: one interface to the Qwen-VL families, and the head that computes the loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd.device import send
from opd.models.positions import POSITIONS
from opd.models.tower import tower_arguments

# Vision tokens [tokens, H], and one such tensor per deepstack level.
Video = tuple[torch.Tensor, list[torch.Tensor]]


class Head(nn.Linear):
    """Language-model head that can compute a loss in its forward, where a sharding engine has
    gathered its weight."""

    def forward(self, hidden: torch.Tensor, loss: Any = None) -> Any:
        """Logits `hidden @ weight.T`, or `loss(hidden, weight)`, which need not build them."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


@dataclass(frozen=True)
class VideoLM:
    """A Qwen-VL model and its parts by one set of names, whatever the family."""

    model: Any

    @property
    def family(self) -> str:
        """`model_type` of transformers, such as `qwen3_vl`."""
        return self.model.config.model_type

    @property
    def visual(self) -> Any:
        """The vision tower with its merger."""
        return self.model.model.visual

    @property
    def language_model(self) -> Any:
        """Embedding, decoder layers and final norm."""
        return self.model.model.language_model

    @property
    def head(self) -> Any:
        """The language-model head, a `Head` after `load.prepare`."""
        return self.model.lm_head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def device_type(self) -> str:
        """Type of the device; of a model without weights, of the one that a plan is made for."""
        return getattr(self.model, "planned_device_type", self.device.type)

    @property
    def trains_vision(self) -> bool:
        """Whether any weight of the vision tower is trained."""
        return any(p.requires_grad for p in self.visual.parameters())

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 gathers the weights layer by layer; then every rank must run the same
        number of forwards."""
        return getattr(self.model, "is_sharded", False)

    def video_bytes(self, grid_thw: tuple[int, int, int]) -> int:
        """Size of the result of `encode_video` for one video, in bytes."""
        config = self.model.config.vision_config
        tokens = math.prod(grid_thw) // config.spatial_merge_size**2
        levels = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
        return tokens * levels * config.out_hidden_size * self.head.weight.element_size()

    def encode_video(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Video:
        """Encode a batch of videos in one call of the vision tower, without a graph where the tower
        is frozen.

        Args:
            pixel_values: `[patches, patch_dim]`, on the host or the device.
            grid_thw: int64 `[B, 3]` on the host, in patches.

        Returns: vision tokens `[tokens, H]`, and one such tensor per deepstack level (none for
            Qwen2.5-VL).
        """
        pixels = send(pixel_values, self.device).to(self.head.weight.dtype)
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            out = self.visual(pixels, **tower_arguments(self.visual, grid_thw, self.device))
        return out.pooler_output, list(getattr(out, "deepstack_features", None) or [])

    def positions(
        self,
        input_ids: torch.Tensor,
        grid_thw: tuple[int, int, int],
        seconds_per_pair: float | None,
    ) -> tuple[torch.Tensor, int]:
        """Position ids `[3, P]` of one unpadded prompt `[P]`, and the position of its first
        completion token.

        Args:
            grid_thw: the video's size in patches; frames count in pairs.
            seconds_per_pair: time between the starts of two frame pairs; None where text stands
                between them.
        """
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        grid = (grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge)
        return POSITIONS[self.family](input_ids, config, grid, seconds_per_pair)

    def train_only(self, trainable: str) -> None:
        """Freeze what `model.trainable` leaves out: the vision tower and its merger (`language`),
        or nothing (`all`)."""
        self.model.requires_grad_(trainable == "all")
        self.language_model.requires_grad_(True)
        self.head.requires_grad_(True)


def end_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """End tokens of a checkpoint: the tokenizer's, and those of its generation config, if any."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return tuple({tokenizer.eos_token_id, *ends})

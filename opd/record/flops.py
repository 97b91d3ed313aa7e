"""FLOPs of a step from the shapes of its models, and the share of a device's peak."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd.data.batch import PromptBatch
from opd.models.video_lm import VideoLM

FLOPS: tuple[str, ...] = ("student", "teacher", "recompute")


PEAK_FLOPS = {  # dense bf16 per second, by a part of the device's name; makers' data sheets
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def mfu(flops: dict[str, float], seconds: float) -> float | None:
    """Share of the device's dense bf16 peak that the run's FLOPs, recomputation left out, made of
    its seconds; None where the peak is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    useful = flops["student"] + flops["teacher"]
    return useful / (seconds * peaks[0]) if peaks and seconds else None


def elements(parameter: torch.Tensor) -> int:
    """Of a weight, whole also where it is sharded."""
    return getattr(parameter, "ds_numel", parameter.numel())


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model's forward, from its shapes: matrix products and attention; a multiplication
    and an addition are two."""

    per_token: float  # of all layers
    per_pair: float  # of a query with a key, all layers
    per_head: float  # of a token through the language-model head
    num_layers: int
    per_patch: float
    per_vision_token: float  # mergers
    patches_per_token: int
    vision_windows: tuple[int | None, ...]  # patches each vision layer attends to; None is a frame
    per_vision_pair: float  # one layer

    @classmethod
    def of(cls, lm: VideoLM) -> "Cost":
        def linear(*modules: Any) -> float:
            kinds = (nn.Linear, nn.Conv3d)
            found = [m for module in modules for m in module.modules() if isinstance(m, kinds)]
            return 2.0 * sum(elements(m.weight) for m in found)

        text, vision = lm.model.config.text_config, lm.model.config.vision_config
        layers, visual = lm.language_model.layers, lm.visual
        blocks, patches = visual.blocks, visual.patch_embed
        full = getattr(vision, "fullatt_block_indexes", range(len(blocks)))
        window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
        heads = text.num_attention_heads * text.head_dim if hasattr(text, "head_dim") else None
        return cls(
            per_token=linear(*layers),
            per_pair=4.0 * (heads or text.hidden_size) * len(layers),
            per_head=2.0 * elements(lm.head.weight),
            num_layers=len(layers),
            per_patch=linear(blocks, patches),
            per_vision_token=linear(visual) - linear(blocks, patches),
            patches_per_token=vision.spatial_merge_size**2,
            vision_windows=tuple(None if i in full else window for i in range(len(blocks))),
            per_vision_pair=4.0 * vision.hidden_size,
        )

    def vision(self, grid_thw: tuple[int, int, int]) -> float:
        """The tower on one video; `grid_thw` in patches."""
        frames, rows, columns = grid_thw
        patches, frame = frames * rows * columns, rows * columns
        pairs = sum(patches * min(frame, window or frame) for window in self.vision_windows)
        tokens = patches / self.patches_per_token
        return (
            self.per_patch * patches + self.per_vision_token * tokens + self.per_vision_pair * pairs
        )

    def prompt(self, batch: int, length: int) -> float:
        """Prefill of `batch` prompts of `length` tokens, padding included; causal pairs at half."""
        return batch * (self.per_token * length + self.per_pair * length**2 / 2)

    def completions(self, batch: int, length: int, rollouts: int, tokens: int) -> float:
        """`tokens` more per rollout after prompts of `length`: all at once or one by one, the
        same."""
        pairs = tokens * length + tokens**2 / 2
        return batch * rollouts * (self.per_token * tokens + self.per_pair * pairs)


def step_flops(
    costs: dict[VideoLM, Cost],
    forwarded: Sequence[PromptBatch],
    drawn: torch.Tensor | None,
    trained: Sequence[PromptBatch],
    completion_mask: torch.Tensor,
    recomputed_layers: int,
) -> dict[str, float]:
    """FLOPs of one micro-batch, by who spends them. Vision towers are counted for every video, also
    where its tokens were kept from an earlier step.

    Args:
        costs: of the student, and then of the teacher if there is one.
        forwarded: what the student's prompt forwards were; drawn: the mask `[B, R, T]` of the
            completions that were decoded here, if they were.
        trained: those of `forwarded` that the teacher and the backward see, and the mask of their
            completions, `[B', R', T']`.
    """
    (_, rollouts, longest), valid = completion_mask.shape, int(completion_mask.sum())
    result = dict.fromkeys(FLOPS, 0.0)
    for name, (lm, cost) in zip(FLOPS, costs.items(), strict=False):

        def of(
            parts: Sequence[PromptBatch], rollouts: int, tokens: int, cost: Cost = cost
        ) -> tuple[float, float, float]:
            """Of vision towers, prompts and completions."""
            sizes = [(len(part.input_ids), part.input_ids.shape[1]) for part in parts]
            return (
                sum(cost.vision(prompt.grid_thw) for part in parts for prompt in part.prompts),
                sum(cost.prompt(*size) for size in sizes),
                sum(cost.completions(*size, rollouts, tokens) for size in sizes),
            )

        vision, prefill, extension = of(trained, rollouts, longest - 1)
        extension += cost.per_head * valid
        if name == "teacher":
            result[name] = vision + prefill + extension
            continue
        result[name] = 2 * vision * lm.trains_vision + 2 * prefill + 3 * extension  # backward, too
        vision, forward, _ = of(forwarded, 0, 0)
        result[name] += vision + forward
        if drawn is not None:
            _, _, decoding = of(forwarded, drawn.shape[1], drawn.shape[2] - 1)
            result[name] += decoding + cost.per_head * drawn.numel()
        result["recompute"] = prefill * recomputed_layers / cost.num_layers
    return result

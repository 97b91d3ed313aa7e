"""FLOPs of a step, computed from the shapes of its models and prompts, and MFU.

Counted are matrix products and attention, with a multiplication and an addition as two operations;
causal attention counts half of its pairs, a backward twice its forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd.data.batch import PromptBatch
from opd.generation.prefilled import Prefilled
from opd.models.layers import recomputed_layers
from opd.models.video_lm import VideoLM

FLOPS: tuple[str, ...] = ("student", "teacher", "recompute")  # who spends them

PEAK_FLOPS = {  # dense bf16 FLOPs per second by a part of the device's name; from data sheets
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def mfu(flops: dict[str, float], seconds: float) -> float | None:
    """Model FLOPs utilisation: FLOPs without recomputation, over `seconds` at the device's dense
    bf16 peak; None where the peak is unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    useful = flops["student"] + flops["teacher"]
    return useful / (seconds * peaks[0]) if peaks and seconds else None


def elements(parameter: torch.Tensor) -> int:
    """Number of elements of a weight; of the whole weight if it is sharded."""
    return getattr(parameter, "ds_numel", parameter.numel())


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model's forward."""

    per_token: float  # a token in all layers
    per_pair: float  # a query with a key, in all layers
    per_head: float  # a token in the language-model head
    num_layers: int
    per_patch: float  # a patch in all vision layers
    per_vision_token: float  # a vision token in the mergers
    patches_per_token: int
    vision_windows: tuple[int | None, ...]  # patches that a vision layer attends to; None: a frame
    per_vision_pair: float  # a query with a key, in one vision layer

    @classmethod
    def of(cls, lm: VideoLM) -> "Cost":
        """Read the shapes of a model."""

        def linear(*modules: Any) -> float:
            kinds = (nn.Linear, nn.Conv3d)
            layers = [m for module in modules for m in module.modules() if isinstance(m, kinds)]
            return 2.0 * sum(elements(m.weight) for m in layers)

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
        """Vision tower on one video; `grid_thw` is in patches."""
        frames, rows, columns = grid_thw
        patches, frame = frames * rows * columns, rows * columns
        pairs = sum(patches * min(frame, window or frame) for window in self.vision_windows)
        tokens = patches / self.patches_per_token
        return (
            self.per_patch * patches + self.per_vision_token * tokens + self.per_vision_pair * pairs
        )

    def prompt(self, batch: int, length: int, own_lengths: Sequence[int] = ()) -> float:
        """Prefill of `batch` sequences of `length` tokens, and of branches of these lengths behind
        each."""
        pairs = length**2 / 2 + sum(own * length + own**2 / 2 for own in own_lengths)
        return batch * (self.per_token * (length + sum(own_lengths)) + self.per_pair * pairs)

    def completions(self, batch: int, length: int, rollouts: int, tokens: int) -> float:
        """Extension of each prompt of `length` tokens by `rollouts` completions of `tokens` tokens,
        in one pass or token by token."""
        pairs = tokens * length + tokens**2 / 2
        return batch * rollouts * (self.per_token * tokens + self.per_pair * pairs)


def step_flops(
    costs: dict[VideoLM, Cost],
    forwarded: Sequence[PromptBatch],
    decoded: torch.Tensor | None,
    trained: Prefilled,
    scored: torch.Tensor,
    recompute: str,
) -> dict[str, float]:
    """FLOPs of one micro-batch, by the names of `FLOPS`. The vision tower counts for every group of
    prompts, also where its tokens were cached by an earlier step. Padding does not count.

    Args:
        costs: of the student, then of the teacher if there is one.
        forwarded: parts of the batch whose prompts the student forwarded.
        decoded: lengths `[N, R]` of the completions that were sampled; None where none were.
        trained: what the teacher and the backward see of them.
        scored: tokens of the completions of `trained` that are in the loss, `[N', R']`.
        recompute: the setting `prefix.recompute`.
    """
    flops = dict.fromkeys(FLOPS, 0.0)

    def completions(cost: Cost, prompts: Sequence[int], lengths: torch.Tensor) -> float:
        """FLOPs in the layers for completions `[N, R]` behind prompts, both given by length."""
        pairs = zip(prompts, (lengths - 1).clamp_min(0).tolist(), strict=True)
        return sum(
            cost.completions(1, prompt, 1, tokens) for prompt, row in pairs for tokens in row
        )

    def prompts(cost: Cost, parts: Sequence[PromptBatch]) -> tuple[float, float]:
        """FLOPs of vision tower and prompts."""
        groups = [group for part in parts for group in part.groups]
        vision = sum(cost.vision(group.prompts[0].grid_thw) for group in groups)
        return vision, sum(cost.prompt(1, group.shared, group.own_lengths) for group in groups)

    for name, (lm, cost) in zip(FLOPS, costs.items(), strict=False):
        vision, prefill = prompts(cost, trained.parts)
        layers = completions(cost, trained.lengths, scored)
        extension = layers + cost.per_head * int(scored.sum())
        if name == "teacher":
            flops[name] = vision + prefill + extension
            continue
        # Backward of everything, and the forward of the completions.
        flops[name] = 2 * vision * lm.trains_vision + 2 * prefill + 3 * extension
        flops[name] += sum(prompts(cost, forwarded))
        if decoded is not None:
            lengths = [len(prompt.input_ids) for part in forwarded for prompt in part.prompts]
            flops[name] += completions(cost, lengths, decoded) + cost.per_head * int(decoded.sum())
        share = recomputed_layers(recompute, cost.num_layers) / cost.num_layers
        flops["recompute"] = (prefill + layers) * share
    return flops

"""Frame sizes and vision tokens of a video: the rules of the Qwen-VL processors, published budgets.

A vision token covers `factor x factor` pixels of two frames; the factor is 32 in Qwen3-VL, 28 in
Qwen2.5-VL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from opd.config import data
from opd.config.data import DataConfig, Family
from opd.data.video.decoding import TEMPORAL_PATCH

FACTORS: dict[str, int] = {"qwen3_vl": 32, "qwen2_5_vl": 28}
MAX_VIDEO_TOKENS: dict[str, int] = {"qwen3_vl": 768, "qwen2_5_vl": 128_000}
MIN_PIXELS = 4096  # all frames together, as in Qwen3-VL's checkpoints; in practice no limit
MAX_ASPECT = 200


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Size settings of a video processor; none is left to a default of the library's version.

    Attributes:
        family: Qwen3-VL limits the pixels of all frames together, Qwen2.5-VL those of each frame.
        factor: patch size times merge size, in pixels; both sides become multiples of it.
        shortest_edge, longest_edge: minimum and maximum number of pixels, despite these names,
            which are the processor's.
        cap_pixels_per_frame: a second limit. In Qwen3-VL a frame may have at most
            `max_video_tokens` and at most its even share of all pixels; in Qwen2.5-VL all frames
            together may have at most 90% of `max_video_tokens`. Either way a frame may have 1.05 x
            `shortest_edge`.
        max_video_tokens: the limit of `cap_pixels_per_frame`, in vision tokens' worth of pixels.

    Raises:
        ValueError: the family is unknown, or a size is not positive.
    """

    family: Family
    factor: int
    shortest_edge: int
    longest_edge: int
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768

    def __post_init__(self) -> None:
        if self.family not in FACTORS:
            raise ValueError(f"unknown family {self.family!r} (known: {', '.join(FACTORS)})")
        if min(self.shortest_edge, self.longest_edge, self.factor) < 1:
            raise ValueError(f"sizes of a budget must be positive: {self}")

    @property
    def options(self) -> dict[str, Any]:
        """The budget as keyword arguments of the processor's call."""
        size = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        return {"size": size, "cap_pixels_per_frame": self.cap_pixels_per_frame}


def processor_budget(
    video_processor: Any, family: Family, frames: int, video_tokens: int | None = None
) -> Budget:
    """Return the budget of a checkpoint's video processor for a video of `frames` frames.

    Args:
        video_processor: `Qwen3VLVideoProcessor` or `Qwen2VLVideoProcessor` of transformers.
        video_tokens: maximum vision tokens of the whole video; None keeps the processor's limit.
    """
    factor, size = video_processor.patch_size * video_processor.merge_size, video_processor.size
    min_pixels, max_pixels = size["shortest_edge"], size["longest_edge"]
    if video_tokens is not None:
        max_pixels = video_tokens * TEMPORAL_PATCH * factor**2
        if family == "qwen2_5_vl":
            max_pixels //= frames + frames % TEMPORAL_PATCH
        min_pixels = min(min_pixels, max_pixels)
    return Budget(
        family=family,
        factor=factor,
        shortest_edge=min_pixels,
        longest_edge=max_pixels,
        # A switch set to None is off; versions without the switch always cap.
        cap_pixels_per_frame=bool(getattr(video_processor, "cap_pixels_per_frame", True)),
        max_video_tokens=getattr(video_processor, "max_video_tokens", MAX_VIDEO_TOKENS[family]),
    )


def target_size(frames: int, height: int, width: int, budget: Budget) -> tuple[int, int]:
    """Return the `(height, width)` to which the family's processor resizes a video's frames.

    Both sides are rounded to multiples of the factor. Where that gives too many (few) pixels, the
    unrounded sides are scaled to the limit, then rounded down (up).

    Raises:
        ValueError: fewer than two frames (Qwen3-VL), or an aspect ratio above `MAX_ASPECT`.
    """
    factor, together = budget.factor, budget.family == "qwen3_vl"
    if together and frames < TEMPORAL_PATCH:
        raise ValueError(f"{frames} frames do not fill a temporal patch")
    if together and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"frames of {height} x {width} exceed the aspect ratio {MAX_ASPECT}")
    count = frames if together else 1
    even = round(count / TEMPORAL_PATCH) * TEMPORAL_PATCH if together else 1
    rows, columns = round(height / factor), round(width / factor)
    pixels = even * rows * columns * factor**2
    min_pixels, max_pixels = budget.shortest_edge, _max_pixels(frames, budget)
    if pixels > max_pixels:
        shrink = math.sqrt(count * height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (count * height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def video_tokens(frames: int, height: int, width: int, budget: Budget) -> int:
    """Return the vision tokens of a video whose frames are `height x width` in its file."""
    height, width = target_size(frames, height, width, budget)
    return math.ceil(frames / TEMPORAL_PATCH) * (height // budget.factor) * (width // budget.factor)


def resize_target(frames: int, height: int, width: int, budget: Budget) -> tuple[int, int]:
    """Return the size to which frames may be resized ahead of the processor without any effect.

    That is `target_size` where the processor leaves frames of that size alone, else `(height,
    width)`.
    """
    target = target_size(frames, height, width, budget)
    return target if target_size(frames, *target, budget) == target else (height, width)


def _max_pixels(frames: int, budget: Budget) -> int:
    """Return the effective upper limit on pixels, of all frames or of each as the family counts."""
    most, floor = budget.longest_edge, int(budget.shortest_edge * 1.05)
    if not budget.cap_pixels_per_frame:
        return most
    tokens = budget.max_video_tokens * budget.factor**2
    if budget.family == "qwen3_vl":
        return frames * max(min(tokens, most // frames), floor)
    return max(min(most, int(tokens * 0.9) * TEMPORAL_PATCH // frames), floor)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Video sampling as in a published run.

    Attributes:
        family: the family of its model.
        fps, max_frames: frames per second, and the maximum number of frames.
        total_tokens: maximum vision tokens of a video.
        frame_tokens: minimum and maximum size of a frame, in vision tokens' worth of pixels, as in
            qwen-vl-utils; the minimum takes precedence over `total_tokens`. None leaves the size to
            `total_tokens`.
    """

    family: Family
    fps: float
    max_frames: int
    total_tokens: int
    frame_tokens: tuple[int, int] | None = None

    def budget(self, frames: int) -> Budget:
        """Return the budget of a video of `frames` frames."""
        area = FACTORS[self.family] ** 2
        share = self.total_tokens * TEMPORAL_PATCH * area / frames  # pixels of one frame
        min_pixels = MIN_PIXELS / frames
        if self.frame_tokens is not None:
            min_pixels, max_pixels = (tokens * area for tokens in self.frame_tokens)
            share = max(min(max_pixels, share), int(min_pixels * 1.05))
        count = frames if self.family == "qwen3_vl" else 1
        return Budget(
            family=self.family,
            factor=FACTORS[self.family],
            shortest_edge=max(1, round(min_pixels * count)),
            longest_edge=math.floor(share * count),
        )


def recipe_of(config: DataConfig, family: Family) -> Recipe | None:
    """Return the recipe of a configuration that limits the size of frames, else None."""
    if config.video_tokens is None or (config.min_frame_tokens or config.max_frame_tokens) is None:
        return None
    return Recipe(
        family=family,
        fps=config.fps,
        max_frames=config.max_frames,
        total_tokens=config.video_tokens,
        frame_tokens=(config.min_frame_tokens or 1, config.max_frame_tokens or config.video_tokens),
    )


def budget_of(config: DataConfig, video_processor: Any, family: Family, frames: int) -> Budget:
    """Return the budget of a video of `frames` frames: as configured, else the checkpoint's own."""
    recipe = recipe_of(config, family)
    if recipe is not None:
        return recipe.budget(frames)
    return processor_budget(video_processor, family, frames, config.video_tokens)


RECIPES = {
    name: Recipe(
        family=family,
        fps=fps,
        max_frames=max_frames,
        total_tokens=total,
        frame_tokens=None if least is None or most is None else (least, most),
    )
    for name, (family, fps, max_frames, total, least, most, _) in data.RECIPES.items()
}
"""Published budgets by the names of `data.recipe`."""

"""How large a video's frames are when the model sees them: the rules of the Qwen-VL processors, and
the budgets that published work used.

A vision token is `factor x factor` pixels of two frames: factor 32 in Qwen3-VL, 28 in Qwen2.5-VL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from opd.config import data
from opd.config.data import DataConfig, Family
from opd.data.video.decoding import TEMPORAL_PATCH

FACTORS: dict[str, int] = {"qwen3_vl": 32, "qwen2_5_vl": 28}
CAPS: dict[str, int] = {"qwen3_vl": 768, "qwen2_5_vl": 128_000}
LEAST_PIXELS = 4096  # of Qwen3-VL's checkpoints, all frames together: never in the way
MAX_ASPECT = 200


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a video processor is told about sizes, nothing left to a default of its version.

    Attributes:
        family: Qwen3-VL limits the pixels of all frames together, Qwen2.5-VL those of each.
        factor: patch size times merge size, in pixels; both sides become multiples of it.
        shortest_edge, longest_edge: least and most pixels, in the processor's misleading words.
        cap_pixels_per_frame: of Qwen3-VL, no frame may cost more than `max_video_tokens`, nor more
            than its even share; of Qwen2.5-VL, all frames together no more than 90% of
            `max_video_tokens`. Either way a frame may have 1.05 x `shortest_edge`.
        max_video_tokens: of that cap, in the processor's words too.
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
            raise ValueError(f"no budget of pixels: {self}")

    @property
    def options(self) -> dict[str, Any]:
        """The same as arguments of the processor's call."""
        size = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        return {"size": size, "cap_pixels_per_frame": self.cap_pixels_per_frame}


def processor_budget(
    video_processor: Any, family: Family, frames: int, video_tokens: int | None = None
) -> Budget:
    """The budget of a checkpoint's video processor for a video of so many frames.

    Args:
        video_processor: of transformers, `Qwen3VLVideoProcessor` or `Qwen2VLVideoProcessor`.
        video_tokens: vision tokens of the whole video at most, instead of the processor's own.
    """
    made, factor = video_processor, video_processor.patch_size * video_processor.merge_size
    least, most = made.size["shortest_edge"], made.size["longest_edge"]
    if video_tokens is not None:
        most = video_tokens * TEMPORAL_PATCH * factor**2
        if family == "qwen2_5_vl":
            most //= frames + frames % TEMPORAL_PATCH
        least = min(least, most)
    return Budget(
        family=family,
        factor=factor,
        shortest_edge=least,
        longest_edge=most,
        # Unset means no; versions that no longer have the switch are to cap always.
        cap_pixels_per_frame=bool(getattr(made, "cap_pixels_per_frame", True)),
        max_video_tokens=getattr(made, "max_video_tokens", CAPS[family]),
    )


def target_size(frames: int, height: int, width: int, budget: Budget) -> tuple[int, int]:
    """`(height, width)` to which the family's processor resizes the frames of a video.

    Both sides are rounded to multiples of the factor; if that is more (fewer) pixels than allowed,
    the unrounded sides are scaled to the limit, then rounded down (up).

    Raises:
        ValueError: for fewer than two frames (Qwen3-VL) or one side 200 times the other.
    """
    factor, together = budget.factor, budget.family == "qwen3_vl"
    if together and frames < TEMPORAL_PATCH:
        raise ValueError(f"{frames} frames do not fill a temporal patch")
    if together and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"frames of {height} x {width} are longer than {MAX_ASPECT} to 1")
    count = frames if together else 1
    even = round(count / TEMPORAL_PATCH) * TEMPORAL_PATCH if together else 1
    rows, columns = round(height / factor), round(width / factor)
    pixels = even * rows * columns * factor**2
    least, most = budget.shortest_edge, _most(frames, budget)
    if pixels > most:
        shrink = math.sqrt(count * height * width / most)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif pixels < least:
        grow = math.sqrt(least / (count * height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def video_tokens(frames: int, height: int, width: int, budget: Budget) -> int:
    """Vision tokens of a video whose frames are `height x width` in its file."""
    high, wide = target_size(frames, height, width, budget)
    return math.ceil(frames / TEMPORAL_PATCH) * (high // budget.factor) * (wide // budget.factor)


def resize_target(frames: int, height: int, width: int, budget: Budget) -> tuple[int, int]:
    """`target_size` where the processor would leave frames of that size alone, so that resizing
    early changes nothing; else the size they have."""
    target = target_size(frames, height, width, budget)
    return target if target_size(frames, *target, budget) == target else (height, width)


def _most(frames: int, budget: Budget) -> int:
    """The upper limit that counts: of all frames or of each, as the family does it."""
    most, floor = budget.longest_edge, int(budget.shortest_edge * 1.05)
    if not budget.cap_pixels_per_frame:
        return most
    tokens = budget.max_video_tokens * budget.factor**2
    if budget.family == "qwen3_vl":
        return frames * max(min(tokens, most // frames), floor)
    return max(min(most, int(tokens * 0.9) * TEMPORAL_PATCH // frames), floor)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How somebody's published runs sampled videos.

    Attributes:
        family: of the model they used.
        fps, max_frames: frames a second, and their number at most.
        total_tokens: vision tokens of a video at most.
        frame_tokens: least and most size of one frame, in tokens' worth of pixels, as qwen-vl-utils
            has it; the least wins over `total_tokens`. None leaves both to `total_tokens`.
    """

    family: Family
    fps: float
    max_frames: int
    total_tokens: int
    frame_tokens: tuple[int, int] | None = None

    def budget(self, frames: int) -> Budget:
        """What to tell the family's processor about a video of so many frames."""
        area = FACTORS[self.family] ** 2
        share = self.total_tokens * TEMPORAL_PATCH * area / frames  # pixels of one frame
        least = LEAST_PIXELS / frames
        if self.frame_tokens is not None:
            least, most = (tokens * area for tokens in self.frame_tokens)
            share = max(min(most, share), int(least * 1.05))
        count = frames if self.family == "qwen3_vl" else 1
        return Budget(
            family=self.family,
            factor=FACTORS[self.family],
            shortest_edge=max(1, round(least * count)),
            longest_edge=math.floor(share * count),
        )


def recipe_of(config: DataConfig, family: Family) -> Recipe | None:
    """The limits that a configuration sets for each frame, if it does."""
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
    """What a video processor is told of sizes, for a video of so many frames: as configured, else
    as its checkpoint has it."""
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
    for name, (family, fps, max_frames, total, least, most) in data.RECIPES.items()
}
"""Published budgets by name, as `data.recipe` knows them."""

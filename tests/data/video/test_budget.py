"""Frame sizes and token counts, against the processors, qwen-vl-utils and hand-computed values."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize as smart_resize_2
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_3

from opd.config.data import Family
from opd.data.video.budget import (
    FACTORS,
    RECIPES,
    Budget,
    Recipe,
    processor_budget,
    resize_target,
    target_size,
    video_tokens,
)
from opd.data.video.resizing import resize_image
from opd.data.video.sampling import VideoFrames
from opd.models.tiny import processor

FAMILIES: tuple[Family, ...] = ("qwen3_vl", "qwen2_5_vl")
sides = st.integers(1, 3000)
budgets = st.tuples(st.integers(1, 400_000), st.integers(1, 30_000_000)).map(sorted)


def budget_of(family: Family, least: int, most: int, cap: bool = False, tokens: int = 768):
    return Budget(
        family=family,
        factor=FACTORS[family],
        shortest_edge=least,
        longest_edge=most,
        cap_pixels_per_frame=cap,
        max_video_tokens=tokens,
    )


@given(st.integers(2, 768), sides, sides, budgets)
@settings(max_examples=500)
def test_qwen3_vl_rounds_as_transformers(frames: int, height: int, width: int, limits) -> None:
    arguments: Any = {"min_pixels": limits[0], "max_pixels": limits[1], "factor": 32}
    budget = budget_of("qwen3_vl", *limits)
    try:
        theirs = smart_resize_3(frames, height, width, temporal_factor=2, **arguments)
    except ValueError:
        with pytest.raises(ValueError, match="exceed the aspect ratio 200"):
            target_size(frames, height, width, budget)
    else:
        assert target_size(frames, height, width, budget) == theirs


@given(st.integers(2, 768), sides, sides, budgets)
@settings(max_examples=500)
def test_qwen2_5_vl_rounds_as_transformers(frames: int, height: int, width: int, limits) -> None:
    arguments: Any = {"min_pixels": limits[0], "max_pixels": limits[1], "factor": 28}
    budget = budget_of("qwen2_5_vl", *limits)
    try:
        theirs = smart_resize_2(height, width, **arguments)
    except ValueError:
        with pytest.raises(ValueError, match="exceed the aspect ratio 200"):
            target_size(frames, height, width, budget)
    else:
        assert target_size(frames, height, width, budget) == theirs


def processed(
    video_processor: Any, frames: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, list[int]]:
    inputs = video_processor(
        videos=[frames], do_sample_frames=False, return_tensors="pt", **options
    )
    return inputs["pixel_values_videos"], inputs["video_grid_thw"][0].tolist()


CASES = [(4, 360, 640), (2, 64, 64), (7, 100, 50), (6, 31, 90), (4, 240, 320), (12, 33, 470)]


@pytest.mark.parametrize("cap", [False, True, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_processors_give_these_sizes(family: Family, cap: bool | None) -> None:
    video_processor: Any
    if family == "qwen3_vl":
        size = {"shortest_edge": 8000, "longest_edge": 600_000}
        video_processor = Qwen3VLVideoProcessor(
            size=size, cap_pixels_per_frame=cap, max_video_tokens=60
        )
    else:
        size = {"shortest_edge": 8000, "longest_edge": 90_000}
        video_processor = Qwen2VLVideoProcessor(
            size=size, cap_pixels_per_frame=cap, max_video_tokens=300
        )
    sizes = set()
    for frames, height, width in CASES:
        budget = processor_budget(video_processor, family, frames)
        pixels, grid = processed(
            video_processor, torch.zeros(frames, 3, height, width, dtype=torch.uint8)
        )
        high, wide = target_size(frames, height, width, budget)
        patch = video_processor.patch_size
        assert grid == [math.ceil(frames / 2), high // patch, wide // patch]
        assert len(pixels) == 4 * video_tokens(frames, height, width, budget)
        sizes.add((high, wide))
        if cap is not None:  # passed to a processor with other settings, the budget decides alone
            other: Any = type(video_processor)(max_video_tokens=video_processor.max_video_tokens)
            frames_in = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
            assert processed(other, frames_in, **budget.options)[1] == grid
    assert len(sizes) > 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [None, 16, 100])
def test_the_embedded_processors_give_these_sizes(family: Family, tokens: int | None) -> None:
    video_processor: Any = processor(family).video_processor
    for frames, height, width in [(16, 64, 64), (32, 64, 64), (4, 128, 96)]:
        budget = processor_budget(video_processor, family, frames, tokens)
        options = {} if tokens is None else {"size": budget.options["size"]}
        video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
        grid = processed(video_processor, video, **options)[1]
        high, wide = target_size(frames, height, width, budget)
        assert grid[1:] == [high // video_processor.patch_size, wide // video_processor.patch_size]
        if tokens is not None:
            assert video_tokens(frames, height, width, budget) <= max(tokens, frames // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_resizing_first_changes_nothing(family: Family) -> None:
    """Bit for bit, whatever the size: the worker may scale, and the processor sees the same."""
    generator = torch.Generator().manual_seed(0)
    video_processor: Any = (
        Qwen3VLVideoProcessor() if family == "qwen3_vl" else Qwen2VLVideoProcessor()
    )
    scaled = 0
    for frames, height, width in [*CASES, (4, 720, 1280), (4, 1, 150)]:
        budget = budget_of(family, 20_000, 60_000 if family == "qwen2_5_vl" else 240_000)
        video = torch.randint(0, 256, (frames, 3, height, width), generator=generator)
        video = video.to(torch.uint8)
        size = resize_target(frames, height, width, budget)
        if size != (height, width):
            images = [torch.from_numpy(resize_image(image.numpy(), size)) for image in video]
            small, scaled = torch.stack(images), scaled + 1
            assert small.shape == (frames, 3, *size) and small.dtype == torch.uint8
        else:
            small = video
        assert processed(video_processor, small, **budget.options)[0].equal(
            processed(video_processor, video, **budget.options)[0]
        )
    assert scaled >= 6


@given(st.sampled_from(FAMILIES), st.integers(1, 384), sides, sides, budgets, st.booleans())
@settings(max_examples=500)
def test_a_resized_video_keeps_its_size(family, pairs, height, width, limits, cap) -> None:
    budget = budget_of(family, *limits, cap=cap)
    if max(height, width) > 150 * min(height, width):
        return
    size = resize_target(2 * pairs, height, width, budget)
    goal = target_size(2 * pairs, height, width, budget)
    assert size in (goal, (height, width))
    assert target_size(2 * pairs, *size, budget) == goal


def test_by_hand() -> None:
    """Qwen3-VL as it ships, 25,165,824 pixels: 640x360 is rounded to 640x352 = 20 x 11 tokens as
    long as frames x 225,280 is less, up to 111; 112 are scaled by sqrt(112 x 230,400 / 25,165,824)
    = 1.0126: 355.5 x 632.0 -> 352 x 608."""
    budget = RECIPES["qwen3_vl"].budget(2)
    assert (budget.shortest_edge, budget.longest_edge) == (4096, 25_165_824)
    for frames, size, tokens in [
        (2, (352, 640), 220),
        (110, (352, 640), 55 * 220),
        (112, (352, 608), 56 * 11 * 19),
        (768, (128, 224), 384 * 4 * 7),
    ]:
        budget = RECIPES["qwen3_vl"].budget(frames)
        assert target_size(frames, 360, 640, budget) == size
        assert video_tokens(frames, 360, 640, budget) == tokens


@pytest.mark.parametrize(
    ("name", "frames", "height", "width", "size", "tokens"),
    [
        # 8,192 tokens are 16,777,216 pixels; 240 frames of 720p: sqrt(240 x 921,600 / that) =
        # 3.6309; 720 / 3.6309 = 198.3 -> 192, 1280 / 3.6309 = 352.5 -> 352.
        ("video_opd", 240, 720, 1280, (192, 352), 120 * 6 * 11),
        # 768 frames: 6.4952; 110.9 -> 96, 197.1 -> 192.
        ("video_opd", 768, 720, 1280, (96, 192), 384 * 3 * 6),
        # 60 frames of 360x480: 60 x 352 x 480 = 10,137,600 fits, so they are only rounded.
        ("video_opd", 60, 360, 480, (352, 480), 30 * 11 * 15),
        # One frame may have 28,672 x 1,024 / 448 = 65,536 pixels, less than 1.05 x 64 tokens =
        # 68,812: sqrt(921,600 / 68,812) = 3.6597; 196.7 -> 192, 349.8 -> 320.
        ("timelens_8b", 448, 720, 1280, (192, 320), 224 * 6 * 10),
        # 768 frames, as in its evaluation, have their smallest size, whatever the total.
        ("timelens_8b", 768, 720, 1280, (192, 320), 384 * 6 * 10),
        # 60 frames: 489,335 pixels each: 1.3724; 524.6 -> 512, 932.7 -> 928.
        ("timelens_8b", 60, 720, 1280, (512, 928), 30 * 16 * 29),
        # 64 pixels are 4 tokens; at least 64 tokens: sqrt(65,536 / 4,096) = 4 -> 256.
        ("timelens_8b", 60, 64, 64, (256, 256), 30 * 64),
        # Factor 28; 28,672 x 784 / 448 = 50,176 < 1.05 x 64 x 784 = 52,684: 4.1824; 172.2 -> 168,
        # 306.0 -> 280.
        ("timelens_7b", 448, 720, 1280, (168, 280), 224 * 6 * 10),
        # 7,168 x 784 / 60 = 93,661 pixels a frame: sqrt(230,400 / that) = 1.5684; 229.5 -> 224,
        # 408.1 -> 392.
        ("time_r1", 60, 360, 640, (224, 392), 30 * 8 * 14),
        # 768 frames: 7,317 < 1.05 x 16 x 784 = 13,171: 4.1824; 86.07 -> 84, 153.02 -> 140.
        ("time_r1", 768, 360, 640, (84, 140), 384 * 3 * 5),
        # At most 768 x 784 = 602,112 a frame: sqrt(921,600 / that) = 1.2372; 582.0 -> 560,
        # 1034.6 -> 1008.
        ("qwen2_5_vl", 16, 720, 1280, (560, 1008), 8 * 20 * 36),
    ],
)
def test_published_budgets_by_hand(
    name: str, frames: int, height: int, width: int, size: tuple[int, int], tokens: int
) -> None:
    budget = RECIPES[name].budget(frames)
    assert target_size(frames, height, width, budget) == size
    assert video_tokens(frames, height, width, budget) == tokens


def utils_size(recipe: Recipe, frames: int, height: int, width: int) -> tuple[int, int]:
    """qwen-vl-utils from its description: a frame may have its share of the total, at most the
    largest frame, at least 1.05 x the smallest."""
    factor = FACTORS[recipe.family]
    assert recipe.frame_tokens is not None
    least, most = (tokens * factor**2 for tokens in recipe.frame_tokens)
    most = max(min(most, recipe.total_tokens * factor**2 / frames * 2), int(least * 1.05))
    # Whole pixels, as the processors take them: of all frames in Qwen3-VL, of each in Qwen2.5-VL.
    # qwen-vl-utils keeps the fraction.
    count = frames if recipe.family == "qwen3_vl" else 1
    most = math.floor(most * count) / count
    high, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        high, wide = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif high * wide < least:
        scale = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return high, wide


@example("time_r1", 131, 131, 224)
@given(
    st.sampled_from(["timelens_8b", "timelens_7b", "time_r1", "qwen2_5_vl"]),
    st.integers(1, 224),
    st.integers(64, 1500),
    st.integers(64, 1500),
)
@settings(max_examples=500)
def test_published_budgets_are_those_of_qwen_vl_utils(name, pairs, height, width) -> None:
    recipe = RECIPES[name]
    if max(height, width) > 8 * min(height, width):
        return
    ours = target_size(2 * pairs, height, width, recipe.budget(2 * pairs))
    assert ours == utils_size(recipe, 2 * pairs, height, width)


def test_timestamps_by_hand() -> None:
    """60 s at 25 frames a second, 2 a second: 120 of 1,500 frames, 1499 / 119 apart. A temporal
    patch stands at the mean of its two frames."""
    indices = [round(k * 1499 / 119) for k in range(120)]
    assert indices[:4] == [0, 13, 25, 38] and indices[-1] == 1499
    video = VideoFrames(
        frames=torch.zeros(120, 3, 2, 2, dtype=torch.uint8),
        indices=indices,
        source_fps=25.0,
        source_frames=1500,
        duration_s=60.0,
        decoder="decord",
    )
    assert video.timestamps_s[:2] == [0.26, 1.26]
    assert video.timestamps_s[-1] == (1486 / 25 + 1499 / 25) / 2
    assert video_tokens(120, 360, 640, RECIPES["video_opd"].budget(120)) == 60 * 8 * 15


def test_an_invalid_budget_is_an_error() -> None:
    for wrong in ({"family": "qwen4"}, {"longest_edge": 0}, {"shortest_edge": 0}, {"factor": 0}):
        settings: Any = {"family": "qwen3_vl", "factor": 32, "shortest_edge": 1, "longest_edge": 9}
        with pytest.raises(ValueError, match=r"must be positive|unknown family"):
            Budget(**settings | wrong)
    with pytest.raises(ValueError, match="do not fill a temporal patch"):
        target_size(1, 64, 64, budget_of("qwen3_vl", 1, 10**6))

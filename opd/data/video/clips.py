"""Clips: parts of a video file that are videos of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

PAST_S = 1.0
"""A clip may end so many seconds after its file, and a span after its video: annotations round."""

Footage = tuple[Path, tuple[float, float] | None]
"""A video file and the clip of it that is meant, `(start, end)` in seconds; None is all of it."""


def clip_length(clip: Sequence[float] | None, file_s: float) -> float:
    """Return the length in seconds of a clip `(start, end)` of a file that lasts `file_s`.

    None is the whole file. A clip is cut off where its file ends.

    Raises ValueError for a clip that starts at the end of the file or later, or ends more than
    `PAST_S` after it.
    """
    if clip is None:
        return file_s
    start_s, end_s = clip
    if start_s >= file_s or end_s > file_s + PAST_S:
        raise ValueError(f"clip {start_s:g} to {end_s:g} s lies outside its file of {file_s:g} s")
    return min(end_s, file_s) - start_s


def clip_frames(
    clip: Sequence[float] | None, source_frames: int, source_fps: float
) -> tuple[int, int]:
    """Return the numbers of the first and the last frame of a clip, as qwen-vl-utils counts them.

    They are the first frame at its start or later, and the last one at its end or earlier. Raises
    as `clip_length` does.
    """
    clip_length(clip, source_frames / source_fps)
    if clip is None:
        return 0, source_frames - 1
    # Rounded, because 4.4 * 25 is more than 110.
    first, end = (round(time_s * source_fps, 6) for time_s in clip)
    start = min(math.ceil(first), source_frames - 1)
    return start, max(start, min(math.floor(end), source_frames - 1))

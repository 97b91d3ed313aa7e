"""Sampling of frames from a video on a regular grid, with their timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from opd.data.video.backends import Backend, check_backend
from opd.data.video.decoding import (
    TEMPORAL_PATCH,
    frame_grid,
    plan_frames,
    planned_images,
    probe_duration,
)

__all__ = [
    "TEMPORAL_PATCH",
    "Backend",
    "VideoFrames",
    "frame_grid",
    "probe_duration",
    "sample_frames",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFrames:
    """Frames sampled from one file, or from a clip of it.

    Attributes:
        frames: `[F, 3, H, W]` uint8 RGB, F even; at the size in the file, or resized to a budget of
            pixels.
        indices: number of each frame, counted at `source_fps`; F of them, non-decreasing. In a file
            of constant frame rate these are the file's own frame numbers.
        source_fps: average frames per second of the file.
        source_frames: number of frames of the file at `source_fps`.
        duration_s: length of the clip, or of the whole file.
        decoder: the library that decoded them; with the backend "auto" it depends on the file.
        start_s: start of the clip in the file, from which all times count.
    """

    frames: torch.Tensor
    indices: list[int]
    source_fps: float
    source_frames: int
    duration_s: float
    decoder: str
    start_s: float = 0.0

    @property
    def times_s(self) -> list[float]:
        """Time of each sampled frame in seconds, `index / source_fps - start_s`."""
        return [max(0.0, index / self.source_fps - self.start_s) for index in self.indices]

    @property
    def timestamps_s(self) -> list[float]:
        """Time of each temporal patch in seconds, F / 2 of them: the mean of its frames' times."""
        times = self.times_s
        return [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)]

    @property
    def num_spanned(self) -> int:
        """Number of frames at `source_fps` from the first sampled frame to the last."""
        return self.indices[-1] - self.indices[0] + 1

    def patch_seconds(self, rule: str) -> float:
        """Return the seconds per temporal patch by a rule of `data.patch_seconds`.

        "processor" is `TEMPORAL_PATCH` over the sampled rate, frames taken per second of video, as
        in the processor of Qwen2.5-VL and in qwen-vl-utils; "times" is `TEMPORAL_PATCH` times the
        mean distance of the frames.
        """
        num_frames, times = len(self.indices), self.times_s
        if rule == "times":
            return TEMPORAL_PATCH * (times[-1] - times[0]) / (num_frames - 1)
        return TEMPORAL_PATCH * self.num_spanned / self.source_fps / num_frames

    def metadata(self) -> VideoMetadata:
        """Return the metadata from which a processor with `do_sample_frames=False` takes times."""
        # Processors divide them by the frame rate; those of a clip may be fractions of a frame.
        counted: list[Any] = list(self.indices)  # a copy: processors may extend theirs in place
        if self.start_s:
            counted = [time * self.source_fps for time in self.times_s]
        return VideoMetadata(
            total_num_frames=self.num_spanned,
            fps=self.source_fps,
            width=self.frames.shape[3],
            height=self.frames.shape[2],
            duration=self.duration_s,
            frames_indices=counted,
        )


def sample_frames(
    path: str | Path,
    *,
    fps: float,
    max_frames: int,
    min_frames: int = 4,
    backend: Backend = "decord",
    clip: Sequence[float] | None = None,
) -> VideoFrames:
    """Decode the frames of `plan_frames` from a video file, in this process.

    A file of variable frame rate is resampled at its average rate: each frame number takes the
    frame on screen at its time, so that times stay true.

    Args:
        path: the video file.
        fps: frames to take per second of video.
        max_frames, min_frames: bounds on the number of frames.
        backend: the decoder; all give the same frames. "decord" refuses files that it is known to
            get wrong (edit lists, rotation); "auto" decodes with pyav what decord cannot decode.
        clip: `(start, end)` in seconds of the part of the file to sample; None is the whole file.

    Raises:
        DataError: the file is missing, empty, truncated or not a video, or the clip lies outside
            of it; one line naming it.
        ValueError: a setting is out of range.
    """
    check_backend(backend)
    path = Path(path)
    plan = plan_frames(path, fps=fps, max_frames=max_frames, min_frames=min_frames, clip=clip)
    frames, decoder = torch.empty(0), ""
    for row, repeats, image, decoder in planned_images(path, plan, backend):  # noqa: B007
        if row == 0:
            frames = torch.empty(len(plan.indices), 3, *image.shape[:2], dtype=torch.uint8)
        frames[row : row + repeats] = torch.from_numpy(image).permute(2, 0, 1)
    return VideoFrames(
        frames=frames,
        indices=plan.indices,
        source_fps=plan.source_fps,
        source_frames=plan.source_frames,
        duration_s=plan.duration_s,
        decoder=decoder,
        start_s=plan.start_s,
    )

"""Sampling of frames from a video on a regular grid, with their timestamps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.video_utils import VideoMetadata

from opd.data.video.decoding import (
    TEMPORAL_PATCH,
    Backend,
    check_backend,
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
    """Frames sampled from one video.

    Attributes:
        frames: `[F, 3, H, W]` uint8 RGB, F even; at the size in the file, or resized to a budget of
            pixels.
        indices: number of each frame, counted at `source_fps`; F of them, non-decreasing. In a file
            of constant frame rate these are the file's own frame numbers.
        source_fps: average frames per second of the file.
        source_frames: number of frames at `source_fps`.
        duration_s: `source_frames / source_fps`.
        decoder: the library that decoded them; with the backend "auto" it depends on the file.
    """

    frames: torch.Tensor
    indices: list[int]
    source_fps: float
    source_frames: int
    duration_s: float
    decoder: str

    @property
    def times_s(self) -> list[float]:
        """Time of each sampled frame in seconds, `index / source_fps`."""
        return [index / self.source_fps for index in self.indices]

    @property
    def timestamps_s(self) -> list[float]:
        """Time of each temporal patch in seconds, F / 2 of them: the mean of its frames' times."""
        times = self.times_s
        return [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)]

    def metadata(self) -> VideoMetadata:
        """Return the metadata from which a processor with `do_sample_frames=False` takes times."""
        return VideoMetadata(
            total_num_frames=self.source_frames,
            fps=self.source_fps,
            width=self.frames.shape[3],
            height=self.frames.shape[2],
            duration=self.duration_s,
            frames_indices=list(self.indices),  # a copy: processors may extend theirs in place
        )


def sample_frames(
    path: str | Path,
    *,
    fps: float,
    max_frames: int,
    min_frames: int = 4,
    backend: Backend = "decord",
) -> VideoFrames:
    """Decode the frames of `frame_grid` from a video file, in this process.

    A file of variable frame rate is resampled at its average rate: each frame number takes the
    frame on screen at its time, so that times stay true.

    Args:
        path: the video file.
        fps: frames to take per second of video.
        max_frames, min_frames: bounds on the number of frames.
        backend: the decoder; all give the same frames. "decord" refuses files that it is known to
            get wrong (edit lists, rotation); "auto" decodes with pyav what decord cannot decode.

    Raises:
        DataError: the file is missing, empty, truncated or not a video; one line naming it.
        ValueError: a setting is out of range.
    """
    check_backend(backend)
    path = Path(path)
    plan = plan_frames(path, fps=fps, max_frames=max_frames, min_frames=min_frames)
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
        duration_s=plan.source_frames / plan.source_fps,
        decoder=decoder,
    )

"""Frames of a video on a regular grid, with the times at which they stand in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import av.error
import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from opd.data.examples import DataError

TEMPORAL_PATCH = 2
"""Frames that Qwen-VL merges into one temporal patch; the number sampled is a multiple of it."""

Backend = Literal["decord", "pyav"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFrames:
    """Frames sampled from one video.

    Attributes:
        frames: `[F, 3, H, W]` uint8 RGB at the size of the file, F even.
        indices: number of each frame, counted at `source_fps`; F of them, never decreasing. In a
            file of constant frame rate, the file's own frame numbers.
        source_fps: average frames per second of the file.
        source_frames: number of frames at `source_fps`.
        duration_s: `source_frames / source_fps`.
    """

    frames: torch.Tensor
    indices: list[int]
    source_fps: float
    source_frames: int
    duration_s: float

    @property
    def times_s(self) -> list[float]:
        """Time of each sampled frame in seconds, `index / source_fps`."""
        return [index / self.source_fps for index in self.indices]

    @property
    def timestamps_s(self) -> list[float]:
        """Time of each temporal patch, F / 2 of them: the mean of its frames, as Qwen3-VL says."""
        times = self.times_s
        return [(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)]

    def metadata(self) -> VideoMetadata:
        """What a processor called with `do_sample_frames=False` needs in order to tell times."""
        return VideoMetadata(
            total_num_frames=self.source_frames,
            fps=self.source_fps,
            width=self.frames.shape[3],
            height=self.frames.shape[2],
            duration=self.duration_s,
            frames_indices=list(self.indices),  # a copy: processors may extend theirs in place
        )


def frame_grid(
    source_frames: int, source_fps: float, *, fps: float, max_frames: int, min_frames: int = 4
) -> list[int]:
    """Numbers of the frames to take: `linspace(0, source_frames - 1, F)`, rounded.

    F is `duration * fps`, at least `min_frames`, at most `max_frames` and the frames there are, and
    then the next lower even number. That is Qwen3-VL's own rule, except that Qwen3-VL repeats the
    last frame where F is odd. A file of one frame gives that frame twice.

    Raises:
        ValueError: for settings out of range.
    """
    if not fps > 0 or not 0 < min_frames <= max_frames or max_frames < TEMPORAL_PATCH:
        raise ValueError(f"cannot sample with {fps=}, {min_frames=}, {max_frames=}")
    wanted = max(int(source_frames / source_fps * fps), min_frames)
    num_frames = min(wanted, max_frames, source_frames)
    num_frames = max(num_frames - num_frames % TEMPORAL_PATCH, TEMPORAL_PATCH)
    return np.linspace(0, source_frames - 1, num_frames).round().astype(int).tolist()


def sample_frames(
    path: str | Path,
    *,
    fps: float,
    max_frames: int,
    min_frames: int = 4,
    backend: Backend = "decord",
) -> VideoFrames:
    """Decode the frames of `frame_grid` from a video file.

    A file of variable frame rate is read as if shown at its average rate: each frame number gets
    the frame on screen at its time, so that times stay true.

    Args:
        path: the video file.
        fps: frames to take per second of video.
        max_frames, min_frames: bounds on their number.
        backend: what decodes the pixels; both give the same. Files that decord is known to get
            wrong (edit lists, rotation) are refused, never handed to the other one silently.

    Raises:
        DataError: where the file is missing, empty, truncated or no video; one line naming it.
        ValueError: for settings out of range.
    """
    if backend not in _DECODERS:
        raise ValueError(f"unknown video backend {backend!r}; known: {', '.join(_DECODERS)}")
    path = Path(path)
    file_times_s, source_fps = _probe(path)
    source_frames = round(file_times_s[-1] * source_fps) + 1
    indices = frame_grid(
        source_frames, source_fps, fps=fps, max_frames=max_frames, min_frames=min_frames
    )
    # Half a frame of tolerance, for files that round their timestamps.
    shown_s = (np.asarray(indices) + 0.5) / source_fps
    positions = np.searchsorted(file_times_s, shown_s, side="right") - 1
    unique, repeats = np.unique(positions, return_counts=True)

    images = _DECODERS[backend](path, len(file_times_s), unique.tolist())
    frames, row = torch.empty(0), 0
    for image, repeat in zip(images, repeats, strict=True):
        if row == 0:
            frames = torch.empty(len(indices), 3, *image.shape[:2], dtype=torch.uint8)
        elif image.shape[:2] != frames.shape[2:]:
            raise DataError(f"{path}: the size of the picture changes within the video")
        frames[row : row + repeat] = torch.from_numpy(image).permute(2, 0, 1)
        row += repeat
    return VideoFrames(
        frames=frames,
        indices=indices,
        source_fps=source_fps,
        source_frames=source_frames,
        duration_s=source_frames / source_fps,
    )


def probe_duration(path: str | Path) -> float:
    """Length in seconds of a video file, without decoding it; DataError where it is unusable."""
    times_s, source_fps = _probe(Path(path))
    return (round(times_s[-1] * source_fps) + 1) / source_fps


def _probe(path: Path) -> tuple[np.ndarray, float]:
    """Times in seconds of a file's visible frames, ascending from 0, and its average frame rate.

    Nothing is decoded. One probe for both backends, so that neither the frames chosen nor their
    times can depend on the backend.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such video file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the video file is empty")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream in the file")
            stream = container.streams.video[0]
            # An edit list discards frames; some containers (AVI) hold decoding times only, and then
            # the two orders are the same. Packets themselves are not kept: they are the whole file.
            ticks, hidden = [], 0
            for packet in container.demux(stream):
                if packet.size and packet.is_discard:
                    hidden += 1
                elif packet.size:
                    ticks.append(packet.pts if packet.pts is not None else packet.dts)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            tick_s = float(stream.time_base or 0)
            declared_frames = stream.frames
            declared_s = (stream.duration or 0) * tick_s
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: not a readable video: {error.strerror}") from error
    if not rate or not tick_s or not ticks or None in ticks:
        raise DataError(f"{path}: no frames with a time in the video")
    times_s = np.sort(np.asarray(ticks, dtype=np.float64)) * tick_s
    times_s -= times_s[0]
    # Fewer frames alone is no proof: an edit list leaves out those that it needs for nothing.
    found = len(ticks) + hidden
    if found < declared_frames and times_s[-1] + 2 / rate < declared_s:
        raise DataError(f"{path}: truncated, {found} of {declared_frames} frames are there")
    return times_s, rate


def _decode_decord(path: Path, num_frames: int, positions: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames at ascending positions among `num_frames`, `[H, W, 3]` uint8 each."""
    import decord  # x86-64 only, so not needed to use the other backend

    reader = None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) != num_frames:
            raise DataError(
                f"{path}: decord counts {len(reader)} frames of {num_frames}, as with an edit "
                "list, and would misplace them; use the pyav backend or re-encode the video"
            )
        keyframes = reader.get_key_indices()
        following = 0
        for position in positions:
            # decord seeks where a skip includes a keyframe, and with an open GOP lands several
            # frames off (so does get_batch). Read instead of skipped, keyframes are passed exactly.
            first, last = (bisect_right(keyframes, p) for p in (following, position))
            for keyframe in keyframes[first:last]:
                _skip(reader, keyframe - 1 - following)
                reader.next()
                following = keyframe
            _skip(reader, position - following)
            image = reader.next().asnumpy()
            following = position + 1
            if image.shape[2] != 3:
                raise DataError(
                    f"{path}: decord garbles a video that is stored rotated; "
                    "use the pyav backend or re-encode the video"
                )
            yield image
    except (RuntimeError, StopIteration, decord.DECORDError) as error:
        reason = str(error).strip().splitlines() or ["it ends early"]
        raise DataError(
            f"{path}: decord cannot decode it: {reason[-1].rpartition('] ')[2]}"
        ) from error
    finally:
        del reader  # decord keeps file and buffers for as long as the reader lives


def _skip(reader: Any, num_frames: int) -> None:
    if num_frames > 0:
        reader.skip_frames(num_frames)


def _decode_pyav(path: Path, num_frames: int, positions: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames at ascending positions among `num_frames`, `[H, W, 3]` uint8 each."""
    remaining = iter(positions)
    wanted = next(remaining, None)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for position, frame in enumerate(container.decode(stream)):
                if position == wanted:
                    image = frame.to_ndarray(format="rgb24")
                    yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
                    wanted = next(remaining, None)
                    if wanted is None:
                        return
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: pyav cannot decode it: {error.strerror}") from error
    raise DataError(f"{path}: ends before frame {wanted} of {num_frames}")


_DECODERS: dict[str, Callable[[Path, int, list[int]], Iterator[np.ndarray]]] = {
    "decord": _decode_decord,
    "pyav": _decode_pyav,
}

"""Decoding of video files: probe the times of a file's frames, choose frames, decode them.

Only torchcodec needs torch, so that a process that decodes with another starts quickly and stays
small. Libraries are imported when a file is opened, because training on tokens alone needs none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from opd.data.video.backends import MODULES, Backend
from opd.data.video.clips import clip_frames, clip_length
from opd.errors import DataError

TEMPORAL_PATCH = 2
"""Frames per temporal patch of Qwen-VL; the number of sampled frames is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The frames to take from one file.

    Attributes:
        indices: number of each frame, counted at `source_fps`; F of them, non-decreasing.
        positions: position in the file of the frame on screen at that time; F of them,
            non-decreasing.
        source_fps: average frames per second of the file.
        source_frames: number of frames of the file at `source_fps`.
        file_frames: number of frames that the file holds.
        start_s: start of the clip in the file; 0 for the whole file.
        duration_s: length of the clip, or of the whole file.
    """

    indices: list[int]
    positions: list[int]
    source_fps: float
    source_frames: int
    file_frames: int
    start_s: float
    duration_s: float


def frame_grid(
    source_frames: int, source_fps: float, *, fps: float, max_frames: int, min_frames: int = 4
) -> list[int]:
    """Return the numbers of the frames to take: `linspace(0, source_frames - 1, F)`, rounded.

    F is `duration * fps`, at least `min_frames`, at most `max_frames` and `source_frames`, rounded
    down to an even number. This is Qwen3-VL's rule, except that Qwen3-VL repeats the last frame
    where F is odd. A file of one frame gives that frame twice.

    Raises:
        ValueError: a setting is out of range.
    """
    if not fps > 0 or not 0 < min_frames <= max_frames or max_frames < TEMPORAL_PATCH:
        raise ValueError(f"cannot sample with {fps=}, {min_frames=}, {max_frames=}")
    num_frames = max(int(source_frames / source_fps * fps), min_frames)
    num_frames = min(num_frames, max_frames, source_frames)
    num_frames = max(num_frames - num_frames % TEMPORAL_PATCH, TEMPORAL_PATCH)
    return np.linspace(0, source_frames - 1, num_frames).round().astype(int).tolist()


def plan_frames(
    path: Path,
    *,
    fps: float,
    max_frames: int,
    min_frames: int = 4,
    clip: Sequence[float] | None = None,
) -> Plan:
    """Plan the frames of `frame_grid` for a file or a clip of it, without decoding it.

    The frames of a clip are those from its start to its end, both included, as in qwen-vl-utils.

    Args:
        clip: its `(start, end)` in seconds of the file; None is the whole file.

    Raises:
        DataError: the file is missing, empty, truncated or not a video, or the clip lies outside
            of it; one line naming it.
        ValueError: a setting is out of range.
    """
    file_times_s, source_fps = probe(path)
    source_frames = round(file_times_s[-1] * source_fps) + 1
    try:
        first, last = clip_frames(clip, source_frames, source_fps)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    indices = frame_grid(
        last - first + 1, source_fps, fps=fps, max_frames=max_frames, min_frames=min_frames
    )
    indices = [first + index for index in indices]
    # Half a frame of tolerance, for files that round their timestamps.
    shown_s = (np.asarray(indices) + 0.5) / source_fps
    positions = np.searchsorted(file_times_s, shown_s, side="right") - 1
    return Plan(
        indices=indices,
        positions=positions.tolist(),
        source_fps=source_fps,
        source_frames=source_frames,
        file_frames=len(file_times_s),
        start_s=clip[0] if clip else 0.0,
        duration_s=clip_length(clip, source_frames / source_fps),
    )


def planned_images(
    path: Path, plan: Plan, backend: Backend
) -> Iterator[tuple[int, int, np.ndarray, str]]:
    """Decode a plan and yield `(row, repeats, image, decoder)` for each distinct frame, in order.

    The frame stands at `repeats` of the plan's indices, from `row` on. Images are `[H, W, 3]` uint8
    RGB, all of one size. The decoder is the backend; with "auto" it is decord, or pyav where decord
    gives no frame.

    Raises DataError, one line naming the file, where it cannot be decoded.
    """
    unique, repeats = np.unique(plan.positions, return_counts=True)
    decoders = ["decord", "pyav"] if backend == "auto" else [backend]
    for decoder in decoders:
        row, size = 0, None
        images = DECODERS[decoder](path, plan.file_frames, unique.tolist())
        try:
            for image, repeat in zip(images, repeats.tolist(), strict=True):
                if size not in (None, image.shape):
                    raise DataError(f"{path}: the frame size changes within the video")
                yield row, repeat, image, decoder
                row, size = row + repeat, image.shape
            return
        except (DataError, ImportError):
            if row or decoder == decoders[-1]:
                raise


def probe_duration(path: str | Path) -> float:
    """Return the length of a video in seconds, without decoding. Raises as `probe` does."""
    times_s, source_fps = probe(Path(path))
    return (round(times_s[-1] * source_fps) + 1) / source_fps


def probe(path: Path) -> tuple[np.ndarray, float]:
    """Return the times in seconds of a file's visible frames, ascending from 0, and its frame rate.

    Nothing is decoded. All backends use this probe, so that neither the choice of frames nor their
    times can depend on the backend. The frame rate is the average one.

    Raises DataError where the file is missing, empty, truncated or not a video.
    """
    import av.error

    try:
        if not path.is_file():
            raise DataError(f"{path}: no such video file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the video file is empty")
    except OSError as error:
        raise DataError(f"{path}: not a readable video: {error.strerror}") from error
    try:
        with _open(path) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream in the file")
            stream = container.streams.video[0]
            # An edit list discards frames. Some containers (AVI) hold decoding times only, in the
            # same order. Packets are not kept: together they are the whole file.
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
        raise DataError(f"{path}: the video has no frames with timestamps")
    times_s = np.sort(np.asarray(ticks, dtype=np.float64)) * tick_s
    times_s -= times_s[0]
    # Fewer frames than declared are no proof: a file with an edit list may lack unused frames.
    num_frames = len(ticks) + hidden
    if num_frames < declared_frames and times_s[-1] + 2 / rate < declared_s:
        raise DataError(f"{path}: truncated, {num_frames} of {declared_frames} frames are present")
    return times_s, rate


def _open(path: Path) -> Any:
    """Open a container. Its metadata may be in any encoding; nothing reads it."""
    import av

    return av.open(str(path), metadata_errors="replace")


def _decode_decord(path: Path, num_frames: int, positions: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames at ascending positions among `num_frames`, `[H, W, 3]` uint8 each."""
    import decord  # x86-64 only, so not needed to use the other backend

    reader = None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        if len(reader) != num_frames:
            raise DataError(
                f"{path}: decord counts {len(reader)} frames of {num_frames}, as with an edit "
                "list, and would misplace them; use data.backend=auto or re-encode the video"
            )
        keyframes = reader.get_key_indices()
        following = 0
        for position in positions:
            # A skip over a keyframe makes decord seek, which with an open GOP lands several frames
            # off (as get_batch does). So keyframes are read instead of skipped.
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
                    "use data.backend=auto or re-encode the video"
                )
            yield image
    except (RuntimeError, StopIteration, decord.DECORDError) as error:
        reason = str(error).strip().splitlines() or ["it ends early"]
        raise DataError(
            f"{path}: decord cannot decode it: {reason[-1].rpartition('] ')[2]}"
        ) from error
    finally:
        del reader  # decord holds the file and its buffers until then


def _skip(reader: Any, num_frames: int) -> None:
    if num_frames > 0:
        reader.skip_frames(num_frames)


def _decode_pyav(path: Path, num_frames: int, positions: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames at ascending positions among `num_frames`, `[H, W, 3]` uint8 each."""
    import av.error

    remaining = iter(positions)
    next_position = next(remaining, None)
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DataError(f"{path}: pyav cannot decode it: no decoder for its codec")
            stream.codec_context.thread_count = 1
            for position, frame in enumerate(container.decode(stream)):
                if position == next_position:
                    image = frame.to_ndarray(format="rgb24")
                    yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
                    next_position = next(remaining, None)
                    if next_position is None:
                        return
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: pyav cannot decode it: {error.strerror}") from error
    raise DataError(f"{path}: ends before frame {next_position} of {num_frames}")


def _decode_torchcodec(path: Path, num_frames: int, positions: list[int]) -> Iterator[np.ndarray]:
    """Yield the frames at ascending positions among `num_frames`, `[H, W, 3]` uint8 each."""
    torchcodec: Any = import_module(MODULES["torchcodec"])
    try:
        decoder = torchcodec.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
        if len(decoder) != num_frames:
            raise DataError(
                f"{path}: torchcodec counts {len(decoder)} frames of {num_frames}, and would "
                "misplace them; use data.backend=pyav or re-encode the video"
            )
        for position in positions:
            yield decoder.get_frame_at(position).data.numpy()
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise DataError(
            f"{path}: torchcodec cannot decode it: {reason[0].rpartition(', ')[2]}"
        ) from error


DECODERS: dict[str, Callable[[Path, int, list[int]], Iterator[np.ndarray]]] = {
    "decord": _decode_decord,
    "pyav": _decode_pyav,
    "torchcodec": _decode_torchcodec,
}

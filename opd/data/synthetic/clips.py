"""Clips of the embedded task: their content, rendering and encoding."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIZE = 64  # pixels, height and width
FPS = 10
COLOURS = {
    "red": (224, 48, 48),
    "green": (48, 200, 64),
    "blue": (64, 96, 240),
    "yellow": (232, 216, 48),
    "magenta": (216, 64, 208),
    "cyan": (48, 208, 216),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape, visible in [start_s, end_s); `center` (row, column) and `radius` are in pixels."""

    colour: str
    kind: str
    start_s: float
    end_s: float
    center: tuple[int, int]
    radius: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The content of a clip and its annotation.

    Attributes:
        id: `SPLIT-INDEX`, with `.POSITION` behind it for a query about another shape.
        shapes: the shapes; the first is the target, unless the id names another.
        query: the sentence to localise.
        duration_s: length in seconds.
        truth, annotation: the true span of the target and the annotated one, in seconds.
        difficulty: 1 to 3, as `opd.data.synthetic.splits` describes.
        contrast: weight of the shapes' colours against the background, up to 1.
        bars: first and last (exclusive) column of each occluding bar.
        background: grey level.
    """

    id: str
    shapes: tuple[Shape, ...]
    query: str
    duration_s: float
    truth: tuple[float, float]
    annotation: tuple[float, float]
    difficulty: int
    contrast: float
    bars: tuple[tuple[int, int], ...]
    background: int


def _mask(shape: Shape) -> np.ndarray:
    """Return the pixels that the shape covers, boolean `[SIZE, SIZE]`."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    y, x, r = rows - shape.center[0], columns - shape.center[1], float(shape.radius)
    distance = np.hypot(y, x)
    match shape.kind:
        case "circle":
            return distance <= r
        case "square":
            return np.maximum(abs(y), abs(x)) <= 0.85 * r
        case "triangle":
            return (y <= 0.8 * r) & (y >= -r + 2.0 * abs(x))
        case "cross":
            return (np.minimum(abs(y), abs(x)) <= 0.3 * r) & (np.maximum(abs(y), abs(x)) <= r)
        case "ring":
            return (distance <= r) & (distance >= 0.55 * r)
        case "star":
            return distance <= r * (0.62 + 0.38 * np.cos(5 * np.arctan2(x, -y)))
    raise ValueError(f"unknown shape {shape.kind!r}")


def render(clip: Clip) -> np.ndarray:
    """Render the frames of a clip, uint8 RGB `[duration_s * FPS, SIZE, SIZE, 3]`.

    Frame i shows the time i / FPS.
    """
    background = np.full((SIZE, SIZE, 3), clip.background, np.float32)
    masks = [_mask(shape) for shape in clip.shapes]
    times = np.arange(round(clip.duration_s * FPS)) / FPS
    visible = np.array(
        [(times >= s.start_s - 1e-6) & (times < s.end_s - 1e-6) for s in clip.shapes]
    )
    frames = np.empty((len(times), SIZE, SIZE, 3), np.uint8)
    for state in np.unique(visible, axis=1).T:
        image = background.copy()
        for shape, mask, shown in reversed(list(zip(clip.shapes, masks, state, strict=True))):
            if shown:  # the target is drawn last, so that only bars can hide it
                colour = np.array(COLOURS[shape.colour], np.float32)
                image[mask] = clip.contrast * colour + (1 - clip.contrast) * clip.background
        for left, right in clip.bars:
            image[:, left:right] = 112
        frames[(visible == state[:, None]).all(axis=0)] = image.round().astype(np.uint8)
    return frames


def write_video(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Encode frames, uint8 RGB `[F, H, W, 3]`, as an mp4 file with H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "16", "preset": "ultrafast", "g": "30"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

"""What a data set holds, before anything is trained on it: every video looked at once, every record
read, what cannot be used named."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd.config.data import DataConfig, Family
from opd.data.checked import checked_path
from opd.data.examples import Example
from opd.data.sources import PROBING, Source
from opd.data.video.budget import budget_of, video_tokens
from opd.data.video.decoding import frame_grid, probe
from opd.errors import DataError

UNEVEN = 1.5  # times the usual distance of two frames: the frame rate is variable
PAST_S = 1.0  # by which a span may end after its video
LISTED = 5  # of each kind of problem


def look_at(video: Path, backend: str) -> dict[str, Any]:
    """A row about a video file: `video`, `size` and `mtime_ns` of the file, `reason` why it is not
    to be used (or None), and where it can be read `duration_s`, `frames`, `fps`, `width`, `height`,
    `rotation` in degrees and whether the frame rate is variable (`variable_rate`). One frame is
    decoded."""
    import av.error

    row: dict[str, Any] = {"video": str(video.absolute()), "reason": None}
    try:
        found = video.stat()
        row |= {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
        times_s, fps = probe(video)
        with av.open(str(video)) as container:
            image = next(container.decode(container.streams.video[0]))
    except StopIteration:
        row["reason"] = "no picture can be decoded"
    except av.error.FFmpegError as error:
        row["reason"] = f"no picture can be decoded: {error.strerror}"
    except OSError as error:
        row["reason"] = str(error.strerror)
    except DataError as error:
        row["reason"] = str(error).removeprefix(f"{video}: ")
    else:
        gaps = np.diff(times_s)
        frames = round(times_s[-1] * fps) + 1
        row |= {
            "duration_s": frames / fps,
            "frames": len(times_s),
            "fps": fps,
            "width": image.width,
            "height": image.height,
            "rotation": image.rotation,
            "variable_rate": bool(len(gaps) and gaps.max() > UNEVEN * np.median(gaps)),
        }
        if image.rotation and backend == "decord":
            row["reason"] = "stored rotated, which decord garbles; data.backend=pyav reads it"
    return row


@dataclass
class Inspection:
    """What was found in one source: its examples, a row for each video, and for each kind of
    problem the lines that tell it."""

    annotations: Path
    examples: list[Example]
    rows: dict[Path, dict[str, Any]]
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def usable(self) -> list[Example]:
        """Examples whose video can be read and reaches their spans' starts."""
        return [e for e in self.examples if self._fits(e)]

    def _fits(self, example: Example) -> bool:
        row = self.rows[example.video]
        return not row["reason"] and all(start < row["duration_s"] for start, _ in example.spans)

    def write(self) -> Path:
        """Leave the rows beside the annotation file, where training finds them."""
        path = checked_path(self.annotations)
        try:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        return path

    def tokens(self, config: DataConfig, video_processor: Any) -> list[int]:
        """Vision tokens of each readable video, as a checkpoint's processor counts them."""
        counts = []
        family: Family = "qwen2_5_vl"
        if type(video_processor).__name__.startswith("Qwen3"):
            family = "qwen3_vl"
        for row in self.rows.values():
            if row["reason"]:
                continue
            source_frames = round(row["duration_s"] * row["fps"])
            grid = frame_grid(
                source_frames, row["fps"], fps=config.fps, max_frames=config.max_frames
            )
            budget = budget_of(config, video_processor, family, len(grid))
            height, width = row["height"], row["width"]
            if row["rotation"] % 180:
                height, width = width, height
            counts.append(video_tokens(len(grid), height, width, budget))
        return counts


def inspect(
    source: Source,
    config: DataConfig,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Inspection:
    """Read a source and look at every video that it names, some at once.

    Args: progress: told of each video, and how many there are.

    Raises DataError for an annotation file that cannot be read.
    """
    left_out: list[str] = []
    examples = source.examples(left_out)
    videos = list(dict.fromkeys(example.video for example in examples))
    rows = {}
    with ThreadPoolExecutor(PROBING, thread_name_prefix="check") as pool:
        looked = pool.map(lambda video: look_at(video, config.backend), videos)
        for video, row in zip(videos, looked, strict=True):
            rows[video] = row
            progress(1, len(videos))
    found = Inspection(source.annotations, examples, rows)
    found.problems = {k: v for k, v in _problems(found, left_out).items() if v}
    return found


def _problems(found: Inspection, left_out: Sequence[str]) -> dict[str, list[str]]:
    rows = found.rows
    starts, ends = [], []
    for example in found.examples:
        row = rows[example.video]
        for start_s, end_s in () if row["reason"] else example.spans:
            told = f"{example.source}: {start_s:g} to {end_s:g} s in {row['duration_s']:.1f} s"
            if start_s >= row["duration_s"]:
                starts.append(told)
            elif end_s > row["duration_s"] + PAST_S:
                ends.append(told)
    readable = [row for row in rows.values() if not row["reason"]]
    return {
        "records left out": list(left_out),
        "videos that cannot be used": [
            f"{row['video']}: {row['reason']}" for row in rows.values() if row["reason"]
        ],
        "spans that start after the video's end (left out)": starts,
        "spans that end after it (cut there)": ends,
        "videos of variable frame rate (used)": [
            row["video"] for row in readable if row["variable_rate"]
        ],
        "videos that are stored rotated (used)": [
            f"{row['video']}: {row['rotation']:g} degrees" for row in readable if row["rotation"]
        ],
    }


def _spread(values: Iterable[float]) -> str:
    low, middle, high = np.quantile(list(values), [0, 0.5, 1])
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def describe(found: Inspection, tokens: Sequence[int]) -> list[str]:
    """What `python -m opd.check` prints of a source."""
    usable, rows = found.usable, found.rows.values()
    told = [
        f"{found.annotations}: {len(usable)} usable examples of {len(found.examples)} read, "
        f"{sum(not row['reason'] for row in rows)} usable videos of {len(found.rows)}"
    ]
    durations = [row["duration_s"] for row in rows if not row["reason"]]
    lengths = [end - start for example in usable for start, end in example.spans]
    if durations:
        told.append(f"  videos, seconds: {_spread(durations)}; {sum(durations) / 3600:.2f} h")
    if lengths:
        told.append(f"  spans, seconds: {_spread(lengths)}")
    if tokens:
        told.append(f"  vision tokens of a video: {_spread(tokens)}")
    kinds = Counter(
        "grounded QA" if e.question and e.spans else "questions" if e.question else "grounding"
        for e in usable
    )
    told.append("  " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    for kind, lines in found.problems.items():
        told.append(f"  {len(lines)} {kind}:")
        told += [f"    {line}" for line in lines[:LISTED]]
        told += [f"    and {len(lines) - LISTED} more"] * (len(lines) > LISTED)
    return told


def plot(found: Inspection, tokens: Sequence[int], path: Path) -> None:
    """Durations, lengths of spans, where in the video they lie, and vision tokens, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    usable, rows = found.usable, found.rows
    spans = [(s, rows[e.video]["duration_s"]) for e in usable for s in e.spans]
    panels = {
        "video, seconds": [row["duration_s"] for row in rows.values() if not row["reason"]],
        "span, seconds": [end - start for (start, end), _ in spans],
        "middle of the span, share of the video": [(a + b) / 2 / d for (a, b), d in spans],
        "vision tokens of a video": list(tokens),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="tight")
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.hist(values or [0], bins=30)
        axis.set_xlabel(name)
    figure.suptitle(found.annotations.name)
    figure.savefig(path, dpi=100)
    plt.close(figure)

"""Inspection of a data set before training: its videos, its records, and what cannot be used."""

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
from opd.data.sources import PROBE_THREADS, Source
from opd.data.video.budget import budget_of, video_tokens
from opd.data.video.clips import PAST_S
from opd.data.video.decoding import frame_grid, probe
from opd.errors import DataError

UNEVEN = 1.5  # a gap of so many median gaps between frames means a variable frame rate
LISTED = 5  # problems of each kind that are printed


def inspect_video(video: Path, backend: str) -> dict[str, Any]:
    """Probe a video file and decode its first frame.

    Returns:
        A row of the report: `video`; `size` and `mtime_ns` of the file; `reason`, why the video is
        unusable, or None. Of a readable file also `duration_s`, `frames`, `fps`, `width`, `height`,
        `rotation` in degrees and `variable_rate`, whether the frame rate varies.
    """
    import av.error

    row: dict[str, Any] = {"video": str(video.absolute()), "reason": None}
    try:
        status = video.stat()
        row |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        times_s, fps = probe(video)
        with av.open(str(video)) as container:
            image = next(container.decode(container.streams.video[0]))
    except StopIteration:
        row["reason"] = "no frame can be decoded"
    except av.error.FFmpegError as error:
        row["reason"] = f"no frame can be decoded: {error.strerror}"
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
            row["reason"] = "stored rotated, which decord garbles; use data.backend=auto"
    return row


@dataclass
class Inspection:
    """The result of inspecting one source.

    Attributes:
        annotations: the annotation file.
        examples: those that were read.
        rows: the row of each video, by path; see `inspect_video`.
        problems: for each kind of problem, one line per case.
    """

    annotations: Path
    examples: list[Example]
    rows: dict[Path, dict[str, Any]]
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def usable(self) -> list[Example]:
        """Examples whose video is usable and does not end before a span starts."""
        return [e for e in self.examples if self._fits(e)]

    def _fits(self, example: Example) -> bool:
        length_s = self.length_s(example)
        return length_s is not None and all(start < length_s for start, _ in example.spans)

    def length_s(self, example: Example) -> float | None:
        """Return the length in seconds of an example's video; None where its file is unusable or
        its clip lies outside of the file."""
        row = self.rows[example.video]
        try:
            return None if row["reason"] else example.length_s(row["duration_s"])
        except ValueError:
            return None

    def videos(self) -> list[tuple[dict[str, Any], float]]:
        """Return the row and the length in seconds of each usable video; clips are videos."""
        lengths = {e.footage: self.length_s(e) for e in self.examples}
        return [(self.rows[path], s) for (path, _), s in lengths.items() if s is not None]

    def write(self) -> Path:
        """Write the report beside the annotation file, where training reads it; return its path."""
        path = checked_path(self.annotations)
        try:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        return path

    def tokens(self, config: DataConfig, video_processor: Any) -> list[int]:
        """Return the vision tokens of each usable video under a checkpoint's video processor."""
        counts = []
        family: Family = "qwen2_5_vl"
        if type(video_processor).__name__.startswith("Qwen3"):
            family = "qwen3_vl"
        for row, length_s in self.videos():
            source_frames = max(1, round(length_s * row["fps"]))
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
    """Read a source and inspect every video that it names, in several threads.

    Args:
        progress: called after each video, with 1 and the number of videos.

    Raises DataError where the annotation file cannot be read.
    """
    left_out: list[str] = []
    examples = source.examples(left_out)
    videos = list(dict.fromkeys(example.video for example in examples))
    rows = {}
    with ThreadPoolExecutor(PROBE_THREADS, thread_name_prefix="check") as pool:
        inspected = pool.map(lambda video: inspect_video(video, config.backend), videos)
        for video, row in zip(videos, inspected, strict=True):
            rows[video] = row
            progress(1, len(videos))
    inspection = Inspection(source.annotations, examples, rows)
    problems = _problems(inspection, left_out)
    inspection.problems = {kind: lines for kind, lines in problems.items() if lines}
    return inspection


def _problems(inspection: Inspection, left_out: Sequence[str]) -> dict[str, list[str]]:
    rows = inspection.rows
    outside, late_starts, late_ends = [], [], []
    for example in inspection.examples:
        row = rows[example.video]
        if row["reason"]:
            continue
        try:
            length_s = example.length_s(row["duration_s"])
        except ValueError as error:
            outside.append(f"{example.source}: {error}")
            continue
        for start_s, end_s in example.spans:
            line = f"{example.source}: {start_s:g} to {end_s:g} s in {length_s:.1f} s"
            if start_s >= length_s:
                late_starts.append(line)
            elif end_s > length_s + PAST_S:
                late_ends.append(line)
    readable = [row for row in rows.values() if not row["reason"]]
    return {
        "records left out": list(left_out),
        "videos that cannot be used": [
            f"{row['video']}: {row['reason']}" for row in rows.values() if row["reason"]
        ],
        "clips that lie outside their file (left out)": outside,
        "spans that start after the video's end (left out)": late_starts,
        "spans that end after the video's end (cut there)": late_ends,
        "videos of variable frame rate (used)": [
            row["video"] for row in readable if row["variable_rate"]
        ],
        "videos that are stored rotated (used)": [
            f"{row['video']}: {row['rotation']:g} degrees" for row in readable if row["rotation"]
        ],
    }


def _spread(values: Iterable[float]) -> str:
    """Format the range and the median of values."""
    low, middle, high = np.quantile(list(values), [0, 0.5, 1])
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def describe(inspection: Inspection, tokens: Sequence[int]) -> list[str]:
    """Return the lines that `python -m opd.check` prints about a source.

    Args:
        tokens: vision tokens of each usable video, from `Inspection.tokens`.
    """
    usable, rows = inspection.usable, inspection.rows.values()
    lines = [
        f"{inspection.annotations}: {len(usable)} usable examples of {len(inspection.examples)} "
        f"read, {sum(not row['reason'] for row in rows)} usable videos of {len(rows)}"
    ]
    durations = [length_s for _, length_s in inspection.videos()]
    lengths = [end - start for example in usable for start, end in example.spans]
    if durations:
        lines.append(f"  videos, seconds: {_spread(durations)}; {sum(durations) / 3600:.2f} h")
    if lengths:
        lines.append(f"  spans, seconds: {_spread(lengths)}")
    if tokens:
        lines.append(f"  vision tokens of a video: {_spread(tokens)}")
    kinds = Counter(
        "grounded QA" if e.question and e.spans else "questions" if e.question else "grounding"
        for e in usable
    )
    lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    for kind, cases in inspection.problems.items():
        lines.append(f"  {len(cases)} {kind}:")
        lines += [f"    {case}" for case in cases[:LISTED]]
        lines += [f"    and {len(cases) - LISTED} more"] * (len(cases) > LISTED)
    return lines


def plot(inspection: Inspection, tokens: Sequence[int], path: Path) -> None:
    """Plot histograms of durations, span lengths, span positions and vision tokens to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    usable = inspection.usable
    spans = [(s, inspection.length_s(e) or 1.0) for e in usable for s in e.spans]
    panels = {
        "video, seconds": [length_s for _, length_s in inspection.videos()],
        "span, seconds": [end - start for (start, end), _ in spans],
        "middle of the span, share of the video": [(a + b) / 2 / d for (a, b), d in spans],
        "vision tokens of a video": list(tokens),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="tight")
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.hist(values or [0], bins=30)
        axis.set_xlabel(name)
    figure.suptitle(inspection.annotations.name)
    figure.savefig(path, dpi=100)
    plt.close(figure)

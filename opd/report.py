"""Runs side by side: scores against what they had cost.

    python -m opd.report RUN [RUN ...]

What is compared are the evaluations of a run on its way (`eval.every`), between which scores are
interpolated. Device time is that of training: decode-wait to optimizer, the teacher's scoring and
the curriculum's included, evaluations and checkpoints left out.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opd.config import ConfigError, fail

SCORES = {
    "miou": "greedy mIoU",
    "sampled_miou": "sampled mIoU",
    "accuracy": "greedy accuracy",
    "sampled_accuracy": "sampled accuracy",
    "acc@gqa": "Acc@GQA",
}
AXES = {
    "step": "optimizer steps",
    "rollouts": "rollouts",
    "generated_tokens": "generated tokens",
    "device_s": "device seconds",
}
NOT_TRAINING = ("evaluate", "checkpoint", "idle")
SCORING = ("teacher", "curriculum")


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run in the order of its steps: a row of `curve.jsonl` each.

    `before_s` are device seconds that were spent before the first step, on the teacher, say; they
    are added to every point.
    """

    points: Sequence[Mapping[str, Any]]
    before_s: float = 0.0

    def seconds(self, scoring: bool = True) -> list[float]:
        """Device seconds of training until each point; without `scoring` those of the teacher, of
        choosing examples and `before_s` are left out."""
        left_out = NOT_TRAINING if scoring else (*NOT_TRAINING, *SCORING)
        first = self.before_s if scoring else 0.0
        return [
            first + sum(s for name, s in point["device_s"].items() if name not in left_out)
            for point in self.points
        ]

    def along(self, axis: str, scoring: bool = True) -> list[float]:
        """Each point's place on an axis of `AXES`."""
        if axis == "device_s":
            return self.seconds(scoring)
        return [point[axis] for point in self.points]

    def at(self, place: float, score: str, axis: str, scoring: bool = True) -> float | None:
        """The score at a place of an axis; None beyond its ends."""
        places = self.along(axis, scoring)
        if not places[0] <= place <= places[-1]:
            return None
        return float(np.interp(place, places, [point[score] for point in self.points]))

    def reaches(self, wanted: float, score: str, axis: str, scoring: bool = True) -> float | None:
        """Where on an axis the score first is as high as wanted; None where it never is."""
        places, scores = self.along(axis, scoring), [point[score] for point in self.points]
        if scores[0] >= wanted:
            return places[0]
        for (left, low), (right, high) in pairwise(zip(places, scores, strict=True)):
            if high >= wanted:
                return left + (right - left) * (wanted - low) / (high - low)
        return None


def read(run: Path) -> Curve:
    """The curve of a finished run; ConfigError where there is none."""
    path = run / "summary.json"
    try:
        points = json.loads(path.read_text())["curve"]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is {run} a finished run?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the summary of a run") from error
    return Curve(points)


def shared(curves: Iterable[Curve]) -> list[str]:
    """The scores that every evaluation of every run has."""
    points = [point for curve in curves for point in curve.points]
    return [s for s in SCORES if all(point.get(s) is not None for point in points)]


def thresholds(low: float, high: float, number: int = 5) -> list[float]:
    """Evenly between two scores, neither of them included."""
    return [low + (high - low) * (i + 1) / (number + 1) for i in range(number)]


def table(curves: Mapping[str, Curve]) -> str:
    """A row a run: its scores at the end, at the fewest steps of all and at the least device time
    of all."""
    steps = min(curve.along("step")[-1] for curve in curves.values())
    seconds = min(curve.along("device_s")[-1] for curve in curves.values())
    width = max(map(len, [*curves, *SCORES.values()]))
    lines = []
    for score in shared(curves.values()):
        at = f"step {steps:.0f}", f"{seconds:.0f} s"
        head = ["start", "end", *at, "device s", "of it scoring"]
        lines.append(f"{SCORES[score]:<{width}}" + "".join(f"{cell:>15}" for cell in head))
        for name, curve in curves.items():
            spent = curve.seconds()[-1]
            cells = [curve.points[0][score], curve.points[-1][score]]
            cells += [curve.at(steps, score, "step"), curve.at(seconds, score, "device_s")]
            shown = ["-" if c is None else f"{c:.3f}" for c in cells]
            shown += [f"{spent:.0f}", f"{spent - curve.seconds(scoring=False)[-1]:.0f}"]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in shown))
    return "\n".join(lines)


def plot(groups: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Scores against steps, rollouts, generated tokens and device seconds; a line a group is the
    mean of its curves, the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = shared(curve for curves in groups.values() for curve in curves)
    size = {"figsize": (20, 4.5 * len(scores)), "squeeze": False}
    figure, axes = plt.subplots(len(scores), len(AXES), sharey="row", layout="constrained", **size)
    for row, score in zip(axes, scores, strict=True):
        for panel, (axis, unit) in zip(row, AXES.items(), strict=True):
            for name, curves in groups.items():
                values = [[point[score] for point in curve.points] for curve in curves]
                places = np.mean([curve.along(axis) for curve in curves], axis=0)
                if len(places) > 1 and places[-1] == places[0]:
                    continue  # a method without rollouts has no place among them
                (line,) = panel.plot(places, np.mean(values, axis=0), marker=".", label=name)
                band = np.min(values, axis=0), np.max(values, axis=0)
                panel.fill_between(places, *band, alpha=0.15, color=line.get_color())
            panel.set(xlabel=unit, ylabel=SCORES[score])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command: a table, and the plot `report.png` in the first run's folder."""
    runs = [Path(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    try:
        if not runs or runs[0].name in ("-h", "--help"):
            raise ConfigError("usage: python -m opd.report RUN [RUN ...]")
        curves = {str(run): read(run) for run in runs}
        print(table(curves))
        path = runs[0] / "report.png"
        plot({name: [curve] for name, curve in curves.items()}, path)
        print(path)
    except ConfigError as error:
        fail(error)


if __name__ == "__main__":
    main()

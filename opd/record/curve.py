"""The curve of a run: scores against steps, rollouts, tokens and device time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

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


def shared(curves: Iterable[Curve]) -> list[str]:
    """The scores that every evaluation of every run has."""
    points = [point for curve in curves for point in curve.points]
    return [s for s in SCORES if all(point.get(s) is not None for point in points)]


def thresholds(low: float, high: float, number: int = 5) -> list[float]:
    """Evenly between two scores, neither of them included."""
    return [low + (high - low) * (i + 1) / (number + 1) for i in range(number)]


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

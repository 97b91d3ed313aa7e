"""Learning curves: the scores of a run against steps, rollouts, generated tokens and device time.

A curve is read from `summary.json` or `curve.jsonl`, where each point is one evaluation during the
run and what the run had cost until then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SCORES = {  # labels by key of a point
    "miou": "greedy mIoU",
    "sampled_miou": "sampled mIoU",
    "accuracy": "greedy accuracy",
    "sampled_accuracy": "sampled accuracy",
    "acc@gqa": "Acc@GQA",
}

AXES = {  # labels by key of a point
    "step": "optimizer steps",
    "rollouts": "rollouts",
    "generated_tokens": "generated tokens",
    "device_s": "device seconds",
}

# Phases of the ledger.
NOT_TRAINING = ("evaluate", "checkpoint", "idle")
SCORING = ("teacher", "curriculum")


@dataclass(frozen=True)
class Curve:
    """The curve of one run.

    Attributes:
        points: rows of `curve.jsonl`, in the order of their steps.
        before_s: device seconds spent before the first step, for example on training the teacher;
            they are added to every point.
    """

    points: Sequence[Mapping[str, Any]]
    before_s: float = 0.0

    def seconds(self, scoring: bool = True) -> list[float]:
        """Device seconds of training until each point. With `scoring` False they exclude the
        teacher, the curriculum and `before_s`."""
        left_out = NOT_TRAINING if scoring else (*NOT_TRAINING, *SCORING)
        first = self.before_s if scoring else 0.0
        return [
            first + sum(s for name, s in point["device_s"].items() if name not in left_out)
            for point in self.points
        ]

    def along(self, axis: str, scoring: bool = True) -> list[float]:
        """Position of each point on an axis of `AXES`; `scoring` as in `seconds`."""
        if axis == "device_s":
            return self.seconds(scoring)
        return [point[axis] for point in self.points]

    def at(self, position: float, score: str, axis: str, scoring: bool = True) -> float | None:
        """Interpolated score at a position on an axis; None outside the curve."""
        positions = self.along(axis, scoring)
        if not positions[0] <= position <= positions[-1]:
            return None
        return float(np.interp(position, positions, [point[score] for point in self.points]))

    def reaches(self, target: float, score: str, axis: str, scoring: bool = True) -> float | None:
        """Interpolated position where the score first reaches a target; None if it never does."""
        positions, scores = self.along(axis, scoring), [point[score] for point in self.points]
        if scores[0] >= target:
            return positions[0]
        for (left, low), (right, high) in pairwise(zip(positions, scores, strict=True)):
            if high >= target:
                return left + (right - left) * (target - low) / (high - low)
        return None


def shared(curves: Iterable[Curve]) -> list[str]:
    """Keys of `SCORES` that every point of every curve has."""
    points = [point for curve in curves for point in curve.points]
    return [s for s in SCORES if all(point.get(s) is not None for point in points)]


def thresholds(low: float, high: float, number: int = 5) -> list[float]:
    """`number` evenly spaced values between two scores, which are not included."""
    return [low + (high - low) * (i + 1) / (number + 1) for i in range(number)]


def plot(groups: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Plot the shared scores against every axis into a PNG file. A group of curves, such as the
    seeds of one method, is drawn as their mean with a band from the lowest to the highest."""
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
                positions = np.mean([curve.along(axis) for curve in curves], axis=0)
                if len(positions) > 1 and positions[-1] == positions[0]:
                    continue  # the method does not advance on this axis: sft has no rollouts
                (line,) = panel.plot(positions, np.mean(values, axis=0), marker=".", label=name)
                band = np.min(values, axis=0), np.max(values, axis=0)
                panel.fill_between(positions, *band, alpha=0.15, color=line.get_color())
            panel.set(xlabel=unit, ylabel=SCORES[score])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)

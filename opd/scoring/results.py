"""Scores of an evaluation by kind of query, each with a bootstrap interval, and the comparison of
several evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from opd.scoring.evaluation import EvaluationRow, read_evaluation
from opd.scoring.metrics import bootstrap, paired_interval

# Upper limits, exclusive, and names.
BUCKETS = {
    "duration": (
        (30.0, "<30 s"),
        (60.0, "30-60 s"),
        (180.0, "1-3 min"),
        (600.0, "3-10 min"),
        (math.inf, ">=10 min"),
    ),
    "share": (
        (0.05, "<5%"),
        (0.1, "5-10%"),
        (0.25, "10-25%"),
        (0.5, "25-50%"),
        (math.inf, ">=50%"),
    ),
}
UNKNOWN = "unknown"


class Mean(TypedDict):
    """A mean over `queries` queries, with its bootstrap interval."""

    mean: float
    interval: tuple[float, float]
    queries: int


class Bucket(TypedDict):
    """Scores of one kind of query: mIoU over true spans, accuracy over questions with options."""

    queries: int
    miou: Mean | None
    accuracy: Mean | None


def breakdown(
    rows: Iterable[EvaluationRow],
    key: str,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Bucket]:
    """Mean tIoU and accuracy by kind of query, with bootstrap intervals that resample videos.

    Args:
        rows: a query whose `video` is unknown is resampled on its own.
        key: `duration` or `share` (the longest true span's share of the video), in the buckets of
            `BUCKETS`; `category`; or `all`.
        confidence, resamples, seed: as in `bootstrap`.

    Returns:
        One entry per kind that has queries, in the order of the buckets, or by name; `unknown`
        comes last.

    Raises:
        ValueError: for an unknown key, or without rows.
    """
    keys = (*BUCKETS, "category", "all")
    if key not in keys:
        raise ValueError(f"no breakdown by {key!r}; there are {', '.join(keys)}")
    kinds: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row, key), []).append(row)
    if not kinds:
        raise ValueError("no rows to break down")
    order = [name for _, name in BUCKETS.get(key, ())]
    order = order or sorted(name for name in kinds if name != UNKNOWN)

    def mean(values: Sequence[float], rows: Sequence[EvaluationRow]) -> Mean | None:
        if not values:
            return None
        videos = [row.video if row.video is not None else ("", row.id) for row in rows]
        interval = bootstrap(values, confidence, resamples, seed, videos)
        return {"mean": float(np.mean(values)), "interval": interval, "queries": len(values)}

    buckets: dict[str, Bucket] = {}
    for name in [*order, UNKNOWN]:
        if of_kind := kinds.get(name):
            timed = [row for row in of_kind if row.truth]
            questions = [row for row in of_kind if row.right is not None]
            buckets[name] = {
                "queries": len(of_kind),
                "miou": mean([row.tiou for row in timed], timed),
                "accuracy": mean([float(row.right or 0) for row in questions], questions),
            }
    return buckets


def kind_of(row: EvaluationRow, key: str) -> str:
    """Name of the bucket or category that a query belongs to; `key` as in `breakdown`."""
    if key == "all":
        return "all"
    if key == "category":
        return UNKNOWN if row.category is None else row.category
    value = row.duration_s if key == "duration" else _span_share(row)
    if value is None:
        return UNKNOWN
    return next(name for limit, name in BUCKETS[key] if value < limit)


def compared(targets: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """A table of several targets' scores. The gain is over the first target, on the queries that
    both answered, with a 95% interval that resamples videos."""
    first = {row.id: row for row in read_evaluation(Path(results[0]["answers"]))}
    lines = [f"{'':40} {'mIoU':>7} {'R@0.3':>7} {'R@0.5':>7} {'R@0.7':>7} {'acc':>7}  gain"]
    for target, scores in zip(targets, results, strict=True):
        names = ("miou", "recall@0.3", "recall@0.5", "recall@0.7", "accuracy")
        values = ["-" if scores.get(n) is None else f"{scores[n]:.3f}" for n in names]
        rows = [row for row in read_evaluation(Path(scores["answers"])) if row.id in first]
        gains = []
        for name in ("tiou", "right"):
            pairs = [(_score(first[row.id], name), _score(row, name), row.video) for row in rows]
            pairs = [(a, b, video) for a, b, video in pairs if a is not None and b is not None]
            if pairs and target != targets[0]:
                before, after, videos = zip(*pairs, strict=True)
                low, high = paired_interval(before, after, groups=videos)
                gain = (sum(after) - sum(before)) / len(pairs)
                gains.append(f"{name} {gain:+.3f} [{low:+.3f}, {high:+.3f}] of {len(pairs)}")
        cells = " ".join(f"{value:>7}" for value in values)
        lines.append(f"{target[-40:]:40} {cells}  {'; '.join(gains)}")
    return "\n".join(lines)


def _span_share(row: EvaluationRow) -> float | None:
    """Share of the video that the longest true span takes; None where either is unknown."""
    if row.duration_s is None or not row.truth:
        return None
    return max(end_s - start_s for start_s, end_s in row.truth) / row.duration_s


def _score(row: EvaluationRow, name: str) -> float | None:
    """`tiou` or `right` as a number; None where the query has no true span, or no options."""
    if name == "tiou":
        return row.tiou if row.truth else None
    return None if row.right is None else float(row.right)

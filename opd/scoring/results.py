"""The rows that `evaluate` writes, checked, and their scores by kind of query.

A row is a dict: `id`; `predicted`, a span in seconds or None; `truth`, its true spans, empty where
it has none; where there are options `right`; and where they are known `windows` (predicted spans,
the surest first), `category`, `duration_s`, `video` and `query`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from opd.scoring.metrics import best_tiou, bootstrap
from opd.text.forms import Span

Row = Mapping[str, Any]

# A bucket ends before its limit.
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


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row, checked. `windows` are the predicted spans, the surest first: `predicted` alone where
    the row has none of its own."""

    id: str
    predicted: Span | None
    windows: tuple[Span, ...]
    truth: tuple[Span, ...]
    right: bool | None
    category: str | None
    duration_s: float | None
    video: str | None
    query: str

    @classmethod
    def of(cls, row: Row) -> Result:
        """From a row.

        Raises:
            ValueError: where something is missing or is not what it should be; names the row.
        """
        try:
            name, predicted, truth = str(row["id"]), row["predicted"], row["truth"]
        except KeyError as error:
            raise ValueError(f"row {row.get('id')!r} has no {error}") from error
        known = None if predicted is None else _span(name, predicted)
        windows = row.get("windows")
        if windows is None:
            windows = [] if predicted is None else [predicted]
        spans = _spans(name, truth)
        for start_s, end_s in spans:
            if start_s >= end_s:
                raise ValueError(
                    f"row {name!r}: true span {start_s:g} to {end_s:g} is not start < end"
                )
        right, duration_s = row.get("right"), row.get("duration_s")
        if right not in (None, True, False):
            raise ValueError(f"row {name!r}: right is {right!r}, not true, false or null")
        number = isinstance(duration_s, int | float)
        if duration_s is not None and not (number and 0 < duration_s < math.inf):
            raise ValueError(f"row {name!r}: duration_s {duration_s!r} is not a positive number")
        category, video = row.get("category"), row.get("video")
        return cls(
            id=name,
            predicted=known,
            windows=_spans(name, windows),
            truth=spans,
            right=None if right is None else bool(right),
            category=None if category is None else str(category),
            duration_s=duration_s,
            video=None if video is None else str(video),
            query=str(row.get("query") or ""),
        )

    @property
    def tiou(self) -> float:
        """Of the prediction with the best matching true span."""
        return best_tiou(self.predicted, self.truth)

    @property
    def share(self) -> float | None:
        """Of the video that the longest true span takes; None where either is unknown."""
        if self.duration_s is None or not self.truth:
            return None
        return max(end_s - start_s for start_s, end_s in self.truth) / self.duration_s


class Mean(TypedDict):
    """Of so many queries, with its bootstrap interval."""

    mean: float
    interval: tuple[float, float]
    queries: int


class Bucket(TypedDict):
    """Queries of a kind: tIoU of those with a true span, accuracy of those with options."""

    queries: int
    miou: Mean | None
    accuracy: Mean | None


def breakdown(
    rows: Iterable[Row],
    key: str,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Bucket]:
    """Mean tIoU and accuracy of kinds of queries, each with its number of queries and its bootstrap
    interval, in which videos are resampled.

    Args:
        rows: queries whose `video` is not known stand for themselves.
        key: `duration` or `share` (the longest true span's share of the video), in the buckets of
            `BUCKETS`; `category`; or `all`.
        confidence, resamples, seed: as in `bootstrap`.

    Returns:
        one entry for each kind that has queries, in order; `unknown` is the last.

    Raises:
        ValueError: for another key, no rows, or a row that is not one.
    """
    keys = (*BUCKETS, "category", "all")
    if key not in keys:
        raise ValueError(f"no breakdown by {key!r}; there are {', '.join(keys)}")
    kinds: dict[str, list[Result]] = {}
    for row in rows:
        result = Result.of(row)
        kinds.setdefault(kind_of(result, key), []).append(result)
    if not kinds:
        raise ValueError("no rows to break down")
    order = [name for _, name in BUCKETS.get(key, ())]
    order = order or sorted(name for name in kinds if name != UNKNOWN)

    def mean(values: Sequence[float], results: Sequence[Result]) -> Mean | None:
        if not values:
            return None
        videos = [r.video if r.video is not None else ("", r.id) for r in results]
        interval = bootstrap(values, confidence, resamples, seed, videos)
        return {"mean": float(np.mean(values)), "interval": interval, "queries": len(values)}

    found: dict[str, Bucket] = {}
    for name in [*order, UNKNOWN]:
        if results := kinds.get(name):
            timed = [r for r in results if r.truth]
            asked = [r for r in results if r.right is not None]
            found[name] = {
                "queries": len(results),
                "miou": mean([r.tiou for r in timed], timed),
                "accuracy": mean([float(r.right or 0) for r in asked], asked),
            }
    return found


def kind_of(result: Result, key: str) -> str:
    """The kind of a query: a key of what `breakdown` returns."""
    if key == "all":
        return "all"
    if key == "category":
        return UNKNOWN if result.category is None else result.category
    value = result.duration_s if key == "duration" else result.share
    if value is None:
        return UNKNOWN
    return next(name for limit, name in BUCKETS[key] if value < limit)


def _span(name: str, value: Any) -> Span:
    try:
        start_s, end_s = map(float, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {name!r}: {value!r} is not a span in seconds") from error
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        raise ValueError(f"row {name!r}: {value!r} is not a span in seconds")
    return start_s, end_s


def _spans(name: str, value: Any) -> tuple[Span, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"row {name!r}: {value!r} is not a list of spans")
    return tuple(_span(name, span) for span in value)

"""Metrics: temporal IoU and everything derived from it, for rewards, curricula and evaluation.

Spans are `(start, end)` in seconds, scores are shares in [0, 1]. A prediction that is None, empty
or reversed overlaps nothing and scores 0.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Sequence
from itertools import product
from typing import TypedDict

import numpy as np

from opd.text.forms import Span

Summary = TypedDict(
    "Summary",
    {
        "miou": float,
        "sampled_miou": float | None,
        "recall@0.3": float,
        "recall@0.5": float,
        "recall@0.7": float,
        "parse_failures": int,
        "queries": int,
    },
)
"""Scores over the queries with a true span."""

Choices = TypedDict(
    "Choices",
    {"accuracy": float, "sampled_accuracy": float | None, "acc@gqa": float | None},
)
"""Scores over the multiple-choice questions."""


def tiou(a: Span, b: Span) -> float:
    """Temporal intersection over union, `|a & b| / |a | b|`, of two spans."""
    overlap = min(a[1], b[1]) - max(a[0], b[0])
    if overlap <= 0:
        return 0.0
    # The union is computed as in the official scorers, so that a tIoU of exactly a threshold is
    # rounded to the same side of it.
    return overlap / (max(a[1], b[1]) - min(a[0], b[0]))


def whole_seconds(span: Span | None) -> Span | None:
    """A span with both times rounded to whole seconds, halves to the even one; it may be empty."""
    return None if span is None else (float(round(span[0])), float(round(span[1])))


def best_tiou(predicted: Span | None, truth: Sequence[Span]) -> float:
    """tIoU of a prediction with the best matching of several true spans; 0 for None.

    Raises:
        ValueError: without a true span.
    """
    if not truth:
        raise ValueError("a query has no true span")
    return 0.0 if predicted is None else max(tiou(predicted, span) for span in truth)


def best_iop(predicted: Span | None, truth: Sequence[Span]) -> float:
    """Share of a prediction that the best matching true span covers (NExT-GQA's IoP); 0 for None.

    It is unfit as a reward, because very short predictions are covered most easily. NExT-GQA's own
    scorer gives an empty prediction inside a true span an IoP of 1; here every empty prediction
    scores 0, and `parse_span` never returns one.
    """
    if predicted is None or predicted[0] >= predicted[1]:
        return 0.0
    start, end = predicted
    covered = (min(end, b) - max(start, a) for a, b in truth)
    return max(0.0, *covered) / (end - start)


def miou(tious: Sequence[float]) -> float:
    """Mean tIoU over queries; unreadable answers count as 0.

    Raises:
        ValueError: without queries.
    """
    if not tious:
        raise ValueError("no queries to average")
    return float(np.mean(tious))


def recall_at(tious: Sequence[float], threshold: float, strict: bool = False) -> float:
    """R1@threshold: the share of queries with `tIoU >= threshold`.

    Args:
        tious: one per query.
        threshold: in [0, 1].
        strict: count `tIoU > threshold` instead, as Time-R1 does.

    Raises:
        ValueError: without queries.
    """
    if not tious:
        raise ValueError("no queries to average")
    return sum(t > threshold if strict else t >= threshold for t in tious) / len(tious)


def summarize(
    greedy: Sequence[Span | None],
    sampled: Sequence[Sequence[Span | None]],
    truth: Sequence[Sequence[Span]],
    *,
    strict: bool = False,
) -> Summary:
    """Score one evaluation.

    Args:
        greedy: one greedy answer per query, None where it could not be parsed.
        sampled: the sampled answers of each query; without any, `sampled_miou` is None.
        truth: the true spans of each query, at least one; the best match counts.
        strict: as in `recall_at`.

    Returns:
        mIoU and recall of the greedy answers; `sampled_miou`, the mean over queries of the mean
        tIoU of their sampled answers; number of unreadable greedy answers; number of queries.

    Raises:
        ValueError: where lengths differ, there are no queries, or a query has no true span.
    """
    if len(greedy) != len(truth) or len(sampled) not in (0, len(truth)):
        raise ValueError(
            f"{len(greedy)} greedy and {len(sampled)} sampled answers for {len(truth)} queries"
        )
    tious = [best_tiou(span, spans) for span, spans in zip(greedy, truth, strict=True)]
    sampled_means = [
        miou([best_tiou(span, spans) for span in answers])
        for answers, spans in zip(sampled, truth, strict=False)
        if answers
    ]
    return {
        "miou": miou(tious),
        "sampled_miou": miou(sampled_means) if sampled_means else None,
        "recall@0.3": recall_at(tious, 0.3, strict),
        "recall@0.5": recall_at(tious, 0.5, strict),
        "recall@0.7": recall_at(tious, 0.7, strict),
        "parse_failures": sum(span is None for span in greedy),
        "queries": len(tious),
    }


def summarize_choices(
    right: Sequence[bool],
    sampled: Sequence[Sequence[bool]],
    iops: Sequence[float | None],
) -> Choices:
    """Score the answers to multiple-choice questions.

    Args:
        right: whether each greedy answer is right.
        sampled: whether each of a question's sampled answers is right.
        iops: IoP of each greedy answer's span; None for questions without a true span.

    Returns:
        Accuracy of the greedy and of the sampled answers; `acc@gqa`, the share of questions with a
        true span whose greedy answer is right and has an IoP of at least 0.5.

    Raises:
        ValueError: without questions.
    """
    if not right:
        raise ValueError("no questions to average")
    means = [sum(answers) / len(answers) for answers in sampled if answers]
    grounded = [r and p >= 0.5 for r, p in zip(right, iops, strict=True) if p is not None]
    return {
        "accuracy": sum(right) / len(right),
        "sampled_accuracy": sum(means) / len(means) if means else None,
        "acc@gqa": sum(grounded) / len(grounded) if grounded else None,
    }


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `mean(after - before)`.

    Args:
        before, after: scores of the same queries in the same order.
        confidence, resamples, seed, groups: as in `bootstrap`.

    Returns:
        `(low, high)`.

    Raises:
        ValueError: where lengths differ, there are no queries, or a setting is out of range.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} scores before and {len(after)} after do not pair up")
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap(gains.tolist(), confidence, resamples, seed, groups)


def bootstrap(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    Args:
        values: one per query.
        confidence: in (0, 1).
        resamples: number of bootstrap samples.
        seed: of the resampling; the same seed gives the same interval.
        groups: the group of each query, its video for example. Groups are resampled, each with all
            its queries, because queries of one video are not independent. None resamples queries.

    Returns:
        `(low, high)`; both equal the mean where there is one query or one group.

    Raises:
        ValueError: where lengths differ, there are no queries, or a setting is out of range.
    """
    if not values or len(values) != len(values if groups is None else groups):
        raise ValueError(f"{len(values)} values and {len(groups or ())} groups give no interval")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} or resamples {resamples} is out of range")
    names = range(len(values)) if groups is None else groups
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group_of_value = [numbers[name] for name in names]
    sums = np.bincount(group_of_value, weights=values)
    counts = np.bincount(group_of_value)
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(sums))  # resamples at a time, to bound memory
    means = []
    for start in range(0, resamples, block):
        drawn = rng.integers(len(sums), size=(min(block, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    means = np.concatenate(means)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def nearest_representable(span: Span, timestamps: Sequence[float]) -> float:
    """Highest tIoU with `span` of any span between two of the `timestamps`.

    It is the ceiling of a model that can only answer with times that it saw. Moving an end away
    from the true one never helps, so that only the neighbours on either side of it are tried.

    Args:
        span: the true span in seconds.
        timestamps: seconds, in any order.
    """
    times = sorted(set(timestamps))
    starts, ends = (
        {*times[max(0, bisect_right(times, end) - 1) :][:1], *times[bisect_left(times, end) :][:1]}
        for end in span
    )
    return max((tiou(span, candidate) for candidate in product(starts, ends)), default=0.0)


def best_constant(spans: Sequence[Span], max_edges: int = 128) -> tuple[Span, float]:
    """The span that has the highest mIoU as the answer to every query, and that mIoU.

    A model must exceed it to show that it looks at the video. The grid is the set of true edges,
    where the optimum lies because between edges the mean is convex in either end. If there are more
    than `max_edges`, it consists of that many quantiles of the edges.

    Args:
        spans: one true span in seconds per query.
        max_edges: grid size; the cost is about `max_edges^2 / 2` passes over the spans.

    Raises:
        ValueError: without spans.
    """
    if not spans:
        raise ValueError("no spans")
    truth = np.asarray(spans, dtype=np.float64)  # [Q, 2]
    edges = np.unique(truth)
    if len(edges) > max_edges:
        edges = np.quantile(edges, np.linspace(0, 1, max_edges))
    best, best_miou = spans[0], -1.0
    for i, start in enumerate(edges[:-1]):
        ends = edges[i + 1 :, None]  # [E, 1]
        overlap = np.minimum(ends, truth[:, 1]) - np.maximum(start, truth[:, 0])  # [E, Q]
        overlap = np.maximum(overlap, 0)
        mean = (overlap / (ends - start + truth[:, 1] - truth[:, 0] - overlap)).mean(1)
        j = int(mean.argmax())
        if mean[j] > best_miou:
            best, best_miou = (float(start), float(ends[j, 0])), float(mean[j])
    return best, best_miou

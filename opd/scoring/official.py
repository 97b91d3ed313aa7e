"""What the benchmarks' own scorers say of the rows that `evaluate` writes (see
`opd.scoring.results`).

Scores are shares in [0, 1], not per cent. A query without a readable answer counts, with 0, where
some of those scorers leave it out or fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from opd.scoring.metrics import best_iop, best_tiou, miou, recall_at, summarize
from opd.scoring.results import Result, Row, kind_of
from opd.text.forms import Span

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
MAX_WINDOWS = 10
# A window of exactly 10 s is short and one of exactly 30 s middle, as in the official code; that
# ends `long` at 150 s, the longest video of the data set.
LENGTHS = {"short": (0.0, 10.0), "middle": (10.0, 30.0), "long": (30.0, math.inf)}


def score(rows: Iterable[Row], metrics: str, *, strict: bool = False) -> dict[str, Any]:
    """Score rows as a benchmark does.

    Args:
        rows: of any kind; those without a true span, or without options, are left out of what
            needs them, and the counts tell how many were scored.
        metrics: a name of `SETS`.
            `grounding`: miou and recall of the prediction (TimeLens, Charades-STA, ActivityNet).
            `qvhighlights`: recall of the first window, mAP of the first ten.
            `nextgqa`: accuracy, IoP, IoU, and acc@gqa: right with an IoP of at least 0.5.
            `rextime`: accuracy, tIoU, and acc@iou0.5: right with a tIoU of at least 0.5.
            `videoqa`: accuracy, of each category too.
        strict: of `grounding`, count `tIoU > threshold` as Time-R1 does.

    Returns:
        shares by name and counts; None for a share of no queries.

    Raises:
        ValueError: no set of that name, no rows of the kind it scores, or a row that is not one.
    """
    if metrics not in SETS:
        raise ValueError(f"no metrics {metrics!r}; there are {', '.join(SETS)}")
    if strict and metrics != "grounding":
        raise ValueError(f"strict is of grounding; {metrics} counts a tIoU of the threshold itself")
    results = [Result.of(row) for row in rows]
    return _grounding(results, strict) if strict else SETS[metrics](results)


def average_precision(
    windows: Sequence[Span], truth: Sequence[Span], thresholds: Sequence[float] = THRESHOLDS
) -> list[float]:
    """Interpolated average precision of the predicted windows of one query, one a threshold.

    In the order of their rank, each window takes the true span still free that it overlaps most, if
    by at least the threshold. With p(r) the highest precision at any rank with a recall of r or
    more, the result is the mean of p(k / T) over k = 1..T, T the number of true spans: the area
    that ActivityNet's and moment_detr's scorers compute. Of true spans overlapped alike the last
    one is taken, as there.

    Args:
        windows: the surest first, any number; an empty or reversed one is a wrong one.
        truth: at least one.
        thresholds: of tIoU, in (0, 1].

    Raises:
        ValueError: where there is no true span.
    """
    if not truth:
        raise ValueError("a query has no true span")
    tious = _tious(windows, truth)
    return [_interpolated(_hits(tious, threshold), len(truth)) for threshold in thresholds]


def _grounding(results: Sequence[Result], strict: bool = False) -> dict[str, Any]:
    timed = _timed(results)
    found = summarize([r.predicted for r in timed], [], [r.truth for r in timed], strict=strict)
    return {name: value for name, value in found.items() if name != "sampled_miou"}


def _qvhighlights(results: Sequence[Result]) -> dict[str, Any]:
    timed = _timed(results)
    first = [best_tiou(next(iter(r.windows), None), r.truth) for r in timed]
    precisions = _precisions(timed, [r.truth for r in timed])
    of_length: dict[str, Any] = {}
    for name, (low, high) in LENGTHS.items():
        # The true windows of that length alone; a prediction is not told apart by its own.
        truth = [[s for s in r.truth if low < s[1] - s[0] <= high] for r in timed]
        kept = [i for i, spans in enumerate(truth) if spans]
        found = _precisions([timed[i] for i in kept], [truth[i] for i in kept])
        of_length[f"map_{name}"] = float(found.mean()) if kept else None
        of_length[f"queries_{name}"] = len(kept)
    return {
        "recall@0.5": recall_at(first, 0.5),
        "recall@0.7": recall_at(first, 0.7),
        "map": float(precisions.mean()),
        "map@0.5": float(precisions[:, THRESHOLDS.index(0.5)].mean()),
        "map@0.75": float(precisions[:, THRESHOLDS.index(0.75)].mean()),
        "queries": len(timed),
        **of_length,
    }


def _nextgqa(results: Sequence[Result]) -> dict[str, Any]:
    asked = _asked(results)
    timed = _timed(asked)
    tious, iops = [r.tiou for r in timed], [best_iop(r.predicted, r.truth) for r in timed]
    return {
        "accuracy": _share(r.right for r in asked),
        "acc@gqa": _share(r.right and iop >= 0.5 for r, iop in zip(timed, iops, strict=True)),
        "miop": miou(iops),
        "iop@0.3": recall_at(iops, 0.3),
        "iop@0.5": recall_at(iops, 0.5),
        "miou": miou(tious),
        "iou@0.3": recall_at(tious, 0.3),
        "iou@0.5": recall_at(tious, 0.5),
        "questions": len(asked),
        "grounded": len(timed),
    }


def _rextime(results: Sequence[Result]) -> dict[str, Any]:
    asked = _asked(results)
    timed = _timed(asked)
    tious = [r.tiou for r in timed]
    return {
        "accuracy": _share(r.right for r in asked),
        "miou": miou(tious),
        "recall@0.3": recall_at(tious, 0.3),
        "recall@0.5": recall_at(tious, 0.5),
        "acc@iou0.5": _share(r.right and t >= 0.5 for r, t in zip(timed, tious, strict=True)),
        "questions": len(asked),
        "grounded": len(timed),
    }


def _videoqa(results: Sequence[Result]) -> dict[str, Any]:
    asked = _asked(results)
    kinds: dict[str, list[Result]] = {}
    for result in sorted(asked, key=lambda r: (r.category is None, r.category or "")):
        kinds.setdefault(kind_of(result, "category"), []).append(result)
    return {
        "accuracy": _share(r.right for r in asked),
        "questions": len(asked),
        "categories": {
            name: {"accuracy": _share(r.right for r in of_kind), "questions": len(of_kind)}
            for name, of_kind in kinds.items()
        },
    }


SETS: dict[str, Callable[[Sequence[Result]], dict[str, Any]]] = {
    "grounding": _grounding,
    "qvhighlights": _qvhighlights,
    "nextgqa": _nextgqa,
    "rextime": _rextime,
    "videoqa": _videoqa,
}


def _timed(results: Sequence[Result]) -> list[Result]:
    timed = [r for r in results if r.truth]
    if not timed:
        raise ValueError(f"none of {len(results)} rows has a true span to score")
    return timed


def _asked(results: Sequence[Result]) -> list[Result]:
    asked = [r for r in results if r.right is not None]
    if not asked:
        raise ValueError(f"none of {len(results)} rows says whether an answer is right")
    return asked


def _share(found: Iterable[bool | None]) -> float:
    return float(np.mean([bool(value) for value in found]))


def _precisions(results: Sequence[Result], truth: Sequence[Sequence[Span]]) -> np.ndarray:
    """[queries, thresholds]"""
    pairs = zip(results, truth, strict=True)
    return np.array([average_precision(r.windows[:MAX_WINDOWS], spans) for r, spans in pairs])


def _tious(windows: Sequence[Span], truth: Sequence[Span]) -> np.ndarray:
    """[windows, truth]; the union as moment_detr's matching writes it, which at a tIoU of exactly a
    threshold may round to its other side than `tiou`."""
    starts, ends = np.reshape(np.array(windows, dtype=np.float64), (-1, 2, 1)).swapaxes(0, 1)
    true_starts, true_ends = np.array(truth, dtype=np.float64).T
    overlap = np.minimum(ends, true_ends) - np.maximum(starts, true_starts)
    union = (ends - starts) + (true_ends - true_starts) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _hits(tious: np.ndarray, threshold: float) -> list[bool]:
    """Whether each window finds a true span that none before it has taken."""
    free, hits = set(range(tious.shape[1])), []
    for row in tious:
        near = [place for place in free if row[place] >= threshold]
        if near:
            free.remove(max(near, key=lambda place: (row[place], place)))
        hits.append(bool(near))
    return hits


def _interpolated(hits: Sequence[bool], truths: int) -> float:
    found = np.array(hits, dtype=bool)
    precision = found.cumsum() / np.arange(1, len(found) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[found].sum() / truths)

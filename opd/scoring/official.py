"""The benchmarks' own scores of an evaluation, from its rows.

Scores are shares in [0, 1], not per cent. A query without a readable answer counts as 0, where some
of the official scorers leave it out or fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from opd.config.run import Config
from opd.data.annotations.formats import recognise
from opd.data.sources import sources_of
from opd.errors import DataError
from opd.scoring.evaluation import EvaluationRow
from opd.scoring.metrics import (
    best_iop,
    best_tiou,
    miou,
    recall_at,
    summarize,
    whole_seconds,
)
from opd.scoring.results import kind_of
from opd.text.forms import Span

METRICS = {  # official metrics by annotation format; all other formats use grounding
    "qvhighlights": "qvhighlights",
    "timelens": "timelens",
    "nextgqa": "nextgqa",
    "rextime": "rextime",
    "mcq": "videoqa",
}
OF_TIOU = ("miou", "recall@0.3", "recall@0.5", "recall@0.7")
THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
MAX_WINDOWS = 10
# Lower limits are exclusive and upper limits inclusive, as in the official code, which ends `long`
# at 150 s, the longest video of its data set.
LENGTHS = {"short": (0.0, 10.0), "middle": (10.0, 30.0), "long": (30.0, math.inf)}


def official(config: Config, rows: list[EvaluationRow]) -> dict[str, Any]:
    """The data set's official scores, and under `metrics` the name of their set; empty where
    `eval.metrics` is auto and no row can be scored. DataError where a set named there scores none.
    """
    name = config.eval.metrics
    if name == "auto":
        source = sources_of(config.data.eval, config.data)[0]
        format = recognise(source.path) if source.format == "auto" else source.format or ""
        name = METRICS.get(format, "grounding")
    strict = config.eval.recall == "above"
    try:
        return {"metrics": name, **score(rows, name, strict=strict and name == "grounding")}
    except ValueError as error:
        if config.eval.metrics != "auto":
            raise DataError(f"eval.metrics={name}: {error}") from error
        return {}


def score(rows: Sequence[EvaluationRow], metrics: str, *, strict: bool = False) -> dict[str, Any]:
    """Score an evaluation as a benchmark does.

    Args:
        rows: queries of any kind. Scores of spans leave out queries without a true span, scores of
            choices those without options; the counts say how many were scored.
        metrics: a name of `SETS`.
            `grounding`: miou and recall of the prediction (Charades-STA, ActivityNet).
            `timelens`: the same of the prediction in whole seconds, to which TimeLens' own
                evaluation rounds, and of the prediction itself, as its ports have it.
            `qvhighlights`: recall of the first window, mAP of the first ten.
            `nextgqa`: accuracy, IoP, IoU, and acc@gqa (right with an IoP of at least 0.5).
            `rextime`: accuracy, tIoU, and acc@iou0.5 (right with a tIoU of at least 0.5).
            `videoqa`: accuracy, overall and by category.
        strict: count `tIoU > threshold` as Time-R1 does; `grounding` only.

    Returns:
        Shares and counts by name; a share of no queries is None.

    Raises:
        ValueError: for an unknown name, or without rows of the kind that it scores.
    """
    if metrics not in SETS:
        raise ValueError(f"no metrics {metrics!r}; there are {', '.join(SETS)}")
    if strict and metrics != "grounding":
        raise ValueError(
            f"strict applies to grounding only; {metrics} counts a tIoU equal to the threshold"
        )
    return _grounding(rows, strict) if strict else SETS[metrics](rows)


def timelens_answers(rows: Sequence[EvaluationRow]) -> dict[str, dict[str, Any]]:
    """Greedy answers to queries with one true span, as TimeLens' own scorer reads them.

    Keys are `VIDEO>>>QUERY>>>[START, END]` with the true span; `timestamps` holds the prediction in
    whole seconds, as TimeLens' own evaluation writes it, or nothing.
    """
    answers: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.answer is not None and len(row.truth) == 1:
            query = " ".join(row.query.replace(">>>", " ").split()).strip(" .")
            key = f"{Path(row.video or row.id).name}>>>{query}>>>{list(row.truth[0])}"
            span = whole_seconds(row.predicted)
            answers[key] = {"timestamps": [] if span is None else [span], "answers": row.answer}
    return answers


def average_precision(
    windows: Sequence[Span], truth: Sequence[Span], thresholds: Sequence[float] = THRESHOLDS
) -> list[float]:
    """Interpolated average precision of one query's predicted windows, at each tIoU threshold.

    In the order of their rank, each window is matched with the free true span that it overlaps
    most, if by at least the threshold. With p(r) the highest precision at any rank with a recall of
    r or more, the result is the mean of p(k / T) over k = 1..T, T the number of true spans. This is
    the area that ActivityNet's and moment_detr's scorers compute. Among true spans of equal overlap
    the last one is taken, as there.

    Args:
        windows: the most certain first, any number; an empty or reversed window counts as wrong.
        truth: at least one span.
        thresholds: tIoU, in (0, 1].

    Raises:
        ValueError: without a true span.
    """
    if not truth:
        raise ValueError("a query has no true span")
    tious = _tious(windows, truth)
    return [_interpolated(_hits(tious, threshold), len(truth)) for threshold in thresholds]


def _grounding(rows: Sequence[EvaluationRow], strict: bool = False) -> dict[str, Any]:
    timed = _timed(rows)
    summary = summarize([r.predicted for r in timed], [], [r.truth for r in timed], strict=strict)
    return {name: value for name, value in summary.items() if name != "sampled_miou"}


def _timelens(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    scores = _grounding(rows)
    rounded = _grounding([replace(r, predicted=whole_seconds(r.predicted)) for r in rows])
    unrounded = {f"{name}_unrounded": scores[name] for name in scores if name in OF_TIOU}
    return rounded | unrounded


def _qvhighlights(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    timed = _timed(rows)
    first = [best_tiou(next(iter(r.windows), None), r.truth) for r in timed]
    precisions = _precisions(timed, [r.truth for r in timed])
    of_length: dict[str, Any] = {}
    for name, (low, high) in LENGTHS.items():
        # Only true windows are restricted to the length; predictions of every length take part.
        truth = [[s for s in r.truth if low < s[1] - s[0] <= high] for r in timed]
        kept = [i for i, spans in enumerate(truth) if spans]
        of_kept = _precisions([timed[i] for i in kept], [truth[i] for i in kept])
        of_length[f"map_{name}"] = float(of_kept.mean()) if kept else None
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


def _nextgqa(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    questions = _questions(rows)
    timed = _timed(questions)
    tious, iops = [r.tiou for r in timed], [best_iop(r.predicted, r.truth) for r in timed]
    return {
        "accuracy": _share(r.right for r in questions),
        "acc@gqa": _share(r.right and iop >= 0.5 for r, iop in zip(timed, iops, strict=True)),
        "miop": miou(iops),
        "iop@0.3": recall_at(iops, 0.3),
        "iop@0.5": recall_at(iops, 0.5),
        "miou": miou(tious),
        "iou@0.3": recall_at(tious, 0.3),
        "iou@0.5": recall_at(tious, 0.5),
        "questions": len(questions),
        "grounded": len(timed),
    }


def _rextime(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    questions = _questions(rows)
    timed = _timed(questions)
    tious = [r.tiou for r in timed]
    return {
        "accuracy": _share(r.right for r in questions),
        "miou": miou(tious),
        "recall@0.3": recall_at(tious, 0.3),
        "recall@0.5": recall_at(tious, 0.5),
        "acc@iou0.5": _share(r.right and t >= 0.5 for r, t in zip(timed, tious, strict=True)),
        "questions": len(questions),
        "grounded": len(timed),
    }


def _videoqa(rows: Sequence[EvaluationRow]) -> dict[str, Any]:
    questions = _questions(rows)
    categories: dict[str, list[EvaluationRow]] = {}
    for row in sorted(questions, key=lambda r: (r.category is None, r.category or "")):
        categories.setdefault(kind_of(row, "category"), []).append(row)
    return {
        "accuracy": _share(r.right for r in questions),
        "questions": len(questions),
        "categories": {
            name: {"accuracy": _share(r.right for r in of_name), "questions": len(of_name)}
            for name, of_name in categories.items()
        },
    }


SETS: dict[str, Callable[[Sequence[EvaluationRow]], dict[str, Any]]] = {
    "grounding": _grounding,
    "timelens": _timelens,
    "qvhighlights": _qvhighlights,
    "nextgqa": _nextgqa,
    "rextime": _rextime,
    "videoqa": _videoqa,
}


def _timed(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    timed = [r for r in rows if r.truth]
    if not timed:
        raise ValueError(f"none of {len(rows)} rows has a true span to score")
    return timed


def _questions(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    questions = [r for r in rows if r.right is not None]
    if not questions:
        raise ValueError(f"none of {len(rows)} rows has options to choose from")
    return questions


def _share(values: Iterable[bool | None]) -> float:
    return float(np.mean([bool(value) for value in values]))


def _precisions(rows: Sequence[EvaluationRow], truth: Sequence[Sequence[Span]]) -> np.ndarray:
    """Average precisions `[queries, thresholds]`."""
    pairs = zip(rows, truth, strict=True)
    return np.array([average_precision(r.windows[:MAX_WINDOWS], spans) for r, spans in pairs])


def _tious(windows: Sequence[Span], truth: Sequence[Span]) -> np.ndarray:
    """tIoUs `[windows, truth]`. The union is computed as in moment_detr's matching, which at a tIoU
    of exactly a threshold may round to the other side than `tiou` does."""
    starts, ends = np.reshape(np.array(windows, dtype=np.float64), (-1, 2, 1)).swapaxes(0, 1)
    true_starts, true_ends = np.array(truth, dtype=np.float64).T
    overlap = np.minimum(ends, true_ends) - np.maximum(starts, true_starts)
    union = (ends - starts) + (true_ends - true_starts) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _hits(tious: np.ndarray, threshold: float) -> list[bool]:
    """Whether each window matches a true span that no window before it has taken."""
    free, hits = set(range(tious.shape[1])), []
    for row in tious:
        matches = [i for i in free if row[i] >= threshold]
        if matches:
            free.remove(max(matches, key=lambda i: (row[i], i)))
        hits.append(bool(matches))
    return hits


def _interpolated(hits: Sequence[bool], truths: int) -> float:
    hit = np.array(hits, dtype=bool)
    precision = hit.cumsum() / np.arange(1, len(hit) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[hit].sum() / truths)

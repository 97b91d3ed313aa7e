"""A plot of predicted beside true spans: the worst and the best queries of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd.scoring.evaluation import EvaluationRow

TRUE, PREDICTED = "tab:green", "tab:blue"
MAX_TEXT = 120  # characters of a query's title; more do not fit above its axis


def timeline(rows: Iterable[EvaluationRow], path: Path, worst: int = 8, best: int = 8) -> Path:
    """Draw predicted and true spans on the videos' time axes, the worst first, by tIoU, then id.

    Args:
        rows: those without a true span are left out. An axis ends with the video where its duration
            is known, which cuts spans that go on past it, else with the last span. Windows other
            than the prediction are drawn faintly.
        path: PNG file to write; it is the same for the same rows in any order.
        worst, best: number of queries from either end of the ranking; none is drawn twice.

    Returns:
        `path`.

    Raises:
        ValueError: where there is nothing to draw.
    """
    if min(worst, best) < 0 or worst + best == 0:
        raise ValueError(f"cannot draw {worst} worst and {best} best queries")
    ranked = sorted((row for row in rows if row.truth), key=lambda row: (row.tiou, row.id))
    if not ranked:
        raise ValueError("no row has a true span to draw")
    shown = ranked[:worst] + ranked[max(worst, len(ranked) - best) :]
    figure = Figure(figsize=(12, 0.6 + 1.05 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, row in zip(axes, shown, strict=True):
        _draw(axis, row)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=100, format="png")
    return path


def _draw(axis: Axes, row: EvaluationRow) -> None:
    further = [span for span in row.windows if span != row.predicted]
    answer = [] if row.predicted is None else [row.predicted]
    for spans, height, colour, strength in (
        (row.truth, 1, TRUE, 0.8),
        (answer, 0, PREDICTED, 0.9),
        (further, 0, PREDICTED, 0.25),
    ):
        bars = [(start_s, end_s - start_s) for start_s, end_s in spans]
        axis.broken_barh(bars, (height, 0.8), color=colour, alpha=strength)
    ends = [time for span in (*row.truth, *row.windows) for time in span]
    axis.set(
        xlim=(0, row.duration_s or max(ends)),
        ylim=(-0.1, 1.9),
        yticks=[0.4, 1.4],
        yticklabels=["answer" if row.predicted else "no answer", "true"],
    )
    text = " ".join(row.query.split())
    text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
    title = f"tIoU {row.tiou:.2f}  {row.id}  {text}"
    axis.set_title(title, fontsize=9, loc="left", parse_math=False)  # a query may say "$5"

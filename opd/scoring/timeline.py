"""A picture of answers beside the truth: the best and the worst of an evaluation on the time axes
of their videos."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd.scoring.results import Result, Row

TRUE, PREDICTED = "tab:green", "tab:blue"
MAX_TEXT = 120  # characters of a query that fit above its axis


def timeline(rows: Iterable[Row], path: Path, worst: int = 8, best: int = 8) -> Path:
    """Draw predicted against true spans, the worst queries first, by tIoU, then id.

    Args:
        rows: as in `opd.scoring.results`; those without a true span are left out. An
            axis ends with the video where `duration_s` is known, else with the last span. Further
            predicted windows are drawn faintly.
        path: of the picture; the file is the same for the same rows in any order.
        worst, best: how many of each; no query is drawn twice.

    Returns:
        `path`.

    Raises:
        ValueError: where nothing is to be drawn, or a row is not one.
    """
    if min(worst, best) < 0 or worst + best == 0:
        raise ValueError(f"cannot draw {worst} worst and {best} best queries")
    ranked = sorted((r for r in map(Result.of, rows) if r.truth), key=lambda r: (r.tiou, r.id))
    if not ranked:
        raise ValueError("no row has a true span to draw")
    shown = ranked[:worst] + ranked[max(worst, len(ranked) - best) :]
    figure = Figure(figsize=(12, 0.6 + 1.05 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, result in zip(axes, shown, strict=True):
        _draw(axis, result)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=100, format="png")
    return path


def _draw(axis: Axes, result: Result) -> None:
    further = [span for span in result.windows if span != result.predicted]
    answer = [] if result.predicted is None else [result.predicted]
    for spans, height, colour, strength in (
        (result.truth, 1, TRUE, 0.8),
        (answer, 0, PREDICTED, 0.9),
        (further, 0, PREDICTED, 0.25),
    ):
        bars = [(start_s, end_s - start_s) for start_s, end_s in spans]
        axis.broken_barh(bars, (height, 0.8), color=colour, alpha=strength)
    ends = [time for span in (*result.truth, *result.windows) for time in span]
    axis.set(
        xlim=(0, result.duration_s or max(ends)),
        ylim=(-0.1, 1.9),
        yticks=[0.4, 1.4],
        yticklabels=["answer" if result.predicted else "no answer", "true"],
    )
    text = " ".join(result.query.split())
    text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
    title = f"tIoU {result.tiou:.2f}  {result.id}  {text}"
    axis.set_title(title, fontsize=9, loc="left", parse_math=False)  # a query may say "$5"

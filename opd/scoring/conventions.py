"""Why a score differs from another: the same answers scored under one changed convention at a time.

Public scorers differ in how they read an answer, in rounding, in cutting predictions to the video,
and in what counts as a hit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd.config.run import Config
from opd.data.examples import Example
from opd.scoring.evaluation import EvaluationRow
from opd.scoring.metrics import whole_seconds
from opd.scoring.official import OF_TIOU, score
from opd.text.forms import Span

AS_EVALUATED = "as evaluated"


def conventions(
    rows: Sequence[EvaluationRow], examples: Sequence[Example], config: Config
) -> dict[str, dict[str, Any]]:
    """Scores of the greedy answers to queries with a true span, by name of the changed convention;
    the first are those of `config`. Empty without such an answer.

    Args:
        rows: as `config` judges the answers.
        examples: those that the answers are about.
    """
    rows = [row for row in rows if row.truth and row.answer is not None]
    if not rows:
        return {}
    above = config.eval.recall == "above"
    reading = "lenient" if config.data.reading == "strict" else "strict"
    changed = replace(config, data=replace(config.data, reading=reading))
    of_id = {example.id: example for example in examples}
    reread = [EvaluationRow.of(of_id[row.id], row.answer, [], changed) for row in rows]
    rounded = [replace(row, predicted=whole_seconds(row.predicted)) for row in rows]
    cut = [replace(row, predicted=_cut(row.predicted, row.duration_s)) for row in rows]
    return {
        AS_EVALUATED: score(rows, "grounding", strict=above),
        f"data.reading={reading}": score(reread, "grounding", strict=above),
        f"eval.recall={'reached' if above else 'above'}": score(
            rows, "grounding", strict=not above
        ),
        "whole seconds": score(rounded, "grounding", strict=above),
        "cut to the video": score(cut, "grounding", strict=above),
    }


def explained(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of `conventions` and other evaluations of the same queries: scores, unreadable
    answers, and the change of mIoU against the first line."""
    first = scores[AS_EVALUATED]["miou"]
    width = max(24, *map(len, scores))
    heads = ("mIoU", "R@0.3", "R@0.5", "R@0.7", "unread")
    lines = [f"{'':{width}}" + "".join(f"{head:>8}" for head in heads) + f"{'change':>9}"]
    for name, values in scores.items():
        cells = "".join(f"{values[key]:>8.4f}" for key in OF_TIOU)
        change = "" if name == AS_EVALUATED else f"{values['miou'] - first:+.4f}"
        lines.append(f"{name:{width}}{cells}{values['parse_failures']:>8}{change:>9}")
    return "\n".join(lines)


def _cut(span: Span | None, duration_s: float | None) -> Span | None:
    """The part of a span inside the video; None if there is none."""
    if span is None or duration_s is None:
        return span
    start_s, end_s = span[0], min(span[1], duration_s)
    return (start_s, end_s) if start_s < end_s else None

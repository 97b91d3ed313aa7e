"""What an evaluation found: a row for each query, and its summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.run import Config
from opd.data.examples import Example
from opd.files import read_rows
from opd.scoring.judge import is_right, named_span, readable
from opd.scoring.metrics import (
    Summary,
    best_constant,
    best_iop,
    best_tiou,
    miou,
    nearest_representable,
    summarize,
    summarize_choices,
)
from opd.text.answers import parse_spans


@dataclass(frozen=True)
class Evaluation:
    """The summary; per query with a true span the tIoU of the greedy answer and the mean tIoU of
    the sampled ones.

    The summary holds what `summarize` and `summarize_choices` say, None where no query is of the
    kind. `ceiling` is the mIoU of the best answers that name two timestamps of the prompt,
    `constant` that of the best single answer to all queries.
    """

    summary: dict[str, Any]
    greedy_tious: list[float]
    sampled_tious: list[float]
    ceiling: float | None
    constant: float | None

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "Evaluation":
        """From the rows that `evaluate` writes."""

        def span(value: Any) -> Any:
            return None if value is None else tuple(value)

        timed = [row for row in rows if row["truth"]]
        asked = [row for row in rows if row.get("right") is not None]
        truth = [tuple(tuple(s) for s in row["truth"]) for row in timed]
        summary: dict[str, Any] = dict.fromkeys(Summary.__annotations__)
        if timed:
            sampled = [[span(s) for s in row["sampled_predicted"]] for row in timed]
            summary |= summarize([span(row["predicted"]) for row in timed], sampled, truth)
        if asked:
            iops = [
                best_iop(span(row["predicted"]), row["truth"]) if row["truth"] else None
                for row in asked
            ]
            sampled = [row["sampled_right"] for row in asked]
            summary |= summarize_choices([row["right"] for row in asked], sampled, iops)
            summary["parse_failures"] = sum(not row["readable"] for row in rows)
        summary["another_form"] = sum(row["another_form"] for row in rows)
        return cls(
            summary=summary | {"queries": len(rows)},
            greedy_tious=[row["tiou"] for row in timed],
            sampled_tious=[
                sum(row["sampled_tious"]) / max(1, len(row["sampled_tious"])) for row in timed
            ],
            ceiling=miou([row["ceiling"] for row in timed]) if timed else None,
            constant=best_constant([spans[0] for spans in truth])[1] if timed else None,
        )

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """From a file that `evaluate` wrote."""
        return cls.of(read_rows(path))


def graded(
    example: Example,
    answer: str,
    sampled: Sequence[str],
    config: Config,
    timestamps_s: Sequence[float] = (),
) -> dict[str, Any]:
    """A row about an answer and others sampled: what they name, and how good that is.

    It holds what `opd.scoring.results` asks for, `answer`, whether it is `readable`, in
    `data.reading` lenient whether it was readable in `another_form` than the prompt's alone, `tiou`
    where there is a true span, `right` where there are options, and the same of the sampled
    answers.
    """
    form, asked, options = config.strict_form, config.template.form, example.options or ()
    predicted = named_span(answer, example, form)
    spans = [named_span(other, example, form) for other in sampled]
    row: dict[str, Any] = {
        "id": example.id,
        "query": example.query,
        "video": f"{example.video.parent.name}/{example.video.name}",
        "duration_s": example.duration_s,
        "category": example.category,
        "answer": answer,
        "readable": readable(answer, example, form),
        "another_form": predicted is not None and named_span(answer, example, asked) is None,
        "predicted": predicted,
        "windows": parse_spans(answer, example.duration_s, form, options),
        "truth": example.spans,
        "sampled_answers": [*sampled],
        "sampled_predicted": spans,
    }
    if example.spans:
        row["tiou"] = best_tiou(predicted, example.spans)
        row["sampled_tious"] = [best_tiou(span, example.spans) for span in spans]
        row["ceiling"] = max(nearest_representable(span, timestamps_s) for span in example.spans)
    if example.options:
        row["right"] = is_right(answer, example, form)
        row["sampled_right"] = [is_right(other, example, form) for other in sampled]
    return row

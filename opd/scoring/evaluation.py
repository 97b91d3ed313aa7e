"""Evaluation: one typed row per query, and the summary over all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd.config.run import Config
from opd.data.examples import Example
from opd.files import read_rows, write_rows
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
    whole_seconds,
)
from opd.text.answers import parse_spans
from opd.text.forms import Span

# The keys of every stored row, in the order in which they are written.
KEYS = (
    "id",
    "query",
    "video",
    "duration_s",
    "category",
    "answer",
    "readable",
    "another_form",
    "predicted",
    "windows",
    "truth",
    "sampled_answers",
    "sampled_predicted",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One query with a model's answers: what each answer names, and how good it is.

    Attributes:
        id, query, duration_s, category: as in `Example`.
        video: folder and name of the video file, for a clip of it followed by `#t=START,END` in
            seconds; None where unknown.
        truth: true spans in seconds; empty where the query has none.
        answer: the greedy answer; None where answers were only sampled.
        readable: whether the answer names a span, an option or both, as the query asks for.
        another_form: whether the answer names a span in another form than the one that the prompt
            asks for; possible with `data.reading` lenient only.
        predicted: the span that the answer names, in seconds; None where it names none.
        windows: all spans that the answer names, the most certain first.
        ceiling: highest tIoU of a span between two timestamps of the prompt; 0 without a true span
            and where the timestamps are unknown.
        right: whether the answer chooses the right option; None without options.
        sampled_answers, sampled_predicted, sampled_tious, sampled_right: the same for each sampled
            answer; `sampled_tious` is empty without a true span, `sampled_right` without options.
    """

    id: str
    query: str = ""
    video: str | None = None
    duration_s: float | None = None
    category: str | None = None
    truth: tuple[Span, ...] = ()
    answer: str | None = None
    readable: bool = False
    another_form: bool = False
    predicted: Span | None = None
    windows: tuple[Span, ...] = ()
    ceiling: float = 0.0
    right: bool | None = None
    sampled_answers: tuple[str, ...] = ()
    sampled_predicted: tuple[Span | None, ...] = ()
    sampled_tious: tuple[float, ...] = ()
    sampled_right: tuple[bool, ...] = ()

    @property
    def tiou(self) -> float:
        """tIoU of the prediction with the best matching true span; ValueError without one."""
        return best_tiou(self.predicted, self.truth)

    @property
    def tiou_rounded(self) -> float:
        """The same of the prediction in whole seconds, as TimeLens scores it."""
        return best_tiou(whole_seconds(self.predicted), self.truth)

    @classmethod
    def of(
        cls,
        example: Example,
        answer: str | None,
        sampled: Sequence[str],
        config: Config,
        timestamps_s: Sequence[float] = (),
    ) -> EvaluationRow:
        """Judge the greedy answer to an example, if there is one, and the sampled ones.

        Args:
            timestamps_s: of the prompt, for `ceiling`.
        """
        form, options = config.strict_form, example.options or ()
        video = f"{example.video.parent.name}/{example.video.name}"
        if example.clip is not None:
            start_s, end_s = example.clip
            video += f"#t={start_s},{end_s}"
        spans = tuple(named_span(text, example, form) for text in sampled)
        row = cls(
            id=example.id,
            query=example.query,
            video=video,
            duration_s=example.duration_s,
            category=example.category,
            truth=example.spans,
            sampled_answers=tuple(sampled),
            sampled_predicted=spans,
        )
        if example.spans:
            ceilings = [nearest_representable(span, timestamps_s) for span in example.spans]
            tious = tuple(best_tiou(span, example.spans) for span in spans)
            row = replace(row, sampled_tious=tious, ceiling=max(ceilings))
        if options:
            row = replace(row, sampled_right=tuple(is_right(s, example, form) for s in sampled))
        if answer is None:
            return row
        predicted = named_span(answer, example, form)
        in_form = named_span(answer, example, config.template.form) is not None
        return replace(
            row,
            answer=answer,
            readable=readable(answer, example, form),
            another_form=predicted is not None and not in_form,
            predicted=predicted,
            windows=parse_spans(answer, form, options),
            right=is_right(answer, example, form) if options else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The row as it is stored: what needs a true span, or options, only where they exist."""
        row = {key: getattr(self, key) for key in KEYS}
        if self.truth:
            row["tiou"] = self.tiou
            row["tiou_rounded"] = self.tiou_rounded
            row["sampled_tious"] = self.sampled_tious
            row["ceiling"] = self.ceiling
        if self.right is not None:
            row["right"] = self.right
            row["sampled_right"] = self.sampled_right
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EvaluationRow:
        """Read a stored row. It must have `id`, `predicted` and `truth`; where `windows` is
        missing, `predicted` is the only one.

        Raises:
            ValueError: where a value is missing or malformed; the message names the row.
        """
        try:
            name, predicted, truth = str(row["id"]), row["predicted"], row["truth"]
        except KeyError as error:
            raise ValueError(f"row {row.get('id')!r} has no {error}") from error
        span = None if predicted is None else _span(name, predicted)
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
            query=str(row.get("query") or ""),
            video=None if video is None else str(video),
            duration_s=duration_s,
            category=None if category is None else str(category),
            truth=spans,
            answer=row.get("answer"),
            readable=row.get("readable", False),
            another_form=row.get("another_form", False),
            predicted=span,
            windows=_spans(name, windows),
            ceiling=row.get("ceiling", 0.0),
            right=None if right is None else bool(right),
            sampled_answers=tuple(row.get("sampled_answers", ())),
            sampled_predicted=tuple(
                None if value is None else _span(name, value)
                for value in row.get("sampled_predicted", ())
            ),
            sampled_tious=tuple(row.get("sampled_tious", ())),
            sampled_right=tuple(row.get("sampled_right", ())),
        )


def read_evaluation(path: Path) -> list[EvaluationRow]:
    """Rows of a file that `write_evaluation` wrote; empty where there is no file."""
    return [EvaluationRow.from_json(row) for row in read_rows(path)]


def write_evaluation(path: Path, rows: Sequence[EvaluationRow]) -> None:
    """Write rows as JSON lines, atomically."""
    write_rows(path, [row.to_json() for row in rows])


@dataclass(frozen=True)
class Evaluation:
    """Summary of an evaluation, and per query with a true span the tIoU of its greedy answer and
    the mean tIoU of its sampled ones.

    `summary` holds the values of `summarize` and `summarize_choices`; they are None where no query
    has a true span, or options. `ceiling` is the mIoU of the best answers between two timestamps of
    the prompt, `constant` the mIoU of the best single answer to all queries.
    """

    summary: dict[str, Any]
    greedy_tious: list[float]
    sampled_tious: list[float]
    ceiling: float | None
    constant: float | None

    @classmethod
    def of(cls, rows: Sequence[EvaluationRow]) -> Evaluation:
        """Summarise the rows of an evaluation."""
        timed = [row for row in rows if row.truth]
        chosen = [row for row in rows if row.right is not None]
        truth = [row.truth for row in timed]
        summary: dict[str, Any] = dict.fromkeys(Summary.__annotations__)
        if timed:
            sampled = [row.sampled_predicted for row in timed]
            summary |= summarize([row.predicted for row in timed], sampled, truth)
        if chosen:
            iops = [best_iop(row.predicted, row.truth) if row.truth else None for row in chosen]
            right = [bool(row.right) for row in chosen]
            summary |= summarize_choices(right, [row.sampled_right for row in chosen], iops)
            summary["parse_failures"] = sum(not row.readable for row in rows)
        summary["another_form"] = sum(row.another_form for row in rows)
        return cls(
            summary=summary | {"queries": len(rows)},
            greedy_tious=[row.tiou for row in timed],
            sampled_tious=[
                sum(row.sampled_tious) / max(1, len(row.sampled_tious)) for row in timed
            ],
            ceiling=miou([row.ceiling for row in timed]) if timed else None,
            constant=best_constant([spans[0] for spans in truth])[1] if timed else None,
        )

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Summarise a stored evaluation."""
        return cls.of(read_evaluation(path))


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

"""The one record that every reader produces and everything else consumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from opd.text.forms import Span

MOST_OPTIONS = 26


@dataclass(frozen=True, kw_only=True)
class Example:
    """One query about one video.

    Attributes:
        id: unique within its data set.
        video: path of the video file.
        query: the sentence to localise.
        spans: true `(start, end)` moments in seconds, `0 <= start < end`; empty where unknown.
        duration_s: length of the video in seconds, where the annotation tells it.
        question, options, answer: of a question, the answer among the options if there are any;
            with spans it is grounded QA; None for plain grounding.
        difficulty: the data set's own score; its scale is the data set's.
        category: the data set's own kind of query, for breakdowns.
        weight: how often training draws it, relative to other examples.
        source: where it was read, `file:line` or `file:index`, for messages.

    Raises:
        ValueError: for a span or duration that cannot be true.
    """

    id: str
    video: Path
    query: str
    spans: tuple[Span, ...]
    duration_s: float | None
    question: str | None = None
    options: tuple[str, ...] | None = None
    answer: str | None = None
    difficulty: float | None = None
    category: str | None = None
    weight: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("the id is empty")
        if not self.query:
            raise ValueError("the query is empty")
        if self.options is not None and (len(self.options) < 2 or self.answer not in self.options):
            raise ValueError(f"answer {self.answer!r} is not among the options {self.options}")
        if len(self.options or ()) > MOST_OPTIONS:
            raise ValueError(f"{len(self.options or ())} options, more than there are letters")
        for start_s, end_s in self.spans:
            if not 0 <= start_s < end_s < math.inf:
                raise ValueError(f"span {start_s:g} to {end_s:g} is not 0 <= start < end")
        if self.duration_s is not None:
            if not 0 < self.duration_s < math.inf:
                raise ValueError(f"duration {self.duration_s:g} is not a positive number")
            for start_s, _ in self.spans:
                # Public data often ends a little past the video; a start there is a mistake.
                if start_s >= self.duration_s:
                    raise ValueError(
                        f"a span starts at {start_s:g} s in a video of {self.duration_s:g} s"
                    )

"""The example: one query about one video, as every reader returns it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from opd.data.video.clips import Footage, clip_length
from opd.text.forms import Span

MAX_OPTIONS = 26  # each is named by a letter


@dataclass(frozen=True, kw_only=True)
class Example:
    """One query about one video.

    Attributes:
        id: unique within its data set.
        video: path of the video file.
        query: the sentence to localise.
        spans: true `(start, end)` moments in seconds, `0 <= start < end`; empty where unknown.
        duration_s: length of the video in seconds; None where the annotation does not say.
        clip: the part of the file that is the example's video, `(start, end)` in seconds; spans and
            duration count from its start. None is the whole file.
        question, options, answer: None for plain grounding. In question answering, `answer` is one
            of the `options`, if there are any; with `spans` the task is grounded QA.
        difficulty: the data set's own score, on its own scale.
        category: the data set's own kind of query, for breakdowns.
        weight: how often training draws the example, relative to others.
        source: where the example was read, `file:line` or `file:index`, for messages.

    Raises:
        ValueError: a field is empty or impossible.
    """

    id: str
    video: Path
    query: str
    spans: tuple[Span, ...]
    duration_s: float | None
    clip: Span | None = None
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
        if len(self.options or ()) > MAX_OPTIONS:
            raise ValueError(f"{len(self.options or ())} options, at most {MAX_OPTIONS} allowed")
        for start_s, end_s in self.spans:
            if not 0 <= start_s < end_s < math.inf:
                raise ValueError(f"span {start_s:g} to {end_s:g} is not 0 <= start < end")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] < math.inf:
            raise ValueError(f"clip {self.clip[0]:g} to {self.clip[1]:g} is not 0 <= start < end")
        if self.duration_s is not None:
            if not 0 < self.duration_s < math.inf:
                raise ValueError(f"duration {self.duration_s:g} is not a positive number")
            for start_s, _ in self.spans:
                # In public data spans often end a little past the video; none may start there.
                if start_s >= self.duration_s:
                    raise ValueError(
                        f"a span starts at {start_s:g} s in a video of {self.duration_s:g} s"
                    )

    @property
    def footage(self) -> Footage:
        """What identifies the video: examples of the same footage share frames and vision tokens;
        two clips of one file are different videos."""
        return self.video, self.clip

    def length_s(self, file_s: float) -> float:
        """Return the length of the video in seconds, given that of its file; raises as
        `clip_length` does."""
        return clip_length(self.clip, file_s)

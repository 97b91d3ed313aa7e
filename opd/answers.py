"""The one parser of a model's grounding answer, and the one way to write such an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Span = tuple[float, float]
"""A moment `(start, end)` in seconds."""

# A time is never cut out of something longer (`12` of `123`, `-12`, `12%`, `1:75`) and never
# carries a unit other than seconds.
_VALUE = (
    r"([0-9]+:[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?|[0-9]+:[0-5][0-9](?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)"
    r"(?![0-9:]|\.[0-9])"
)
_SECONDS = r"(\s?(?:seconds|second|secs|sec|s)\b|(?!\w))"
_NOT_OTHER = r"(?!\s?(?:%|(?:ms|milliseconds?|m|mins?|minutes?|h|hours?|frames?)\b))"
_TIME = rf"<?{_VALUE}{_SECONDS}{_NOT_OTHER}>?"  # two groups: value, unit
_START = r"(?<![\w.+\-])(?<![0-9]:)"
_JOIN = r"\s?(?:\bto\b|\band\b|\buntil\b|[-\u2013\u2014~])\s?"

_BRACKETS = re.compile(rf"[\[(]\s?{_TIME}(?:\s?,\s?|{_JOIN}){_TIME}\s?[\])]", re.IGNORECASE)
_PAIR = re.compile(
    rf"(\b(?:from|between|in|at|during|is)\s|:\s?)?{_START}{_TIME}{_JOIN}{_TIME}", re.IGNORECASE
)
_START_KEY, _END_KEY = (
    re.compile(rf"\b{name}(?:_time)?[\"']?\s?[:=]\s?[\"']?{_TIME}", re.IGNORECASE)
    for name in ("start", "end")
)


def parse_span(answer: str, duration_s: float | None = None) -> Span | None:
    """Read the moment, in seconds, that a model's answer names; None where it names none.

    Forms: `From 3.4 to 7.1 seconds.`, `12.54 to 17.83`, `The event happens in 3.0 - 9.5 seconds`,
    `[5.2, 10.4]`, start_time and end_time as JSON, each also as mm:ss or h:mm:ss, and any of them
    inside `<time>` or `<answer>` tags. Thinking, and whatever stands outside an answer tag, is
    ignored; a tag that is never closed is a truncated answer and counts as none. Where an answer
    names several moments the first one counts, as on QVHighlights. Two bare numbers inside other
    text count only after a word such as "from" or "in", or with a unit.

    Args:
        answer: decoded completion; no string makes this raise.
        duration_s: length of the video in seconds; the span is clipped to `[0, duration_s]`.

    Returns:
        `(start, end)` with `0 <= start < end`, both finite, or None: not readable, reversed,
        empty, not finite, or outside the video.
    """
    text = _answer_text(answer)
    values = None if text is None else _find(text)
    if values is None:
        return None
    start_s, end_s = values
    if duration_s is not None:
        end_s = min(end_s, duration_s)
    return (start_s, end_s) if start_s < end_s < math.inf else None


def parse_choice(answer: str, options: Sequence[str]) -> str | None:
    """Which of the options a model's answer to a multiple-choice question names; None where it
    names none, or several.

    A letter counts where it stands first ("B", "(B)", "B. red", "Answer: B"), else the one option
    whose whole text the answer is or holds. Thinking and tags are treated as in `parse_span`.
    """
    text = _answer_text(answer)
    if text is None or not options:
        return None
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    lead = r"(?:(?:the\s)?(?:correct\s)?answer(?:\sis)?\s?:?\s|option\s)?"
    letter = re.compile(rf"{lead}\(?([{letters}])(?:[).:,]|\s|$)", re.IGNORECASE)
    if match := letter.match(text):
        # "A red circle" begins with an article, unless option A says so.
        article = match[1] in "Aa" and text[match.end(1) :][:1] == " "
        if not article:
            return options[letters.index(match[1].upper())]
    plain = text.lower()
    exact = [o for o in options if o.lower().strip(" .") == plain]
    held = exact or [
        o for o in options if re.search(rf"\b{re.escape(o.lower().strip(' .'))}\b", plain)
    ]
    return held[0] if len(held) == 1 else None


def format_span(start_s: float, end_s: float) -> str:
    """Write a span (seconds) in the canonical form, `From 3.4 to 7.1 seconds.`

    Both ends are rounded to a tenth of a second; a span that would vanish by that is widened
    outwards instead, so that `parse_span` reads every result.

    Raises:
        ValueError: unless `0 <= start_s < end_s < inf`.
    """
    if not 0 <= start_s < end_s < math.inf:
        raise ValueError(f"span {start_s:g} to {end_s:g} is not 0 <= start < end")
    start, end = f"{start_s:.1f}", f"{end_s:.1f}"
    if start == end:
        # The inner round keeps 1.1 * 10 = 11.000000000000002 from being pushed to 12.
        start = f"{math.floor(round(start_s * 10, 6)) / 10:.1f}"
        end = f"{math.ceil(round(end_s * 10, 6)) / 10:.1f}"
    return f"From {start} to {end} seconds."


def _answer_text(answer: str) -> str | None:
    """The part of a completion that is its answer, on one line; None where it was cut off."""
    text = " ".join(answer.rpartition("</think>")[2].split())
    if "<think>" in text:
        return None
    for tag in ("answer", "time"):
        _, opened, inside = text.partition(f"<{tag}>")
        if opened:
            text, closed, _ = inside.partition(f"</{tag}>")
            if not closed:
                return None
    return text.strip(" .*`\"'")


def _find(text: str) -> Span | None:
    start, end = _START_KEY.search(text), _END_KEY.search(text)
    if start and end:
        return _seconds(start[1]), _seconds(end[1])
    if match := _BRACKETS.search(text):
        return _seconds(match[1]), _seconds(match[3])
    for match in _PAIR.finditer(text):
        cue, first, first_unit, second, second_unit = match.groups()
        if cue or first_unit or second_unit or ":" in second or match[0] == text:
            return _seconds(first), _seconds(second)
    return None


def _seconds(value: str) -> float:
    total = 0.0
    for part in value.split(":"):
        total = total * 60 + float(part)
    return total

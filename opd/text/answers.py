"""The one parser of a model's answer.

An answer is read leniently, in whatever form it is written, or strictly: the whole of it, outside
its thinking, must be written in one form of `FORMS`. In grounded question answering the choice
comes first and the moments follow: `B. red. From 3.4 to 7.1 seconds.`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from operator import itemgetter
from string import ascii_uppercase

from opd.text.forms import FORMS, Span, format_span, format_spans, in_seconds, spelled

__all__ = [
    "FORMS",
    "Span",
    "format_span",
    "format_spans",
    "has_form",
    "parse_choice",
    "parse_span",
    "parse_spans",
    "read",
]

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
_EDGES = " .*`\"'"  # of an answer, as chat models decorate it
# What must follow a choice: the end of the answer or of a sentence, after a bracket only a space.
_AFTER_BRACKET, _AFTER_WORDS = re.compile(r"[.,:;]?(?: |$)"), re.compile(r"[.,:;] |\.?$")


def parse_span(
    answer: str,
    duration_s: float | None = None,
    form: str | None = None,
    options: Sequence[str] = (),
) -> Span | None:
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
        form: a name of `FORMS`: the whole answer outside its thinking must be written in it.
        options: of a question, whose choice may come first.

    Returns:
        `(start, end)` with `0 <= start < end`, both finite, or None: not readable, reversed,
        empty, not finite, or outside the video.
    """
    first = next(_moments(answer, form, options, tags=1), None)
    return None if first is None else _within(first, duration_s)


def parse_spans(
    answer: str,
    duration_s: float | None = None,
    form: str | None = None,
    options: Sequence[str] = (),
) -> tuple[Span, ...]:
    """All moments that an answer names, in its order: as `parse_span`, but moments that are
    reversed, empty or outside the video are passed over, and each `<time>` tag may hold some."""
    found = (_within(moment, duration_s) for moment in _moments(answer, form, options))
    return tuple(span for span in found if span is not None)


def read(
    answer: str, duration_s: float | None, form: str, options: Sequence[str] = ()
) -> tuple[Span | None, bool]:
    """The moment an answer names, read strictly if that gives one and else leniently; and whether
    leniency was needed to read it."""
    span = parse_span(answer, duration_s, form, options)
    if span is not None:
        return span, False
    span = parse_span(answer, duration_s, None, options)
    return span, span is not None


def has_form(answer: str, form: str, thinking: bool = False, options: Sequence[str] = ()) -> bool:
    """Whether the whole answer is written in a form of `FORMS`, whatever its times are; with
    `thinking`, after a thought that ends in `</think>`."""
    thought = "</think>" in answer or not thinking
    return thought and next(_moments(answer, form, options), None) is not None


def parse_choice(answer: str, options: Sequence[str], strict: bool = False) -> str | None:
    """Which of the options a model's answer to a multiple-choice question names; None where it
    names none, or several.

    A letter counts where it stands first ("B", "(B)", "B. red", "Answer: B"), else the one option
    whose whole text the answer is or holds. Thinking and answer tags are treated as in
    `parse_span`. `strict`: the answer is the letter, the option's exact text or both, at most with
    a full stop after it, and nothing else.
    """
    if strict:
        whole = _outside_thinking(answer)
        choice, rest = _cut_choice(_unwrapped(whole, "answer") or whole, options)
        return None if rest else choice
    text = _answer_text(answer)
    if not text or not options:
        return None
    letters = ascii_uppercase[: len(options)]
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


def _within(moment: Span, duration_s: float | None) -> Span | None:
    start_s, end_s = moment
    if duration_s is not None:
        end_s = min(end_s, duration_s)
    return (start_s, end_s) if start_s < end_s < math.inf else None


def _moments(
    answer: str, form: str | None, options: Sequence[str], tags: int | None = None
) -> Iterator[Span]:
    """The moments as named, possible or not: strictly in a form, or in any; of a lenient answer in
    `<time>` tags, the first `tags` of them are read."""
    if form is not None:
        text = _unwrapped(_outside_thinking(answer), FORMS[form].tag)
        yield from spelled(_cut_choice(text or "", options)[1], form)
        return
    for part in _time_tags(_answer_text(answer))[:tags]:
        yield from _anywhere(_cut_choice(part.strip(_EDGES), options)[1])


def _outside_thinking(answer: str) -> str:
    """What follows a completion's thinking, on one line; empty where the thinking was cut off."""
    text = " ".join(answer.rpartition("</think>")[2].split())
    return "" if "<think>" in text else text


def _unwrapped(text: str, tag: str) -> str | None:
    """The inside of the tag that must be around the whole text; without a tag the text itself."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    if tag and not (text.startswith(opened) and text.endswith(closed)):
        return None
    return text[len(opened) : -len(closed)].strip() if tag else text


def _answer_text(answer: str) -> str:
    """The part of a completion that is its answer; empty where it was cut off."""
    text = _outside_thinking(answer)
    _, opened, inside = text.partition("<answer>")
    if opened:
        text, closed, _ = inside.partition("</answer>")
        text = text if closed else ""
    return text.strip(_EDGES)


def _time_tags(text: str) -> list[str]:
    """What `<time>` tags hold, up to one that is not closed; without any, the whole text."""
    found, at = [], text.find("<time>")
    if at < 0:
        return [text]
    while at >= 0 and (end := text.find("</time>", at)) >= 0:
        found.append(text[at + len("<time>") : end])
        at = text.find("<time>", end)
    return found


def _cut_choice(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """The option whose letter, exact text or both stand first in an answer, and what follows."""
    found = [
        (len(head), option, end.end())
        for number, option in enumerate(options)
        for head, tail in _heads(ascii_uppercase[number : number + 1], option)
        if text.startswith(head) and (end := tail.match(text, len(head)))
    ]
    _, choice, at = max(found, key=itemgetter(0), default=(0, None, 0))  # "red circle", not "red"
    return choice, text[at:]


def _heads(letter: str, option: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """All ways to begin with an option, and what must follow."""
    words = " ".join(option.split()).strip(" .")
    if letter:
        yield from ((f"({letter})", _AFTER_BRACKET), (f"{letter})", _AFTER_BRACKET))
        yield letter, _AFTER_WORDS
    if words:
        yield words, _AFTER_WORDS
    if letter and words:
        for lead in (f"({letter})", f"{letter})", f"{letter}.", f"{letter}:"):
            yield f"{lead} {words}", _AFTER_WORDS


def _anywhere(text: str) -> Iterator[Span]:
    starts, ends = list(_START_KEY.finditer(text)), list(_END_KEY.finditer(text))
    brackets = _BRACKETS.search(text)
    if starts and ends:
        for start, end in zip(starts, ends, strict=False):
            yield in_seconds(start[1]), in_seconds(end[1])
    elif brackets:
        for match in _BRACKETS.finditer(text):
            yield in_seconds(match[1]), in_seconds(match[3])
    else:
        for match in _PAIR.finditer(text):
            cue, first, first_unit, second, second_unit = match.groups()
            if cue or first_unit or second_unit or ":" in second or match[0] == text:
                yield in_seconds(first), in_seconds(second)

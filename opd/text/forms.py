"""Forms of answers: writing moments in a given form and parsing them strictly.

What `format_spans` writes in one form of `FORMS`, `parse_form` accepts in that form only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Span = tuple[float, float]
"""A moment `(start, end)`, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to write moments: `before`, the moments separated by `between`, then `after`.

    Attributes:
        one: a single moment; START and END stand for its times.
        before, between, after: text around and between the moments.
        tag: name of the tag around the whole answer; empty for none.
        listed: whether several moments stand in [ ]; when parsing, one moment may as well.
        decimals: decimals of a second when writing; parsing accepts any number of them.
        clock: whether times are mm:ss instead of seconds.
        source: project or data set that asks for this form.
    """

    one: str
    before: str = ""
    between: str = ", "
    after: str = ""
    tag: str = ""
    listed: bool = False
    decimals: int = 1
    clock: bool = False
    source: str


_OBJECT = '{"start_time": START, "end_time": END}'

FORMS = {
    # From 3.4 to 7.1 seconds and from 8.0 to 9.0 seconds.
    "seconds": Form(
        before="From ",
        one="START to END seconds",
        between=" and from ",
        after=".",
        source="this project: the embedded models",
    ),
    # The event happens in 3.0 - 9.5 seconds, 12.0 - 14.0 seconds.
    "event": Form(
        before="The event happens in ",
        one="START - END seconds",
        after=".",
        source="TimeLens, training/data/grounding.py, one moment or several",
    ),
    # 12.54 to 17.83, 20.00 to 21.50
    "plain": Form(one="START to END", decimals=2, source="Time-R1's answer without its tag"),
    # {"start_time": 3.0, "end_time": 9.5}; several as a list of objects
    "json": Form(one=_OBJECT, listed=True, source="the keys of Qwen-VL's own JSON answers"),
    # [[3.0, 9.5], [12.0, 14.0]]
    "windows": Form(
        before="[",
        one="[START, END]",
        after="]",
        source="QVHighlights' relevant_windows; TimeLens2 asks for such an array",
    ),
    # <time>[5.2, 10.4]</time>
    "time_tag": Form(
        one="<time>[START, END]</time>", between="", source="TVG-R1, reward_score/tvgonly.py"
    ),
    # <answer>12.54 to 17.83</answer>
    "answer_tag": Form(
        one="START to END",
        tag="answer",
        decimals=2,
        source="Time-R1, src/vllm_inference/data/config.py; after <think>...</think> or without",
    ),
    # <answer>{"start_time": "3.0", "end_time": "9.5"}</answer>
    "answer_json": Form(
        one='{"start_time": "START", "end_time": "END"}',
        tag="answer",
        listed=True,
        source="Temporal-R1, verl/utils/reward_score/tvg.py, which wants the times in quotes",
    ),
    # 00:03.0 - 01:09.5
    "clock": Form(
        one="START - END", clock=True, source="answers of models about long videos, in mm:ss"
    ),
}

_OPTIONAL_SPACE = re.compile(r" (?=[{}\[\],:<>-])|(?<=[{}\[\],:<>-]) ")


def format_span(start_s: float, end_s: float, form: str = "seconds") -> str:
    """Write a span, in seconds, in a form of `FORMS`: by default `From 3.4 to 7.1 seconds.`

    Both ends are rounded to the form's decimals. A span that rounding would make empty is widened
    outwards instead, so that `parse_span` accepts every result.

    Raises:
        ValueError: unless `0 <= start_s < end_s < inf`.
    """
    return format_spans([(start_s, end_s)], form)


def format_spans(spans: Sequence[Span], form: str = "seconds", choice: str = "") -> str:
    """Write spans, in seconds, in a form of `FORMS`, each as `format_span` does.

    Args:
        spans: possibly none, for an answer that is the choice alone.
        form: name of the form.
        choice: chosen option or answer in words; it precedes the moments, inside the form's tag.

    Raises:
        ValueError: for a span that is not `0 <= start < end < inf`.
    """
    rules = FORMS[form]
    moments = [_write_one(*span, rules) for span in spans]
    text = rules.between.join(moments)
    if rules.listed and len(moments) > 1:
        text = f"[{text}]"
    text = f"{rules.before}{text}{rules.after}" if moments else ""
    text = " ".join(part for part in (choice, text) if part)
    return f"<{rules.tag}>{text}</{rules.tag}>" if rules.tag else text


def _write_one(start_s: float, end_s: float, form: Form) -> str:
    if not 0 <= start_s < end_s < math.inf:
        raise ValueError(f"span {start_s:g} to {end_s:g} is not 0 <= start < end")
    ends = [f"{value:.{form.decimals}f}" for value in (start_s, end_s)]
    if ends[0] == ends[1]:
        scale = 10**form.decimals
        # The inner round keeps 1.1 * 10 = 11.000000000000002 from being rounded up to 12.
        last = math.ceil(round(end_s * scale, 6))
        first = min(math.floor(round(start_s * scale, 6)), last - 1)
        first, last = max(first, 0), max(last, 1)
        ends = [f"{ticks / scale:.{form.decimals}f}" for ticks in (first, last)]
    if form.clock:
        ends = [_clock(text) for text in ends]
    return form.one.replace("START", ends[0]).replace("END", ends[1])


def _clock(seconds: str) -> str:
    whole, _, fraction = seconds.partition(".")
    minutes, rest = divmod(int(whole), 60)
    return f"{minutes:02d}:{rest:02d}.{fraction}"


def tag_of(form: str) -> str:
    """The tag around an answer in a form of `FORMS`, or around each of its moments; else empty."""
    around_moment = re.match(r"<(\w+)>", FORMS[form].one)
    return FORMS[form].tag or (around_moment[1] if around_moment else "")


def parse_form(text: str, form: str) -> list[Span]:
    """Parse a one-line text that is written entirely in a form of `FORMS`; never raises.

    Returns its moments, in seconds, unchecked (a moment may be reversed or empty), or an empty list
    if the text has another form.
    """
    compact, (one, whole) = _compact(text), _patterns(form)
    if not whole.fullmatch(compact):
        return []
    return [(in_seconds(match[1]), in_seconds(match[2])) for match in one.finditer(compact)]


def in_seconds(value: str) -> float:
    """Convert a time written in seconds, as mm:ss or as h:mm:ss to seconds."""
    total = 0.0
    for part in value.split(":"):
        total = total * 60 + float(part)
    return total


@lru_cache
def _patterns(form: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of a form: one moment, with a group for each time, and a whole answer."""
    rules = FORMS[form]
    time = r"([0-9]+:[0-5][0-9](?:\.[0-9]+)?)" if rules.clock else r"([0-9]+(?:\.[0-9]+)?)"
    before, one, between, after = (
        re.escape(_compact(part)) for part in (rules.before, rules.one, rules.between, rules.after)
    )
    one = one.replace("START", time).replace("END", time)
    several = f"{one}(?:{between}{one})*"
    if rules.listed:
        several = rf"(?:{one}|\[{several}\])"
    after = r"\.?" if rules.after == "." else after
    return re.compile(one), re.compile(before + several + after)


def _compact(text: str) -> str:
    """Remove the optional spaces around punctuation in a one-line text."""
    return _OPTIONAL_SPACE.sub("", text)

"""Forms of answers: how a moment, or several, are written and read back.

What `format_spans` writes in a form of `FORMS`, `spelled` reads in that form and in no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Span = tuple[float, float]
"""A moment `(start, end)` in seconds."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How moments are written: `before`, each as `one` with `between` between them, `after`; all
    of it in the tag `tag`, if any.

    Attributes:
        one: one moment; START and END stand for its times.
        listed: several stand in [ ] (and one may).
        decimals: of a second, as written; any number of them is read.
        clock: times are mm:ss, not seconds.
        source: where this form is asked for.
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
    "plain": Form(one="START to END", decimals=2, source="Time-R1's answer, without its tag"),
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
    "clock": Form(one="START - END", clock=True, source="mm:ss, as models answer of long videos"),
}

_LOOSE = re.compile(r" (?=[{}\[\],:<>-])|(?<=[{}\[\],:<>-]) ")


def format_span(start_s: float, end_s: float, form: str = "seconds") -> str:
    """Write a span (seconds) in a form of `FORMS`, by default `From 3.4 to 7.1 seconds.`

    Both ends are rounded to the form's decimals; a span that would vanish by that is widened
    outwards instead, so that `parse_span` reads every result.

    Raises:
        ValueError: unless `0 <= start_s < end_s < inf`.
    """
    return format_spans([(start_s, end_s)], form)


def format_spans(spans: Sequence[Span], form: str = "seconds", choice: str = "") -> str:
    """Write one span or several as `format_span` does; a choice, or the answer in words, goes in
    front of them, inside the form's tag. Without spans it is the choice alone."""
    chosen = FORMS[form]
    moments = [_write_one(*span, chosen) for span in spans]
    text = chosen.between.join(moments)
    if chosen.listed and len(moments) > 1:
        text = f"[{text}]"
    text = f"{chosen.before}{text}{chosen.after}" if moments else ""
    text = " ".join(part for part in (choice, text) if part)
    return f"<{chosen.tag}>{text}</{chosen.tag}>" if chosen.tag else text


def _write_one(start_s: float, end_s: float, form: Form) -> str:
    if not 0 <= start_s < end_s < math.inf:
        raise ValueError(f"span {start_s:g} to {end_s:g} is not 0 <= start < end")
    ends = [f"{value:.{form.decimals}f}" for value in (start_s, end_s)]
    if ends[0] == ends[1]:
        scale = 10**form.decimals
        # The inner round keeps 1.1 * 10 = 11.000000000000002 from being pushed to 12.
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


def spelled(text: str, form: str) -> list[Span]:
    """The moments of a one-line text that is written in a form from end to end, possible moments
    or not; none where it is written otherwise. No text makes this raise."""
    inside, (one, whole) = _tight(text), _patterns(form)
    if not whole.fullmatch(inside):
        return []
    return [(in_seconds(match[1]), in_seconds(match[2])) for match in one.finditer(inside)]


def in_seconds(value: str) -> float:
    """Of a time as it is written: seconds, mm:ss or h:mm:ss."""
    total = 0.0
    for part in value.split(":"):
        total = total * 60 + float(part)
    return total


@lru_cache
def _patterns(form: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Of one moment, with a group for each time, and of all that a form may be written as."""
    chosen = FORMS[form]
    time = r"([0-9]+:[0-5][0-9](?:\.[0-9]+)?)" if chosen.clock else r"([0-9]+(?:\.[0-9]+)?)"
    before, one, between, after = (
        re.escape(_tight(part))
        for part in (chosen.before, chosen.one, chosen.between, chosen.after)
    )
    one = one.replace("START", time).replace("END", time)
    several = f"{one}(?:{between}{one})*"
    if chosen.listed:
        several = rf"(?:{one}|\[{several}\])"
    after = r"\.?" if chosen.after == "." else after
    return re.compile(one), re.compile(before + several + after)


def _tight(text: str) -> str:
    """Without the spaces of a one-line text around punctuation, where they make no difference."""
    return _LOOSE.sub("", text)

"""Moments in free text: the patterns with which models name times."""

from __future__ import annotations

import re
from collections.abc import Iterator

from opd.text.forms import Span, in_seconds

# A time is never part of something longer (`12` in `123`, `-12`, `12%`, `1:75`) and never has a
# unit other than seconds.
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
# "The start time of the event is 3 seconds, and the end time is 9 seconds",
# "starts at 0:03 and ends at 0:09", "Starting time: 3. Ending time: 9."
_START_WORDS, _END_WORDS = (
    rf"\b(?:{verb})(?:\stime(?:stamp)?)?(?:\sof\sthe(?:\s[a-z]+){{1,3}}?)?"
    rf"(?:\s?[:=]\s?|\s(?:is|at|is\sat)\s)(?:about\s|around\s|approximately\s|the\s)?{_TIME}"
    for verb in ("start(?:s|ing)?|begin(?:s|ning)?", "end(?:s|ing)?|finish(?:es)?|stops?")
)
_PROSE = re.compile(rf"{_START_WORDS}[^0-9]{{0,60}}?{_END_WORDS}", re.IGNORECASE)
# Between two pairs of one list, and after the last one.
_BETWEEN_PAIRS = re.compile(r"\s?(?:[,;&]|\band\b|\bor\b|,\s(?:and|or)\b)\s?", re.IGNORECASE)
_AFTER_PAIR = re.compile(r"\s?(?:$|[,;&.()\]]|(?:and|or)\b)", re.IGNORECASE)


def moments_anywhere(text: str) -> Iterator[Span]:
    """Iterate over the moments in a text: as JSON, else in brackets, else as pairs of times, else
    as sentences about start and end."""
    starts, ends = list(_START_KEY.finditer(text)), list(_END_KEY.finditer(text))
    brackets = _BRACKETS.search(text)
    if starts and ends:
        for start, end in zip(starts, ends, strict=False):
            yield in_seconds(start[1]), in_seconds(end[1])
    elif brackets:
        for match in _BRACKETS.finditer(text):
            yield in_seconds(match[1]), in_seconds(match[3])
    elif pairs := _pairs(text):
        yield from pairs
    else:
        for match in _PROSE.finditer(text):
            yield in_seconds(match[1]), in_seconds(match[3])


def _pairs(text: str) -> list[Span]:
    """Pairs of times in a text: in a list of pairs, all of them if one is marked as a time."""
    lists: list[list[re.Match[str]]] = []
    end = 0
    for match in _PAIR.finditer(text):
        follows = lists and _BETWEEN_PAIRS.fullmatch(text, end, match.start())
        if follows and not match[1]:  # a word such as "from" begins a new list
            lists[-1].append(match)
        else:
            lists.append([match])
        end = match.end()
    pairs: list[Span] = []
    for matches in lists:
        whole = matches[0].start() == 0 and matches[-1].end() == len(text)
        if whole or any(map(_is_marked, matches)):
            pairs += [
                (in_seconds(match[2]), in_seconds(match[4]))
                for match in matches
                if whole or _is_marked(match) or _AFTER_PAIR.match(text, match.end())
            ]
    return pairs


def _is_marked(match: re.Match[str]) -> bool:
    """Whether a pair of numbers has a word before it, a unit or a colon that makes it a time."""
    cue, _, first_unit, second, second_unit = match.groups()
    return bool(cue or first_unit or second_unit or ":" in second)

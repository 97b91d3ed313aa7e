"""The parser of a model's answers, used for rewards, filters and evaluation alike.

Strict parsing requires the whole answer, outside its thinking, to have one form of `FORMS`. Lenient
parsing accepts an answer in any of these forms, and looks for moments anywhere in all others. In
grounded question answering the choice comes first and the moments follow: `B. red. From 3.4 to 7.1
seconds.`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from string import ascii_uppercase

from opd.text.forms import FORMS, Span, format_span, format_spans, parse_form, tag_of
from opd.text.free_text import moments_anywhere

__all__ = [
    "FORMS",
    "Span",
    "format_span",
    "format_spans",
    "has_form",
    "has_tags",
    "parse_choice",
    "parse_span",
    "parse_spans",
]

_BOX = "\\boxed{"
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_EDGES = " .*`\"'$"  # decoration that chat models put around an answer
# What must follow a choice: the end of the answer or of a sentence, or a space after a bracket.
_AFTER_BRACKET, _AFTER_WORDS = re.compile(r"[.,:;]?(?: |$)"), re.compile(r"[.,:;] |\.?$")


def parse_span(answer: str, form: str | None = None, options: Sequence[str] = ()) -> Span | None:
    """Parse the moment that a model's answer names.

    Accepted forms are those of `FORMS`, `[5.2, 10.4]`, and sentences such as `it starts at 3 and
    ends at 9` or `Starting time: 3. Ending time: 9.`, each also with mm:ss or h:mm:ss, inside
    `<time>` or `<answer>` tags or in `\\boxed{}`. Thinking and any text outside an answer tag are
    ignored. A tag that is not closed means that the answer is truncated and names no moment. If an
    answer names several moments, the first one counts, as on QVHighlights. Bare numbers inside
    other text count only after a word such as "from" or "in", with a unit, or in a list with such.

    Args:
        answer: decoded completion; no string raises an exception.
        form: name of the form of `FORMS` that the whole answer outside its thinking must have;
            None accepts any form.
        options: options of the question, one of which may precede the moment.

    Returns:
        `(start, end)` in seconds with `0 <= start < end`, both finite, as the answer says it: it
        may leave the video. None if there is no moment, or if it is reversed, empty or not finite.
    """
    moments = _moments(answer, form, options, tags=1)
    return moments[0] if moments and _is_possible(moments[0]) else None


def parse_spans(
    answer: str, form: str | None = None, options: Sequence[str] = ()
) -> tuple[Span, ...]:
    """Parse all moments that an answer names, in their order.

    Arguments and forms are those of `parse_span`, but moments that are reversed, empty or not
    finite are skipped, and every `<time>` tag is parsed.
    """
    return tuple(filter(_is_possible, _moments(answer, form, options)))


def has_form(
    answer: str,
    form: str,
    thinking: bool = False,
    options: Sequence[str] = (),
    *,
    grounded: bool = True,
    several: bool = True,
) -> bool:
    """Whether the whole answer has a form of `FORMS`, whatever its times and its choice are.

    Args:
        answer: decoded completion.
        form: name of the form.
        thinking: whether `<think>...</think>` must precede the answer.
        options: options of the question, one of which may precede the moments.
        grounded: whether moments are required; otherwise a choice is.
        several: whether more than one moment is allowed.
    """
    if thinking and _after_thinking(answer) is None:
        return False
    if not grounded:
        return parse_choice(answer, options, form) is not None
    moments = _moments(answer, form, options)
    return bool(moments) and (several or len(moments) == 1)


def has_tags(answer: str, form: str, thinking: bool = False, *, grounded: bool = True) -> bool:
    """Whether an answer has the tags of a form, whatever stands between them.

    A tag around the whole answer is its beginning and its end, as in Time-R1's reward; tags around
    moments may be anywhere, as in TVG-R1's. Arguments are those of `has_form`.
    """
    text, tag = answer.strip(), tag_of(form)
    if FORMS[form].tag:
        thought = r"<think>.*?</think>\s*" if thinking else ""
        opened = re.match(rf"{thought}<{tag}>", text, re.DOTALL)
        return opened is not None and text.endswith(f"</{tag}>", opened.end())
    rest = _after_thinking(answer) if thinking else text
    if rest is None or not (tag and grounded):
        return rest is not None
    _, opened, inside = rest.partition(f"<{tag}>")
    return bool(opened) and f"</{tag}>" in inside


def parse_choice(answer: str, options: Sequence[str], form: str | None = None) -> str | None:
    """Parse which option an answer to a multiple-choice question names.

    A letter counts if it comes first ("B", "(B)", "B. red", "Answer: B") or in `\\boxed{}`;
    otherwise the one option counts whose whole text the answer equals or contains. Thinking and
    answer tags are treated as in `parse_span`.

    Args:
        answer: decoded completion; no string raises an exception.
        options: texts of the options.
        form: require the letter, the option's exact text or both, optionally followed by a full
            stop, and behind it nothing but moments in this form of `FORMS`; None accepts any text.

    Returns:
        The text of the option; None if the answer names no option, or several.
    """
    whole = _outside_thinking(answer)
    choice, rest = _cut_choice(_unwrapped(whole, "answer") or whole, options)
    if choice and any(not rest or has_form(answer, f, options=options) for f in _forms(form)):
        return choice
    if form is not None or not options:
        return None
    choices = (_choice_anywhere(text, options) for text in _readings(answer) if text)
    return next((choice for choice in choices if choice is not None), None)


def _choice_anywhere(text: str, options: Sequence[str]) -> str | None:
    """The option whose letter begins a text, or whose words are in it; None for none or several."""
    letters = ascii_uppercase[: len(options)]
    lead = r"(?:(?:the\s)?(?:correct\s)?answer(?:\sis)?\s?:?\s|option\s)?"
    letter = re.compile(rf"{lead}\(?([{letters}])(?:[).:,]|\s|$)", re.IGNORECASE)
    if match := letter.match(text):
        # The A of "A red circle" is an article, not the letter of an option.
        article = match[1] in "Aa" and text[match.end(1) :][:1] == " "
        if not article:
            return options[letters.index(match[1].upper())]
    plain = text.lower()
    exact = [o for o in options if o.lower().strip(" .") == plain]
    contained = exact or [
        o for o in options if re.search(rf"\b{re.escape(o.lower().strip(' .'))}\b", plain)
    ]
    return contained[0] if len(contained) == 1 else None


def _is_possible(moment: Span) -> bool:
    start_s, end_s = moment
    return start_s < end_s < math.inf


def _moments(
    answer: str, form: str | None, options: Sequence[str], tags: int | None = None
) -> list[Span]:
    """The moments of an answer, unchecked, in one form or (None) in any; in an answer without a
    form, of the first `tags` `<time>` tags at most."""
    whole, forms = _outside_thinking(answer), _forms(form)
    tags_of_forms = {FORMS[name].tag for name in forms}
    rests = {t: _cut_choice(_unwrapped(whole, t) or "", options)[1] for t in tags_of_forms}
    for name in forms:
        if moments := parse_form(rests[FORMS[name].tag], name):
            return moments
    for text in _readings(answer) if form is None else ():
        parts = [part.strip(_EDGES) for part in _time_tags(text)[:tags]]
        moments = [m for part in parts for m in moments_anywhere(_cut_choice(part, options)[1])]
        if moments:
            return moments
    return []


def _forms(form: str | None) -> Sequence[str]:
    """Names of the forms that are accepted."""
    return tuple(FORMS) if form is None else (form,)


def _outside_thinking(answer: str) -> str:
    """The completion after its thinking, on one line; empty if the thinking was truncated."""
    text = " ".join(answer.rpartition("</think>")[2].split())
    return "" if "<think>" in text else text


def _after_thinking(answer: str) -> str | None:
    """What follows the first `</think>` of an answer that begins with `<think>`; else None."""
    thought, closed, rest = answer.strip().partition("</think>")
    return rest if thought.startswith("<think>") and closed else None


def _unwrapped(text: str, tag: str) -> str | None:
    """The content of the tag that encloses the text, None if it does not; the text if `tag` is
    empty."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    if tag and not (text.startswith(opened) and text.endswith(closed)):
        return None
    return text[len(opened) : -len(closed)].strip() if tag else text


def _answer_text(answer: str) -> str:
    """The answer within a completion; empty if it was truncated."""
    text = _outside_thinking(answer)
    _, opened, inside = text.partition("<answer>")
    if opened:
        text, closed, _ = inside.partition("</answer>")
        text = text if closed else ""
    return text.strip(_EDGES)


def _readings(answer: str) -> Iterator[str]:
    """The texts in which a completion may name its answer: what stands in `\\boxed{}`, if anything
    does, then the whole answer. Nothing if a box was truncated."""
    text = _answer_text(answer)
    if _BOX not in text:
        yield text
        return
    text = _LATEX_TEXT.sub(r"\1", text)
    outside, *parts = text.split(_BOX)
    boxes = []
    for part in parts:
        depths = accumulate(((c == "{") - (c == "}") for c in part), initial=1)
        end = next((at for at, depth in enumerate(depths) if depth == 0), 0)
        if not end:
            return
        boxes.append(part[: end - 1])
        outside += boxes[-1] + part[end:]
    yield ", ".join(boxes)
    yield outside.strip(_EDGES)


def _time_tags(text: str) -> list[str]:
    """Contents of the `<time>` tags up to one that is not closed; the whole text without tags."""
    contents, at = [], text.find("<time>")
    if at < 0:
        return [text]
    while at >= 0 and (end := text.find("</time>", at)) >= 0:
        contents.append(text[at + len("<time>") : end])
        at = text.find("<time>", end)
    return contents


def _cut_choice(text: str, options: Sequence[str]) -> tuple[str | None, str]:
    """Split an answer into the option whose letter, exact text or both begin it, and the rest."""
    matches = [
        (len(head), option, end.end())
        for number, option in enumerate(options)
        for head, tail in _heads(ascii_uppercase[number : number + 1], option)
        if text.startswith(head) and (end := tail.match(text, len(head)))
    ]
    # The longest match: "red circle" rather than "red".
    _, choice, at = max(matches, key=itemgetter(0), default=(0, None, 0))
    return choice, text[at:]


def _heads(letter: str, option: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """All ways in which an answer can begin with an option, and the pattern that must follow."""
    words = " ".join(option.split()).strip(" .")
    if letter:
        yield from ((f"({letter})", _AFTER_BRACKET), (f"{letter})", _AFTER_BRACKET))
        yield letter, _AFTER_WORDS
    if words:
        yield words, _AFTER_WORDS
    if letter and words:
        for lead in (f"({letter})", f"{letter})", f"{letter}.", f"{letter}:"):
            yield f"{lead} {words}", _AFTER_WORDS

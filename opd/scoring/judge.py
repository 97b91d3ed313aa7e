"""Judgement of one answer: the span or option that it names, whether it is right, and its reward.
Pure functions of text and annotation.

A reward is a weighted sum of terms in [0, 1], with the weights `reward.*` of the configuration.
Terms about time need a true span, `choice` needs options, `format` either. A term that does not
apply to an example is left out of its sum, so that grounding, VideoQA and grounded QA mix in one
run (the dual reward of Temporal-R1, arXiv 2506.01908). To add a term, write a function with the
signature of `Term`, name it in `TERMS`, and give `RewardConfig` a weight of that name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from opd.config.method import RewardConfig
from opd.data.examples import Example
from opd.scoring.metrics import best_tiou, tiou
from opd.text.answers import has_form, has_tags, parse_choice, parse_span
from opd.text.forms import FORMS, Span
from opd.text.templates import DEFAULT, Template


def boundary_tiou(predicted: Span | None, truth: tuple[Span, ...], duration_s: float) -> float:
    """Reward of Time-R1: tIoU (1 - |ds|/T) (1 - |de|/T) with the best matching true span.

    ds and de are the errors of start and end, T is the video's length in seconds. The factors
    separate spans of equal tIoU by the distance of their boundaries; 0 for None.
    """
    if predicted is None:
        return 0.0
    rewards = []
    for span in truth:
        start, end = (abs(a - b) / duration_s for a, b in zip(predicted, span, strict=True))
        rewards.append(tiou(predicted, span) * max(0.0, 1 - start) * max(0.0, 1 - end))
    return max(rewards)


def is_right(answer: str, example: Example, form: str | None = None) -> bool:
    """Whether the answer chooses the right option. Here and below, `form` (a name of `FORMS`)
    accepts only answers written in that form, with an explicit choice; None accepts any form."""
    return parse_choice(answer, example.options or (), form) == example.answer


def named_span(answer: str, example: Example, form: str | None = None) -> Span | None:
    """The span that the answer names, in seconds; None where it names none.

    It is never clipped to the video, nor are true spans: in public data many of them end past it,
    and no official scorer clips.
    """
    return parse_span(answer, form, example.options or ())


def readable(answer: str, example: Example, form: str | None = None) -> bool:
    """Whether the answer names a span, an option or both, as the example asks for."""
    if example.options and parse_choice(answer, example.options, form) is None:
        return False
    return not example.spans or named_span(answer, example, form) is not None


@dataclass(frozen=True)
class Judged:
    """An answer to an example, with what the terms of a reward judge it by.

    Attributes:
        answer: decoded completion.
        example: the example that it answers.
        config: for parameters of terms, such as `threshold_at`.
        template: the prompt template; the term `format` is about the form that it asks for.
        form: the only accepted form, as in `is_right`.
    """

    answer: str
    example: Example
    config: RewardConfig = field(default_factory=RewardConfig)
    template: Template = DEFAULT
    form: str | None = None

    @cached_property
    def predicted(self) -> Span | None:
        """The span that the answer names, in seconds; None where it names none."""
        return named_span(self.answer, self.example, self.form)


def _tiou(judged: Judged) -> float | None:
    spans = judged.example.spans
    return best_tiou(judged.predicted, spans) if spans else None


def _threshold(judged: Judged) -> float | None:
    overlap = _tiou(judged)
    return None if overlap is None else float(overlap >= judged.config.threshold_at)


def _boundary(judged: Judged) -> float | None:
    spans, duration_s = judged.example.spans, judged.example.duration_s
    if not spans or duration_s is None:
        return None
    return boundary_tiou(judged.predicted, spans, duration_s)


def _format(judged: Judged) -> float | None:
    """Whether the answer has the form that the template asks for. Of an answer without moments,
    the tag around it is checked alone, as in Temporal-R1's code for questions."""
    example, template = judged.example, judged.template
    if not example.spans and not example.options:
        return None
    grounded, options = bool(example.spans), example.options or ()
    arguments = judged.answer, template.form, template.thinking
    if template.checked == "tags" or (FORMS[template.form].tag and not grounded):
        return float(has_tags(*arguments, grounded=grounded))
    several = template.spans == "all"
    return float(has_form(*arguments, options, grounded=grounded, several=several))


def _choice(judged: Judged) -> float | None:
    if not judged.example.options:
        return None
    return float(is_right(judged.answer, judged.example, judged.form))


# A value in [0, 1], or None where the example has no such term.
Term = Callable[[Judged], float | None]

TERMS: dict[str, Term] = {
    "tiou": _tiou,
    "threshold": _threshold,
    "boundary": _boundary,
    "format": _format,
    "choice": _choice,
}
"""The terms of a reward; the weight of each is the field of `RewardConfig` with its name."""


def reward(
    answer: str,
    example: Example,
    config: RewardConfig,
    template: Template = DEFAULT,
    form: str | None = None,
) -> float:
    """Weighted sum of the terms that apply to the example; never raises, whatever the answer.

    Arguments are the attributes of `Judged`.
    """
    judged = Judged(answer, example, config, template, form)
    used = {name: weight for name, weight in config.weights.items() if weight}
    values = ((weight, TERMS[name](judged)) for name, weight in used.items())
    return sum((weight * value for weight, value in values if value is not None), 0.0)

"""Judgement of one answer: the span or option that it names, whether it is right, and its reward.
Pure functions of text and annotation.

A reward is a weighted sum of terms in [0, 1], with the weights `reward.*` of the configuration.
Terms about time need a true span, `choice` needs options. A term that does not apply to an example
is left out of its sum, so that grounding, VideoQA and grounded QA mix in one run (the dual reward
of Temporal-R1, arXiv 2506.01908).
"""

from opd.config.method import RewardConfig
from opd.data.examples import Example
from opd.scoring.metrics import best_tiou, tiou
from opd.text.answers import has_form, parse_choice, parse_span
from opd.text.forms import Span
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
    return parse_choice(answer, example.options or (), form is not None) == example.answer


def named_span(answer: str, example: Example, form: str | None = None) -> Span | None:
    """The span that the answer names, in seconds; None where it names none within the video."""
    return parse_span(answer, example.duration_s, form, example.options or ())


def readable(answer: str, example: Example, form: str | None = None) -> bool:
    """Whether the answer names a span, an option or both, as the example asks for."""
    if example.options and parse_choice(answer, example.options, form is not None) is None:
        return False
    return not example.spans or named_span(answer, example, form) is not None


def reward(
    answer: str,
    example: Example,
    config: RewardConfig,
    template: Template = DEFAULT,
    form: str | None = None,
) -> float:
    """Weighted sum of the terms that apply to the example; never raises, whatever the answer.

    The term `format` is 1 for an answer in the form that `template` asks for.
    """
    terms: dict[str, float] = {}
    if example.spans:
        predicted = named_span(answer, example, form)
        overlap = best_tiou(predicted, example.spans)
        terms["tiou"] = overlap
        terms["threshold"] = float(overlap >= config.threshold_at)
        if example.duration_s is not None:
            terms["boundary"] = boundary_tiou(predicted, example.spans, example.duration_s)
        terms["format"] = float(
            has_form(answer, template.form, template.thinking, example.options or ())
        )
    if example.options:
        terms["choice"] = float(is_right(answer, example, form))
    return sum(getattr(config, name) * value for name, value in terms.items())

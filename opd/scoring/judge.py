"""Rewards of answers, and what a group of them says about each: pure functions of text and
annotation.

A reward is a weighted sum of terms in [0, 1] (`reward.*` in the configuration). The continuous ones
need a true span, `choice` needs options; a term that an example cannot have is left out of its sum,
so that grounding, VideoQA and grounded QA mix in one run (the dual reward of Temporal-R1, arXiv
2506.01908).
"""

from opd.config.method import RewardConfig
from opd.data.examples import Example
from opd.scoring.metrics import best_tiou, tiou
from opd.text.answers import has_form, parse_choice, parse_span
from opd.text.forms import Span
from opd.text.templates import DEFAULT, Template


def boundary_tiou(predicted: Span | None, truth: tuple[Span, ...], duration_s: float) -> float:
    """tIoU (1 - |ds|/T) (1 - |de|/T) with the best matching true span, T the video's length in
    seconds: Time-R1's reward, which still tells two spans apart that miss by little."""
    if predicted is None:
        return 0.0
    values = []
    for span in truth:
        starts, ends = (abs(a - b) / duration_s for a, b in zip(predicted, span, strict=True))
        values.append(tiou(predicted, span) * max(0.0, 1 - starts) * max(0.0, 1 - ends))
    return max(values)


def is_right(answer: str, example: Example, form: str | None = None) -> bool:
    """Whether the right one of the example's options is chosen. With a form, here and below, the
    answer must be written in it, and name its choice in so many words."""
    return parse_choice(answer, example.options or (), form is not None) == example.answer


def named_span(answer: str, example: Example, form: str | None = None) -> Span | None:
    """The moment in the example's video that an answer names."""
    return parse_span(answer, example.duration_s, form, example.options or ())


def readable(answer: str, example: Example, form: str | None = None) -> bool:
    """Whether the answer names a moment, an option or both, as the example asks for."""
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
    """The weighted sum of the terms that this example can have; no string makes it raise. `format`
    is about the form that the template asks for."""
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

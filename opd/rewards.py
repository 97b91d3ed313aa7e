"""Rewards of answers, and what a group of them says about each: pure functions of text and
annotation.

A reward is a weighted sum of terms in [0, 1] (`reward.*` in the configuration). The continuous ones
need a true span, `choice` needs options; a term that an example cannot have is left out of its sum,
so that grounding, VideoQA and grounded QA mix in one run (the dual reward of Temporal-R1, arXiv
2506.01908).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.answers import Span, has_form, parse_choice, parse_span
from opd.config import Config
from opd.data.examples import Example
from opd.metrics import best_tiou, tiou
from opd.prompts import DEFAULT, Template
from opd.rollout import Rollouts, decode_answers
from opd.settings import RewardConfig


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


def advantages(rewards: torch.Tensor, kind: str, eps: float = 1e-4) -> torch.Tensor:
    """Group advantages `[B, R]` of rewards `[B, R]`, R answers to one prompt: reward less the
    group's mean, for kind "std" over its standard deviation (of a sample) + eps. A group whose
    rewards are all equal has advantages of exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(all_equal(rewards)[:, None], 0)
    return centred if kind == "mean" else centred / (rewards.std(1, keepdim=True) + eps)


def all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Boolean `[B]`: groups that prefer nothing."""
    return (rewards == rewards[:, :1]).all(1)


def grade(
    rollouts: Rollouts, examples: Sequence[Example], tokenizer: Any, config: Config
) -> Rollouts:
    """The same rollouts with their rewards."""
    values = [
        [
            reward(answer, example, config.reward, config.template, config.strict_form)
            for answer in answers
        ]
        for answers, example in zip(decode_answers(rollouts, tokenizer), examples, strict=True)
    ]
    return replace(rollouts, rewards=torch.tensor(values))

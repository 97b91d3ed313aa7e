"""Rewards of rollouts, and the advantage of each answer over its group."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.config.run import Config
from opd.data.examples import Example
from opd.generation.sampling import Rollouts, decode_answers
from opd.scoring.judge import reward


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

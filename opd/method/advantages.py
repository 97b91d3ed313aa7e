"""Rewards of rollouts, the advantage of each over its group, and which of them are trained on.

Only objectives that use rewards need this: GRPO, `opd.reward_coef`, and routing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.config.run import Config
from opd.data.examples import Example
from opd.generation.sampling import Rollouts, decode_answers
from opd.scoring.judge import reward


def advantages(rewards: torch.Tensor, kind: str, eps: float = 1e-4) -> torch.Tensor:
    """Advantages `[B, R]` of rewards `[B, R]`, where a group is the R answers to one prompt.

    Kind "mean" is A = r - mean(r); kind "std" is A = (r - mean(r)) / (std(r) + eps), with the
    sample standard deviation. A group with equal rewards has advantages of exactly 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(all_equal(rewards)[:, None], 0)
    return centred if kind == "mean" else centred / (rewards.std(1, keepdim=True) + eps)


def all_equal(rewards: torch.Tensor) -> torch.Tensor:
    """Boolean `[B]`: groups in which all R rewards of `[B, R]` are equal."""
    return (rewards == rewards[:, :1]).all(1)


def grade(
    rollouts: Rollouts, examples: Sequence[Example], tokenizer: Any, config: Config
) -> Rollouts:
    """Add the reward of every answer; one example per prompt."""
    rewards = [
        [
            reward(answer, example, config.reward, config.template, config.strict_form)
            for answer in answers
        ]
        for answers, example in zip(decode_answers(rollouts, tokenizer), examples, strict=True)
    ]
    return replace(rollouts, rewards=torch.tensor(rewards))


def for_loss(
    rollouts: Rollouts, examples: Sequence[Example], processor: Any, config: Config
) -> Rollouts:
    """Add what the loss needs besides tokens: rewards where it uses them, and which tokens are in
    it."""
    rollouts = replace(rollouts, horizon=config.opd.horizon)
    if config.on_references:
        return rollouts
    if config.compares or config.routes:
        rollouts = grade(rollouts, examples, processor.tokenizer, config)
    return replace(rollouts, trained=_trained(rollouts, config))


def _trained(rollouts: Rollouts, config: Config) -> torch.Tensor | None:
    """Boolean `[B, R]`: the rollouts that take part in the loss; None where all do.

    GRPO leaves out groups with equal rewards, which prefer no answer, unless there is a KL penalty
    or an entropy bonus, which have a gradient there too. Routing suspends answers whose reward
    reaches `curriculum.route_below`.
    """
    rewards = rollouts.rewards
    if config.method == "grpo" and not config.grpo.regularised:
        assert rewards is not None
        return (~all_equal(rewards))[:, None].expand_as(rewards)
    if config.routes:
        assert rewards is not None
        return rewards < config.curriculum.route_below
    return None

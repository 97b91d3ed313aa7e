"""Signals of how healthy a step was."""

from collections.abc import Sequence
from typing import Any

import torch

from opd.config.run import Config
from opd.data.examples import Example
from opd.generation.sampling import Rollouts, decode_answers
from opd.method.advantages import all_equal
from opd.method.objectives import Loss
from opd.scoring.judge import named_span, readable


def signals(
    losses: Sequence[Loss],
    rollouts: Sequence[Rollouts],
    examples: Sequence[Example],
    tokenizer: Any,
    config: Config,
) -> dict[str, Any]:
    """How healthy a step was, over its completion tokens, and the first completion as a sample.

    `kl_number` and `kl_template` are the KL on tokens with a digit and on the others;
    `logprob_gap` is the mean distance between the sampler's and the trainer's log-probability of a
    token: rounding, as long as the two agree. `reward_std` is the mean standard deviation within a
    group, `equal_groups` counts those that have none. None where the method has no such thing.
    """

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(loss, name) for loss in losses]
        values = [value for value in values if value is not None]
        return torch.cat(values) if values else None

    def mean(values: torch.Tensor | None) -> float | None:
        known = values is not None and values.numel() and bool(values.isfinite().all())
        return float(values.mean()) if known else None  # type: ignore[union-attr]

    kl = joined("token_kl")
    ids = torch.cat([r.in_loss(r.completion_ids) for r in rollouts])
    length = sum(r.num_tokens for r in rollouts)
    completions = sum(r.truncated.numel() for r in rollouts)
    row = {
        "kl": mean(kl),
        "kl_number": None,
        "kl_template": None,
        "student_entropy": mean(joined("student_entropy")),
        "teacher_entropy": mean(joined("teacher_entropy")),
        "completion_length": length / completions,
        "truncated": sum(int(r.truncated.sum()) for r in rollouts) / completions,
        "parse_failures": None,
        "logprob_gap": None,
        "reward": None,
        "reward_std": None,
        "equal_groups": None,
        "trained_share": sum(int((r.loss_lengths > 0).sum()) for r in rollouts) / completions,
        "sample": None,
    }
    rewards = [r.rewards for r in rollouts if r.rewards is not None]
    if rewards:
        groups = torch.cat(rewards)
        row["reward"] = mean(groups)
        if groups.shape[1] > 1:
            row["reward_std"] = mean(groups.std(1))
            row["equal_groups"] = int(all_equal(groups).sum())
    elif kl is None:  # trained on references: nothing was sampled
        return row | {"trained_share": None}
    chosen = joined("student_logprobs")
    if chosen is not None:
        drawn = torch.cat([r.in_loss(r.rollout_logprobs) for r in rollouts])
        row["logprob_gap"] = mean((chosen - drawn).abs())
    if tokenizer is not None:
        texts = tokenizer.convert_ids_to_tokens(ids.tolist())
        digits = [any(c.isdigit() for c in text or "") for text in texts]
        if kl is not None:
            number = torch.tensor(digits, dtype=torch.bool, device=kl.device)
            row["kl_number"], row["kl_template"] = mean(kl[number]), mean(kl[~number])
        answers = [a for r in rollouts for a in decode_answers(r, tokenizer)]
        failures = [
            not readable(answer, example, config.strict_form)
            for found, example in zip(answers, examples, strict=True)
            for answer in found
        ]
        row["parse_failures"] = sum(failures) / completions
        first, answer = examples[0], answers[0][0]
        row["sample"] = {
            "id": first.id,
            "query": first.query,
            "answer": answer,
            "predicted": named_span(answer, first, config.strict_form),
            "annotated": config.template.reference(first.spans, first.answer, first.options),
        }
    return row

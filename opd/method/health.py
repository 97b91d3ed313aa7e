"""Health of a step: KL, entropy, lengths, rewards and parse failures, for `metrics.jsonl`, and
warnings of a policy that collapses."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from opd import distributed
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.examples import Example
from opd.generation.sampling import Rollouts, decode_answers
from opd.method.advantages import all_equal
from opd.method.objectives import Loss
from opd.scoring.judge import named_span, readable

WATCHED = 20  # steps whose mean is compared with that of as many at the start


def gather_step(
    results: Sequence[tuple[Loss, Rollouts]], batches: Sequence[PromptBatch], config: Config
) -> tuple[list[Loss], list[Rollouts], list[Example], dict[str, int]]:
    """Losses, rollouts and examples of every rank's micro-batches, on the host, and what they add
    to the fields of `Progress`. Each rank passes its own and receives all."""
    mine = [
        (loss.cpu(), rollouts.cpu(), batch.examples, batch.num_tokens, len(batch.groups))
        for (loss, rollouts), batch in zip(results, batches, strict=True)
    ]
    everyone = [micro_batch for rank in distributed.all_gather(mine) for micro_batch in rank]
    losses, rollouts, of_batches, num_tokens, num_groups = zip(*everyone, strict=True)
    examples = [example for of_batch in of_batches for example in of_batch]
    sampled = () if config.on_references else rollouts
    counts = {
        "prompts": len(examples),
        "groups": sum(num_groups),
        "prompt_tokens": sum(num_tokens),
        "rollouts": sum(r.truncated.numel() for r in sampled),
        "generated_tokens": sum(r.num_tokens for r in sampled),
        "trained_rollouts": sum(int((r.loss_lengths > 0).sum()) for r in sampled),
        "trained_tokens": sum(int(r.loss_lengths.sum()) for r in rollouts),
    }
    return [*losses], [*rollouts], examples, counts


def signals(
    losses: Sequence[Loss],
    rollouts: Sequence[Rollouts],
    examples: Sequence[Example],
    tokenizer: Any,
    config: Config,
) -> dict[str, Any]:
    """Means over the completion tokens of a step, and its first completion as a sample.

    Args:
        losses, rollouts: of each micro-batch, on the host.
        examples: one per prompt, in the order of the rollouts.
        tokenizer: None leaves out what needs text.

    Returns:
        `kl_number` and `kl_template` are the KL on tokens with a digit and on all others.
        `logprob_gap` is the mean absolute difference between the sampler's and the trainer's
        log-probability of a token, which is rounding as long as the two agree. `reward_std` is the
        mean standard deviation within a group, `equal_groups` the number of groups with equal
        rewards. A value is None where the method does not have it, or it is not finite; `truncated`
        and `parse_failures` also where sampling stops at the horizon. `generated_tokens` were
        sampled, `trained_tokens` are in the loss.
    """

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(loss, name) for loss in losses]
        values = [value for value in values if value is not None]
        return torch.cat(values) if values else None

    def mean(values: torch.Tensor | None) -> float | None:
        if values is None or not values.numel() or not bool(values.isfinite().all()):
            return None
        return float(values.mean())

    kl = joined("token_kl")
    ids = torch.cat([r.in_loss(r.completion_ids) for r in rollouts])
    length = sum(r.num_tokens for r in rollouts)
    completions = sum(r.truncated.numel() for r in rollouts)
    whole = config.sampled_length == config.sample.max_completion_length
    truncated = sum(int(r.truncated.sum()) for r in rollouts)
    row = {
        "kl": mean(kl),
        "kl_number": None,
        "kl_template": None,
        "student_entropy": mean(joined("student_entropy")),
        "teacher_entropy": mean(joined("teacher_entropy")),
        "completion_length": length / completions,
        "generated_tokens": None if config.on_references else length,
        "trained_tokens": len(ids),
        "truncated": truncated / completions if whole else None,
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
    elif kl is None:  # trained on reference answers: nothing was sampled
        return row | {"trained_share": None}
    student_logprobs = joined("student_logprobs")
    if student_logprobs is not None:
        rollout_logprobs = torch.cat([r.in_loss(r.rollout_logprobs) for r in rollouts])
        row["logprob_gap"] = mean((student_logprobs - rollout_logprobs).abs())
    if tokenizer is not None:
        texts = tokenizer.convert_ids_to_tokens(ids.tolist())
        digits = [any(c.isdigit() for c in text or "") for text in texts]
        if kl is not None:
            number = torch.tensor(digits, dtype=torch.bool, device=kl.device)
            row["kl_number"], row["kl_template"] = mean(kl[number]), mean(kl[~number])
        answers = [of_prompt for r in rollouts for of_prompt in decode_answers(r, tokenizer)]
        failures = [
            not readable(answer, example, config.strict_form)
            for of_prompt, example in zip(answers, examples, strict=True)
            for answer in of_prompt
        ]
        row["parse_failures"] = sum(failures) / completions if whole else None
        first, answer = examples[0], answers[0][0]
        row["sample"] = {
            "id": first.id,
            "query": first.query,
            "answer": answer,
            "predicted": named_span(answer, first, config.strict_form),
            "annotated": config.template.reference(first.spans, first.answer, first.options),
        }
    return row


class Watch:
    """Watches the rows of metrics for completions that run into their limit, or whose length has
    changed by a factor of four: the usual signs that a policy collapses."""

    def __init__(self, config: Config) -> None:
        self.limit = config.sample.max_completion_length
        self.sampled = not config.on_references
        self.lengths: deque[float] = deque(maxlen=WATCHED)
        self.truncated: deque[float] = deque(maxlen=WATCHED)
        self.first: float | None = None  # mean length at the start
        self.said: set[str] = set()

    def note(self, row: dict[str, Any]) -> list[str]:
        """Warnings after this row, a line each; every kind of warning comes once."""
        if not self.sampled:
            return []
        self.lengths.append(row["completion_length"])
        self.truncated.append(row["truncated"] or 0.0)
        if len(self.lengths) < WATCHED:
            return []
        length, truncated = (sum(v) / WATCHED for v in (self.lengths, self.truncated))
        self.first = first = self.first or length
        change = f"from {first:.1f} to {length:.1f} tokens in the mean of {WATCHED} steps"
        signs = {
            "limit": truncated >= 0.5
            and f"{truncated:.0%} of the completions reach sample.max_completion_length="
            f"{self.limit}: raise it, unless answers are meant to be shorter",
            "shorter": length <= first / 4
            and f"completions have shrunk {change}: if answers are cut short, lower optim.lr",
            "longer": length >= 4 * first
            and f"completions have grown {change}: if answers ramble, lower optim.lr",
        }
        new = {kind: text for kind, text in signs.items() if text and kind not in self.said}
        self.said |= new.keys()
        return [f"step {row['step']}: {text}" for text in new.values()]

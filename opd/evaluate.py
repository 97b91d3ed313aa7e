"""Evaluation: greedy and sampled answers on a split, one parser, one metric library, every answer
stored."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.answers import parse_span
from opd.config import Config
from opd.data.loader import Prompts, batches
from opd.metrics import (
    Summary,
    best_constant,
    best_tiou,
    miou,
    nearest_representable,
    summarize,
)
from opd.models.load import VideoLM
from opd.prefix import encode, prefill
from opd.rollout import Policy, Rollouts, sample, uniforms

# In the place of a step number: evaluation draws its own numbers, the same before and after.
EVALUATION_STEP = -1


@dataclass(frozen=True)
class Evaluation:
    """The summary; per query the tIoU of the greedy answer and the mean tIoU of the sampled ones.

    `ceiling` is the mIoU of the best answers that name two timestamps of the prompt, `constant`
    that of the best single answer to all queries.
    """

    summary: Summary
    greedy_tious: list[float]
    sampled_tious: list[float]
    ceiling: float
    constant: float


def decode_answers(rollouts: Rollouts, tokenizer: Any) -> list[list[str]]:
    """The text of each completion, special tokens left out: one list of R answers per prompt."""
    answers = []
    for ids, mask in zip(
        rollouts.completion_ids.tolist(), rollouts.completion_mask.tolist(), strict=True
    ):
        kept = [
            [t for t, m in zip(row, valid, strict=True) if m]
            for row, valid in zip(ids, mask, strict=True)
        ]
        answers.append(tokenizer.batch_decode(kept, skip_special_tokens=True))
    return answers


@torch.no_grad()
def evaluate(
    lm: VideoLM,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    path: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Answer every query once greedily and `eval.draws` times sampled; write a row a query to
    `path`.

    A row holds `id`, `answer`, `predicted`, `truth` (spans in seconds), `tiou`, and the sampled
    answers and their spans.
    """
    size, draws = config.eval.batch_size, config.eval.draws
    plan = [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]
    rows, ceilings = [], []
    for batch in batches(prompts, plan, lm.device, [lm]):
        prefix = prefill(lm, batch, encode(lm, batch))
        length = config.sample.max_completion_length
        greedy = decode_answers(sample(lm, prefix, policy, length, None), prompts.tokenizer)
        sampled: list[list[str]] = [[] for _ in batch.examples]
        if draws:
            numbers = uniforms(
                config.seed, EVALUATION_STEP, [e.id for e in batch.examples], draws, length
            )
            sampled = decode_answers(sample(lm, prefix, policy, length, numbers), prompts.tokenizer)
        for example, (answer,), others in zip(batch.examples, greedy, sampled, strict=True):
            predicted = parse_span(answer, example.duration_s)
            spans = [parse_span(other, example.duration_s) for other in others]
            rows.append(
                {
                    "id": example.id,
                    "answer": answer,
                    "predicted": predicted,
                    "truth": example.spans,
                    "tiou": best_tiou(predicted, example.spans),
                    "sampled_answers": others,
                    "sampled_predicted": spans,
                    "sampled_tious": [best_tiou(span, example.spans) for span in spans],
                }
            )
        for prompt in batch.prompts:
            spans, times = prompt.example.spans, prompt.timestamps_s
            ceilings.append(max(nearest_representable(span, times) for span in spans))
        progress(len(batch.examples))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarize(
        [r["predicted"] for r in rows],
        [r["sampled_predicted"] for r in rows],
        [r["truth"] for r in rows],
    )
    means = [sum(r["sampled_tious"]) / max(1, draws) for r in rows]
    _, constant = best_constant([r["truth"][0] for r in rows])
    return Evaluation(summary, [r["tiou"] for r in rows], means, miou(ceilings), constant)

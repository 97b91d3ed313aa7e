"""Evaluation: greedy and sampled answers on a split, one parser, one metric library, every answer
stored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.loader import rows_of
from opd.data.prompts import Prompts
from opd.files import write_rows
from opd.generation.sampling import Policy, decode_answers, sample, uniforms
from opd.generation.shared_video import forward_by_video
from opd.models.video_lm import VideoLM
from opd.scoring.evaluation import Evaluation, graded

# In the place of a step number: evaluation draws its own numbers, the same before and after.
EVALUATION_STEP = -1


@torch.no_grad()
def evaluate(
    lm: VideoLM,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    path: Path,
    progress: Callable[[int], object] = lambda _: None,
    store: Callable[[list[dict[str, Any]]], object] = lambda _: None,
    known: Sequence[dict[str, Any]] = (),
) -> Evaluation:
    """Answer every query once greedily and `eval.draws` times sampled; write a row a query to
    `path`.

    Args:
        store: takes the rows of each batch, on the rank that made them.
        known: rows of other examples than the prompts', made before; they are counted and written,
            too.
    """
    draws, length = config.eval.draws, config.sample.max_completion_length

    def answer(batch: PromptBatch) -> list[dict[str, Any]]:
        rows = []
        prefix = forward_by_video(lm, batch)
        greedy = decode_answers(sample(lm, prefix, policy, length, None), prompts.tokenizer)
        sampled: list[list[str]] = [[] for _ in batch.examples]
        if draws:
            numbers = uniforms(
                config.seed, EVALUATION_STEP, [e.id for e in batch.examples], draws, length
            )
            sampled = decode_answers(sample(lm, prefix, policy, length, numbers), prompts.tokenizer)
        for prompt, (text,), others in zip(batch.prompts, greedy, sampled, strict=True):
            rows.append(graded(prompt.example, text, others, config, prompt.timestamps_s))
        store(rows)
        return rows

    rows = [*known]
    if len(prompts):
        rows += rows_of(prompts, config.eval.batch_size, lm, answer, progress)
    if distributed.is_first():
        write_rows(path, rows)
    return Evaluation.of(rows)

"""Evaluation of a model on a split: it answers every query greedily and by sampling, and every
answer is judged and stored."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from opd import distributed
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.loader import rows_of
from opd.data.prompts import Prompts
from opd.generation.policy import Policy, uniforms
from opd.generation.prefix import forward
from opd.generation.sampling import decode_answers, sample
from opd.models.video_lm import VideoLM
from opd.scoring.evaluation import Evaluation, EvaluationRow, write_evaluation

# Takes the place of a step number in `uniforms`: every evaluation of a run draws the same numbers.
EVALUATION_STEP = -1


@torch.no_grad()
def evaluate(
    lm: VideoLM,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    path: Path,
    progress: Callable[[int], object] = lambda _: None,
    store: Callable[[list[EvaluationRow]], object] = lambda _: None,
    earlier: Sequence[EvaluationRow] = (),
) -> Evaluation:
    """Answer every query once greedily and `eval.draws` times by sampling; write one row per query
    to `path`.

    Args:
        progress: called with the number of queries that were answered since its last call.
        store: called with the rows of each batch, on the rank that answered it.
        earlier: rows that a stopped evaluation left, of examples that are not among `prompts`; they
            come first in `path` and count in the result.

    Returns:
        The evaluation of all rows, on every rank.
    """
    draws, length = config.eval.draws, config.sample.max_completion_length

    def answer(batch: PromptBatch) -> list[EvaluationRow]:
        prefix = forward(lm, batch)
        greedy = decode_answers(sample(lm, prefix, policy, length, None), prompts.tokenizer)
        sampled: list[list[str]] = [[] for _ in batch.examples]
        if draws:
            numbers = uniforms(
                config.seed, EVALUATION_STEP, [e.id for e in batch.examples], draws, length
            )
            sampled = decode_answers(sample(lm, prefix, policy, length, numbers), prompts.tokenizer)
        rows = [
            EvaluationRow.of(prompt.example, text, texts, config, prompt.timestamps_s)
            for prompt, (text,), texts in zip(batch.prompts, greedy, sampled, strict=True)
        ]
        store(rows)
        return rows

    rows = [*earlier]
    if len(prompts):
        rows += rows_of(prompts, config.eval.batch_size, lm, answer, progress)
    if distributed.is_first():
        write_evaluation(path, rows)
    return Evaluation.of(rows)

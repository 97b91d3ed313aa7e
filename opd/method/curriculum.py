"""Curricula: which examples of the pool each round of training uses.

    tvdf       Video-OPD: of the examples on which the teacher is reliable, those on which it is
               furthest ahead of the current student (arXiv 2602.02994)
    scc        Anchor-Frontier: of the same reliable examples, a few that the current student
               answers well and many that it does not (arXiv 2609.40055)
    variance   Temporal-R1: examples on which the student's own answers vary (arXiv 2506.01908)
    random     control: the same number of examples, drawn at random

A score is the mean tIoU of `curriculum.answers` answers, drawn by the sampler and with the prompts
of training. Answers are stored under a hash of the model's weights, the decoding settings, the data
and the seed, so that a rerun reuses them exactly when all of these are the same.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd import distributed
from opd.config.method import CurriculumConfig
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.examples import Example
from opd.data.loader import rows_of
from opd.data.prompts import Prompts
from opd.errors import DataError
from opd.files import read_rows, write_rows
from opd.generation.policy import Policy, uniforms
from opd.generation.prefix import forward
from opd.generation.sampling import decode_answers, sample
from opd.method.teacher import Teacher
from opd.models.video_lm import VideoLM
from opd.scoring.evaluation import EvaluationRow

BUCKETS = 5
CENTRE, SIGMA = 0.9, 0.2  # of the Gaussian rule, as published
SCORING_STEP = -2  # in place of a step number in `uniforms`; evaluation uses -1


@dataclass(frozen=True)
class Score:
    """Scores of one example: mean tIoU of the teacher's and of the student's answers, standard
    deviation of the student's tIoUs, and share of the student's answers that choose the right
    option. A score is None where it does not apply, was not needed or the video does not decode."""

    id: str
    teacher_tiou: float | None = None
    student_tiou: float | None = None
    student_std: float | None = None
    student_right: float | None = None

    def varies(self, min_std: float) -> bool:
        """Whether the student's answers vary in tIoU, or are neither always right nor always
        wrong."""
        return (self.student_std or 0.0) > min_std or 0 < (self.student_right or 0.0) < 1


def select(scores: Sequence[Score], count: int, config: CurriculumConfig, seed: int) -> list[int]:
    """Indices into `scores` of at most `count` examples, in the order in which they were chosen.

    Ties go to the lower index. An example that lacks a score which the rule needs is never chosen.
    Random choices depend on `seed` alone. Raises DataError, with the numbers, where no example
    qualifies.
    """
    source = np.random.default_rng(seed)
    places, rule = list(range(len(scores))), config.select
    reason = "the pool is empty"
    if config.kind == "variance":
        places = [i for i in places if scores[i].varies(config.min_std)]
        reason = f"the student's tIoU varies by more than {config.min_std} on none of {len(scores)}"
        rule = "random"
    elif config.kind in ("tvdf", "scc"):
        both = [i for i in places if None not in (scores[i].teacher_tiou, scores[i].student_tiou)]
        places = both
        if config.kind == "scc" or rule != "disagreement":
            places = [i for i in both if _teacher(scores[i]) >= config.threshold]
        best = max((_teacher(scores[i]) for i in both), default=0.0)
        reason = (
            f"the teacher's tIoU reaches {config.threshold} on none of {len(scores)} examples "
            f"(at most {best:.3f}, {len(scores) - len(both)} without a score)"
        )
    else:
        rule = "random"
    if not places:
        raise DataError(f"curriculum.kind={config.kind}: {reason}")
    if config.kind == "scc":
        return _anchors_and_frontiers(scores, places, count, config, source)
    count = min(count, len(places))
    if rule in ("random", "reliability"):
        return [places[i] for i in source.permutation(len(places))[:count]]
    gaps = [_teacher(scores[i]) - (scores[i].student_tiou or 0.0) for i in places]
    ranked = sorted(range(len(places)), key=lambda i: -gaps[i])  # stable
    if rule == "uniform":
        chosen = [ranked[math.floor((i + 0.5) * len(ranked) / count)] for i in range(count)]
    elif rule == "buckets":
        chosen = _from_buckets(ranked, gaps, count, source)
    elif rule == "gaussian":
        # Gumbel's trick draws without replacement in proportion to the density.
        keys = [-((gap - CENTRE) ** 2) / (2 * SIGMA**2) for gap in gaps]
        keys = np.array(keys) + source.gumbel(size=len(keys))
        chosen = np.argsort(-keys, kind="stable")[:count].tolist()
    else:  # topk, disagreement
        chosen = ranked[:count]
    return [places[i] for i in chosen]


def _anchors_and_frontiers(
    scores: Sequence[Score],
    places: list[int],
    count: int,
    config: CurriculumConfig,
    source: np.random.Generator,
) -> list[int]:
    """A share `config.anchors` of `count` from the examples that the student answers well, the rest
    from those that it does not. Where one kind has too few, the other does not make up for it."""
    num_anchors = round(config.anchors * count)
    chosen: list[int] = []
    for number, belongs in (
        (num_anchors, lambda tiou: tiou >= config.threshold),
        (count - num_anchors, lambda tiou: tiou < config.frontier_below),
    ):
        candidates = [i for i in places if belongs(scores[i].student_tiou or 0.0)]
        chosen += [candidates[i] for i in source.permutation(len(candidates))[:number]]
    if not chosen:
        raise DataError(
            f"curriculum.kind=scc: of {len(places)} reliable examples the student's tIoU reaches "
            f"{config.threshold} or stays below {config.frontier_below} on none"
        )
    return chosen


def _teacher(score: Score) -> float:
    assert score.teacher_tiou is not None
    return score.teacher_tiou


def _from_buckets(
    ranked: list[int], gaps: list[float], count: int, source: np.random.Generator
) -> list[int]:
    """The same number at random from each of five equal parts of the gaps' range. Where a part has
    too few, the best remaining examples fill up."""
    edges = np.linspace(max(gaps), min(gaps), BUCKETS + 1)[1:-1]  # a gap on an edge is above it
    buckets: list[list[int]] = [[] for _ in range(BUCKETS)]
    for i in ranked:
        buckets[int((gaps[i] < edges).sum())].append(i)
    chosen: list[int] = []
    for number, bucket in enumerate(buckets):
        quota = (number + 1) * count // BUCKETS - number * count // BUCKETS
        chosen += [bucket[i] for i in source.permutation(len(bucket))[:quota]]
    left = [i for i in ranked if i not in set(chosen)]
    return chosen + left[: count - len(chosen)]


def weights_digest(lm: VideoLM) -> str:
    """Hash of every parameter's bytes; of a sharded model, the hashes of all ranks' shards."""
    digest = hashlib.blake2b(digest_size=16)
    weights = lm.model.state_dict()
    if lm.sharded:
        weights = {name: p.ds_tensor for name, p in lm.model.named_parameters()}
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mine = digest.hexdigest()
    return "".join(distributed.all_gather(mine)) if lm.sharded else mine


def score_answers(
    lm: VideoLM,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, EvaluationRow]:
    """Draw `curriculum.answers` answers to each example that decodes; returns their rows by id.

    Rows are stored in `folder` under a hash of everything that they depend on, and read from there
    if they were drawn before.
    """
    data = [
        (e.id, e.footage, e.query, e.spans, e.question, e.options, e.answer, e.duration_s)
        for e in prompts.examples
    ]
    settings = asdict(config.data)
    names = ("fps", "max_frames", "video_tokens", "min_frame_tokens", "max_frame_tokens")
    names += ("timestamps", "patch_seconds", "backend", "reading")
    prompt = {name: settings[name] for name in names} | {"prompt": vars(config.template)}
    number = config.curriculum.answers
    sampling = [asdict(config.sample), config.seed, number, weights_digest(lm)]
    text = json.dumps([data, prompt, sampling, policy.allowed_columns.tolist()], default=str)
    path = folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.jsonl"
    stored = distributed.from_first(lambda: read_rows(path) if path.is_file() else None)
    if stored is not None:
        return {row["id"]: _from_stored(row) for row in stored}
    length = config.sample.max_completion_length

    def answer(batch: PromptBatch) -> list[EvaluationRow]:
        draws = uniforms(config.seed, SCORING_STEP, [e.id for e in batch.examples], number, length)
        rollouts = sample(lm, forward(lm, batch), policy, length, draws)
        texts = decode_answers(rollouts, prompts.tokenizer)
        return [
            EvaluationRow.of(example, None, answers, config)
            for example, answers in zip(batch.examples, texts, strict=True)
        ]

    rows = rows_of(prompts, config.eval.batch_size, lm, answer, progress)
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, [_to_stored(row) for row in rows])
    return {row.id: row for row in rows}


def _to_stored(row: EvaluationRow) -> dict[str, Any]:
    """What the curriculum keeps of a row: the sampled answers and how good they are."""
    return {
        "id": row.id,
        "answers": row.sampled_answers,
        "tious": row.sampled_tious,
        "rights": row.sampled_right,
    }


def _from_stored(row: dict[str, Any]) -> EvaluationRow:
    return EvaluationRow(
        id=row["id"],
        sampled_answers=tuple(row["answers"]),
        sampled_tious=tuple(row["tious"]),
        sampled_right=tuple(row["rights"]),
    )


def choose(
    student: VideoLM,
    teacher: Teacher | None,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    run_dir: Path,
    number: int,
    progress: Callable[[int], object] = lambda _: None,
) -> list[int]:
    """Indices into the pool that round `number` (from 0) trains on.

    They are written to `curriculum/round_R.jsonl` before they are used; a resumed run reads them
    from there. Raises DataError where no example qualifies.
    """
    settings, folder = config.curriculum, run_dir / "curriculum"
    if settings.kind == "none":
        return list(range(len(prompts)))
    path = folder / f"round_{number}.jsonl"
    stored = distributed.from_first(lambda: read_rows(path) if path.is_file() else None)
    if stored is not None:
        ranked = sorted((row["rank"], i) for i, row in enumerate(stored) if row["selected"])
        return [i for _, i in ranked]
    of_teacher: dict[str, EvaluationRow] = {}
    of_student: dict[str, EvaluationRow] = {}
    scoring = prompts, policy, config, folder / "scores", progress
    if settings.kind in ("tvdf", "scc"):
        assert teacher is not None
        of_teacher = score_answers(teacher.lm, *scoring)
        if not any(any(row.sampled_tious) for row in of_teacher.values()):
            raise DataError(
                f"curriculum.kind={settings.kind}: none of the teacher's answers to "
                f"{len(of_teacher)} examples overlaps a true span"
            )
    if settings.kind in ("tvdf", "scc", "variance"):
        of_student = score_answers(student, *scoring)

    def score_of(example: Example) -> Score:
        no_answers = EvaluationRow(id=example.id)  # the video does not decode, or nobody answered
        teacher_row = of_teacher.get(example.id, no_answers)
        student_row = of_student.get(example.id, no_answers)
        return Score(
            example.id,
            teacher_tiou=_mean(teacher_row.sampled_tious),
            student_tiou=_mean(tious := student_row.sampled_tious),
            student_std=float(np.std(tious)) if tious else None,
            student_right=_mean(student_row.sampled_right),
        )

    scores = [score_of(example) for example in prompts.examples]
    count = max(1, round(settings.share * len(prompts)))
    chosen = select(scores, count, settings, config.seed + number)
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        ranks = {place: rank for rank, place in enumerate(chosen)}
        rows = [
            asdict(score) | {"selected": i in ranks, "rank": ranks.get(i)}
            for i, score in enumerate(scores)
        ]
        write_rows(path, rows)
    return chosen


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def rounds(steps: int, number: int) -> list[range]:
    """Split the steps of a run into rounds of equal length, to within one step."""
    edges = [round(i * steps / number) for i in range(number + 1)]
    return [range(a, b) for a, b in pairwise(edges)]

"""Curricula: which examples of the pool a round of training uses.

    tvdf       Video-OPD: keep the examples on which the teacher is reliable, and of them those on
               which it is furthest ahead of the current student (arXiv 2602.02994)
    scc        Anchor-Frontier: of the reliable ones, a few that the current student can do and many
               that it cannot (arXiv 2609.40055)
    variance   Temporal-R1: keep those on which the student's own answers vary (arXiv 2506.01908)
    random     the control: as many, drawn at random

Scores are mean tIoUs of `answers` sampled answers, by the training's own sampler and prompts, with
the annotation. They are stored under a key made of the model's weights, the decoding settings, the
data and the seed: a rerun reuses them where all of these are the same, and only there.
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
from opd.generation.sampling import Policy, decode_answers, sample, uniforms
from opd.generation.shared_video import forward_by_video
from opd.method.teacher import Teacher
from opd.models.video_lm import VideoLM
from opd.scoring.judge import is_right, named_span
from opd.scoring.metrics import best_tiou

BUCKETS = 5
CENTRE, SIGMA = 0.9, 0.2  # of the Gaussian variant, as published
SCORING_STEP = -2  # of the draws; evaluation has -1, training 0 and above


@dataclass(frozen=True)
class Score:
    """What is known of an example: mean tIoUs, None where it was not asked for, has no true span or
    the video does not decode, the standard deviation of the student's, and the share of its answers
    that choose the right option."""

    id: str
    teacher_tiou: float | None = None
    student_tiou: float | None = None
    student_std: float | None = None
    student_right: float | None = None

    def varies(self, min_std: float) -> bool:
        """Whether the student's answers do: in tIoU, or neither always right nor always wrong."""
        return (self.student_std or 0.0) > min_std or 0 < (self.student_right or 0.0) < 1


def select(scores: Sequence[Score], count: int, config: CurriculumConfig, seed: int) -> list[int]:
    """The places of at most `count` chosen scores, in the order in which they were chosen.

    Ties go to the earlier place; an example without the scores that a rule needs is never chosen by
    it. Drawing depends on `seed` alone. Raises DataError, with the numbers, where nothing is left.
    """
    source = np.random.default_rng(seed)
    places, rule = list(range(len(scores))), config.select
    told = "the pool is empty"
    if config.kind == "variance":
        places = [i for i in places if scores[i].varies(config.min_std)]
        told = f"the student's tIoU varies by more than {config.min_std} on none of {len(scores)}"
        rule = "random"
    elif config.kind in ("tvdf", "scc"):
        both = [i for i in places if None not in (scores[i].teacher_tiou, scores[i].student_tiou)]
        places = both
        if config.kind == "scc" or rule != "disagreement":
            places = [i for i in both if _teacher(scores[i]) >= config.threshold]
        best = max((_teacher(scores[i]) for i in both), default=0.0)
        told = (
            f"the teacher's tIoU reaches {config.threshold} on none of {len(scores)} examples "
            f"(at most {best:.3f}, {len(scores) - len(both)} without a score)"
        )
    else:
        rule = "random"
    if not places:
        raise DataError(f"curriculum.kind={config.kind}: {told}")
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
        chosen = _from_buckets(ranked, count, source)
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
    """`anchors` of `count` among those that the student answers well, the rest among those that it
    does not; a kind of which there are too few is all taken, and not made up for."""
    wanted = round(config.anchors * count)
    chosen: list[int] = []
    for number, fits in (
        (wanted, lambda tiou: tiou >= config.threshold),
        (count - wanted, lambda tiou: tiou < config.frontier_below),
    ):
        found = [i for i in places if fits(scores[i].student_tiou or 0.0)]
        chosen += [found[i] for i in source.permutation(len(found))[:number]]
    if not chosen:
        raise DataError(
            f"curriculum.kind=scc: of {len(places)} reliable examples the student's tIoU reaches "
            f"{config.threshold} or stays below {config.frontier_below} on none"
        )
    return chosen


def _teacher(score: Score) -> float:
    assert score.teacher_tiou is not None
    return score.teacher_tiou


def _from_buckets(ranked: list[int], count: int, source: np.random.Generator) -> list[int]:
    """The same number at random from each fifth of the ranking; what a fifth cannot give comes from
    the best that are left."""
    fifths = [part.tolist() for part in np.array_split(ranked, BUCKETS)]
    chosen: list[int] = []
    for number, part in enumerate(fifths):
        wanted = (number + 1) * count // BUCKETS - number * count // BUCKETS
        chosen += [part[i] for i in source.permutation(len(part))[:wanted]]
    left = [i for i in ranked if i not in set(chosen)]
    return chosen + left[: count - len(chosen)]


def weights_digest(lm: VideoLM) -> str:
    """Of every parameter's bytes; of a sharded model, of all ranks' parts."""
    digest = hashlib.blake2b(digest_size=16)
    weights = lm.model.state_dict()
    if lm.sharded:
        weights = {name: p.ds_tensor for name, p in lm.model.named_parameters()}
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = digest.hexdigest()
    return "".join(distributed.all_gather(found)) if lm.sharded else found


def score_answers(
    lm: VideoLM,
    prompts: Prompts,
    policy: Policy,
    config: Config,
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """`tious` and `rights` of `curriculum.answers` sampled answers to each example that decodes,
    empty where it has no true span or no options: from the file that the same question left in
    `folder`, or asked and stored there."""
    data = [
        (e.id, str(e.video), e.query, e.spans, e.question, e.options, e.answer, e.duration_s)
        for e in prompts.examples
    ]
    settings = asdict(config.data)
    names = ("fps", "max_frames", "video_tokens", "backend", "reading")
    asked = {name: settings[name] for name in names} | {"prompt": vars(config.template)}
    number = config.curriculum.answers
    sampling = [asdict(config.sample), config.seed, number, weights_digest(lm)]
    text = json.dumps([data, asked, sampling, policy.allowed_columns.tolist()], default=str)
    path = folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.jsonl"
    stored = distributed.from_first(lambda: read_rows(path) if path.is_file() else None)
    if stored is not None:
        return {row["id"]: row for row in stored}
    length = config.sample.max_completion_length

    def answer(batch: PromptBatch) -> list[dict[str, Any]]:
        draws = uniforms(config.seed, SCORING_STEP, [e.id for e in batch.examples], number, length)
        made = sample(lm, forward_by_video(lm, batch), policy, length, draws)
        texts = decode_answers(made, prompts.tokenizer)
        return [
            judge(*pair, config.strict_form) for pair in zip(batch.examples, texts, strict=True)
        ]

    rows = rows_of(prompts, config.eval.batch_size, lm, answer, progress)
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
    return {row["id"]: row for row in rows}


def judge(example: Example, answers: list[str], form: str | None = None) -> dict[str, Any]:
    """An example's answers, their tIoUs where it has a true span, and where it has options whether
    they choose the right one."""
    row: dict[str, Any] = {"id": example.id, "answers": answers, "tious": [], "rights": []}
    if example.spans:
        spans = [named_span(answer, example, form) for answer in answers]
        row["tious"] = [best_tiou(span, example.spans) for span in spans]
    if example.options:
        row["rights"] = [is_right(answer, example, form) for answer in answers]
    return row


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
    """The places in the pool that round `number` (from 0) trains on, written to
    `curriculum/round_R.jsonl` before they are used and read from there by a run that goes on."""
    settings, folder = config.curriculum, run_dir / "curriculum"
    if settings.kind == "none":
        return list(range(len(prompts)))
    path = folder / f"round_{number}.jsonl"
    rows = distributed.from_first(lambda: read_rows(path) if path.is_file() else None)
    if rows is not None:
        return [i for _, i in sorted((r["rank"], i) for i, r in enumerate(rows) if r["selected"])]
    judged: dict[str, dict[str, Any]] = {}
    answered: dict[str, dict[str, Any]] = {}
    asked = prompts, policy, config, folder / "scores", progress
    if settings.kind in ("tvdf", "scc"):
        assert teacher is not None
        judged = score_answers(teacher.lm, *asked)
        if not any(any(row["tious"]) for row in judged.values()):
            raise DataError(
                f"curriculum.kind={settings.kind}: no answer of the teacher to {len(judged)} fits"
            )
    if settings.kind in ("tvdf", "scc", "variance"):
        answered = score_answers(student, *asked)

    def of(rows: dict[str, dict[str, Any]], example: Example, name: str) -> list[float]:
        return rows.get(example.id, {}).get(name, [])

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    scores = [
        Score(
            example.id,
            mean(of(judged, example, "tious")),
            mean(tious := of(answered, example, "tious")),
            float(np.std(tious)) if tious else None,
            mean(of(answered, example, "rights")),
        )
        for example in prompts.examples
    ]
    count = max(1, round(settings.share * len(prompts)))
    chosen = select(scores, count, settings, config.seed + number)
    ranks = {place: rank for rank, place in enumerate(chosen)}
    if distributed.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(score) for score in scores]
        more = [{"selected": i in ranks, "rank": ranks.get(i)} for i in range(len(scores))]
        write_rows(path, [row | told for row, told in zip(rows, more, strict=True)])
    return chosen


def rounds(steps: int, number: int) -> list[range]:
    """The steps of each round, as even as can be."""
    edges = [round(i * steps / number) for i in range(number + 1)]
    return [range(a, b) for a, b in pairwise(edges)]

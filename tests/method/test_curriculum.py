"""Curricula: every rule against brute force, what is stored and reused, and going on mid-round."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.config.method import CurriculumConfig
from opd.config.run import load_config
from opd.errors import ConfigError, DataError, Stopped
from opd.files import read_rows
from opd.method import curriculum
from opd.method.curriculum import Score, rounds, select
from tests.helpers import metric_rows, run, slow_after


def pool(size: int = 200, seed: int = 0) -> list[Score]:
    """Scores on a coarse grid, so that many tie, a tenth of them missing."""
    source = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        teacher, student = (round(float(x), 1) for x in source.random(2))
        missing = source.random() < 0.1
        std = None if missing else round(float(source.random()) / 2, 1)
        rows.append(Score(str(i), teacher, None if missing else student, std))
    return rows


def tvdf(**settings: Any) -> CurriculumConfig:
    return CurriculumConfig(kind="tvdf", **settings)


def known(scores: list[Score]) -> list[int]:
    return [i for i, s in enumerate(scores) if s.student_tiou is not None]


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_topk_is_the_best_by_brute_force(count, threshold):
    scores = pool()
    reliable = [i for i in known(scores) if scores[i].teacher_tiou >= threshold]
    chosen = select(scores, count, tvdf(threshold=threshold), 0)
    left = list(reliable)
    for place in chosen:  # one by one, the furthest ahead, the earliest of equals
        best = max(left, key=lambda i: (scores[i].teacher_tiou - scores[i].student_tiou, -i))
        assert place == best
        left.remove(best)
    assert len(chosen) == min(count, len(reliable))


def test_a_hand_computed_pool():
    scores = [
        Score("a", 0.7, 0.6),  # reliable at the threshold, 0.1 ahead
        Score("b", 0.6, 0.0),  # furthest ahead, not reliable
        Score("c", 0.75, 0.25),  # reliable, 0.5 ahead
        Score("d", 0.8, None),  # the student was not asked
        Score("e", 1.0, 0.5),  # as far ahead as c, later
        Score("f", None, 0.1),
    ]
    assert select(scores, 2, tvdf(), 0) == [2, 4]
    assert select(scores, 3, tvdf(), 0) == [2, 4, 0]
    assert select(scores, 9, tvdf(), 0) == [2, 4, 0]
    assert select(scores, 1, tvdf(select="disagreement"), 0) == [1]
    assert sorted(select(scores, 9, tvdf(select="reliability"), 0)) == [0, 2, 4]
    assert sorted(select(scores, 9, CurriculumConfig(kind="random"), 0)) == list(range(6))


def test_disagreement_ignores_reliability():
    scores = pool()
    everything = select(scores, 30, tvdf(threshold=0.0), 0)
    assert select(scores, 30, tvdf(select="disagreement", threshold=0.99), 0) == everything


def test_uniform_takes_every_rank_alike():
    scores = [Score(str(i), 1.0, i / 100) for i in range(100)]
    chosen = select(scores, 10, tvdf(select="uniform"), 0)
    assert chosen == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert select(scores, 100, tvdf(select="uniform"), 0) == list(range(100))


@pytest.mark.parametrize("count", [1, 4, 5, 23, 50])
def test_buckets_give_the_same_number_each(count):
    scores = [Score(str(i), 1.0, i / 100) for i in range(50)]
    chosen = select(scores, count, tvdf(select="buckets"), 3)
    assert len(chosen) == len(set(chosen)) == count
    sizes = Counter(place // 10 for place in chosen)
    assert max(sizes.values()) - min(sizes.get(k, 0) for k in range(5)) <= 1


def test_buckets_divide_the_range_of_the_gaps():
    # Gaps of 0 to 1: 40 near 0, 3 in each other fifth. Of 10, each fifth gives two.
    gaps = [
        *np.linspace(0, 0.19, 40),
        *(0.2 * k + 0.05 * j + 0.02 for k in range(1, 5) for j in range(3)),
    ]
    gaps[-1] = 1.0
    scores = [Score(str(i), 1.0, 1.0 - gap) for i, gap in enumerate(gaps)]
    chosen = select(scores, 10, tvdf(select="buckets"), 0)
    assert Counter(min(4, int(gaps[i] * 5)) for i in chosen) == {k: 2 for k in range(5)}
    # Of 20, the four small fifths give all of theirs, and the best of what is left fill up.
    chosen = select(scores, 20, tvdf(select="buckets"), 0)
    assert Counter(min(4, int(gaps[i] * 5)) for i in chosen) == {0: 8, 1: 3, 2: 3, 3: 3, 4: 3}


def test_gaussian_draws_in_proportion_to_its_density():
    # Gaps of 0.9 and 0.5: e^0 against e^-2, so the first comes first in 88% of the draws.
    scores = [Score("near", 1.0, 0.1), Score("far", 1.0, 0.5)]
    first = [select(scores, 1, tvdf(select="gaussian"), seed)[0] for seed in range(2000)]
    assert first.count(0) / 2000 == pytest.approx(1 / (1 + np.exp(-2)), abs=0.03)


@pytest.mark.parametrize("rule", ["random", "reliability", "buckets", "gaussian", "variance"])
def test_what_is_drawn_follows_from_the_seed(rule):
    scores = pool()
    kind = rule if rule in ("random", "variance") else "tvdf"
    chosen = "topk" if rule in ("random", "variance") else rule
    config = CurriculumConfig(kind=kind, select=chosen, threshold=0.3)
    draws = [tuple(select(scores, 20, config, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 20 for draw in draws)


def test_variance_keeps_those_that_vary():
    scores = pool()
    config = CurriculumConfig(kind="variance", min_std=0.2)
    chosen = select(scores, 1000, config, 0)
    assert sorted(chosen) == [i for i, s in enumerate(scores) if (s.student_std or 0) > 0.2]


@pytest.mark.parametrize("count", [10, 40, 1000])
@pytest.mark.parametrize("anchors", [0.0, 0.1, 0.5, 1.0])
def test_scc_takes_anchors_and_frontiers(anchors, count):
    scores = pool(400)
    config = CurriculumConfig(kind="scc", threshold=0.6, anchors=anchors, frontier_below=0.3)
    kinds: dict[str, set[int]] = {"anchor": set(), "frontier": set()}
    for i in known(scores):
        if scores[i].teacher_tiou >= 0.6 and scores[i].student_tiou >= 0.6:
            kinds["anchor"].add(i)
        elif scores[i].teacher_tiou >= 0.6 and scores[i].student_tiou < 0.3:
            kinds["frontier"].add(i)
    chosen = select(scores, count, config, 0)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= kinds["anchor"] | kinds["frontier"]
    wanted = round(anchors * count)
    for kind, number in (("anchor", wanted), ("frontier", count - wanted)):
        assert len(kinds[kind] & set(chosen)) == min(number, len(kinds[kind])), kind
    assert select(scores, count, config, 0) == chosen
    if 0 < anchors < 1 and count < 1000:
        assert select(scores, count, config, 1) != chosen


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CurriculumConfig(kind="scc", threshold=0.5, frontier_below=0.05),
            "curriculum.kind=scc: of 1 reliable examples the student's tIoU reaches 0.5 or stays "
            "below 0.05 on none",
        ),
        (
            tvdf(threshold=0.95),
            "curriculum.kind=tvdf: the teacher's tIoU reaches 0.95 on none of 2 examples "
            "(at most 0.500, 1 without a score)",
        ),
        (
            CurriculumConfig(kind="variance"),
            "curriculum.kind=variance: the student's tIoU varies by more than 0.1 on none of 2",
        ),
    ],
)
def test_an_empty_choice_is_one_line_with_the_numbers(config, message):
    scores = [Score("a", 0.5, 0.1, 0.05), Score("b", 0.9, None, None)]
    with pytest.raises(DataError) as error:
        select(scores, 1, config, 0)
    assert str(error.value) == message


@pytest.mark.parametrize(("steps", "number"), [(450, 3), (7, 3), (3, 3), (5, 1)])
def test_rounds_share_the_steps(steps, number):
    parts = rounds(steps, number)
    assert [i for part in parts for i in part] == list(range(steps))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_mistakes_in_the_configuration():
    with pytest.raises(ConfigError, match=r"^curriculum.kind=tvdf: needs a teacher, which"):
        load_config(["method=grpo", "num_rollouts=2", "curriculum.kind=tvdf"])
    with pytest.raises(ConfigError, match=r"^curriculum.rounds=9: more than steps=4$"):
        load_config(["curriculum.rounds=9", "steps=4"])


# Whole runs.

SHORT = [
    "steps=4",
    "batch_size=2",
    "optim.lr=5e-3",
    "data.limit_train=12",
    "data.limit_eval=2",
    "eval.draws=0",
    "eval.teacher=false",
    "curriculum.kind=tvdf",
    "curriculum.rounds=2",
    "curriculum.threshold=0.1",
    "curriculum.share=0.5",
    "curriculum.answers=2",
]


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(videos, folder, *SHORT)
    return folder


@pytest.mark.slow
def test_a_run_trains_on_what_it_chose(whole):
    first, second = (read_rows(whole / f"curriculum/round_{i}.jsonl") for i in (0, 1))
    assert len(first) == len(second) == 12
    assert [row["teacher_tiou"] for row in first] == [row["teacher_tiou"] for row in second]
    assert [row["student_tiou"] for row in first] != [row["student_tiou"] for row in second]
    for rows in (first, second):
        scores = [Score(r["id"], r["teacher_tiou"], r["student_tiou"]) for r in rows]
        wanted = select(scores, 6, tvdf(threshold=0.1), 0)
        assert [r["selected"] for r in rows] == [i in wanted for i in range(12)]
        assert [rows[i]["rank"] for i in wanted] == list(range(len(wanted)))
    chosen = [{r["id"] for r in rows if r["selected"]} for rows in (first, second)]
    samples = metric_rows(whole, "samples.jsonl")
    for step, sample in enumerate(samples):
        assert sample["id"] in chosen[step // 2]


def test_its_cost_is_on_the_ledger(whole):
    import json

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["device_hours"]["curriculum"] > 0
    assert summary["student_prompt_forwards_per_step"] == 1.0


@pytest.mark.slow
def test_the_teacher_is_asked_once_and_a_rerun_asks_nobody(whole, videos, monkeypatch):
    scores = sorted((whole / "curriculum/scores").iterdir())
    assert len(scores) == 3  # the teacher, and the student before each round
    before = {path.name: path.read_bytes() for path in (whole / "curriculum").rglob("*.jsonl")}
    rows = metric_rows(whole)

    def asked(*_: Any) -> Any:
        raise AssertionError("scored again")

    monkeypatch.setattr(curriculum, "sample", asked)
    run(videos, whole, *SHORT, "overwrite=true")
    assert metric_rows(whole) == rows
    assert before == {p.name: p.read_bytes() for p in (whole / "curriculum").rglob("*.jsonl")}
    for change in (
        "seed=1",
        "sample.temperature=0.9",
        "curriculum.answers=3",
        "data.fps=3",
        "data.reading=strict",
    ):
        with pytest.raises(AssertionError, match="scored again"):
            run(videos, whole, *SHORT, "overwrite=true", change)
    run(videos, whole, *SHORT, "overwrite=true")  # other tests read it


OTHERS = {
    "scc": ["curriculum.kind=scc", "curriculum.frontier_below=0.9"],
    "variance": ["curriculum.kind=variance", "curriculum.min_std=0.01", "optim.lr=1e-4"],
    "random": ["curriculum.kind=random"],
}


@pytest.mark.parametrize(
    ("kind", "after"), slow_after(1, [*[("tvdf", i) for i in (2, 1, 3)], *[(k, 3) for k in OTHERS]])
)
def test_a_stopped_run_goes_on_in_the_same_order(kind, after, whole, videos, tmp_path, monkeypatch):
    from opd.method.trainer import Trainer

    keys = [*SHORT, *OTHERS.get(kind, [])]
    if kind != "tvdf":
        whole = tmp_path / "whole"
        run(videos, whole, *keys)

    original, calls = Trainer.step, [0]

    def step(self: Trainer, *arguments: Any) -> Any:
        calls[0] += 1
        row = original(self, *arguments)
        if calls[0] == after:
            monkeypatch.setattr("opd.record.interrupts.Interrupts.check", stop)
        return row

    def stop(self: Any) -> None:
        raise Stopped("stopped", 130)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Stopped):
        run(videos, tmp_path / "run", *keys)
    monkeypatch.undo()
    run(videos, tmp_path / "run", *keys, "resume=auto")
    assert metric_rows(tmp_path / "run") == metric_rows(whole)
    for name in ("round_0.jsonl", "round_1.jsonl"):
        path = f"curriculum/{name}"
        assert (tmp_path / "run" / path).read_bytes() == (whole / path).read_bytes()


def test_a_digest_is_of_the_weights():
    from tests.helpers import ours

    lm = ours("student", layers=1)
    first = curriculum.weights_digest(lm)
    assert curriculum.weights_digest(ours("student", layers=1)) == first
    with torch.no_grad():
        next(iter(lm.model.parameters())).view(-1)[0] += 1e-9
    assert curriculum.weights_digest(lm) != first

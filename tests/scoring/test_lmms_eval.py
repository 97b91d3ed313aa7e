"""The same answers get the same scores from lmms-eval's scorers, except where docs/evaluation.md
names a difference. Skipped where the package, or loguru, which its scorers import, is missing."""

import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd.config.run import Config
from opd.data.examples import Example
from opd.scoring.evaluation import EvaluationRow
from opd.scoring.official import score
from opd.text.forms import FORMS, Span, format_span

# Its scorers of these tasks need nothing else of the package at work; the rest would be heavy.
UNUSED = "lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils"
UNUSED += ("lmms_eval.tasks._task_utils.file_utils",)
METRICS = {"miou": "mIOU", "recall@0.3": "IOU@3", "recall@0.5": "IOU@5", "recall@0.7": "IOU@7"}
Scores = dict[str, float]
Scorer = Callable[[Sequence[str], Sequence[Span]], Scores]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import the scorers of a task, without the package around them."""
    pytest.importorskip("loguru", reason="lmms-eval's scorers import loguru")
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lmms-eval is not installed")
    folder = Path(spec.origin).parent / "tasks"
    for name in UNUSED:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def load(name: str) -> Any:
        path = folder / name / "utils.py"
        if not path.is_file():
            pytest.skip(f"this lmms-eval has no task {name}")
        spec = importlib.util.spec_from_file_location(f"lmms_eval_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def ours(answers: Sequence[str], truth: Sequence[Span]) -> Scores:
    rows = []
    for k, (answer, span) in enumerate(zip(answers, truth, strict=True)):
        given = {"id": str(k), "video": Path(f"{k}.mp4"), "query": "q", "spans": (span,)}
        rows.append(EvaluationRow.of(Example(**given, duration_s=100.0), answer, [], Config()))
    return {name: value for name, value in score(rows, "grounding").items() if name in METRICS}


def theirs(task: Callable[[str], Any], name: str) -> Scorer:
    """The scores of a task for answers with one true span each, as shares."""
    module = task(name)

    def timelens(answers: Sequence[str], truth: Sequence[Span]) -> Scores:
        docs = [
            {"video_path": f"{k}", "query": "q", "span": [list(t)]} for k, t in enumerate(truth)
        ]
        pairs = zip(docs, answers, strict=True)
        results = [module.timelens_process_results(d, [a])["timelens_mIOU"] for d, a in pairs]
        scores = module._timelens_compute_metrics(results)
        return {ours: scores[theirs] / 100 for ours, theirs in METRICS.items()}

    def charades_sta(answers: Sequence[str], truth: Sequence[Span]) -> Scores:
        docs = [
            {"video": f"{k}", "caption": "q", "timestamp": list(t)} for k, t in enumerate(truth)
        ]
        process = module.temporal_grounding_process_results_generation
        pairs = zip(docs, answers, strict=True)
        results = [process(doc, [answer])["charades_sta_mIOU"] for doc, answer in pairs]
        scores = module._temporal_grounding_compute_metrics(results)
        return {ours: scores[theirs] / 100 for ours, theirs in METRICS.items()}

    def extremewhenbench(answers: Sequence[str], truth: Sequence[Span]) -> Scores:
        known = dict.fromkeys(("qid", "video_id", "source_corpus"), "x")
        docs = [known | {"correct_interval": list(span)} for span in truth]
        pairs = zip(docs, answers, strict=True)
        records = [module.ewb_process_results(doc, [a])["ewb_mIoU"] for doc, a in pairs]
        recalls = {f"recall@{t}": module._recall_at(records, t) for t in (0.3, 0.5, 0.7)}
        return {"miou": module.ewb_aggregate_miou(records), **recalls}

    return {f.__name__: f for f in (timelens, charades_sta, extremewhenbench)}[name]


LISTS = {"clock", "windows", "time_tag", "json", "answer_json"}
UNREAD = {  # forms that a task does not read, or reads as something else
    "timelens": set(),
    "charades_sta": LISTS,
    "extremewhenbench": LISTS,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNREAD)
def test_scores_of_answers_in_a_form(name, form, task):
    scorer, chance = theirs(task, name), random.Random(form)
    answers, truth = [], []
    for _ in range(200):
        start = chance.uniform(0, 80)
        truth.append((round(start, 1), round(start + chance.uniform(0.5, 40), 1)))
        start = max(0.0, start + chance.gauss(0, 5))
        answers.append(format_span(start, start + chance.uniform(0.5, 40), form))
    answers[::20] = ["I cannot tell."] * 10
    # Exactly at a threshold, with one that both score alike to the last bit.
    answers += [format_span(0, end, form) for end in (3, 5, 7)]
    truth += [(0.0, 10.0)] * 3
    actual, expected = ours(answers, truth), scorer(answers, truth)
    if form in UNREAD[name]:
        assert expected["miou"] < actual["miou"] - 0.05
    else:
        assert actual == pytest.approx(expected, abs=1e-12)


TRUTH = (3.0, 9.5)
DIFFERENCES = {  # of answers whose true span is TRUTH: our tIoU, and that of each task
    "9.5 - 3.0 seconds": (0, {"timelens": 0, "charades_sta": 1, "extremewhenbench": 1}),
    "Dog 3 barks at 9.5 men": (0, {"timelens": 1, "charades_sta": 0, "extremewhenbench": 0}),
    "Dogs 3 - 9.5 bark": (0, {"timelens": 1, "charades_sta": 1, "extremewhenbench": 1}),
    "<think>0 - 1 s?</think> From 3 to 9.5 s": (
        1,
        {"timelens": 0, "charades_sta": 0, "extremewhenbench": 1},
    ),
    "0 - 1 s and 3.0 - 9.5 s": (0, {"timelens": 0, "charades_sta": 0, "extremewhenbench": 1}),
    "It starts at 3 and ends at 9.5": (
        1,
        {"timelens": 1, "charades_sta": 0, "extremewhenbench": 0},
    ),
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("answer", DIFFERENCES)
def test_the_differences_that_the_page_names(answer, name, task):
    tiou, of_tasks = DIFFERENCES[answer]
    assert ours([answer], [TRUTH])["miou"] == pytest.approx(tiou)
    assert theirs(task, name)([answer], [TRUTH])["miou"] == pytest.approx(of_tasks[name])

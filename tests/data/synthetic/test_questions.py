"""VideoQA and grounded QA: questions with one right answer, their prompts and their scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd.config.data import DataConfig
from opd.config.method import CurriculumConfig, RewardConfig
from opd.config.run import load_config
from opd.data.annotations.formats import read_examples
from opd.data.examples import Example
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.data.synthetic import questions
from opd.data.synthetic.clips import Clip
from opd.data.synthetic.splits import draw_clip, ensure_split
from opd.files import read_rows
from opd.method.curriculum import Score, select
from opd.models import tiny
from opd.models.load import prepare
from opd.scoring import metrics
from opd.scoring.judge import is_right, readable, reward
from tests.helpers import run

CLIPS = [draw_clip("mixed", i) for i in range(600)]


def answers(clip: Clip, text: str, options: tuple[str, ...]) -> list[str]:
    """The options that are true, from the shapes alone."""
    if text == "what appears first":
        starts = {f"{s.colour} {s.kind}": s.start_s for s in clip.shapes}
        return [min(options, key=lambda o: starts[o])]
    named = text.split()[-1]
    right = {s.colour for s in clip.shapes if s.kind == named}
    right |= {s.kind for s in clip.shapes if s.colour == named}
    return [option for option in options if option in right]


def ask(clip: Clip, wrong: float = 0.0, seed: int = 0) -> Example:
    example = Example(id=clip.id, video=Path("v"), query="q", spans=(clip.truth,), duration_s=12.0)
    return questions.mixed(clip, example, np.random.default_rng(seed), wrong, lambda _, s: s)


def test_every_question_has_one_right_answer():
    kinds = set()
    for clip in CLIPS:
        for question in questions.questions(clip):
            kinds.add(question.kind)
            options = (question.answer, *question.others)
            assert len(set(options)) == len(options)
            assert answers(clip, question.text, options) == [question.answer], (clip, question)
    assert kinds == {"colour", "shape", "first"}


def test_three_tasks_of_which_a_share_is_answered_wrongly():
    examples = [ask(clip, wrong=0.3, seed=i) for i, clip in enumerate(CLIPS)]
    tasks = [(bool(e.options), bool(e.spans)) for e in examples]
    for task in ((False, True), (True, False), (True, True)):
        assert 0.25 < tasks.count(task) / 600 < 0.42, task
    pairs = [(clip, e) for clip, e in zip(CLIPS, examples, strict=True) if e.options]
    right = [answers(clip, e.query, e.options) == [e.answer] for clip, e in pairs]
    assert 0.62 < np.mean(right) < 0.78
    shown = {(s.start_s, s.end_s) for clip in CLIPS for s in clip.shapes}
    assert all(span in shown for e in examples for span in e.spans)
    places = [e.options.index(e.answer) for _, e in pairs if len(e.options) == 4]
    assert min(np.bincount(places)) > 0.15 * len(places), "the right option has no favourite place"
    assert ask(CLIPS[3], 0.3, 5) == ask(CLIPS[3], 0.3, 5)


def test_what_is_written_is_read_back(tmp_path):
    path = ensure_split(tmp_path, "mixed_eval", 24)
    examples = read_examples(path, "timerft", tmp_path)
    assert len(examples) == 24
    for example in examples:
        assert example.options or example.spans
        if example.options:
            clip = draw_clip("mixed_eval", int(example.id.rpartition("-")[2]))
            assert answers(clip, example.query, example.options) == [example.answer]
            assert example.question == example.query
    with pytest.raises(ValueError, match="is not among the options"):
        Example(id="x", video=path, query="q", spans=(), duration_s=1.0, options=("a", "b"))
    record = json.loads(path.read_text())[0] | {"answer": "a", "options": ["a", 3]}
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([record]))
    left_out: list[str] = []
    read_examples(bad, "timerft", tmp_path, left_out)
    assert left_out == [f"{bad}:0: invalid \"options\": ['a', 3]"]


def test_each_task_is_asked_and_answered_in_its_own_form(tmp_path):
    lm, processor = prepare(tiny.build("student", 0)), tiny.processor()
    examples = load_examples("synthetic:mixed_eval", DataConfig(video_root=str(tmp_path)), 24)
    prompts = Prompts(examples, DataConfig(), processor, lm)
    seen = set()
    for index, example in enumerate(examples):
        prompt = prompts[index]
        text = processor.tokenizer.decode(prompt.input_ids).split("<|vision_start|>")[0]
        question = text.removeprefix("<|im_start|>user\n").removesuffix("<0.1 seconds>")
        answer = processor.tokenizer.decode(prompt.completion_ids).removesuffix("<|im_end|>")
        start, end = example.spans[0] if example.spans else (0.0, 0.0)
        time = f"From {start:.1f} to {end:.1f} seconds."
        if not example.options:
            expected = (f"{example.query}. When?", time)
        elif not example.spans:
            expected = (f"{example.query}: {', '.join(example.options)}?", f"{example.answer}.")
        else:
            words = f"{example.query}: {', '.join(example.options)}? When?"
            expected = (words, f"{example.answer}. {time}")
        assert (question, answer) == expected
        assert readable(answer, example) and (not example.options or is_right(answer, example))
        seen.add((bool(example.options), bool(example.spans)))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "options", "spans", "expected", "clear"),
    [
        ("red. From 2.0 to 6.0 seconds.", True, True, 1.0 + 2.0, True),
        ("blue. From 2.0 to 6.0 seconds.", True, True, 1.0, True),
        ("red. From 7.0 to 8.0 seconds.", True, True, 2.0, True),
        ("red.", True, True, 2.0, False),
        ("From 2.0 to 4.0 seconds.", True, True, 0.5, False),
        ("red.", True, False, 2.0, True),
        ("green.", True, False, 0.0, True),
        ("red or blue.", True, False, 0.0, False),
        ("From 2.0 to 4.0 seconds.", False, True, 0.5, True),
        ("red.", False, True, 0.0, False),
    ],
)
def test_the_dual_reward(answer, options, spans, expected, clear):
    example = Example(
        id="x",
        video=Path("v"),
        query="q",
        question="q" if options else None,
        options=("blue", "red", "green") if options else None,
        answer="red" if options else None,
        spans=((2.0, 6.0),) if spans else (),
        duration_s=10.0,
    )
    assert reward(answer, example, RewardConfig(tiou=1.0, choice=2.0)) == pytest.approx(expected)
    assert readable(answer, example) == clear


def test_choices_by_hand():
    assert metrics.best_iop((2.0, 4.0), [(3.0, 9.0)]) == 0.5
    assert metrics.best_iop((2.0, 4.0), [(5.0, 9.0), (0.0, 3.5)]) == 0.75
    assert metrics.best_iop((2.0, 4.0), [(5.0, 9.0)]) == 0.0
    assert metrics.best_iop(None, [(5.0, 9.0)]) == 0.0
    summary = metrics.summarize_choices(
        [True, False, True, True], [[True, False], [], [False], [True]], [0.5, 1.0, 0.49, None]
    )
    assert summary == {"accuracy": 0.75, "sampled_accuracy": 0.5, "acc@gqa": 1 / 3}
    nothing = metrics.summarize_choices([False], [[]], [None])
    assert nothing == {"accuracy": 0.0, "sampled_accuracy": None, "acc@gqa": None}
    with pytest.raises(ValueError, match="no questions"):
        metrics.summarize_choices([], [], [])


def test_variance_keeps_what_is_neither_always_right_nor_always_wrong():
    scores = [
        Score("always", student_right=1.0),
        Score("never", student_right=0.0),
        Score("sometimes", student_right=0.25),
        Score("moves", student_std=0.2, student_right=1.0),
        Score("stays", student_std=0.05, student_right=0.0),
        Score("unknown"),
    ]
    chosen = select(scores, 9, CurriculumConfig(kind="variance", min_std=0.1), 0)
    assert sorted(chosen) == [2, 3]


@pytest.mark.parametrize(
    ("keys", "needs"),
    [
        (["method=sft"], ("spans", "answer")),
        (["method=grpo", "num_rollouts=2"], ("spans",)),
        (["method=grpo", "num_rollouts=2", "reward.choice=1"], ("spans", "options")),
        (["method=grpo", "num_rollouts=2", "reward.choice=1", "reward.tiou=0"], ("options",)),
        (["curriculum.kind=variance"], ("spans", "options")),
        (["curriculum.kind=scc"], ("spans",)),
        ([], ()),
    ],
)
def test_what_a_training_example_must_have(keys, needs):
    assert load_config(keys).needs == needs


def whole(videos: Path, run_dir: Path, *keys: str) -> dict[str, Any]:
    common = ["steps=2", "batch_size=4", "data.train=synthetic:mixed", "data.limit_train=24"]
    more = ["data.eval=synthetic:mixed_eval", "data.limit_eval=24", "eval.draws=2"]
    return run(videos, run_dir, *common, *more, "sample.max_completion_length=24", *keys)


@pytest.fixture(scope="module")
def mixed_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few clips of the mixed splits, in place of all."""
    root = tmp_path_factory.mktemp("mixed")
    for name, full in (("mixed", 1024), ("mixed_eval", 512)):
        ensure_split(root, name, 24).rename(root / f"{name}-{full}.json")
    return root


@pytest.mark.slow
def test_all_tasks_mix_in_one_run(mixed_videos, tmp_path):
    keys = ["method=grpo", "num_rollouts=3", "reward.choice=1", "curriculum.kind=variance"]
    summary = whole(mixed_videos, tmp_path / "grpo", *keys, "curriculum.min_std=0.01")
    rows = read_rows(tmp_path / "grpo" / "eval_after.jsonl")
    kinds = {("right" in row, "tiou" in row) for row in rows}
    assert kinds == {(True, False), (False, True), (True, True)} and len(rows) == 24
    right = [row["right"] for row in rows if "right" in row]
    assert summary["after"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert summary["after"]["queries"] == 24 and summary["after"]["miou"] is not None
    assert summary["after"]["parse_failures"] == sum(not row["readable"] for row in rows)
    chosen = read_rows(tmp_path / "grpo" / "curriculum" / "round_0.jsonl")
    assert any(row["student_right"] is not None for row in chosen)
    assert any(row["student_std"] is not None for row in chosen)


@pytest.mark.slow
def test_a_run_without_any_time_to_tell(mixed_videos, tmp_path):
    keys = ["method=grpo", "num_rollouts=2", "reward.choice=1", "reward.tiou=0"]
    summary = whole(mixed_videos, tmp_path / "qa", *keys)
    assert summary["left_out"]["train"] > 0, "grounding has no options"
    summary = whole(mixed_videos, tmp_path / "opd", "eval.teacher=false")
    assert summary["left_out"]["train"] == 0 and summary["after"]["accuracy"] is not None

"""The embedded task: clips as described, imperfect annotations where stated, truth on file."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd.data.annotations.formats import read_examples
from opd.data.synthetic import splits
from opd.data.synthetic.clips import COLOURS, FPS, SIZE, Clip, render
from opd.data.synthetic.splits import NOVEL_SHAPES, SPLITS, asked_about, draw_clip, ensure_split
from opd.errors import DataError
from opd.scoring.metrics import tiou

POOL = [draw_clip("train", i) for i in range(1024)]
HELD_OUT = [draw_clip("eval", i) for i in range(512)]


def test_a_clip_is_a_function_of_split_and_index() -> None:
    assert draw_clip("train", 17) == POOL[17]
    assert draw_clip("train", 17).shapes != draw_clip("eval", 17).shapes
    assert len({clip.shapes for clip in POOL + HELD_OUT}) == len(POOL) + len(HELD_OUT)


def test_clips_are_as_the_task_says() -> None:
    for clip in POOL + HELD_OUT:
        target, *others = clip.shapes
        assert 1 <= len(others) <= 4
        alike = [s for s in others if s.colour == target.colour or s.kind == target.kind]
        assert len(alike) >= 1, "a distractor shares the target's colour or kind"
        assert len({(s.colour, s.kind) for s in clip.shapes}) == len(clip.shapes)
        assert f"{target.colour} {target.kind}" in clip.query
        start, end = clip.truth
        assert 1.5 <= round(end - start, 6) <= 6.0 and start >= 0 and end <= clip.duration_s
        assert round(start * 10, 6) % 1 == 0
        if clip.difficulty == 3:
            assert any(
                s.colour == target.colour and min(s.end_s, end) - max(s.start_s, start) >= 1.0
                for s in others
            )
        assert len(clip.bars) == (2 if clip.difficulty >= 2 else 0)
    counts = Counter(clip.difficulty for clip in POOL)
    assert all(count > 250 for count in counts.values()) and set(counts) == {1, 2, 3}


def test_the_pools_annotations_are_imperfect_by_the_stated_amounts() -> None:
    overlaps = np.array([tiou(clip.annotation, clip.truth) for clip in POOL])
    far = np.array([max(abs(np.subtract(c.annotation, c.truth))) > 2.0 for c in POOL])
    wrong = (overlaps < 0.3) & far
    assert 0.16 < wrong.mean() < 0.24
    errors = np.concatenate(
        [np.subtract(c.annotation, c.truth) for c in np.array(POOL, object)[~far]]
    )
    assert 0.42 < errors.std() < 0.55
    assert all(clip.annotation == clip.truth for clip in HELD_OUT)


def test_shapes_that_the_teacher_never_saw() -> None:
    novel = [any(s.kind in NOVEL_SHAPES for s in clip.shapes) for clip in POOL]
    assert 0.15 < np.mean(novel) < 0.25
    for name in ("teacher", "student", "eval"):
        kinds = {s.kind for i in range(300) for s in draw_clip(name, i).shapes}
        assert kinds == set(splits.SHAPES)


@pytest.mark.parametrize("index", range(6))
def test_what_is_drawn_is_what_the_truth_says(index: int) -> None:
    clip = draw_clip("eval", index)
    frames = render(clip).astype(int)
    without = render(replace(clip, shapes=clip.shapes[1:])).astype(int)
    visible = (frames != without).any(axis=(1, 2, 3))
    times = np.flatnonzero(visible) / FPS
    assert times[0] == pytest.approx(clip.truth[0])
    assert times[-1] + 1 / FPS == pytest.approx(clip.truth[1])


def test_the_bars_do_not_point_at_the_target() -> None:
    def hidden(clip: Clip, position: int) -> float:
        center, radius = clip.shapes[position].center[1], clip.shapes[position].radius
        columns = np.abs(np.arange(SIZE) - center) <= radius
        bars = np.zeros(SIZE, bool)
        for left, right in clip.bars:
            bars[left:right] = True
        return (columns & bars).sum() / columns.sum()

    clips = [clip for clip in POOL + HELD_OUT if clip.bars]
    target = [hidden(clip, 0) for clip in clips]
    others = [np.mean([hidden(c, i) for i in range(1, len(c.shapes))]) for c in clips]
    assert np.mean(target) > 0.2
    assert abs(np.mean(target) - np.mean(others)) < 0.01


def test_a_clip_asked_about_each_of_its_shapes(tmp_path: Path) -> None:
    path = ensure_split(tmp_path, "student", 5)
    examples = read_examples(path, "timerft", tmp_path)
    clips = [draw_clip("student", i) for i in range(5)]
    queried = [asked_about(c, i, SPLITS["student"]) for c in clips for i in range(len(c.shapes))]
    assert [e.id for e in examples] == [clip.id for clip in queried]
    assert len({e.id for e in examples}) == len(examples) > 5
    assert {e.video.name for e in examples} == {f"{clip.id}.mp4" for clip in clips}
    assert [e.spans[0] for e in examples] == [clip.annotation for clip in queried]
    for clip, shape in zip(queried, (s for c in clips for s in c.shapes), strict=True):
        assert f"{shape.colour} {shape.kind}" in clip.query
        assert clip.truth == (shape.start_s, shape.end_s)


@pytest.mark.parametrize("name", ["names", "words"])
def test_questions_in_words(name: str, tmp_path: Path) -> None:
    examples = read_examples(ensure_split(tmp_path, name, 40), "timerft", tmp_path)
    assert len({e.id for e in examples}) == len(examples)
    answers = Counter()
    for example in examples:
        clip = draw_clip(name, int(example.video.stem.rpartition("-")[2]))
        shown = {f"{s.colour} {s.kind}" for s in clip.shapes}
        assert all((s.start_s, s.end_s) == (0.0, clip.duration_s) for s in clip.shapes)
        assert example.spans == () and example.answer is not None
        if example.question == splits.WHAT:
            assert {example.answer} == {f"{s}." for s in shown}
        else:
            named = [
                shape
                for shape in (f"{c} {k}" for c in COLOURS for k in splits.SHAPES)
                if example.question == f"is a {shape} visible"
            ]
            assert example.answer == ("yes." if named[0] in shown else "no.")
        answers[example.answer] += 1
    assert answers["yes."] == answers["no."] == (40 if name == "words" else 0)


def test_a_split_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ensure_split(tmp_path, "train", 6)
    examples = read_examples(path, "timerft", tmp_path)
    assert [e.id for e in examples] == [f"train-{i:05d}" for i in range(6)]
    assert [e.spans[0] for e in examples] == [clip.annotation for clip in POOL[:6]]
    assert all(e.video.is_file() and e.duration_s == 12.0 for e in examples)
    truths = [
        json.loads(x) for x in (tmp_path / "truth" / "train-6.jsonl").read_text().splitlines()
    ]
    assert [tuple(t["truth"]) for t in truths] == [clip.truth for clip in POOL[:6]]
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(splits, "write_video", None)
    assert ensure_split(tmp_path, "train", 6).stat().st_mtime_ns == before, "written once"


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="synthetic:test: no such split"):
        ensure_split(tmp_path, "test")


def test_the_splits_have_disjoint_seeds() -> None:
    seeds = [split.seed for name, split in SPLITS.items() if name != "eval_512"]
    assert len(set(seeds)) == len(seeds)
    assert draw_clip("eval_512", 9).shapes == draw_clip("eval", 9).shapes  # eval, and more

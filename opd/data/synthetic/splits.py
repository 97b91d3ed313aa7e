"""The embedded task: mp4 clips of coloured shapes that appear and vanish, in public annotations.

A query names one shape by colour and kind; the answer is the time span in which it is visible. A
clip has one to three distractors that share the target's colour or kind, and one of three levels of
difficulty, each of which includes those before it:

    1  contrast     the shapes' colours are blended with the background
    2  occlusion    two grey bars hide a part of the picture, independently of the target
    3  neighbour    a shape of the target's colour is visible at an overlapping time

Splits have disjoint seeds:

    train                 the training pool; 20% of the annotations are wrong, the others jittered;
                          a fifth of the clips has shapes that the teacher never saw
    eval, tune            held out, clean; `tune` is for choosing settings
    eval_512              those of eval and more like them
    mixed, mixed_eval,    the same for three tasks at once: grounding, VideoQA, grounded QA
    mixed_tune
    mixed_first           teaches the forms of these tasks to a student that knows grounding alone

The shipped models were trained on the others, in this order:

    names, words          clips of 1 s: what is visible, and for `words` whether something is
    short                 clips of 4 s, half of them with one shape: when each shape is visible
    teacher, student      clean annotations for the teacher, jittered ones for the student
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from opd.data.annotations.write import write_timerft
from opd.data.examples import Example
from opd.data.synthetic.clips import COLOURS, Clip, Shape, render, write_video
from opd.data.synthetic.questions import SHAPES, WHAT, WHETHER, mixed, words
from opd.errors import DataError

NOVEL_SHAPES = ("ring", "star")  # in a fifth of the training pool, and nowhere else
PHRASES = ("the {} is visible", "a {} appears", "the {} can be seen", "a {} is on the screen")
CELLS = ((17, 17), (17, 47), (47, 17), (47, 47))


@dataclass(frozen=True, kw_only=True)
class Split:
    """The parameters from which a split is drawn.

    Attributes:
        seed: of its clips.
        clips: number of clips.
        jitter_s: standard deviation of the noise on each annotated boundary, in seconds.
        wrong: fraction of annotations that are wrong.
        novel: fraction of clips with shapes of `NOVEL_SHAPES`.
        solo: fraction of clips that show the target alone.
        ask: target: when the target is visible; all: when each shape is; names, words: what is
            visible, in words; mixed: grounding, VideoQA or grounded QA.
        duration_s: length of a clip in seconds.
        spans_s: shortest and longest span in seconds.
    """

    seed: int
    clips: int
    jitter_s: float = 0.0
    wrong: float = 0.0
    novel: float = 0.0
    solo: float = 0.0
    ask: str = "target"
    duration_s: float = 12.0
    spans_s: tuple[float, float] = (1.5, 6.0)


SPLITS = {
    "train": Split(seed=1, clips=1024, jitter_s=0.5, wrong=0.2, novel=0.2),
    "eval": Split(seed=2, clips=128),
    "eval_512": Split(seed=2, clips=512),
    "tune": Split(seed=3, clips=256),
    "mixed": Split(seed=9, clips=1024, jitter_s=0.5, wrong=0.2, ask="mixed"),
    "mixed_eval": Split(seed=10, clips=512, ask="mixed"),
    "mixed_tune": Split(seed=11, clips=256, ask="mixed"),
    "mixed_first": Split(seed=12, clips=1024, jitter_s=0.5, ask="mixed"),
    "names": Split(seed=7, clips=6144, solo=1.0, ask="names", duration_s=1.0, spans_s=(1.0, 1.0)),
    "words": Split(seed=8, clips=12288, solo=0.5, ask="words", duration_s=1.0, spans_s=(1.0, 1.0)),
    "short": Split(seed=5, clips=12288, solo=0.5, ask="all", duration_s=4.0, spans_s=(0.5, 1.5)),
    "teacher": Split(seed=6, clips=8192, solo=0.2, ask="all"),
    "student": Split(seed=4, clips=4096, solo=0.2, ask="all", jitter_s=0.5),
}


def _span(rng: np.random.Generator, split: Split) -> tuple[float, float]:
    shortest, longest = (round(10 * s) for s in split.spans_s)
    length = rng.integers(shortest, longest + 1) / 10
    start = rng.integers(0, round((split.duration_s - length) * 10) + 1) / 10
    return round(float(start), 1), round(float(start + length), 1)


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return round(max(0.0, min(a[1], b[1]) - max(a[0], b[0])), 6)


def _annotate(
    rng: np.random.Generator, truth: tuple[float, float], split: Split
) -> tuple[float, float]:
    """Return the annotated span: the truth, a jittered one, or with `split.wrong` another one."""
    if rng.random() < split.wrong:
        while True:
            wrong = _span(rng, split)
            union = max(wrong[1], truth[1]) - min(wrong[0], truth[0])
            if _overlap(wrong, truth) < 0.3 * union:
                return wrong
    if not split.jitter_s:
        return truth
    start, end = np.round(np.array(truth) + rng.normal(0.0, split.jitter_s, 2), 1)
    start = float(np.clip(start, 0.0, split.duration_s - 0.5))
    return round(start, 1), round(float(np.clip(end, start + 0.5, split.duration_s)), 1)


def _phrase(rng: np.random.Generator, shape: Shape) -> str:
    return str(rng.choice(PHRASES)).format(f"{shape.colour} {shape.kind}")


def draw_clip(split_name: str, index: int, split: Split | None = None) -> Clip:
    """Draw clip `index` of a split.

    A pure function of its arguments, so a shorter version of a split holds the same clips.
    """
    split = split or SPLITS[split_name]
    rng = np.random.default_rng([split.seed, index])
    difficulty = int(rng.integers(1, 4))
    novel = rng.random() < split.novel
    target_kind = str(rng.choice(NOVEL_SHAPES if novel else SHAPES))
    colour = str(rng.choice(list(COLOURS)))
    cells = [CELLS[i] for i in rng.permutation(len(CELLS))]
    cells.append(cells[-1])  # a fifth shape shares a cell with the fourth

    def place(cell: tuple[int, int]) -> tuple[int, int]:
        row, column = np.array(cell) + rng.integers(-3, 4, 2)
        return int(row), int(column)

    truth = _span(rng, split)
    looks = [(colour, target_kind)]
    spans = [truth]
    kinds = SHAPES + NOVEL_SHAPES if novel else SHAPES
    num_distractors = int(rng.integers(1, 4))
    num_others = int(rng.integers(0, 5 - num_distractors))
    if split.solo and rng.random() < split.solo:
        num_distractors = num_others = 0
    for position in range(num_distractors + num_others):
        neighbour = difficulty == 3 and position == 0
        while True:
            if neighbour or (position < num_distractors and rng.random() < 0.5):
                candidate = (colour, str(rng.choice(kinds)))
            elif position < num_distractors:
                candidate = (str(rng.choice(list(COLOURS))), target_kind)
            else:
                candidate = (str(rng.choice(list(COLOURS))), str(rng.choice(kinds)))
            span = _span(rng, split)
            if candidate not in looks and (
                not neighbour or _overlap(span, truth) >= min(1.0, split.spans_s[0])
            ):
                break
        looks.append(candidate)
        spans.append(span)
    shapes = tuple(
        Shape(
            colour=c,
            kind=k,
            start_s=s[0],
            end_s=s[1],
            center=place(cell),
            radius=int(rng.integers(10, 14)),
        )
        for (c, k), s, cell in zip(looks, spans, cells, strict=False)
    )
    bars: tuple[tuple[int, int], ...] = ()
    if difficulty >= 2:  # one through each column of cells
        lefts = [column + int(rng.integers(-8, 3)) for column in sorted({c for _, c in CELLS})]
        bars = tuple((left, left + 6) for left in lefts)
    return Clip(
        id=f"{split_name}-{index:05d}",
        shapes=shapes,
        query=_phrase(rng, shapes[0]),
        duration_s=split.duration_s,
        truth=truth,
        annotation=_annotate(rng, truth, split),
        difficulty=difficulty,
        contrast=float(rng.uniform(0.55, 1.0)),
        bars=bars,
        background=int(rng.integers(16, 56)),
    )


def asked_about(clip: Clip, position: int, split: Split) -> Clip:
    """Return the clip with a query about its shape at `position`; a pure function."""
    if position == 0:
        return clip
    rng = np.random.default_rng([split.seed, int(clip.id.rpartition("-")[2]), position])
    shape = clip.shapes[position]
    truth = (shape.start_s, shape.end_s)
    return replace(
        clip,
        id=f"{clip.id}.{position}",
        query=_phrase(rng, shape),
        truth=truth,
        annotation=_annotate(rng, truth, split),
    )


def split_of(name: str) -> Split:
    """Return a split by its name. Raises DataError for an unknown one."""
    if name not in SPLITS:
        raise DataError(f"synthetic:{name}: no such split (known: {', '.join(SPLITS)})")
    return SPLITS[name]


def path_of(root: Path, name: str, clips: int | None = None) -> Path:
    """Return the path of a split's annotation file. Raises DataError for an unknown split."""
    return root / f"{name}-{clips or split_of(name).clips}.json"


def ensure_split(root: Path, name: str, clips: int | None = None) -> Path:
    """Write a split below `root` unless it exists, and return its annotation file (TimeRFT format).

    Args:
        clips: number of clips, if not all of the split.

    True spans of grounding queries go to `truth/NAME-CLIPS.jsonl`, which no reader opens.

    Raises DataError for an unknown split.
    """
    split = split_of(name)
    count = clips or split.clips
    annotations = path_of(root, name, clips)
    if annotations.exists():
        return annotations
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_clip(name, index) for index in range(count)]

    def generator(clip: Clip, stream: int) -> np.random.Generator:
        return np.random.default_rng([split.seed, int(clip.id.rpartition("-")[2]), stream])

    queried: list[Clip] = []  # one entry per grounding query
    if split.ask in ("names", "words"):
        whether = split.ask == "words"
        per_clip = (words(c, _example(root, c), generator(c, 1), whether) for c in drawn)
        examples = [example for several in per_clip for example in several]
    elif split.ask == "mixed":
        annotate = partial(_annotate, split=split)
        examples = [
            mixed(c, _example(root, c), generator(c, 2), split.wrong, annotate) for c in drawn
        ]
    else:
        queried = [
            asked_about(clip, position, split)
            for clip in drawn
            for position in range(len(clip.shapes) if split.ask == "all" else 1)
        ]
        examples = [_example(root, clip) for clip in queried]

    def write(clip: Clip) -> None:
        path = folder / f"{clip.id}.mp4"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.mp4")  # several runs may write at once
            write_video(part, render(clip))
            part.replace(path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, drawn))
    if queried:
        truth = root / "truth" / f"{name}-{count}.jsonl"
        truth.parent.mkdir(exist_ok=True)
        rows = [json.dumps({"id": clip.id, "truth": clip.truth}) for clip in queried]
        truth.write_text("".join(f"{row}\n" for row in rows))
    part = annotations.with_suffix(f".{os.getpid()}")
    write_timerft(part, examples, root)
    part.replace(annotations)  # last: the file exists only when the split is complete
    return annotations


def _example(root: Path, clip: Clip) -> Example:
    return Example(
        id=clip.id,
        video=root / clip.id.rpartition("-")[0] / f"{clip.id.partition('.')[0]}.mp4",
        query=clip.query,
        spans=(clip.annotation,),
        duration_s=clip.duration_s,
        difficulty=float(clip.difficulty),
        source=clip.id,
    )


def corpus() -> Sequence[str]:
    """Return every text of the task, from which the embedded tokenizer is trained."""
    shapes = [f"{c} {k}" for c in COLOURS for k in SHAPES + NOVEL_SHAPES]
    queries = [phrase.format(shape) for phrase in PHRASES for shape in shapes]
    numbers = [f"{t / 10:.1f}" for t in range(121)]
    return (
        queries
        + [f"<{n} seconds>" for n in numbers]
        + [f"From {n} to {n} seconds." for n in numbers]
        + [WHAT, *(WHETHER.format(shape) for shape in shapes), "yes.", "no."]
    )

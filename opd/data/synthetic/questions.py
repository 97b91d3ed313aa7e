"""The embedded task's questions: what is to be seen; which colour, which shape, what came first,
with the time asked for as well (grounded QA) or not (VideoQA)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from opd.data.examples import Example
from opd.data.synthetic.clips import COLOURS, Clip, Shape
from opd.text.forms import Span

SHAPES = ("circle", "square", "triangle", "cross")
WHAT, WHETHER = "what is visible", "is a {} visible"
TASKS = ("grounding", "videoqa", "grounded_qa")
OPTIONS = 4  # of which colour and which shape
APART_S = 1.0  # between the starts of two shapes of which one came first


@dataclass(frozen=True)
class Question:
    """A question with one right answer about a clip; `shape` is what the answer is about."""

    kind: str  # colour, shape or first
    text: str
    answer: str
    others: tuple[str, ...]  # wrong options to choose from
    shape: Shape


def name(shape: Shape) -> str:
    """As queries and answers call it."""
    return f"{shape.colour} {shape.kind}"


def questions(clip: Clip) -> list[Question]:
    """Everything that can be asked of a clip and has one right answer."""
    kinds = Counter(shape.kind for shape in clip.shapes)
    colours = Counter(shape.colour for shape in clip.shapes)
    found = []
    for shape in clip.shapes:
        if kinds[shape.kind] == 1:
            others = tuple(c for c in COLOURS if c != shape.colour)
            text = f"what colour is the {shape.kind}"
            found.append(Question("colour", text, shape.colour, others, shape))
        if colours[shape.colour] == 1:
            others = tuple(k for k in SHAPES if k != shape.kind)
            text = f"what shape is {shape.colour}"
            found.append(Question("shape", text, shape.kind, others, shape))
        for later in clip.shapes:
            if later.start_s >= shape.start_s + APART_S:
                text = "what appears first"
                found.append(Question("first", text, name(shape), (name(later),), shape))
    return found


def mixed(
    clip: Clip,
    example: Example,
    rng: np.random.Generator,
    wrong: float,
    annotate: Callable[[np.random.Generator, Span], Span],
) -> Example:
    """The clip's grounding example, or in two of three cases a question about it, every second of
    these with the time; `wrong` of the answers are another option."""
    task = TASKS[rng.integers(len(TASKS))]
    found = questions(clip)
    if task == "grounding" or not found:
        return example
    kinds = sorted({question.kind for question in found})
    kind = kinds[rng.integers(len(kinds))]
    found = [question for question in found if question.kind == kind]
    asked = found[rng.integers(len(found))]
    others = [asked.others[i] for i in rng.permutation(len(asked.others))[: OPTIONS - 1]]
    options = [asked.answer, *others]
    answer = asked.answer
    if rng.random() < wrong:
        answer = others[rng.integers(len(others))]
    span = annotate(rng, (asked.shape.start_s, asked.shape.end_s))
    return replace(
        example,
        query=asked.text,
        question=asked.text,
        options=tuple(options[i] for i in rng.permutation(len(options))),
        answer=answer,
        spans=(span,) if task == "grounded_qa" else (),
    )


def words(clip: Clip, example: Example, rng: np.random.Generator, whether: bool) -> list[Example]:
    """What is visible, where that is one shape; then, if asked, whether one of the shapes is, and
    whether one is that shares its colour or its kind with one of them."""
    shown = [(s.colour, s.kind) for s in clip.shapes]
    found = [(WHAT, f"{shown[0][0]} {shown[0][1]}.")] if len(shown) == 1 else []
    if whether:
        absent = [
            (c, k)
            for c in COLOURS
            for k in SHAPES
            if (c, k) not in shown and any(c == colour or k == kind for colour, kind in shown)
        ]
        for pairs, answer in ((shown, "yes."), (absent, "no.")):
            colour, kind = pairs[rng.integers(len(pairs))]
            found.append((WHETHER.format(f"{colour} {kind}"), answer))
    return [
        replace(
            example,
            id=f"{clip.id}.{number}",
            query=question,
            question=question,
            answer=answer,
            spans=(),
        )
        for number, (question, answer) in enumerate(found)
    ]

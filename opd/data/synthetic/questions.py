"""Questions of the embedded task: what or whether something is visible, and for VideoQA and
grounded QA (which also asks for the time) the colour, the shape or what appears first."""

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
OPTIONS = 4  # of a question about colour or shape
APART_S = 1.0  # least time between two starts for a question about which came first


@dataclass(frozen=True)
class Question:
    """A question about a clip that has one right answer; `shape` is what the answer is about."""

    kind: str  # colour, shape or first
    text: str
    answer: str
    others: tuple[str, ...]  # wrong answers
    shape: Shape


def name(shape: Shape) -> str:
    """Return a shape's name in queries and answers, such as "red circle"."""
    return f"{shape.colour} {shape.kind}"


def questions(clip: Clip) -> list[Question]:
    """Return all questions about a clip that have one right answer."""
    kinds = Counter(shape.kind for shape in clip.shapes)
    colours = Counter(shape.colour for shape in clip.shapes)
    possible = []
    for shape in clip.shapes:
        if kinds[shape.kind] == 1:
            others = tuple(c for c in COLOURS if c != shape.colour)
            text = f"what colour is the {shape.kind}"
            possible.append(Question("colour", text, shape.colour, others, shape))
        if colours[shape.colour] == 1:
            others = tuple(k for k in SHAPES if k != shape.kind)
            text = f"what shape is {shape.colour}"
            possible.append(Question("shape", text, shape.kind, others, shape))
        for later in clip.shapes:
            if later.start_s >= shape.start_s + APART_S:
                text = "what appears first"
                possible.append(Question("first", text, name(shape), (name(later),), shape))
    return possible


def mixed(
    clip: Clip,
    example: Example,
    rng: np.random.Generator,
    wrong: float,
    annotate: Callable[[np.random.Generator, Span], Span],
) -> Example:
    """Return an example of one task at random: the clip's grounding example or a question about it.

    Args:
        example: the grounding example.
        wrong: fraction of questions whose annotated answer is a wrong option.
        annotate: returns the annotated span for a true one.
    """
    task = TASKS[rng.integers(len(TASKS))]
    possible = questions(clip)
    if task == "grounding" or not possible:
        return example
    kinds = sorted({question.kind for question in possible})
    kind = kinds[rng.integers(len(kinds))]
    possible = [question for question in possible if question.kind == kind]
    question = possible[rng.integers(len(possible))]
    others = [question.others[i] for i in rng.permutation(len(question.others))[: OPTIONS - 1]]
    options = [question.answer, *others]
    answer = question.answer
    if rng.random() < wrong:
        answer = others[rng.integers(len(others))]
    span = annotate(rng, (question.shape.start_s, question.shape.end_s))
    return replace(
        example,
        query=question.text,
        question=question.text,
        options=tuple(options[i] for i in rng.permutation(len(options))),
        answer=answer,
        spans=(span,) if task == "grounded_qa" else (),
    )


def words(clip: Clip, example: Example, rng: np.random.Generator, whether: bool) -> list[Example]:
    """Return examples that are answered in words.

    The first asks what is visible, if that is a single shape. With `whether`, one more asks about a
    visible shape ("yes.") and one about an absent shape that shares the colour or the kind of a
    visible one ("no.").
    """
    shown = [(s.colour, s.kind) for s in clip.shapes]
    pairs = [(WHAT, f"{shown[0][0]} {shown[0][1]}.")] if len(shown) == 1 else []
    if whether:
        absent = [
            (c, k)
            for c in COLOURS
            for k in SHAPES
            if (c, k) not in shown and any(c == colour or k == kind for colour, kind in shown)
        ]
        for candidates, answer in ((shown, "yes."), (absent, "no.")):
            colour, kind = candidates[rng.integers(len(candidates))]
            pairs.append((WHETHER.format(f"{colour} {kind}"), answer))
    return [
        replace(
            example,
            id=f"{clip.id}.{number}",
            query=question,
            question=question,
            answer=answer,
            spans=(),
        )
        for number, (question, answer) in enumerate(pairs)
    ]

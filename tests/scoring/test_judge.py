"""Rewards and group advantages, by hand."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.method import RewardConfig
from opd.config.options import option
from opd.data.examples import Example
from opd.method.advantages import advantages, all_equal
from opd.scoring.judge import TERMS, Judged, boundary_tiou, reward
from opd.text.answers import parse_choice
from opd.text.templates import load_template

TR1, OBJECT = "temporal_r1", '{"start_time": "2.0", "end_time": "4.0"}'
PIECES = ("<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>", " ", "\n", "a")
OPTIONS = ("a red circle", "a blue square", "red", "a green circle first")


def example(**changes: Any) -> Example:
    given: dict[str, Any] = dict(
        id="x", video=Path("x.mp4"), query="q", spans=((2.0, 6.0),), duration_s=10.0
    )
    return Example(**(given | changes))


def only(**weights: Any) -> RewardConfig:
    return RewardConfig(**({"tiou": 0.0} | weights))


@pytest.mark.parametrize(
    ("answer", "weights", "expected"),
    [
        ("From 2.0 to 6.0 seconds.", {"tiou": 1.0}, 1.0),
        ("From 4.0 to 8.0 seconds.", {"tiou": 1.0}, 2 / 6),
        ("From 7.0 to 8.0 seconds.", {"tiou": 1.0}, 0.0),
        ("no idea", {"tiou": 1.0}, 0.0),
        ("From 6.0 to 2.0 seconds.", {"tiou": 1.0}, 0.0),
        ("From 2.0 to 4.0 seconds.", {"threshold": 1.0}, 1.0),  # exactly 0.5
        ("From 2.0 to 3.9 seconds.", {"threshold": 1.0}, 0.0),
        ("From 2.0 to 4.0 seconds.", {"threshold": 2.0, "threshold_at": 0.6}, 0.0),
        # tIoU 1/3; both ends are 2 s off in 10 s: 1/3 x .8 x .8
        ("From 4.0 to 8.0 seconds.", {"boundary": 1.0}, 0.64 / 3),
        ("nothing", {"boundary": 1.0}, 0.0),
        ("From 4.0 to 8.0 seconds.", {"format": 1.0}, 1.0),
        ("4 to 8 seconds", {"format": 1.0}, 0.0),
        ("4 - 8", {"format": 1.0}, 0.0),
        ("From 4.0 to 8.0 seconds.", {"tiou": 0.9, "format": 0.1}, 0.3 + 0.1),
        ("B", {"choice": 1.0}, 0.0),  # no options: no such term
    ],
)
def test_grounding(answer, weights, expected):
    assert reward(answer, example(), only(**weights)) == pytest.approx(expected)


def test_several_true_spans():
    two = example(spans=((0.0, 1.0), (4.0, 8.0)))
    assert reward("From 4.0 to 8.0 seconds.", two, only(tiou=1.0)) == 1.0
    # Of the two, (4, 8) is better: tIoU 1/2 with starts 2 s apart.
    assert boundary_tiou((6.0, 8.0), two.spans, 10.0) == pytest.approx(0.5 * 0.8)


def test_the_dual_reward():
    weights = only(tiou=1.0, choice=0.5)
    question = example(options=OPTIONS, answer="a blue square", spans=())
    assert reward("B", question, weights) == 0.5
    assert reward("C", question, weights) == 0.0
    both = example(options=OPTIONS, answer="a blue square")
    assert reward("B. From 2.0 to 4.0 seconds.", both, weights) == pytest.approx(0.5 + 0.5)
    assert reward("A. From 2.0 to 4.0 seconds.", both, weights) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        ("From 2.0 to 4.0 seconds.", "default", 1.0),
        ("From 2.0 to 4.0 seconds. And then", "default", 0.0),
        ("2 to 4", "default", 0.0),
        ("The event happens in 2.0 - 4.0 seconds.", "timelens", 1.0),
        ("From 2.0 to 4.0 seconds.", "timelens", 0.0),
        ("<think>so</think><answer>2 to 4</answer>", "time_r1", 1.0),
        ("<think>so</think>\n<answer>2 to 4</answer>", "time_r1", 1.0),
        ("<answer>2 to 4</answer>", "time_r1", 0.0),
        ("<think>so</think><answer>2 to", "time_r1", 0.0),
        ("so</think><answer>2 to 4</answer>", "time_r1", 0.0),
        ('<think>so</think><answer>{"start_time": "2.0", "end_time": "4"}</answer>', TR1, 1.0),
        ('<think>\n</think>\n<answer> {"start_time" : "2","end_time":"4.5"} </answer>', TR1, 1.0),
        ('<think>so</think><answer>{"start_time": 2.0, "end_time": 4.0}</answer>', TR1, 0.0),
        ('<think>so</think><answer>{"end_time": "4.0", "start_time": "2.0"}</answer>', TR1, 0.0),
        (f"<think>so</think><answer>[{OBJECT}, {OBJECT}]</answer>", TR1, 0.0),
        (f"<answer>{OBJECT}</answer>", TR1, 0.0),
        (f"so</think><answer>{OBJECT}</answer>", TR1, 0.0),
    ],
)
def test_an_answer_in_the_form_that_the_prompt_asks_for(answer, prompt, expected):
    template = load_template(prompt)
    assert reward(answer, example(), only(format=1.0), template) == expected
    # Read strictly, an answer in another form names nothing.
    strictly = reward(answer, example(), only(tiou=1.0), template, template.form)
    assert strictly > 0 or not expected


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        # Whatever stands between the tags, and whether it names a time at all.
        ("<think>a</think>\n<answer>no idea</answer>", "time_r1", 1.0),
        ("<think></think><answer></answer>", "time_r1", 1.0),
        (" <think>a</think>b</think> <answer>c</answer>d</answer>\n", "time_r1", 1.0),
        ("<think>a</think> so <answer>2 to 4</answer>", "time_r1", 0.0),
        ("<think>a</think><answer>2 to 4</answer> so", "time_r1", 0.0),
        ("well <think>a</think><answer>2 to 4</answer>", "time_r1", 0.0),
        ("<think>a<answer>2 to 4</answer>", "time_r1", 0.0),
        ("<think>a</think> so <time>never</time> or so", "tvg_r1", 1.0),
        ("<think>a <time>[2, 4]</time></think>", "tvg_r1", 0.0),
        ("<think>a</think> <time>[2, 4]", "tvg_r1", 0.0),
        ("<time>[2, 4]</time>", "tvg_r1", 0.0),
    ],
)
def test_tags_alone(answer, prompt, expected):
    assert reward(answer, example(), only(format=1.0), load_template(prompt)) == expected


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_tags_are_those_of_the_published_patterns(answer):
    published = {
        "time_r1": r"<think>.*?</think>\s*<answer>.*?</answer>",
        "tvg_r1": r"<think>.*</think>.*<time>.*</time>.*",
    }
    for prompt, pattern in published.items():
        expected = re.fullmatch(pattern, answer.strip(), re.DOTALL) is not None
        assert reward(answer, example(), only(format=1.0), load_template(prompt)) == expected


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        ("B", "default", 1.0),
        ("B. a blue square.", "mcq", 1.0),
        ("It is a blue square", "mcq", 0.0),
        ("From 2.0 to 4.0 seconds.", "mcq", 0.0),
        ("<think>so</think><answer>B</answer>", TR1, 1.0),
        ("<think>so</think><answer>who knows</answer>", TR1, 1.0),
        ("<think>so</think>B", TR1, 0.0),
        ("<answer>B</answer>", TR1, 0.0),
        ("<think>so</think> B", "tvg_r1", 1.0),
        ("B", "tvg_r1", 0.0),
    ],
)
def test_the_form_of_an_answer_to_a_question(answer, prompt, expected):
    question = example(options=OPTIONS, answer="a blue square", spans=())
    assert reward(answer, question, only(format=1.0), load_template(prompt)) == expected


def test_half_for_the_right_option_and_half_for_the_form():
    question = example(options=OPTIONS, answer="a blue square", spans=())
    weights, template = only(choice=0.5, format=0.5, tiou=0.5), load_template(TR1)
    assert reward("<think>so</think><answer>B</answer>", question, weights, template) == 1.0
    assert reward("<think>so</think><answer>A</answer>", question, weights, template) == 0.5
    assert reward("<answer>B</answer>", question, weights, template) == 0.5


def test_every_term_has_a_weight_and_needs_what_its_weight_says():
    assert list(TERMS) == list(RewardConfig().weights)
    question = {"options": OPTIONS, "answer": "a blue square"}
    examples = {
        (): example(spans=()),
        ("spans",): example(),
        ("options",): example(spans=(), **question),
        ("spans", "options"): example(**question),
    }
    needs = {entry.name: set(entry.metadata["needs"]) for entry in fields(RewardConfig)}
    for name, term in TERMS.items():
        for has, each in examples.items():
            value = term(Judged("B. From 2.0 to 4.0 seconds.", each))
            assert (value is not None) == bool(needs[name] & set(has)), (name, has)
            assert value is None or 0 <= value <= 1
        assert RewardConfig(**(dict.fromkeys(TERMS, 0.0) | {name: 0.5})).needs
    # The form of an answer alone does not make an example worth training on.
    assert only(format=0.5, tiou=0.5).needs == ("spans",)
    assert only(format=0.5, choice=0.5).needs == ("options",)
    assert only(format=0.5).needs == ("spans", "options")
    assert only(choice=1.0).needs == ("options",)


def test_a_term_is_one_function_and_one_weight(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Extended(RewardConfig):
        brief: float = option(0.0, "Weight of brevity.", least=0, needs=("answer",))

    monkeypatch.setitem(TERMS, "brief", lambda judged: 1 / len(judged.answer))
    config = Extended(tiou=0.5, brief=2.0)
    assert config.needs == ("spans", "answer")
    assert reward("2 to 6 s", example(), config) == pytest.approx(0.5 + 2.0 / 8)


def test_a_choice_read_strictly():
    question = example(options=OPTIONS, answer="a blue square", spans=())
    loose = "It is a blue square, I think"
    assert reward(loose, question, only(choice=1.0)) == 1.0
    assert reward(loose, question, only(choice=1.0), form="seconds") == 0.0
    assert reward("B", question, only(choice=1.0), form="seconds") == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A", OPTIONS[0]),
        ("(b)", OPTIONS[1]),
        ("B.", OPTIONS[1]),
        ("C: red", OPTIONS[2]),
        ("Answer: D", OPTIONS[3]),
        ("The correct answer is B", OPTIONS[1]),
        ("<think>A or B</think><answer>C</answer>", OPTIONS[2]),
        ("a blue square", OPTIONS[1]),
        ("It was a blue square.", OPTIONS[1]),
        ("A blue square", OPTIONS[1]),  # an article, not option A
        ("a red circle", OPTIONS[0]),
        ("E", None),
        ("", None),
        ("a red circle or a blue square", None),
        ("<answer>B", None),
    ],
)
def test_choices(answer, expected):
    assert parse_choice(answer, OPTIONS) == expected


def test_without_options_there_is_no_choice():
    assert parse_choice("A", ()) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.from_regex(r"[A-D0-9 .:()<>a-z/-]{0,40}"))
def test_no_string_makes_a_reward_raise(answer):
    every = RewardConfig(**dict.fromkeys(TERMS, 1))
    value = reward(answer, example(options=OPTIONS, answer="red"), every)
    assert 0 <= value <= 5 and math.isfinite(value)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
    centred = [0.5, -0.5, 0.0, 0.0]
    std = (0.5 / 3) ** 0.5
    assert advantages(rewards, "mean")[0].tolist() == centred
    actual = advantages(rewards, "std")
    assert actual[0].tolist() == pytest.approx([x / (std + 1e-4) for x in centred], rel=1e-6)
    assert (actual[1] == 0).all() and (advantages(rewards, "mean")[1] == 0).all()
    assert all_equal(rewards).tolist() == [False, True]


def test_equal_rewards_that_do_not_average_to_themselves():
    # Three times 0.1 has a mean of 0.1 + 1.5e-9: rounding is no preference.
    rewards = torch.full((1, 3), 0.1)
    assert (advantages(rewards, "std") == 0).all()

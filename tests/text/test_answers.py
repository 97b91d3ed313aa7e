"""Answers: lenient and strict parsing, and writing that parses back to the same moments."""

import math
import re
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opd.text.answers import has_form, parse_choice, parse_span, parse_spans
from opd.text.forms import FORMS, format_span, format_spans

OPTIONS = ("a red circle", "red", "it jumps.", "3")


def read(answer, form, options=()):
    """The moment of an answer, and whether only lenient parsing finds it."""
    strict, lenient = (parse_span(answer, accepted, options) for accepted in (form, None))
    assert strict in (None, lenient)
    return lenient, strict != lenient


@pytest.mark.parametrize(
    ("answer", "span"),
    [
        ("From 3.4 to 7.1 seconds.", (3.4, 7.1)),
        ("from 3.4 to 7.1 seconds", (3.4, 7.1)),
        ("12.54 to 17.83", (12.54, 17.83)),
        ("13.4-28.1", (13.4, 28.1)),
        ("The event happens in 3.0 - 9.5 seconds", (3.0, 9.5)),
        ("The event happens between 3s and 9.5s.", (3.0, 9.5)),
        ("From <3.4 seconds> to <7.1 seconds>.", (3.4, 7.1)),
        ("**3 \u2013 9**", (3.0, 9.0)),
        ('{"start_time": 3.4, "end_time": 7.1}', (3.4, 7.1)),
        ('```json\n[{"end_time": "00:09.5",\n "start_time": "00:03"}]\n```', (3.0, 9.5)),
        ("{'start': 3, 'end': 7}", (3.0, 7.0)),
        ("<time>[5.2, 10.4]</time>", (5.2, 10.4)),
        ("[5.2, 10.4]", (5.2, 10.4)),
        ("<answer>12.54 to 17.83</answer>", (12.54, 17.83)),
        ("<think>from 1 to 2 seconds</think>\n<answer>\n3 to 4\n</answer> so", (3.0, 4.0)),
        ("from 1 to 2 seconds</think>From 3.0 to 4.0 seconds.", (3.0, 4.0)),
        ("It may be from 1 to 2. <answer><time>[5.2, 10.4]</time></answer>", (5.2, 10.4)),
        ("From 01:05 to 1:07.5", (65.0, 67.5)),
        ("1:00:05 - 1:00:07", (3605.0, 3607.0)),
        # The words of a query do not count as its time; the first of several moments does.
        ("2-3 people dance from 4.0 to 5.0 seconds", (4.0, 5.0)),
        ("From 3 to 5 seconds and from 8 to 9 seconds.", (3.0, 5.0)),
        ("In clip 2-3, from 5 to 9 seconds.", (5.0, 9.0)),
        ("from 01:12 to 01:30", (72.0, 90.0)),
        ("01:12 - 01:30, 02:00 - 02:10", (72.0, 90.0)),
        ("12.54 to 17.83, 20.00 to 21.50", (12.54, 17.83)),
        ("He jumps 3.0 - 9.5, 12.0 - 14.0 seconds.", (3.0, 9.5)),
        # Start and end in sentences of their own.
        ("Starting time: 0.8 seconds. Ending time: 1.1 seconds", (0.8, 1.1)),
        (
            "The start time of the event is 0 seconds, and the end time is 12 seconds",
            (0.0, 12.0),
        ),
        ("The video segment starts at 00:00:18 and ends at 00:00:23.", (18.0, 23.0)),
        ("It begins at about 3.5 s into the video and finishes at 9 s.", (3.5, 9.0)),
        ("Start time: 01:12, end time: 01:30", (72.0, 90.0)),
        # Moments that are named as such come before these sentences.
        ("The clip starts at 0 and ends at 30. It happens from 5 to 9 seconds.", (5.0, 9.0)),
        (r"\boxed{3.4 to 7.1}", (3.4, 7.1)),
        (r"So the answer is $\boxed{[3.4, 7.1]}$.", (3.4, 7.1)),
        (r"It jumps. \boxed{\text{3.4 to 7.1}}", (3.4, 7.1)),
        (r'\boxed{{"start_time": 3.4, "end_time": 7.1}}', (3.4, 7.1)),
        (r"From \boxed{3.4} to \boxed{7.1} seconds", (3.4, 7.1)),
        (r"\boxed{B} From 3.4 to 7.1 seconds.", (3.4, 7.1)),
    ],
)
def test_forms_seen_in_the_wild(answer, span):
    assert parse_span(answer) == pytest.approx(span)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot tell.",
        "From 3.4 seconds.",
        "From 7.1 to 3.4 seconds.",
        "From 3.4 to 3.4 seconds.",
        "From -3 to 5 seconds.",
        "From 3 to -5 seconds.",
        "From nan to inf seconds.",
        f"From 3 to {'9' * 400} seconds.",
        f"From {'9' * 400} to {'9' * 401} seconds.",
        "From 1 to 2 minutes.",
        "From 10% to 20%.",
        "From frame 3 to frame 9",
        "From 1 to 25 frames",
        "From 1:75 to 2:00",
        "From 1e1 to 2e1 seconds",
        "2-3 people dance",
        "2-3 people and 4-5 dogs",
        "3.4 7.1",
        "It starts with 3 people and ends with 9.",
        "It starts at 3 and goes on.",
        "It ends at 9 minutes and starts at 3 minutes.",
        "The person starts to run 2 times and stops 3 times.",
        "Starting time: 3 minutes. Ending time: 9 minutes.",
        r"\boxed{From 3.4 to 7.1",
        r"\boxed{3}",
        "<answer>From 3.4 to 7",
        "<think>From 3.4 to 7.1 seconds.",
        "<answer>none</answer> From 3.4 to 7.1 seconds.",
        '{"start_time": -1, "end_time": 7.1}',
        '{"start_time": null, "end_time": 7.1}',
        '{"start_time": 9, "end_time": 7.1}',
    ],
)
def test_other_texts_name_no_moment(answer):
    assert parse_span(answer) is None


# fmt: off
_PIECES = st.sampled_from([
    "From", "from", "to", "in", "is", "-", "\u2013", ",", ":", ".", "%", "[", "]", "(", ")", "<",
    ">", "3", "3.4", "7.1", "00:03", "1:75", "9999999999", "-1", "nan", "inf", "1e999", "\u0663",
    "s", "seconds", "minutes", "<time>", "</time>", "<answer>", "</answer>", "<think>", "</think>",
    '"', "'", "**", "{", "}", "\n", '"start_time":', '"end_time":', "start=", "end=",
])
# fmt: on


@given(st.one_of(st.text(), st.lists(_PIECES).map(" ".join), st.lists(_PIECES).map("".join)))
def test_no_string_raises_and_every_span_is_possible(answer):
    span = parse_span(answer)
    assert span is None or 0 <= span[0] < span[1] < math.inf
    for form in (None, *FORMS):
        for span in parse_spans(answer, form, OPTIONS):
            assert 0 <= span[0] < span[1] < math.inf
        read(answer, form or "plain", OPTIONS)
        assert parse_choice(answer, OPTIONS, form) in (None, *OPTIONS)


# fmt: off
_LONG = [
    "9", " ", "<", "[", ":", "-", "{", "\u0663", "from ", "1:", "1 to ", "[1,", "start:1", "end:1",
    "<answer>", "<time>", "</time>", "<time></time>", "<think>", "</think>", "(A) ", "red ",
    # Nearly written in a form: a head, then what may be repeated behind it.
    'From |1.5 to 2.5 seconds and from ', "The event happens in |1.5 - 2.5 seconds, ",
    '[|{"start_time":1,"end_time":2},', "[|[1, 2], ", "<answer>|1 to 2, ", "red. |1 to 2, ",
    "|1:00-1:01,", "|<time>[1, 2]</time>", "From 1 to |9", '{"start_time": |0',
    "starts at 1 ", "starts at 1 and |a ", "start time of the |a ", "1 to 2 and ", "\\boxed{", "{}",
    "\\boxed{1 to 2}", "\\boxed{|{", "\\text{", "\\boxed{1}\\text{1}",
]
# fmt: on


@pytest.mark.parametrize("text", _LONG)
def test_long_nonsense_is_parsed_in_linear_time(text):
    head, _, piece = text.rpartition("|")
    for end in ("", "</answer>"):
        answer, began = (head + piece * 100_000)[:100_000] + end, time.process_time()
        for form in (None, *FORMS):
            parse_spans(answer, form, OPTIONS)
        parse_choice(answer, OPTIONS)
        parse_choice(answer, OPTIONS, "plain")
        assert time.process_time() - began < 3  # about 0.1 s; a quadratic pattern takes minutes


def test_canonical_form():
    assert format_span(3.4, 7.1) == "From 3.4 to 7.1 seconds."
    assert format_span(0, 10) == "From 0.0 to 10.0 seconds."
    # A span that rounding would empty is widened, within the video.
    assert format_span(7.98, 8.0) == "From 7.9 to 8.0 seconds."
    assert format_span(3.41, 3.44) == "From 3.4 to 3.5 seconds."
    assert format_span(1.06, 1.1) == "From 1.0 to 1.1 seconds."


@given(st.floats(0, 1e5), st.floats(1e-3, 1e4))
def test_a_written_span_parses_back(start_s, length_s):
    span = parse_span(format_span(start_s, start_s + length_s))
    assert span == pytest.approx((start_s, start_s + length_s), abs=0.1001)


@pytest.mark.parametrize("span", [(3, 3), (4, 3), (-1, 2), (0, math.inf), (math.nan, 1)])
def test_an_impossible_span_cannot_be_written(span):
    with pytest.raises(ValueError, match="is not 0 <= start < end"):
        format_span(*span)


WRITTEN = {
    "seconds": "From 3.0 to 9.5 seconds.",
    "event": "The event happens in 3.0 - 9.5 seconds.",
    "plain": "3.00 to 9.50",
    "json": '{"start_time": 3.0, "end_time": 9.5}',
    "windows": "[[3.0, 9.5]]",
    "time_tag": "<time>[3.0, 9.5]</time>",
    "answer_tag": "<answer>3.00 to 9.50</answer>",
    "answer_json": '<answer>{"start_time": "3.0", "end_time": "9.5"}</answer>',
    "clock": "00:03.0 - 00:09.5",
}
SEVERAL = {
    "seconds": "From 3.0 to 9.5 seconds and from 61.0 to 62.0 seconds.",
    "event": "The event happens in 3.0 - 9.5 seconds, 61.0 - 62.0 seconds.",
    "plain": "3.00 to 9.50, 61.00 to 62.00",
    "json": '[{"start_time": 3.0, "end_time": 9.5}, {"start_time": 61.0, "end_time": 62.0}]',
    "windows": "[[3.0, 9.5], [61.0, 62.0]]",
    "time_tag": "<time>[3.0, 9.5]</time><time>[61.0, 62.0]</time>",
    "answer_tag": "<answer>3.00 to 9.50, 61.00 to 62.00</answer>",
    "answer_json": '<answer>[{"start_time": "3.0", "end_time": "9.5"}, '
    '{"start_time": "61.0", "end_time": "62.0"}]</answer>',
    "clock": "00:03.0 - 00:09.5, 01:01.0 - 01:02.0",
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_by_hand(form):
    two = [(3.0, 9.5), (61.0, 62.0)]
    assert format_span(3.0, 9.5, form) == WRITTEN[form]
    assert format_spans(two, form) == SEVERAL[form]
    assert parse_spans(SEVERAL[form], form) == tuple(two)
    assert parse_span(SEVERAL[form], form) == two[0]
    for other, answer in [*WRITTEN.items(), *SEVERAL.items()]:
        assert has_form(answer, form) == (other == form)
        assert (parse_span(answer, form) is not None) == (other == form)
        assert read(answer, form) == (two[0], other != form)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("From 3 to 9.5 seconds", "seconds"),
        (" The event happens in 3.0-9.50 seconds\n", "event"),
        ("<think>From 1.0 to 2.0 seconds.</think>\n3 to 9.5", "plain"),
        ('{\n  "start_time" : 3,\n  "end_time" : 9.5\n}', "json"),
        ('[{"start_time": 3, "end_time": 9.5}]', "json"),
        ("[[3,9.5]]", "windows"),
        ("<think> so </think> <time> [3.0, 9.5] </time>", "time_tag"),
        ("so </think><answer> 3 to 9.5 </answer>", "answer_tag"),
        ('<answer>{"start_time":"3","end_time":"9.5"}</answer>', "answer_json"),
        ("0:03 - 00:09.50", "clock"),
    ],
)
def test_small_deviations_from_a_form(answer, form):
    assert read(answer, form) == ((3.0, 9.5), False)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("It is from 3.0 to 9.5 seconds.", "seconds"),
        ("From 3.0 to 9.5 seconds. And then", "seconds"),
        ("from 3.0 to 9.5 seconds.", "seconds"),
        ("The event happens in 3.0 - 9.5 seconds", "plain"),
        ("3 to 9.5", "answer_tag"),
        ("so <answer>3 to 9.5</answer>", "answer_tag"),
        ("<answer>3 to 9.5</answer>", "plain"),
        ("<time>3 to 9.5</time>", "time_tag"),
        ('```json\n{"start_time": 3.0, "end_time": 9.5}\n```', "json"),
        ('{"start_time": "3.0", "end_time": "9.5"}', "json"),
        ('{"end_time": 9.5, "start_time": 3.0}', "json"),
        ("[3.0, 9.5]", "windows"),
        ("From 0:03 to 0:09.5", "clock"),
    ],
)
def test_read_reports_lenient_parsing(answer, form):
    assert parse_span(answer, form) is None
    assert not has_form(answer, form)
    assert read(answer, form) == ((3.0, 9.5), True)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot tell.",
        "From 9.5 to 3.0 seconds.",
        "<think>From 3.0 to 9.5 seconds.",
        "<answer>3.0 to 9.5",
        f"From 3.0 to {'9' * 400} seconds.",
        "From \u0663 to \u0669 seconds.",
    ],
)
def test_an_answer_without_a_moment_is_not_lenient(answer):
    for form in FORMS:
        assert read(answer, form) == (None, False)


def test_several_moments_in_any_form():
    assert parse_spans("From 3 to 5 seconds and from 8 to 9 seconds.") == ((3, 5), (8, 9))
    assert parse_spans("[[82, 150], [0, 10]]") == ((82, 150), (0, 10))
    text = '```json\n[{"start": "00:03", "end": "00:09"}, {"start": 70, "end": 80}]\n```'
    assert parse_spans(text) == ((3, 9), (70, 80))
    assert parse_spans("<time>[1, 2]</time> or <time>3 to 4</time><time>5 to") == ((1, 2), (3, 4))
    assert parse_span("<time>[1, 2]</time> or <time>3 to 4</time>") == (1, 2)
    assert parse_spans("I cannot tell.") == parse_spans("<time>[1, 2]") == ()
    # What cannot be is passed over, where the one moment that counts would be none.
    impossible = f"[[5, 3], [2, 2], [6, 12], [8, 9], [1, {'9' * 400}]]"
    for form in (None, "windows"):
        assert parse_spans(impossible, form) == ((6, 12), (8, 9))
        assert parse_span(impossible, form) is None


# Text around an answer, with a word or a sign before bare numbers that marks them as times.
MARKED = {"": "", "**": "**", "The answer is ": ".", "Answer: ": " (approximately)."}
AROUND = {"Sure! ": " I hope this helps.", "```json\n": "\n```", "2-3 people dance. ": " The end."}


@pytest.mark.parametrize("unit", ["", " seconds", "s", " sec"])
@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_lenient_parsing_reads_every_form_within_other_text(form, windows, unit):
    spans = ((3.0, 9.5), (61.0, 62.0), (70.5, 80.0))[:windows]
    written = format_spans(spans, form)
    if unit and "seconds" not in written:
        written = re.sub(r"([0-9]+\.[0-9]+)", rf"\1{unit}", written)
    bare = form == "plain" and not unit
    for prefix, suffix in (MARKED if bare else MARKED | AROUND).items():
        answer = f"{prefix}{written}{suffix}"
        for text in (
            answer,
            f"<think>From 1.0 to 2.0 seconds.</think>\n{answer}",
            f"from 1.0 to 2.0 seconds</think> {answer}",
            f"Well. <answer>{answer}</answer> So." if not FORMS[form].tag else answer,
        ):
            assert parse_spans(text, None, OPTIONS) == spans, text
            assert parse_span(text, None, OPTIONS) == spans[0], text


def test_required_thinking():
    assert has_form("<think>so</think><answer>3 to 4</answer>", "answer_tag", thinking=True)
    assert has_form("<answer>4 to 3</answer>", "answer_tag")
    assert not has_form("<answer>3 to 4</answer>", "answer_tag", thinking=True)
    assert not has_form("<think>so <answer>3 to 4</answer>", "answer_tag", thinking=True)


HEADS = {"a red circle": "a red circle.", "red": "B. red.", "it jumps.": "(C)", "3": "D: 3."}
_SPANS = st.tuples(st.floats(0, 1e5), st.floats(1e-9, 1e4)).map(lambda p: (p[0], p[0] + p[1]))


@given(st.lists(_SPANS, min_size=1, max_size=4), st.sampled_from(sorted(FORMS)), st.data())
def test_every_form_parses_its_own_answers_only(spans, form, data):
    assume(all(start < end for start, end in spans))
    answer = format_spans(spans, form)
    parsed = parse_spans(answer, form)
    assert len(parsed) == len(spans)
    assert parse_spans(answer) == parsed
    error = 1.0001 * 10 ** -FORMS[form].decimals
    for span, truth in zip(parsed, spans, strict=True):
        assert span == pytest.approx(truth, abs=error, rel=0)
    thought = f"<think>{data.draw(st.text(alphabet='a1[]. ', max_size=9))}</think>{answer}"
    assert parse_spans(thought, form) == parsed
    assert parse_span(answer, form) == parsed[0]
    assert [other for other in FORMS if parse_spans(answer, other)] == [form]
    choice, head = data.draw(st.sampled_from(sorted(HEADS.items())))
    chosen = format_spans(spans, form, head)
    for accepted in (None, form):  # lenient parsing reads whatever strict parsing reads
        assert parse_spans(thought, accepted) == parsed
        assert parse_spans(chosen, accepted, OPTIONS) == parsed
        assert parse_choice(chosen, OPTIONS, accepted) == choice
    other = next(name for name in FORMS if name != form)
    assert parse_choice(chosen, OPTIONS, other) is None


@given(st.floats(0, 1e308), st.floats(0, 1e308), st.sampled_from(sorted(FORMS)))
def test_no_possible_span_is_written_as_an_impossible_one(one, other, form):
    start, end = sorted((one, other))
    assume(start < end)
    assert parse_span(format_span(start, end, form), form) is not None


def test_the_closest_boundaries_stay_apart():
    assert format_span(1.1 - 1e-9, 1.1) == "From 1.0 to 1.1 seconds."
    assert format_span(0, 1e-9) == "From 0.0 to 0.1 seconds."
    assert format_span(59.98, 60.0, "clock") == "00:59.9 - 01:00.0"
    assert format_span(12.537, 12.539, "plain") == "12.53 to 12.54"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "red"),
        ("B.", "red"),
        ("(B)", "red"),
        ("red", "red"),
        ("red.", "red"),
        ("B. red", "red"),
        ("(B) red.", "red"),
        ("a red circle", "a red circle"),
        ("it jumps.", "it jumps."),
        ("<think>A or B</think>\n<answer>(B)</answer>", "red"),
        ("3", "3"),
        ("D", "3"),
        ("b", None),
        ("Red", None),
        ("A red circle", None),
        ("B. a red circle", None),
        ("The answer is B", None),
        ("B because", None),
        ("red or a red circle", None),
        ("E", None),
        ("", None),
        ("<answer>B", None),
        ("B. From 3.0 to 4.0 seconds.", None),
    ],
)
def test_strict_choices(answer, expected):
    assert parse_choice(answer, OPTIONS, "plain") == expected
    if expected:
        assert parse_choice(answer, OPTIONS) == expected
    assert parse_choice(answer, (), "plain") is None


@pytest.mark.parametrize(
    ("answer", "form", "lenient"),
    [
        ("B. red. From 3.0 to 9.5 seconds.", "seconds", False),
        ("red. 3.0 to 9.5", "plain", False),
        ("(B) 3.0 to 9.5", "plain", False),
        ("<think>hm</think><answer>B. 3.0 to 9.5</answer>", "answer_tag", False),
        ("a red circle: The event happens in 3.0 - 9.5 seconds.", "event", False),
        ("B. red. <time>[3.0, 9.5]</time>", "time_tag", False),
        ('D. {"start_time": 3.0, "end_time": 9.5}', "json", False),
        ("3 to 9.5", "plain", False),  # not option D
        ("3.0 to 9.5", "plain", False),
        ("Red, from 3.0 to 9.5 seconds.", "seconds", True),
        ("B. 3.0 to 9.5", "answer_tag", True),
    ],
)
def test_the_choice_comes_first(answer, form, lenient):
    assert read(answer, form, OPTIONS) == ((3.0, 9.5), lenient)


def test_strict_choices_before_moments_of_another_form():
    assert parse_choice("B. red. From 3.0 to 9.5 seconds.", OPTIONS, "seconds") == "red"
    assert parse_choice("B. red. From 3.0 to 9.5 seconds.", OPTIONS, "plain") is None
    assert parse_choice("<answer>B. 3 to 9.5</answer>", OPTIONS, "answer_tag") == "red"
    assert parse_choice("B. 3 to 9.5", OPTIONS, "answer_tag") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\boxed{B}", "red"),
        (r"So the answer must be $\boxed{B}$.", "red"),
        (r"\boxed{\text{(B)}}", "red"),
        (r"<think>\boxed{A}</think><answer>\boxed{\textbf{B. red}}</answer>", "red"),
        (r"\boxed{a red circle}", "a red circle"),
        (r"It is red. \boxed{4 to 9}", "red"),  # the box holds the moment
        (r"\boxed{E}", None),
        (r"\boxed{B", None),
        (r"\boxed{}", None),
    ],
)
def test_choices_in_boxes(answer, expected):
    assert parse_choice(answer, OPTIONS) == expected
    assert parse_choice(answer, OPTIONS, "plain") is None


def test_a_choice_beside_a_time_tag():
    assert parse_choice("B. red. <time>[3.0, 9.5]</time>", OPTIONS) == "red"

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.answers import format_span, parse_span


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
        "3.4 7.1",
        "<answer>From 3.4 to 7",
        "<think>From 3.4 to 7.1 seconds.",
        "<answer>none</answer> From 3.4 to 7.1 seconds.",
        '{"start_time": -1, "end_time": 7.1}',
        '{"start_time": null, "end_time": 7.1}',
        '{"start_time": 9, "end_time": 7.1}',
    ],
)
def test_anything_else_is_no_answer(answer):
    assert parse_span(answer) is None


def test_spans_are_clipped_to_the_video():
    assert parse_span("From 3.0 to 12.0 seconds.", 8.0) == (3.0, 8.0)
    assert parse_span("From 8.0 to 12.0 seconds.", 8.0) is None
    assert parse_span("From 3.0 to 12.0 seconds.") == (3.0, 12.0)


# fmt: off
_PIECES = st.sampled_from([
    "From", "from", "to", "in", "is", "-", "\u2013", ",", ":", ".", "%", "[", "]", "(", ")", "<",
    ">", "3", "3.4", "7.1", "00:03", "1:75", "9999999999", "-1", "nan", "inf", "1e999", "\u0663",
    "s", "seconds", "minutes", "<time>", "</time>", "<answer>", "</answer>", "<think>", "</think>",
    '"', "'", "**", "{", "}", "\n", '"start_time":', '"end_time":', "start=", "end=",
])
# fmt: on


@given(
    st.one_of(st.text(), st.lists(_PIECES).map(" ".join), st.lists(_PIECES).map("".join)),
    st.one_of(st.none(), st.floats(0, 1e6)),
)
def test_no_string_raises_and_no_span_leaves_the_video(answer, duration_s):
    span = parse_span(answer, duration_s)
    if span is not None:
        assert 0 <= span[0] < span[1] <= (math.inf if duration_s is None else duration_s)
        assert math.isfinite(span[1])


@pytest.mark.parametrize(
    "piece", ["9", " ", "<", "from ", "1:", "1 to ", "[1,", "start:1", "<answer>"]
)
def test_long_nonsense_is_read_in_linear_time(piece):
    parse_span(piece * 50_000)  # a quadratic pattern would take minutes


def test_canonical_form():
    assert format_span(3.4, 7.1) == "From 3.4 to 7.1 seconds."
    assert format_span(0, 10) == "From 0.0 to 10.0 seconds."
    # A span that rounding would empty is widened, within the video.
    assert format_span(7.98, 8.0) == "From 7.9 to 8.0 seconds."
    assert format_span(3.41, 3.44) == "From 3.4 to 3.5 seconds."
    assert format_span(1.06, 1.1) == "From 1.0 to 1.1 seconds."


@given(st.floats(0, 1e5), st.floats(1e-3, 1e4))
def test_what_is_written_is_read_back(start_s, length_s):
    span = parse_span(format_span(start_s, start_s + length_s))
    assert span == pytest.approx((start_s, start_s + length_s), abs=0.1001)


@pytest.mark.parametrize("span", [(3, 3), (4, 3), (-1, 2), (0, math.inf), (math.nan, 1)])
def test_no_text_for_an_impossible_span(span):
    with pytest.raises(ValueError, match="is not 0 <= start < end"):
        format_span(*span)

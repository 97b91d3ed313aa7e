"""The benchmarks' metrics: by hand from their definitions, and against a second way to compute
them, on a grid of seconds with fractions and every possible matching."""

import itertools
import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from opd.scoring.evaluation import EvaluationRow
from opd.scoring.official import (
    SETS,
    THRESHOLDS,
    average_precision,
    score,
    timelens_answers,
)
from opd.scoring.results import breakdown


def row(name="q", predicted=None, truth=(), **optional):
    stored = {"id": name, "predicted": predicted, "truth": truth, **optional}
    return EvaluationRow.from_json(stored)


@pytest.mark.parametrize(
    ("windows", "truth", "expected"),
    [
        ([(0, 10)], [(0, 10)], 1),
        ([(20, 30), (0, 10)], [(0, 10)], 1 / 2),
        ([(0, 10), (20, 30)], [(0, 10)], 1),
        ([(0, 10), (0, 10)], [(0, 10)], 1),  # a duplicate after the last hit costs nothing
        ([(0, 10), (0, 10)], [(0, 10), (20, 30)], 1 / 2),
        ([(0, 10), (0, 10), (20, 30)], [(0, 10), (20, 30)], (1 + 2 / 3) / 2),
        # The precision at a recall is the best at that recall or beyond: 2/3, not 1/2, for 1/2.
        ([(40, 50), (0, 10), (20, 30)], [(0, 10), (20, 30)], 2 / 3),
        ([], [(0, 10)], 0),
        ([(10, 20)], [(0, 10)], 0),  # touching
        ([(5, 5), (10, 0), (0, 10)], [(0, 10)], 1 / 3),  # empty, reversed
    ],
)
def test_average_precision_by_hand(windows, truth, expected):
    assert average_precision(windows, truth) == pytest.approx([expected] * 10)


def test_a_window_takes_the_truth_that_it_overlaps_most():
    # (0, 11) overlaps (0, 12) by 11/12 and (0, 10) by 10/11: it takes the first, which (1, 12)
    # needs at 0.9, though another matching would serve both.
    windows, truth = [(0, 11), (1, 12)], [(0, 10), (0, 12)]
    assert average_precision(windows, truth, [0.7, 0.9]) == [1, 0.5]
    # The second of two equal windows is left the second truth, by 0.8.
    windows, truth = [(0, 10), (0, 10)], [(0, 10), (0, 8)]
    assert average_precision(windows, truth, [0.8, 0.85]) == [1, 0.5]


def test_a_tiou_of_the_threshold_counts_and_a_tie_goes_to_the_last():
    assert average_precision([(0, 5)], [(0, 10)], [0.5, 0.55]) == [1, 0]
    truth = [(0, 5), (5, 10)]
    assert average_precision([(0, 10), (0, 5)], truth, [0.5]) == [1]
    assert average_precision([(0, 10), (5, 10)], truth, [0.5]) == [0.5]


def test_average_precision_needs_a_truth():
    with pytest.raises(ValueError, match="no true span"):
        average_precision([(0, 1)], [])


def cells(span):
    return set(range(*span))


def overlaps(window, truth):
    """tIoU of spans in whole seconds, counted second by second."""
    either = cells(window) | cells(truth)
    return Fraction(len(cells(window) & cells(truth)), len(either) or 1)


def greedy_by_enumeration(tious, threshold):
    """Of every way to give windows different true spans, or none: the one that is best for the
    first window, among those the best for the second, and so on."""
    num_truths = len(tious[0]) if tious else 0
    choices = [
        [-1, *(j for j in range(num_truths) if row_tious[j] >= threshold)] for row_tious in tious
    ]
    ways = (
        way
        for way in itertools.product(*choices)
        if len({j for j in way if j >= 0}) == sum(j >= 0 for j in way)
    )
    return max(
        ways, key=lambda way: [(tious[i][j] if j >= 0 else -1, j) for i, j in enumerate(way)]
    )


def area_under_interpolated_curve(hits, num_truths):
    area = Fraction(0)
    for wanted in range(1, num_truths + 1):
        ranks = range(1, len(hits) + 1)
        reached = [Fraction(sum(hits[:n]), n) for n in ranks if sum(hits[:n]) >= wanted]
        area += max(reached, default=Fraction(0)) / num_truths
    return area


def test_average_precision_against_every_matching():
    chance = random.Random(0)
    thresholds = [Fraction(n, 20) for n in (10, 13, 15, 19)]
    ties = 0
    for _ in range(1500):
        starts = [chance.randint(0, 8) for _ in range(chance.randint(1, 3))]
        truth = [(start, start + chance.randint(1, 8)) for start in starts]
        windows = []
        for _ in range(chance.randint(0, 4)):
            start = chance.randint(0, 8)
            window = (start, start + chance.randint(-1, 6))
            windows.append(chance.choice([window, window, chance.choice([*truth, *windows])]))
        tious = [[overlaps(window, span) for span in truth] for window in windows]
        ties += any(tiou in thresholds for line in tious for tiou in line)
        expected = []
        for threshold in thresholds:
            way = greedy_by_enumeration(tious, threshold)
            hits = [j >= 0 for j in way]
            expected.append(float(area_under_interpolated_curve(hits, len(truth))))
        actual = average_precision(windows, truth, [float(t) for t in thresholds])
        assert actual == pytest.approx(expected), (windows, truth)
    assert ties > 100


def test_qvhighlights_by_hand():
    rows = [
        # tIoU of the first window 0.75, with its second true span; 60 s and 10 s long.
        row("a", (100, 107.5), [(0, 60), (100, 110)], windows=[(100, 107.5), (0, 30)]),
        row("b", None, [(0, 30)]),
        row("c", (0, 14), [(0, 20)]),  # 0.7 and no list of windows
        row("d", (0, 1), []),  # no truth: left out
    ]
    # a at 0.5: both windows hit; 0.55 to 0.75: the first alone. c up to 0.7.
    short, middle, long = (6 / 10), (0 + 5 / 10) / 2, (1 / 2) / 10
    assert score(rows, "qvhighlights") == pytest.approx(
        {
            "recall@0.5": 2 / 3,
            "recall@0.7": 2 / 3,
            "map": ((1 + 5 * 0.5) / 10 + 0 + 5 / 10) / 3,
            "map@0.5": (1 + 0 + 1) / 3,
            "map@0.75": (0.5 + 0 + 0) / 3,
            "queries": 3,
            "map_short": short,
            "queries_short": 1,  # exactly 10 s
            "map_middle": middle,
            "queries_middle": 2,  # one of them exactly 30 s
            "map_long": long,  # the window of the short truth is a wrong one before it
            "queries_long": 1,
        }
    )


def test_the_first_ten_windows_count():
    wrong = [(100 + i, 101 + i) for i in range(9)]
    tenth = row("q", wrong[0], [(0, 40)], windows=[*wrong, (0, 40)])
    assert score([tenth], "qvhighlights")["map"] == pytest.approx(0.1)
    eleventh = replace(tenth, windows=(*wrong, (120, 121), (0, 40)))
    actual = score([eleventh], "qvhighlights")
    assert actual["map"] == 0
    assert actual["map_short"] is None and actual["queries_short"] == 0


def test_recall_is_of_the_first_window():
    known = {"predicted": (0, 10), "truth": [(0, 10)]}
    for windows, expected in (([(50, 60), (0, 10)], 0), ([(0, 10), (50, 60)], 1), ([], 0)):
        actual = score([row(**known, windows=windows)], "qvhighlights")
        assert actual["recall@0.5"] == expected
        assert actual["map"] == (0.5 if windows and not expected else expected)


def test_nextgqa_by_hand():
    rows = [
        row("a", (0, 4), [(2, 10), (0, 3)], right=True),  # IoP 0.75, IoU 0.75 of the second
        row("b", (0, 10), [(0, 3)], right=True),  # both 0.3
        row("c", (0, 2), [(0, 4)], right=False),  # IoP 1, IoU 0.5
        row("d", None, [(0, 4)], right=True),
        row("e", None, [], right=False),  # a question without a true span
        row("f", (0, 1), [(0, 1)]),  # no question
    ]
    assert score(rows, "nextgqa") == pytest.approx(
        {
            "accuracy": 3 / 5,
            "acc@gqa": 1 / 4,
            "miop": (0.75 + 0.3 + 1 + 0) / 4,
            "iop@0.3": 3 / 4,
            "iop@0.5": 2 / 4,
            "miou": (0.75 + 0.3 + 0.5 + 0) / 4,
            "iou@0.3": 3 / 4,
            "iou@0.5": 2 / 4,
            "questions": 5,
            "grounded": 4,
        }
    )


def test_rextime_by_hand():
    rows = [
        row("a", (0, 5), [(0, 10)], right=True),
        row("b", (0, 9), [(0, 10)], right=False),
        row("c", (0, 3), [(0, 10)], right=True),
        row("d", None, [(0, 10)], right=False),
    ]
    assert score(rows, "rextime") == pytest.approx(
        {
            "accuracy": 1 / 2,
            "miou": (0.5 + 0.9 + 0.3) / 4,
            "recall@0.3": 3 / 4,
            "recall@0.5": 2 / 4,
            "acc@iou0.5": 1 / 4,
            "questions": 4,
            "grounded": 4,
        }
    )


def test_videoqa_by_hand():
    rows = [
        row("a", right=True, category="order"),
        row("b", right=False, category="count"),
        row("c", right=True, category="order"),
        row("d", right=False),
        row("e", (0, 1), [(0, 1)]),
    ]
    actual = score(rows, "videoqa")
    assert actual["accuracy"] == 0.5 and actual["questions"] == 4
    assert list(actual["categories"].items()) == [
        ("count", {"accuracy": 0, "questions": 1}),
        ("order", {"accuracy": 1, "questions": 2}),
        ("unknown", {"accuracy": 0, "questions": 1}),
    ]


def test_grounding_by_hand():
    rows = [
        row("a", (0, 5), [(0, 10)]),
        row("b", (0, 10), [(3, 8), (0, 10)]),
        row("c", None, [(0, 10)]),
        row("d", (8, 2), [(0, 10)]),
    ]
    expected = {
        "miou": 1.5 / 4,
        "recall@0.3": 2 / 4,
        "recall@0.5": 2 / 4,
        "recall@0.7": 1 / 4,
        "parse_failures": 1,
        "queries": 4,
    }
    assert score(rows, "grounding") == pytest.approx(expected)
    actual = score(rows, "grounding", strict=True)
    assert actual == pytest.approx(expected | {"recall@0.5": 1 / 4})


def test_timelens_by_hand():
    rows = [
        row("a", (2.4, 9.6), [(2, 10)]),  # 7.2 / 8, in whole seconds 1
        row("b", (2.5, 3.5), [(2, 4)]),  # 1 / 2; halves go to the even second: 2 to 4, 1
        row("c", (5.1, 5.4), [(5, 6)]),  # 0.3 / 1; 5 to 5 is empty, 0
        row("d", None, [(0, 1)]),
        row("e", (0, 1)),  # no true span
    ]
    assert score(rows, "timelens") == pytest.approx(
        {
            "miou": (1 + 1) / 4,
            "miou_unrounded": (0.9 + 0.5 + 0.3) / 4,
            "recall@0.3": 2 / 4,
            "recall@0.3_unrounded": 3 / 4,
            "recall@0.5": 2 / 4,
            "recall@0.5_unrounded": 2 / 4,
            "recall@0.7": 2 / 4,
            "recall@0.7_unrounded": 1 / 4,
            "parse_failures": 1,
            "queries": 4,
        }
    )
    assert [r.to_json()["tiou_rounded"] for r in rows[:4]] == [1, 1, 0, 0]
    assert "tiou_rounded" not in rows[4].to_json()


def test_answers_for_the_scorer_of_timelens():
    """Scored as that scorer reads them: the key's last part is the truth, the first pair counts."""
    chance = random.Random(1)
    rows = []
    for k in range(50):
        start, length, shift = chance.uniform(0, 60), chance.uniform(1, 20), chance.uniform(-3, 3)
        predicted = None if k % 7 == 0 else (max(0, start + shift), start + shift + length)
        known = {"answer": f"answer {k}", "video": f"v/{k}.mp4", "query": f"a >>> b {k}. "}
        rows.append(row(str(k), predicted, [(start, start + length)], **known))
    two = row("two", (0, 1), [(0, 1), (2, 3)], answer="x")
    answers = json.loads(json.dumps(timelens_answers([*rows, two, row("n", truth=[(0, 1)])])))
    assert len(answers) == 50 and list(answers)[1].startswith("1.mp4>>>a b 1>>>[")
    tious = []
    for key, answer in answers.items():
        _, _, text = key.split(">>>")
        (start, end), pairs = json.loads(text), answer["timestamps"] or [(-100, -100)]
        first, last = pairs[0]
        shared, whole = min(end, last) - max(start, first), max(end, last) - min(start, first)
        tious.append(max(shared, 0) / whole)
    actual = score(rows, "timelens")
    assert sum(tious) / len(tious) == pytest.approx(actual["miou"])
    assert [a["answers"] for a in answers.values()] == [r.answer for r in rows]
    for threshold in (0.3, 0.5, 0.7):
        share = sum(tiou >= threshold for tiou in tious) / len(tious)
        assert share == pytest.approx(actual[f"recall@{threshold}"])
    assert actual["miou"] != actual["miou_unrounded"]


def test_spans_against_a_grid_of_seconds():
    """Every per-query metric of 3,000 queries: empty, reversed, touching, missing, equal."""
    numbers = np.random.default_rng(0)
    num_queries, num_truths = 3000, 3
    predicted = numbers.integers(0, 15, (num_queries, 2))
    starts = numbers.integers(0, 14, (num_queries, num_truths))
    truth = np.stack([starts, starts + numbers.integers(1, 8, starts.shape)], -1)
    truth[:, 2] = np.where(numbers.random((num_queries, 1)) < 0.5, truth[:, 2], truth[:, 0])
    predicted[::7] = truth[::7, 1]
    answered = numbers.random(num_queries) < 0.9
    right = numbers.random(num_queries) < 0.6
    seconds = np.arange(25)
    own = (predicted[:, :1] <= seconds) & (seconds < predicted[:, 1:]) & answered[:, None]
    true = (truth[..., :1] <= seconds) & (seconds < truth[..., 1:])  # [queries, truths, seconds]
    both = (own[:, None] & true).sum(2)
    tious = (both / (own[:, None] | true).sum(2)).max(1)
    iops = both.max(1) / np.maximum(own.sum(1), 1)
    rows = [
        row(str(i), p if known else None, t, right=r)
        for i, (p, t, known, r) in enumerate(
            zip(predicted.tolist(), truth.tolist(), answered, right.tolist(), strict=True)
        )
    ]
    assert (tious == 0.5).sum() > 50 and (iops == 0.5).sum() > 50

    def shares(values, name, *limits):
        return {f"{name}@{limit}": (values >= limit).mean() for limit in limits}

    counts = {"questions": num_queries, "grounded": num_queries}
    common = {"accuracy": right.mean(), "miou": tious.mean(), **counts}
    assert score(rows, "nextgqa") == pytest.approx(
        {
            "acc@gqa": (right & (iops >= 0.5)).mean(),
            "miop": iops.mean(),
            **shares(iops, "iop", 0.3, 0.5),
            **shares(tious, "iou", 0.3, 0.5),
            **common,
        }
    )
    assert score(rows, "rextime") == pytest.approx(
        {
            **shares(tious, "recall", 0.3, 0.5),
            "acc@iou0.5": (right & (tious >= 0.5)).mean(),
            **common,
        }
    )
    grounding = {"miou": tious.mean(), "queries": num_queries, "parse_failures": (~answered).sum()}
    assert score(rows, "grounding") == pytest.approx(
        {**shares(tious, "recall", 0.3, 0.5, 0.7), **grounding}
    )
    strict = score(rows, "grounding", strict=True)
    assert strict["recall@0.5"] == pytest.approx((tious > 0.5).mean())
    highlights = score(rows, "qvhighlights")
    assert highlights["recall@0.7"] == pytest.approx((tious >= 0.7).mean())


def test_lengths_keep_their_own_true_windows_only():
    chance = random.Random(3)
    limits = {"short": range(1, 11), "middle": range(11, 31), "long": range(31, 151)}
    rows = []
    for i in range(60):
        starts = [chance.randrange(100) for _ in range(3)]
        truth = [(s, s + chance.choice([2, 9, 10, 11, 29, 30, 31, 50])) for s in starts]
        windows = [(s + chance.randrange(3), e) for s, e in chance.sample(truth, 2)]
        rows.append(row(str(i), windows[0], truth[: chance.randint(1, 3)], windows=windows))
    actual = score(rows, "qvhighlights")
    for name, lengths in limits.items():
        kept = [
            replace(r, truth=spans)
            for r in rows
            if (spans := tuple(s for s in r.truth if s[1] - s[0] in lengths))
        ]
        assert actual[f"queries_{name}"] == len(kept)
        assert actual[f"map_{name}"] == pytest.approx(score(kept, "qvhighlights")["map"])


def test_thresholds_are_the_nearest_floats():
    assert THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@pytest.mark.parametrize("metrics", SETS)
def test_nothing_to_score(metrics):
    for rows in ([], [row("a")]):
        with pytest.raises(ValueError, match=f"^none of {len(rows)} rows") as error:
            score(rows, metrics)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": [1]}, "row 'q': [1] is not a span in seconds"),
        ({"predicted": [1, "x"]}, "is not a span in seconds"),
        ({"predicted": 3}, "is not a span in seconds"),
        ({"predicted": [0, math.nan]}, "is not a span in seconds"),
        ({"windows": [[0, 1], [2]]}, "row 'q': [2] is not a span in seconds"),
        ({"windows": 7}, "row 'q': 7 is not a list of spans"),
        ({"truth": None}, "row 'q': None is not a list of spans"),
        ({"truth": [[5, 5]]}, "row 'q': true span 5 to 5 is not start < end"),
        ({"right": "A"}, "row 'q': right is 'A', not true, false or null"),
        ({"duration_s": 0}, "row 'q': duration_s 0 is not a positive number"),
        ({"duration_s": "9"}, "row 'q': duration_s '9' is not a positive number"),
    ],
)
def test_a_row_that_is_none_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        row(**{"name": "q", "predicted": (0, 1), "truth": [(0, 1)]} | changes)
    assert message in str(error.value)


def test_what_a_row_or_a_call_lacks_is_named():
    with pytest.raises(ValueError, match="row 'q' has no 'truth'"):
        EvaluationRow.from_json({"id": "q", "predicted": None})
    with pytest.raises(ValueError, match="no metrics 'iou'; there are grounding, timelens"):
        score([], "iou")
    with pytest.raises(ValueError, match="strict applies to grounding only; rextime"):
        score([row("q", (0, 1), [(0, 1)], right=True)], "rextime", strict=True)
    with pytest.raises(ValueError, match="no breakdown by 'length'; there are duration, share"):
        breakdown([], "length")
    with pytest.raises(ValueError, match="no rows to break down"):
        breakdown([], "all")


def test_breakdown_by_duration_and_share():
    durations = [29.9, 30, 59.9, 60, 179.9, 180, 599.9, 600, 5000, None]
    rows = [row(str(i), (0, 5), [(0, 10)], duration_s=d) for i, d in enumerate(durations)]
    actual = breakdown(rows, "duration", resamples=10)
    assert {name: bucket["queries"] for name, bucket in actual.items()} == {
        "<30 s": 1,
        "30-60 s": 2,
        "1-3 min": 2,
        "3-10 min": 2,
        ">=10 min": 2,
        "unknown": 1,
    }
    assert list(actual)[-1] == "unknown"
    assert actual["30-60 s"]["miou"] == {"mean": 0.5, "interval": (0.5, 0.5), "queries": 2}
    assert actual["30-60 s"]["accuracy"] is None
    # The longest true span counts; one that ends past the video is still of the last bucket.
    truths = [[(0, 4), (50, 51)], [(0, 5)], [(0, 10)], [(0, 25)], [(0, 3), (3, 53)], [(0, 120)], []]
    rows = [row(str(i), None, truth, duration_s=100) for i, truth in enumerate(truths)]
    actual = breakdown(rows, "share", resamples=10)
    counts = [(name, bucket["queries"]) for name, bucket in actual.items()]
    kinds = ["<5%", "5-10%", "10-25%", "25-50%", ">=50%", "unknown"]
    assert counts == list(zip(kinds, [1, 1, 1, 1, 2, 1], strict=True))
    assert actual["unknown"]["miou"] is None


def test_breakdown_resamples_videos():
    # As in the bootstrap by hand: video a holds two queries of 0, b one of 1.
    rows = [
        row("1", None, [(0, 1)], category="x", video="a"),
        row("2", (0, 1), [(0, 1)], category="x", video="b", right=True),
        row("3", (5, 6), [(0, 1)], category="x", video="a", right=False),
        row("4", (0, 1), [(0, 2)]),
    ]
    actual = breakdown(rows, "category", confidence=0.9)
    assert list(actual) == ["x", "unknown"]
    assert actual["x"] == {
        "queries": 3,
        "miou": {"mean": 1 / 3, "interval": (0, 1), "queries": 3},
        "accuracy": {"mean": 0.5, "interval": (0, 1), "queries": 2},
    }
    whole = breakdown(rows, "all", seed=1)["all"]
    assert whole["queries"] == 4 and whole["miou"]["mean"] == pytest.approx(1.5 / 4)
    assert whole == breakdown(rows, "all", seed=1)["all"]
    # Queries of unknown videos stand for themselves.
    alone = [row(str(i), (0, 1), [(0, 1 + i)]) for i in range(5)]
    low, high = breakdown(alone, "all")["all"]["miou"]["interval"]
    assert low < high

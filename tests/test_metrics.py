import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd import metrics

_SPANS = st.tuples(st.integers(0, 40), st.integers(1, 40)).map(
    lambda pair: (pair[0] / 4, (pair[0] + pair[1]) / 4)
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 10), (0, 10), 1.0),
        ((0, 10), (5, 15), 5 / 15),
        ((0, 10), (2, 4), 0.2),
        ((0, 10), (10, 20), 0.0),
        ((0, 10), (12, 20), 0.0),
        ((10, 0), (0, 10), 0.0),  # reversed
        ((5, 5), (0, 10), 0.0),  # empty
        ((5, 5), (5, 5), 0.0),
    ],
)
def test_tiou(a, b, expected):
    assert metrics.tiou(a, b) == pytest.approx(expected)


@given(_SPANS, _SPANS)
def test_tiou_is_symmetric_and_within_one(a, b):
    assert metrics.tiou(a, b) == metrics.tiou(b, a)
    assert 0 <= metrics.tiou(a, b) <= 1
    assert (metrics.tiou(a, b) == 1) == (a == b)


def test_recall_thresholds():
    tious = [0.2, 0.5, 0.9, 0.0]
    assert metrics.recall_at(tious, 0.5) == 0.5
    assert metrics.recall_at(tious, 0.5, strict=True) == 0.25
    assert metrics.miou(tious) == pytest.approx(0.4)


def test_summary_by_hand():
    summary = metrics.summarize(
        greedy=[(0, 10), (0, 4), None],
        sampled=[[(0, 10), None], [(0, 5)], [(8, 9), (0, 2)]],
        truth=[[(0, 10)], [(0, 10), (0, 8)], [(0, 4)]],
    )
    assert summary == pytest.approx(
        {
            "miou": (1 + 0.5 + 0) / 3,  # the better of 0.4 and 0.5 counts
            "sampled_miou": (0.5 + 0.625 + 0.25) / 3,
            "recall@0.3": 2 / 3,
            "recall@0.5": 2 / 3,
            "recall@0.7": 1 / 3,
            "parse_failures": 1,
            "queries": 3,
        }
    )


@pytest.mark.parametrize("sampled", [[], [[], []]])
def test_nothing_sampled_is_null_not_zero(sampled):
    summary = metrics.summarize([(0, 1), None], sampled, [[(0, 1)], [(0, 1)]])
    assert summary["sampled_miou"] is None
    assert summary["miou"] == 0.5


def test_summary_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="1 greedy and 0 sampled answers for 2 queries"):
        metrics.summarize([None], [], [[(0, 1)], [(0, 1)]])
    with pytest.raises(ValueError, match="no queries"):
        metrics.summarize([], [], [])
    with pytest.raises(ValueError, match="no true span"):
        metrics.summarize([None], [], [[]])


def test_paired_interval():
    before = np.linspace(0, 0.5, 200).tolist()
    noise = np.random.default_rng(1).normal(0, 0.1, 200)
    after = (np.array(before) + 0.1 + noise).tolist()
    low, high = metrics.paired_interval(before, after)
    assert (low, high) == metrics.paired_interval(before, after)
    # The normal approximation of the same interval; pairing has removed the spread of `before`.
    mean, error = 0.1 + noise.mean(), noise.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=2e-3)
    narrow = metrics.paired_interval(before, after, confidence=0.5, resamples=500, seed=3)
    assert low < narrow[0] < narrow[1] < high
    assert metrics.paired_interval([0.2], [0.5]) == pytest.approx((0.3, 0.3))
    with pytest.raises(ValueError, match="do not pair up"):
        metrics.paired_interval([0.2], [0.5, 0.6])


def test_ceiling_by_hand():
    assert metrics.nearest_representable((2, 4), [0, 2, 4, 6]) == 1
    assert metrics.nearest_representable((2.5, 4), [0, 2, 4, 6]) == pytest.approx(0.75)
    assert metrics.nearest_representable((2.5, 3), [6, 2, 0, 4]) == pytest.approx(0.25)
    assert metrics.nearest_representable((7, 8), [0, 2, 4, 6]) == 0
    assert metrics.nearest_representable((1, 2), []) == 0


@given(_SPANS, st.lists(st.integers(0, 40).map(lambda t: t / 2), max_size=8))
def test_ceiling_against_every_pair(span, timestamps):
    pairs = itertools.product(timestamps, timestamps)
    best = max((metrics.tiou(span, pair) for pair in pairs), default=0)
    assert metrics.nearest_representable(span, timestamps) == best


def test_best_constant_by_hand():
    assert metrics.best_constant([(2, 5)]) == ((2, 5), 1)
    # (0, 2) scores 1, 1 and 0; (0, 10) scores 0.2, 0.2 and 1.
    assert metrics.best_constant([(0, 2), (0, 2), (0, 10)]) == ((0, 2), pytest.approx(2.2 / 3))


@given(st.lists(_SPANS, min_size=1, max_size=5))
def test_best_constant_against_a_fine_grid(spans):
    span, score = metrics.best_constant(spans)
    assert score == pytest.approx(metrics.miou([metrics.tiou(span, s) for s in spans]))
    edges = np.arange(0, 21, 0.5)
    grid = itertools.combinations(edges, 2)
    assert score >= max(metrics.miou([metrics.tiou(s, g) for s in spans]) for g in grid) - 1e-9


def test_best_constant_of_many_spans():
    starts = np.random.default_rng(0).uniform(0, 5, 500)
    spans = [(start, start + 4) for start in starts.tolist()]
    exact = metrics.best_constant(spans[:60])[1]
    assert metrics.best_constant(spans[:60], max_edges=40)[1] == pytest.approx(exact, abs=0.01)
    assert metrics.best_constant(spans)[1] > 0.5

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.scoring import metrics

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


def test_tiou_and_iop_against_a_grid_of_seconds():
    # Each second is a cell; spans touch, repeat, are empty or reversed. Whole numbers below 2^53
    # divide to the nearest float, so even equality is exact.
    random = np.random.default_rng(0)
    pairs = random.integers(0, 12, (5000, 2, 2))
    pairs[:, 1].sort(axis=1)
    pairs[:, 1, 1] += 1  # the truth is never empty
    pairs[:500, 0] = pairs[:500, 1]
    seconds = np.arange(13)
    cells = (pairs[..., :1] <= seconds) & (seconds < pairs[..., 1:])  # [pairs, 2, seconds]
    both, either, own = cells.all(1).sum(1), cells.any(1).sum(1), cells[:, 0].sum(1)
    for (a, b), overlap, union, length in zip(pairs.tolist(), both, either, own, strict=True):
        assert metrics.tiou(a, b) == overlap / union
        assert metrics.best_iop(a, [b]) == (overlap / length if length else 0)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (None, 0),
        ((2, 4), 1),
        ((0, 20), 0.25),  # the best true span, not their sum
        ((8, 12), 0.5),
        ((10, 12), 0),  # touching
        ((6, 6), 0),  # of no length, where NExT-GQA's own scorer says 1
        ((6, 2), 0),
    ],
)
def test_iop(predicted, expected):
    assert metrics.best_iop(predicted, [(0, 4), (5, 10)]) == expected


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


def test_bootstrap_of_videos_by_hand():
    # Of two videos one draws twice the first, twice the second, or each once: 0, 1, or 1/3, with
    # probabilities 1/4, 1/4, 1/2.
    values, videos = [0, 1, 0], ["a", "b", "a"]
    assert metrics.bootstrap(values, groups=videos) == (0, 1)
    assert metrics.bootstrap(values, confidence=0.4, groups=videos) == pytest.approx((1 / 3, 1 / 3))
    assert metrics.bootstrap(values, groups="aaa") == pytest.approx((1 / 3, 1 / 3))
    assert metrics.bootstrap(values, groups="abc") == metrics.bootstrap(values)


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 2, 3, 3]])
def test_bootstrap_against_every_resample(groups):
    random = np.random.default_rng(4)
    values = random.random(6).tolist()
    members = [[v] for v in values]
    if groups:
        members = [[v for v, g in zip(values, groups, strict=True) if g == k] for k in range(4)]
    means = [
        np.mean([v for video in draw for v in video])
        for draw in itertools.product(members, repeat=len(members))
    ]
    low, high = metrics.bootstrap(values, 0.8, resamples=40_000, seed=1, groups=groups)
    assert np.quantile(means, 0.09) <= low <= np.quantile(means, 0.11)
    assert np.quantile(means, 0.89) <= high <= np.quantile(means, 0.91)


def test_queries_of_one_video_are_not_independent():
    videos = np.random.default_rng(2).random(100)
    values, groups = np.repeat(videos, 4).tolist(), np.repeat(range(100), 4).tolist()
    low, high = metrics.bootstrap(values)
    wide_low, wide_high = metrics.bootstrap(values, groups=groups)
    assert (wide_high - wide_low) / (high - low) == pytest.approx(2, rel=0.05)
    zeros = [0.0] * len(values)
    assert metrics.paired_interval(zeros, values, groups=groups) == (wide_low, wide_high)


def test_bootstrap_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="0 values and 0 groups"):
        metrics.bootstrap([])
    with pytest.raises(ValueError, match="2 values and 1 groups"):
        metrics.bootstrap([1, 2], groups=["a"])
    for settings in ({"confidence": 1}, {"confidence": 0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="out of range"):
            metrics.bootstrap([1, 2], **settings)


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

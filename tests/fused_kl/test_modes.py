"""Modes, estimators and supports of the divergences, against their dense definitions in fp64."""

from math import log
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_kl import linear_reverse_kl, reference, topk_reverse_kl

BETAS = (0.0, 0.3, 1.0)
LEAVES = ("student_hidden", "student_lm_head", "student_bias")
ARGUMENTS = ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head")


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Tiles of 100 columns and some rows, so that small shapes have many, with ragged ends."""
    monkeypatch.setattr("fused_kl.tiles.MIN_TILE_COLUMNS", 100)
    monkeypatch.setattr("fused_kl.tiles.LOWMEM_BYTES", {"cpu": 100 * 5 * 16, "gpu": 100 * 5 * 16})


def sides(tensors):
    return tuple(getattr(tensors, name) for name in ARGUMENTS)


def rules_of(tensors) -> dict[str, Any]:
    return dict(
        token_weights=tensors.token_weights.masked_fill(tensors.token_ids % 4 == 0, 0),
        allowed_columns=tensors.allowed_columns,
        temperature=0.7,
        student_bias=tensors.student_bias,
        teacher_bias=tensors.teacher_bias,
        softcap=12.0,
        logit_scale=1.3,
    )


def assert_same(tensors, out, dense, direction=None, tolerance=1e-9):
    """Loss, details and every gradient; along `direction` where the loss is a vector."""
    loss, *details = dense
    for actual, truth in zip(
        (out.loss, out.token_kl, out.student_entropy, out.teacher_entropy),
        (loss, *details),
        strict=True,
    ):
        assert_close(actual.detach(), truth.detach(), rtol=tolerance, atol=1e-10)
    leaves = [leaf for leaf in (getattr(tensors, name) for name in LEAVES) if leaf is not None]
    gradients = torch.autograd.grad(out.loss, leaves, direction)
    for actual, truth in zip(gradients, torch.autograd.grad(loss, leaves, direction), strict=True):
        assert_close(actual, truth, rtol=tolerance, atol=1e-11)


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk_size", [5, "auto"])
def test_every_option_at_once(case, mode, beta, chunk_size, narrow_tiles):
    tensors = case.build(teacher_vocab=1201, bias=True)
    rules = rules_of(tensors)
    out = linear_reverse_kl(*sides(tensors), **rules, beta=beta, mode=mode, chunk_size=chunk_size)
    assert_same(tensors, out, reference.linear_reverse_kl(*sides(tensors), **rules, beta=beta))
    assert out.plan.mode == mode
    assert (out.plan.columns == 1187) == (mode == "fast")


@pytest.mark.parametrize("beta", BETAS)
def test_a_loss_per_row(case, beta, narrow_tiles):
    tensors = case.build(teacher_vocab=1201, bias=True)
    rules = rules_of(tensors) | dict(beta=beta, reduction="none")
    direction = torch.linspace(-1, 2, 13, dtype=torch.float64)
    out = linear_reverse_kl(*sides(tensors), **rules)
    assert out.loss.shape == (13,) and out.plan.mode == "lowmem"
    assert_same(tensors, out, reference.linear_reverse_kl(*sides(tensors), **rules), direction)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(case, beta, narrow_tiles):
    tensors = case.build(num_rows=3, vocab=11, student_size=4, teacher_size=5, logit_std=1.0)
    rules: dict[str, Any] = dict(beta=beta, reduction="none", temperature=1.3, softcap=4.0)
    rules["token_weights"] = tensors.token_weights

    def loss(hidden, lm_head, bias):
        return linear_reverse_kl(
            hidden, lm_head, *sides(tensors)[2:], student_bias=bias, **rules
        ).loss

    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (*sides(tensors)[:2], bias))


@pytest.mark.parametrize("vocab", [129_920, 151_936])
def test_real_vocabularies(case, vocab):
    tensors = case.build(num_rows=3, vocab=vocab, student_size=4, dtype=torch.float64)
    for beta in BETAS:
        out = linear_reverse_kl(*sides(tensors), mode="lowmem", beta=beta)
        assert_same(tensors, out, reference.linear_reverse_kl(*sides(tensors), beta=beta))


def test_lowmem_allows_a_second_backward(case, narrow_tiles):
    tensors = case.build()
    leaves = sides(tensors)[:2]
    out = linear_reverse_kl(*sides(tensors), mode="lowmem")
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(out.loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("trained", ["student_hidden", "student_lm_head", "student_bias", None])
def test_lowmem_with_one_trained_input_or_none(case, trained, narrow_tiles):
    tensors = case.build(bias=True)
    for name in LEAVES:
        getattr(tensors, name).requires_grad_(name == trained)
    out = linear_reverse_kl(*sides(tensors), student_bias=tensors.student_bias, mode="lowmem")
    truth, *_ = reference.linear_reverse_kl(*sides(tensors), student_bias=tensors.student_bias)
    assert_close(out.loss, truth)
    assert out.loss.requires_grad == (trained is not None)
    if trained:
        leaf = getattr(tensors, trained)
        gradients, wanted = (torch.autograd.grad(loss, leaf)[0] for loss in (out.loss, truth))
        assert_close(gradients, wanted)


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_nan_in_masked_rows_and_no_rows(case, mode, num_rows, narrow_tiles):
    tensors = case.build(num_rows=num_rows, bias=True)
    with torch.no_grad():
        tensors.student_hidden[:2] = torch.nan
        tensors.teacher_hidden[:2] = torch.inf
    weights = torch.ones(num_rows)
    weights[:2] = 0
    rules: dict[str, Any] = dict(token_weights=weights, student_bias=tensors.student_bias)
    out = linear_reverse_kl(*sides(tensors), **rules, mode=mode, beta=0.4)
    dense = reference.linear_reverse_kl(*sides(tensors), **rules, beta=0.4)
    if num_rows:
        assert_same(tensors, out, dense)
    else:
        out.loss.backward()
        assert out.loss.item() == 0
        assert all((getattr(tensors, name).grad == 0).all() for name in LEAVES)


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
def test_logprobs_of_given_tokens(case, mode, narrow_tiles):
    tensors = case.build()
    rules: dict[str, Any] = dict(allowed_columns=tensors.allowed_columns, temperature=1.3)
    out = linear_reverse_kl(*sides(tensors), **rules, token_ids=tensors.token_ids, mode=mode)
    truth, _ = reference.linear_logprobs(*sides(tensors)[:2], tensors.token_ids, **rules)
    assert truth.isneginf().any() and truth.isfinite().any()
    assert out.student_logprobs is not None
    assert_close(out.student_logprobs, truth.detach(), rtol=1e-10, atol=1e-10)


def test_mode_and_chunk_size_change_only_rounding(case, narrow_tiles):
    tensors = case.build(dtype=torch.float32)
    losses, gradients = [], []
    for mode, chunk_size in (("fast", 1), ("fast", "auto"), ("lowmem", 3), ("lowmem", "auto")):
        out = linear_reverse_kl(*sides(tensors), mode=mode, chunk_size=chunk_size)
        losses.append(out.loss.detach())
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, sides(tensors)[:2])])
        )
    for loss, gradient in zip(losses, gradients, strict=True):
        assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
def test_repeats_bit_by_bit(case, mode):
    results = []
    for _ in range(3):
        tensors = case.build(num_rows=40, dtype=torch.bfloat16)
        out = linear_reverse_kl(*sides(tensors), mode=mode, chunk_size=16)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, sides(tensors)[:2])))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


# The k likeliest columns of one side.


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_topk(case, tail, support, k):
    tensors = case.build(teacher_vocab=1201, bias=True)
    options: dict[str, Any] = dict(k=k, tail=tail, support=support)
    rules = rules_of(tensors)
    out = topk_reverse_kl(*sides(tensors), **options, **rules, chunk_size=5)
    assert_same(tensors, out, reference.linear_reverse_kl(*sides(tensors), **options, **rules))
    if k == 1 and not tail:
        assert out.loss.item() == 0


@pytest.mark.parametrize("tail", [False, True])
def test_topk_of_the_whole_vocabulary_is_the_reverse_kl(case, tail):
    tensors = case.build()
    whole = linear_reverse_kl(*sides(tensors))
    actual = topk_reverse_kl(*sides(tensors), k=1187, tail=tail)
    assert_close(actual.loss, whole.loss)
    leaves = sides(tensors)[:2]
    pair = (torch.autograd.grad(out.loss, leaves) for out in (actual, whole))
    for a, b in zip(*pair, strict=True):
        assert_close(a, b)


def test_topk_by_hand():
    # The teacher's two likeliest of p = (.5, .25, .25) and q = (.3, .6, .1) are the first two:
    # renormalised (2/3, 1/3) and (1/3, 2/3).
    student, teacher = (
        torch.tensor([[0.5, 0.25, 0.25]]).log(),
        torch.tensor([[0.3, 0.6, 0.1]]).log(),
    )
    eye = torch.eye(3)
    actual = topk_reverse_kl(student, eye, teacher, eye, k=2)
    assert actual.loss.item() == pytest.approx(log(2) / 3, rel=1e-5)
    actual = topk_reverse_kl(student, eye, teacher, eye, k=2, tail=True)
    exact = 0.5 * log(0.5 / 0.3) + 0.25 * log(0.25 / 0.6) + 0.25 * log(0.25 / 0.1)
    assert actual.loss.item() == pytest.approx(exact, rel=1e-5)


# The estimator on sampled tokens.


def test_sampled(case):
    tensors = case.build(teacher_vocab=1201, bias=True)
    rules = rules_of(tensors)
    out = linear_reverse_kl(
        *sides(tensors), **rules, token_ids=tensors.token_ids, estimator="sampled", chunk_size=5
    )
    value, surrogate = reference.sampled_reverse_kl(*sides(tensors), tensors.token_ids, **rules)
    full = linear_reverse_kl(*sides(tensors), **rules, token_ids=tensors.token_ids)
    assert_close(out.loss.detach(), value)
    for name in ("token_kl", "student_entropy", "teacher_entropy", "student_logprobs"):
        assert_close(getattr(out, name), getattr(full, name), rtol=1e-9, atol=1e-10)
    leaves = [getattr(tensors, name) for name in LEAVES]
    gradients = torch.autograd.grad(out.loss, leaves)
    for actual, truth in zip(gradients, torch.autograd.grad(surrogate, leaves), strict=True):
        assert_close(actual, truth, rtol=1e-9, atol=1e-11)


# torch.compile sees one node.


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (linear_reverse_kl, dict(mode="fast")),
        (linear_reverse_kl, dict(mode="lowmem", beta=0.3)),
        (linear_reverse_kl, dict(estimator="sampled")),
        (topk_reverse_kl, dict(k=5, tail=True)),
    ],
)
def test_compiles_whole(case, function, options):
    tensors = case.build(num_rows=6, vocab=50, bias=True, dtype=torch.float32)

    def loss(hidden, head, bias):
        out = function(
            hidden * 1.0,
            head,
            *sides(tensors)[2:],
            student_bias=bias,
            token_weights=tensors.token_weights,
            token_ids=tensors.token_ids,
            allowed_columns=tensors.allowed_columns,
            **options,
        )
        return out.loss * 2, out.token_kl

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [getattr(tensors, name) for name in LEAVES]
    results = []
    for call in (loss, compiled):
        value, token_kl = call(*leaves)
        results.append((value.detach(), token_kl, *torch.autograd.grad(value, leaves)))
    for eager, gradients in zip(*results, strict=True):
        assert_close(gradients, eager, rtol=1e-6, atol=1e-7)
    assert not results[1][1].requires_grad


@pytest.mark.parametrize("name", ["fast", "lowmem"])
@pytest.mark.parametrize("ids", [True, False])
def test_opcheck(case, name, ids):
    from fused_kl import ops
    from fused_kl.arguments import DivergenceInputs, DivergenceOptions

    tensors = case.build(num_rows=5, vocab=23, bias=True, dtype=torch.float32)
    inputs = DivergenceInputs(
        *(tensors.student_hidden, tensors.student_lm_head, tensors.student_bias),
        *(tensors.teacher_hidden, tensors.teacher_lm_head, tensors.teacher_bias),
        *(tensors.token_weights, tensors.token_ids if ids else None, tensors.allowed_columns),
    )
    options = DivergenceOptions(0.7, 9.0, beta=0.5, mode=name, chunk_size=3)
    needs_grad = (True, True, False) if name == "fast" else ()
    torch.library.opcheck(getattr(ops, name), (*inputs, *options, *needs_grad))

"""What holds for any input: invariances, signs, and agreement with the definition."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_kl import linear_policy_loss, linear_reverse_kl, reference

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

shapes = st.fixed_dictionaries(
    dict(
        num_rows=st.integers(0, 9),
        vocab=st.integers(2, 40),
        student_size=st.integers(1, 6),
        teacher_size=st.integers(1, 6),
        logit_std=st.sampled_from([0.1, 1.0, 10.0]),
        seed=st.integers(0, 10_000),
    )
)
betas = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99)


def run(tensors, function=linear_reverse_kl, **options):
    sides = (
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )
    out = function(*sides, **options)
    loss, token_kl = (out[0], out[1]) if isinstance(out, tuple) else (out.loss, out.token_kl)
    return loss.detach(), token_kl.detach(), *torch.autograd.grad(loss, sides[:2])


def close(left, right):
    for a, b in zip(left, right, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)


@QUICK
@given(
    shapes,
    betas,
    st.integers(1, 10),
    st.floats(0.3, 3.0),
    st.booleans(),
    st.sampled_from(["fast", "lowmem"]),
    st.none() | st.floats(5.0, 50.0),
)
def test_agrees_with_the_definition(
    case, shape, beta, chunk_size, temperature, banned, mode, softcap
):
    tensors = case.build(**shape)
    tensors.allowed_columns[0] = True
    options: dict[str, Any] = dict(beta=beta, temperature=temperature, softcap=softcap)
    options["token_weights"] = tensors.token_weights.masked_fill(tensors.token_ids % 3 == 0, 0)
    if banned:
        options["allowed_columns"] = tensors.allowed_columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_kl.tiles.MIN_TILE_COLUMNS", 3)
        patch.setattr("fused_kl.tiles.LOWMEM_BYTES", {"cpu": 16 * 7 * 3, "gpu": 1})
        fused = run(tensors, chunk_size=chunk_size, mode=mode, **options)
    close(fused, run(tensors, reference.linear_reverse_kl, **options))


@QUICK
@given(shapes, betas)
def test_is_never_negative_and_the_mixture_is_bounded(case, shape, beta):
    token_kl = run(case.build(**shape), beta=beta)[1]
    assert (token_kl >= 0).all()
    if 0 < beta < 1:
        bound = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
        assert (token_kl <= bound + 1e-6).all()


@QUICK
@given(shapes, betas, st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(case, shape, beta, random):
    tensors = case.build(**shape)
    order = list(range(shape["num_rows"]))
    random.shuffle(order)
    loss, token_kl, hidden_grad, head_grad = run(tensors, beta=beta, chunk_size=4)
    with torch.no_grad():
        tensors.student_hidden.copy_(tensors.student_hidden[order])
        tensors.teacher_hidden.copy_(tensors.teacher_hidden[order])
    shuffled = run(tensors, beta=beta, chunk_size=3)
    close(shuffled, (loss, token_kl[order], hidden_grad[order], head_grad))


@QUICK
@given(shapes, betas)
def test_a_constant_added_to_the_logits_changes_nothing(case, shape, beta):
    tensors = case.build(**shape)
    constant = torch.full((shape["vocab"],), 3.0, dtype=torch.float64)
    plain = run(tensors, beta=beta)
    close(run(tensors, beta=beta, student_bias=constant, teacher_bias=-constant), plain)


@QUICK
@given(shapes, betas)
def test_splitting_the_batch_adds_up(case, shape, beta):
    tensors = case.build(**shape)
    half = shape["num_rows"] // 2
    first = tensors.token_weights.clone()
    first[half:] = 0
    second = tensors.token_weights - first
    whole = run(tensors, beta=beta, token_weights=tensors.token_weights)
    parts = [run(tensors, beta=beta, token_weights=weights) for weights in (first, second)]
    close([a + b for a, b in zip(*parts, strict=True)], whole)


@QUICK
@given(shapes)
def test_reverse_and_forward_are_one_function_with_the_sides_swapped(case, shape):
    tensors = case.build(**shape)
    student = (tensors.student_hidden.detach(), tensors.student_lm_head.detach())
    teacher = (tensors.teacher_hidden, tensors.teacher_lm_head)
    for beta in (0.0, 0.25, 0.5):
        left = linear_reverse_kl(*student, *teacher, beta=beta)
        right = linear_reverse_kl(*teacher, *student, beta=1 - beta)
        assert_close(left.token_kl, right.token_kl, rtol=1e-8, atol=1e-10)
        assert_close(left.student_entropy, right.teacher_entropy)


@pytest.mark.parametrize("allowed", [False, True])
def test_the_sampled_loss_has_the_gradient_of_the_reverse_kl_in_expectation(case, allowed):
    """Every token of a small vocabulary, weighted by its probability: sign and scale included."""
    tensors = case.build(num_rows=2, vocab=11, logit_std=1.0)
    student = (tensors.student_hidden, tensors.student_lm_head)
    teacher = (tensors.teacher_hidden, tensors.teacher_lm_head)
    columns = torch.arange(11)[tensors.allowed_columns | torch.tensor(not allowed)]
    options: dict[str, Any] = dict(allowed_columns=tensors.allowed_columns) if allowed else {}
    repeat = len(columns)
    ids = columns.repeat(2)
    hidden, teacher_hidden = (x.repeat_interleave(repeat, 0) for x in (student[0], teacher[0]))
    log_p, _ = reference.linear_logprobs(hidden.detach(), student[1].detach(), ids, **options)
    log_q, _ = reference.linear_logprobs(teacher_hidden, teacher[1], ids, **options)
    sampled = linear_policy_loss(
        hidden,
        student[1],
        ids,
        advantages=log_q - log_p,
        token_weights=log_p.exp(),
        **options,
    )
    exact = linear_reverse_kl(*student, *teacher, **options)
    assert_close(sampled.loss.detach(), exact.loss.detach())
    close(torch.autograd.grad(sampled.loss, student), torch.autograd.grad(exact.loss, student))

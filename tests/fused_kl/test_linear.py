"""linear_reverse_kl against the dense definition in fp64, feature by feature."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_kl import linear_reverse_kl, reference

BETAS = (0.0, 0.3, 0.5, 1.0)


def both(tensors, *, chunk_size: Any = 5, **changes):
    """Losses, details and gradients of the fused and the dense version, on the same tensors."""
    sides = (
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )
    options: dict[str, Any] = dict(
        student_bias=tensors.student_bias, teacher_bias=tensors.teacher_bias, **changes
    )
    leaves = [tensors.student_hidden, tensors.student_lm_head]
    if tensors.student_bias is not None:
        leaves.append(tensors.student_bias)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    fused = linear_reverse_kl(*sides, chunk_size=chunk_size, **options)
    dense_loss, *dense = reference.linear_reverse_kl(*sides, **options)
    details = (fused.token_kl, fused.student_entropy, fused.teacher_entropy)
    return (
        (fused.loss, *details, *torch.autograd.grad(fused.loss * 0.7, leaves)),
        (dense_loss, *dense, *torch.autograd.grad(dense_loss * 0.7, leaves)),
    )


def assert_same(pair, rtol=1e-10, atol=1e-12):
    for fused, dense in zip(*pair, strict=True):
        assert_close(fused.detach(), dense.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("logit_std", [1.0, 10.0])
def test_divergence_and_every_gradient(case, beta, logit_std):
    assert_same(both(case.build(logit_std=logit_std), beta=beta))


@pytest.mark.parametrize("beta", BETAS)
def test_everything_at_once(case, beta):
    tensors = case.build(teacher_vocab=1201, bias=True)
    pair = both(
        tensors,
        beta=beta,
        temperature=0.7,
        token_weights=tensors.token_weights,
        allowed_columns=tensors.allowed_columns,
    )
    assert_same(pair)


@pytest.mark.parametrize("teacher_vocab", [1150, 1201])
def test_unequal_vocabularies_are_cut_to_the_smaller(case, teacher_vocab):
    tensors = case.build(teacher_vocab=teacher_vocab, bias=True)
    pair = both(tensors, allowed_columns=tensors.allowed_columns)
    assert_same(pair)
    gradient = pair[0][5]
    assert gradient.shape == tensors.student_lm_head.shape
    assert (gradient[teacher_vocab:] == 0).all()


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, "auto"])
def test_chunk_size_changes_nothing(case, num_rows, chunk_size):
    assert_same(both(case.build(num_rows=num_rows), chunk_size=chunk_size))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", [129_920, 151_936])
def test_large_vocabulary(case, beta, vocab):
    # A thread's block holds one row at most, so that the last block is ragged.
    assert_same(both(case.build(num_rows=3, vocab=vocab, student_size=4), beta=beta), 1e-9)


@pytest.mark.parametrize("all_masked", [False, True])
def test_no_valid_token_gives_a_connected_zero(case, all_masked):
    tensors = case.build(num_rows=4 if all_masked else 0, bias=True)
    weights = torch.zeros(4) if all_masked else None
    out = linear_reverse_kl(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
        student_bias=tensors.student_bias,
        token_weights=weights,
    )
    out.loss.backward()
    assert out.loss.item() == 0
    for leaf in (tensors.student_hidden, tensors.student_lm_head, tensors.student_bias):
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_nan_in_masked_rows_does_not_spread(case, beta, mask_dtype):
    tensors = case.build(bias=True)
    with torch.no_grad():
        tensors.student_hidden[[0, 6]] = torch.nan
        tensors.teacher_hidden[[6, 12]] = torch.inf
    weights = torch.ones(13)
    weights[[0, 6, 12]] = 0
    pair = both(tensors, beta=beta, token_weights=weights.to(mask_dtype))
    assert_same(pair)
    assert (pair[0][4][[0, 6, 12]] == 0).all()


def test_banned_columns_get_no_gradient_and_may_hold_anything_finite(case):
    tensors = case.build()
    with torch.no_grad():
        tensors.student_lm_head[~tensors.allowed_columns] = 1e6
    pair = both(tensors, allowed_columns=tensors.allowed_columns)
    assert_same(pair)
    assert (pair[0][5][~tensors.allowed_columns] == 0).all()


def test_minus_inf_in_both_biases_is_a_ban(case):
    tensors = case.build(bias=True)
    banned = ~tensors.allowed_columns
    expected = both(tensors, allowed_columns=tensors.allowed_columns)[0]
    with torch.no_grad():
        tensors.student_bias[banned] = -torch.inf
        tensors.teacher_bias[banned] = -torch.inf
    sides = (tensors.student_hidden, tensors.student_lm_head)
    out = linear_reverse_kl(
        *sides,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
        student_bias=tensors.student_bias,
        teacher_bias=tensors.teacher_bias,
    )
    gradients = torch.autograd.grad(out.loss * 0.7, (*sides, tensors.student_bias))
    assert_same(((out.loss, *gradients), (expected[0], *expected[4:])))


def test_non_contiguous_inputs(case):
    tensors = case.build(num_rows=12)
    expected = both(tensors)[0]
    strided = case.build(num_rows=12)
    for name in ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head"):
        tensor = getattr(strided, name).detach()
        grad = name.startswith("student")
        strided_tensor = torch.stack([tensor, tensor + 1], -1)[..., 0]
        if name.endswith("hidden"):
            strided_tensor = tensor.t().contiguous().t()
        assert not strided_tensor.is_contiguous()
        setattr(strided, name, strided_tensor.requires_grad_(grad))
    assert_same((both(strided)[0], expected))


def test_weights_scale_the_loss_but_not_the_details(case):
    tensors = case.build()
    plain = both(tensors)[0]
    doubled = both(tensors, token_weights=torch.full((13,), -2.0))[0]
    assert_close(doubled[0], -2 * plain[0])
    assert_close(doubled[1], plain[1])
    assert_close(doubled[4], -2 * plain[4])


@pytest.mark.parametrize("trained", ["student_hidden", "student_lm_head", "student_bias"])
def test_one_trained_input_at_a_time(case, trained):
    tensors = case.build(bias=True)
    expected = torch.autograd.grad(
        reference.linear_reverse_kl(
            tensors.student_hidden,
            tensors.student_lm_head,
            tensors.teacher_hidden,
            tensors.teacher_lm_head,
            student_bias=tensors.student_bias,
        )[0],
        getattr(tensors, trained),
    )[0]
    for name in {"student_hidden", "student_lm_head", "student_bias"} - {trained}:
        getattr(tensors, name).requires_grad_(False)
    out = linear_reverse_kl(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
        student_bias=tensors.student_bias,
        chunk_size=4,
    )
    out.loss.backward()
    assert_close(getattr(tensors, trained).grad, expected)


def test_details_are_detached_and_the_loss_is_not(case):
    tensors = case.build(dtype=torch.float32)
    out = linear_reverse_kl(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )
    assert out.loss.requires_grad
    assert out.loss.shape == ()
    for detail in (out.token_kl, out.student_entropy, out.teacher_entropy):
        assert not detail.requires_grad
        assert detail.shape == (13,)
        assert detail.dtype == torch.float32


@pytest.mark.parametrize("trained", [True, False])
def test_logprobs_of_given_tokens_come_along(case, trained):
    tensors = case.build(teacher_vocab=1201, bias=True)
    sides = [tensors.student_hidden, tensors.student_lm_head]
    if not trained:
        sides = [side.detach() for side in sides]
    sides += [tensors.teacher_hidden, tensors.teacher_lm_head]
    columns = min(len(tensors.student_lm_head), len(tensors.teacher_lm_head))
    ids = torch.randint(columns, (13,), generator=torch.Generator().manual_seed(3))
    rules: dict[str, Any] = dict(
        allowed_columns=tensors.allowed_columns,
        temperature=0.7,
        token_weights=tensors.token_weights,
        student_bias=tensors.student_bias.detach(),
    )
    plain = linear_reverse_kl(*sides, **rules, chunk_size=5)
    out = linear_reverse_kl(*sides, **rules, chunk_size=5, token_ids=ids)
    assert plain.student_logprobs is None and out.student_logprobs is not None
    assert_close(out.loss.detach(), plain.loss.detach(), rtol=0, atol=0)
    logits = (sides[0] @ sides[1].T + tensors.student_bias).detach()[:, :columns] / 0.7
    logits[:, ~tensors.allowed_columns[:columns]] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    expected[tensors.token_weights == 0] = 0
    assert (expected == -torch.inf).any() and (expected < 0).sum() > 5
    assert_close(out.student_logprobs, expected, rtol=1e-10, atol=1e-12)
    assert not out.student_logprobs.requires_grad


def test_second_backward_raises(case):
    tensors = case.build()
    out = linear_reverse_kl(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as error:
        out.loss.backward()
    assert str(error.value) == (
        "second backward through a fused loss: its gradients were computed in forward and handed "
        "over by the first backward; compute the loss again"
    )


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(case, beta):
    tensors = case.build(
        num_rows=3, vocab=11, student_size=4, teacher_size=5, logit_std=1.0, bias=True
    )
    allowed = torch.ones(11, dtype=torch.bool)
    allowed[4] = False

    def loss(hidden, lm_head, bias):
        return linear_reverse_kl(
            hidden,
            lm_head,
            tensors.teacher_hidden,
            tensors.teacher_lm_head,
            student_bias=bias,
            token_weights=tensors.token_weights,
            allowed_columns=allowed,
            temperature=1.3,
            beta=beta,
            chunk_size=2,
        ).loss

    leaves = (tensors.student_hidden, tensors.student_lm_head, tensors.student_bias)
    # torch.autograd.gradcheck walks a graph twice, which handed-over gradients forbid.
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        for index in range(leaf.numel()):
            with torch.no_grad():
                element = leaf.view(-1)[index]
                value = element.item()
                element.fill_(value + 1e-6)
                change = loss(*leaves)
                element.fill_(value - 1e-6)
                change -= loss(*leaves)
                element.fill_(value)
            assert_close(gradient.view(-1)[index], change / 2e-6, rtol=1e-6, atol=1e-8)

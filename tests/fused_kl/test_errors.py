"""The user's mistakes: one line that names the argument, what it is, and what is expected."""

from typing import Any

import pytest
import torch

from fused_kl import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    topk_reverse_kl,
)

N, V, H = 3, 11, 4


def divergence(**changes):
    arguments: dict[str, Any] = dict(
        student_hidden=torch.randn(N, H),
        student_lm_head=torch.randn(V, H),
        teacher_hidden=torch.randn(N, H + 1),
        teacher_lm_head=torch.randn(V, H + 1),
    )
    return linear_reverse_kl(**(arguments | changes))


def tokens(function, **changes):
    arguments: dict[str, Any] = dict(
        hidden=torch.randn(N, H),
        lm_head=torch.randn(V, H),
        token_ids=torch.zeros(N, dtype=torch.int64),
    )
    return function(**(arguments | changes))


MISTAKES = [
    (
        dict(student_hidden=torch.randn(1, N, H)),
        "student_hidden has shape [1, 3, 4], expected [N, H]",
    ),
    (dict(teacher_lm_head=torch.randn(V)), "teacher_lm_head has shape [11], expected [V, H]"),
    (
        dict(student_lm_head=torch.randn(V, 9)),
        "student_lm_head has shape [11, 9], expected [V, 4] to match student_hidden",
    ),
    (
        dict(student_lm_head=torch.randn(0, H)),
        "student_lm_head has shape [0, 4], expected at least one row",
    ),
    (
        dict(teacher_hidden=torch.randn(N + 1, H + 1)),
        "teacher_hidden has 4 rows, expected 3 as student_hidden",
    ),
    (dict(student_bias=torch.randn(V + 1)), "student_bias has shape [12], expected [11]"),
    (dict(token_ids=torch.zeros(N + 1).long()), "token_ids has shape [4], expected [3]"),
    (dict(token_ids=torch.zeros(N)), "token_ids has dtype torch.float32, expected int64 or int32"),
    (dict(token_ids=torch.full((N,), V)), "token_ids holds 11, expected ids in [0, 11)"),
    (
        dict(teacher_hidden=torch.ones(N, H + 1, dtype=torch.int64)),
        "teacher_hidden has dtype torch.int64, expected float16, bfloat16, float32 or float64",
    ),
    (
        dict(student_lm_head=torch.randn(V, H, dtype=torch.bfloat16)),
        "student_lm_head has dtype torch.bfloat16, expected torch.float32 as student_hidden",
    ),
    (
        dict(teacher_bias=torch.randn(V).half()),
        "teacher_bias has dtype torch.float16, expected torch.float32 as teacher_hidden",
    ),
    (
        dict(teacher_lm_head=torch.randn(V, H + 1, requires_grad=True)),
        "teacher_lm_head requires grad, expected a frozen teacher without grad (detach it)",
    ),
    (
        dict(teacher_hidden=torch.randn(N, H + 1, requires_grad=True)),
        "teacher_hidden requires grad, expected a frozen teacher without grad (detach it)",
    ),
    (
        dict(teacher_bias=torch.randn(V, requires_grad=True)),
        "teacher_bias requires grad, expected a frozen teacher without grad (detach it)",
    ),
    (
        dict(token_weights=torch.ones(N, requires_grad=True)),
        "token_weights requires grad, expected constants without grad (detach it)",
    ),
    (dict(token_weights=torch.ones(N, 1)), "token_weights has shape [3, 1], expected [3]"),
    (
        dict(token_weights=torch.ones(N, dtype=torch.int64)),
        "token_weights has dtype torch.int64, expected a float dtype or bool",
    ),
    (
        dict(teacher_hidden=torch.randn(N, H + 1, device="meta")),
        "teacher_hidden is on meta, expected cpu as student_hidden",
    ),
    (
        dict(allowed_columns=torch.ones(V + 1, dtype=torch.bool)),
        "allowed_columns has shape [12], expected [11]",
    ),
    (
        dict(allowed_columns=torch.ones(V, dtype=torch.int64)),
        "allowed_columns has dtype torch.int64, expected bool",
    ),
    (
        dict(allowed_columns=torch.zeros(V, dtype=torch.bool)),
        "allowed_columns allows no column, expected at least one True",
    ),
    (dict(temperature=0.0), "temperature is 0.0, expected a finite number > 0"),
    (dict(temperature=float("nan")), "temperature is nan, expected a finite number > 0"),
    (dict(beta=1.5), "beta is 1.5, expected a number in [0, 1]"),
    (dict(beta=float("nan")), "beta is nan, expected a number in [0, 1]"),
    (dict(softcap=0.0), "softcap is 0.0, expected a finite number > 0"),
    (dict(logit_scale=-1.0), "logit_scale is -1.0, expected a finite number > 0"),
    (dict(mode="quick"), "mode is 'quick', expected one of auto, fast, lowmem, sparse"),
    (dict(estimator="k1"), "estimator is 'k1', expected one of full, sampled"),
    (dict(reduction="mean"), "reduction is 'mean', expected one of sum, none"),
    (
        dict(mode="fast", reduction="none"),
        "mode is 'fast' and reduction is 'none', expected mode 'lowmem' or 'auto'",
    ),
    (
        dict(estimator="sampled"),
        "estimator is 'sampled', expected token_ids, beta 1, reduction 'sum' and not mode 'lowmem'",
    ),
    (
        dict(check=True, student_hidden=torch.full((N, H), torch.nan)),
        "student_hidden holds nan at [0, 0], expected finite values",
    ),
    (
        dict(check=True, teacher_lm_head=torch.full((V, H + 1), torch.inf)),
        "teacher_lm_head holds inf at [0, 0], expected finite values",
    ),
    (
        dict(check=True, student_bias=torch.full((V,), torch.nan)),
        "student_bias holds nan at [0], expected finite values",
    ),
    (
        dict(check=True, token_weights=torch.tensor([1.0, torch.inf, 1.0])),
        "token_weights holds inf at [1], expected finite values",
    ),
    (dict(chunk_size=0), "chunk_size is 0, expected 'auto' or an integer >= 1"),
    (dict(chunk_size=True), "chunk_size is True, expected 'auto' or an integer >= 1"),
    (dict(chunk_size="big"), "chunk_size is 'big', expected 'auto' or an integer >= 1"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_divergence(changes, message):
    with pytest.raises(ValueError) as error:
        divergence(**changes)
    assert str(error.value) == message


def test_only_the_columns_in_use_count_as_allowed():
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[-1] = True
    with pytest.raises(ValueError, match=r"^allowed_columns allows no column, expected at least"):
        divergence(allowed_columns=allowed, teacher_lm_head=torch.randn(V - 1, H + 1))


@pytest.mark.parametrize("k", [0, 12, 2.0, True])
def test_k(k):
    arguments = torch.randn(N, H), torch.randn(V, H), torch.randn(N, H), torch.randn(V, H)
    with pytest.raises(ValueError) as error:
        topk_reverse_kl(*arguments, k=k)
    assert str(error.value) == f"k is {k!r}, expected an integer in [1, 11]"
    with pytest.raises(ValueError) as error:
        topk_reverse_kl(*arguments, k=2, support="both")  # pyright: ignore
    assert str(error.value) == "support is 'both', expected one of teacher, student"


def test_check_lets_masked_rows_and_banned_columns_pass():
    hidden, weights = torch.randn(N, H), torch.tensor([1.0, 0.0, 1.0])
    hidden[1] = torch.nan
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    out = divergence(
        student_hidden=hidden,
        token_weights=weights,
        student_bias=bias,
        teacher_bias=bias,
        check=True,
    )
    assert out.loss.isfinite()


TOKEN_MISTAKES = [
    (dict(hidden=torch.randn(N)), "hidden has shape [3], expected [N, H]"),
    (
        dict(token_ids=torch.zeros(N + 1, dtype=torch.int64)),
        "token_ids has shape [4], expected [3]",
    ),
    (
        dict(token_ids=torch.zeros(N)),
        "token_ids has dtype torch.float32, expected int64 or int32",
    ),
    (dict(token_ids=torch.tensor([0, 11, 2])), "token_ids holds 11, expected ids in [0, 11)"),
    (dict(token_ids=torch.tensor([0, -1, 2])), "token_ids holds -1, expected ids in [0, 11)"),
    (dict(bias=torch.randn(1)), "bias has shape [1], expected [11]"),
    (
        dict(lm_head=torch.randn(V, H).double()),
        "lm_head has dtype torch.float64, expected torch.float32 as hidden",
    ),
    (dict(temperature=-1.0), "temperature is -1.0, expected a finite number > 0"),
]


@pytest.mark.parametrize(
    ("changes", "message"), TOKEN_MISTAKES, ids=[text for _, text in TOKEN_MISTAKES]
)
@pytest.mark.parametrize("function", [linear_logprobs, linear_cross_entropy, linear_policy_loss])
def test_tokens(function, changes, message):
    if function is linear_policy_loss:
        changes = changes | dict(advantages=torch.ones(N))
    with pytest.raises(ValueError) as error:
        tokens(function, **changes)
    assert str(error.value) == message


POLICY_MISTAKES = [
    (dict(advantages=torch.ones(1)), "advantages has shape [1], expected [3]"),
    (
        dict(advantages=torch.ones(N, requires_grad=True)),
        "advantages requires grad, expected constants without grad (detach it)",
    ),
    (
        dict(advantages=torch.ones(N), old_logprobs=torch.ones(N, requires_grad=True)),
        "old_logprobs requires grad, expected constants without grad (detach it)",
    ),
    (
        dict(advantages=torch.ones(N), kl_coef=-0.1, reference_logprobs=torch.ones(N)),
        "kl_coef is -0.1, expected a finite number >= 0",
    ),
    (
        dict(advantages=torch.ones(N), kl_coef=0.1),
        "kl_coef is 0.1 without reference_logprobs, expected both",
    ),
    (
        dict(advantages=torch.ones(N), entropy_coef=-0.1),
        "entropy_coef is -0.1, expected a finite number >= 0",
    ),
    (
        dict(advantages=torch.ones(N), entropy_coef=float("inf")),
        "entropy_coef is inf, expected a finite number >= 0",
    ),
    (
        dict(advantages=torch.ones(N), clip=1.5),
        "clip is 1.5, expected None or a number in (0, 1)",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), POLICY_MISTAKES, ids=[text for _, text in POLICY_MISTAKES]
)
def test_policy(changes, message):
    with pytest.raises(ValueError) as error:
        tokens(linear_policy_loss, **changes)
    assert str(error.value) == message

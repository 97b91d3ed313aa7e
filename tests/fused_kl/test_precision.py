"""How far from the fp64 truth: never much further than dense torch in the same dtype."""

from typing import Any

import pytest
import torch

from fused_kl import linear_logprobs, linear_policy_loss, linear_reverse_kl, reference

STDS = (1.0, 3.0, 10.0, 30.0)
# The widest error that the order of summation explains, relative to the largest element.
SLACK = 2e-6


def sides(tensors):
    return (
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
    )


def results(loss, detail, leaves):
    return {
        "loss": loss.detach(),
        "detail": detail.detach(),
        "hidden": torch.autograd.grad(loss, leaves[0], retain_graph=True)[0],
        "lm_head": torch.autograd.grad(loss, leaves[1])[0],
    }


def divergence_results(tensors, beta, dtype):
    """Fused (two fresh graphs, since a backward is final) or dense in `dtype`."""
    leaves = sides(tensors)[:2]
    if dtype is None:
        out = linear_reverse_kl(*sides(tensors), beta=beta, chunk_size=5)
        hidden, lm_head = torch.autograd.grad(out.loss, leaves)
        return dict(loss=out.loss.detach(), detail=out.token_kl, hidden=hidden, lm_head=lm_head)
    loss, token_kl, *_ = reference.linear_reverse_kl(*sides(tensors), beta=beta, dtype=dtype)
    return results(loss, token_kl, leaves)


def assert_within_rule(fused, dense, truth, eps):
    for name, exact in truth.items():
        exact = exact.double()
        scale = exact.abs().max() if name != "detail" else max(1e-6, exact.abs().max())
        error = (fused[name].double() - exact).abs().max()
        allowed = 2 * (dense[name].double() - exact).abs().max() + eps * scale
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [None, 0.1])
@pytest.mark.parametrize("logit_std", STDS)
def test_fp32_divergence(case, beta, gap, logit_std):
    # fp64 truth of fp32 inputs: the rounding of the inputs is nobody's error.
    tensors = case.build(logit_std=logit_std, gap=gap, dtype=torch.float32)
    exact = case.build(logit_std=logit_std, gap=gap, dtype=torch.float32)
    for name in ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head"):
        tensor = getattr(exact, name)
        setattr(exact, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
    fused = divergence_results(tensors, beta, None)
    truth = divergence_results(exact, beta, torch.float64)
    dense = divergence_results(tensors, beta, torch.float32)
    assert_within_rule(fused, dense, truth, SLACK)
    lse = max(
        (h @ w.T).logsumexp(-1).abs().max().item() for h, w in (sides(exact)[:2], sides(exact)[2:])
    )
    assert (fused["loss"] - truth["loss"]).abs() <= 1e-6 * lse * len(tensors.student_hidden)
    assert (fused["detail"] - truth["detail"]).abs().max() <= 1e-6 * lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [None, 0.1])
@pytest.mark.parametrize("logit_std", STDS)
def test_half_precision_inputs_lose_one_rounding(case, dtype, gap, logit_std):
    tensors = case.build(logit_std=logit_std, gap=gap, dtype=dtype)
    fused = divergence_results(tensors, 1.0, None)
    truth = divergence_results(tensors, 1.0, torch.float64)
    dense = divergence_results(tensors, 1.0, dtype)
    assert_within_rule(fused, dense, truth, SLACK)
    # Far better than the rule asks: the inputs are exact in fp32, so only the end is rounded.
    for name in ("hidden", "lm_head"):
        assert fused[name].dtype == dtype
        error = (fused[name].double() - truth[name].double()).norm()
        assert error <= torch.finfo(dtype).eps * truth[name].double().norm()
    assert fused["loss"].dtype == torch.float32
    torch.testing.assert_close(fused["loss"].double(), truth["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tiny_divergence_is_not_lost_in_the_rounding_of_lse(case, beta):
    """At a gap of 1e-3 the KL is 5e-7, the spacing of fp32 numbers at lse = 7.6 the same."""
    tensors = case.build(num_rows=64, logit_std=1.0, gap=1e-3, dtype=torch.float32)
    fused = divergence_results(tensors, beta, None)["detail"].double()
    truth = divergence_results(tensors, beta, torch.float64)["detail"].double()
    assert truth.max() < 2e-6
    assert (fused - truth).abs().max() < 1e-8


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_models_give_zero_and_no_negative_value(case, beta):
    tensors = case.build(logit_std=10.0, dtype=torch.float32)
    leaves = (tensors.student_hidden, tensors.student_lm_head)
    out = linear_reverse_kl(*leaves, *(leaf.detach() for leaf in leaves), beta=beta)
    assert (out.token_kl == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_far_apart_models_stay_finite(case, beta):
    tensors = case.build(logit_std=200.0, dtype=torch.float32)
    leaves = sides(tensors)[:2]
    out = linear_reverse_kl(*sides(tensors), beta=beta)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.loss, leaves))
    expected = reference.linear_reverse_kl(*sides(tensors), beta=beta)[1]
    torch.testing.assert_close(out.token_kl.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_std", STDS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
def test_policy_loss(case, dtype, logit_std, entropy_coef):
    tensors = case.build(logit_std=logit_std, dtype=dtype)
    leaves = (tensors.student_hidden, tensors.student_lm_head)
    args = (*leaves, tensors.token_ids)
    options: dict[str, Any] = dict(advantages=tensors.advantages, entropy_coef=entropy_coef)
    out = linear_policy_loss(*args, chunk_size=5, **options)
    gradients = torch.autograd.grad(out.loss, leaves)
    fused = dict(loss=out.loss, detail=out.logprobs, hidden=gradients[0], lm_head=gradients[1])
    truth, dense = (
        results(*reference.linear_policy_loss(*args, **options, dtype=x)[:2], leaves)
        for x in (torch.float64, dtype)
    )
    assert_within_rule(fused, dense, truth, SLACK if dtype == torch.float32 else 2**-8)


@pytest.fixture
def half_products(monkeypatch):
    """A GPU's bf16 path on a CPU: products of bf16 inputs with fp32 results, gradients in bf16."""

    def product_(out, a, b, *, alpha, accumulate):
        gradients = alpha * (a.double() @ b.double())
        out.copy_(out + gradients if accumulate else gradients)

    def multiplies_half(*tensors):
        return all(tensor.dtype == torch.bfloat16 for tensor in tensors)

    monkeypatch.setattr("fused_kl.head.multiplies_half", multiplies_half)
    for module in ("head", "gradients"):
        monkeypatch.setattr(f"fused_kl.{module}.product_", product_)


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("chunk_size", ["auto", 7])
@pytest.mark.parametrize(("logit_std", "gap"), [(3.0, 1.0), (3.0, 0.1), (10.0, 0.1), (30.0, 0.01)])
def test_bf16_gradients_of_fp32_logits_stay_within_one_percent(
    case, mode, chunk_size, logit_std, gap, half_products, monkeypatch
):
    monkeypatch.setattr("fused_kl.tiles.MIN_TILE_COLUMNS", 100)
    monkeypatch.setattr("fused_kl.tiles.LOWMEM_BYTES", {"cpu": 20_000, "gpu": 20_000})
    changes: dict[str, Any] = dict(logit_std=logit_std, gap=gap, dtype=torch.bfloat16, vocab=4001)
    tensors = case.build(**changes)
    weights = torch.full((13,), 1 / 13)
    out = linear_reverse_kl(
        *sides(tensors), token_weights=weights, mode=mode, chunk_size=chunk_size
    )
    actual = torch.autograd.grad(out.loss, sides(tensors)[:2])
    truth, token_kl, *_ = reference.linear_reverse_kl(*sides(tensors), token_weights=weights)
    for gradient, exact in zip(actual, torch.autograd.grad(truth, sides(tensors)[:2]), strict=True):
        assert gradient.dtype == torch.bfloat16
        # The reference hands its gradient over in bf16 too: half of what is seen is its rounding.
        assert (gradient.double() - exact.double()).norm() < 1e-2 * exact.double().norm()
    assert (out.token_kl - token_kl).abs().max() < 1e-4


@pytest.mark.parametrize("chunk_size", [5, "auto"])
@pytest.mark.parametrize(
    ("function", "entropy_coef"),
    [(linear_policy_loss, 0.0), (linear_policy_loss, 0.5), (linear_logprobs, 0.0)],
)
def test_token_gradients_in_bf16(case, half_products, function, entropy_coef, chunk_size):
    tensors = case.build(dtype=torch.bfloat16)
    leaves = sides(tensors)[:2]
    options: dict[str, Any] = dict(advantages=tensors.advantages, entropy_coef=entropy_coef)
    if function is linear_policy_loss:
        loss = function(*leaves, tensors.token_ids, chunk_size=chunk_size, **options).loss
    else:
        out = function(*leaves, tensors.token_ids, chunk_size=chunk_size)
        loss = -out.logprobs @ tensors.advantages.float()
    dense, *_ = reference.linear_policy_loss(*leaves, tensors.token_ids, **options)
    for gradient, exact in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(dense, leaves), strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact.double()).norm() < 1e-2 * exact.double().norm()

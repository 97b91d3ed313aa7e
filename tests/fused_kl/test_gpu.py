"""What only a GPU can show: python -m pytest -m gpu. Needs torch, triton and pytest."""

from typing import Any

import pytest
import torch

from fused_kl import linear_cross_entropy, linear_logprobs, linear_policy_loss, linear_reverse_kl
from fused_kl.rows import Banned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
V, HS, HT = 151_936, 256, 512


def sides(num_rows: int, dtype: torch.dtype = torch.bfloat16, gap: float | None = None):
    """Logits of standard deviation 10; with `gap`, the teacher's are the student's plus noise."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden, teacher_hidden = randn(num_rows, HS), randn(num_rows, HT)
    head, teacher_head = randn(V, HS) * 10 / HS**0.5, randn(V, HT) * 10 / HT**0.5
    if gap is not None:
        teacher_hidden[:, :HS], teacher_head[:, :HS] = hidden, head
        teacher_head[:, HS:] *= gap / 10
    student = (hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_())
    return *student, teacher_hidden.to(dtype), teacher_head.to(dtype)


def exact_gradients(tensors):
    """Of the reverse KL, in fp64."""
    hidden, head, teacher_hidden, teacher_head = (x.detach().double() for x in tensors)
    log_p = (hidden @ head.T).log_softmax(-1)
    r = log_p - (teacher_hidden @ teacher_head.T).log_softmax(-1)
    p = log_p.exp()
    kl = (p * r).sum(-1, keepdim=True)
    grad = p * (r - kl)
    return kl[:, 0], grad @ head, grad.T @ hidden


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("num_rows", [3, 32, 200])
@pytest.mark.parametrize("gap", [None, 0.1])
def test_bf16_gradients_within_one_percent(mode, num_rows, gap, monkeypatch):
    # Budgets small enough that 200 rows are several chunks, and the vocabulary several tiles.
    monkeypatch.setattr("fused_kl.tiles.FAST_BYTES", {"gpu": 128 * V * 10, "cpu": 0})
    monkeypatch.setattr("fused_kl.tiles.LOWMEM_BYTES", {"gpu": 20_000 * 200 * 10, "cpu": 0})
    tensors = sides(num_rows, gap=gap)
    kl, *wanted = exact_gradients(tensors)
    out = linear_reverse_kl(*tensors, mode=mode)
    actual = torch.autograd.grad(out.loss, tensors[:2])
    assert (out.token_kl - kl).abs().max() < 1e-4
    for gradient, exact in zip(actual, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_loss_may_be_scaled(scale):
    tensors = sides(40)
    plain = torch.autograd.grad(linear_reverse_kl(*tensors).loss, tensors[:2])
    scaled = torch.autograd.grad(linear_reverse_kl(*tensors).loss * scale, tensors[:2])
    assert all(torch.equal(a * scale, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("mode", ["fast", "lowmem"])
def test_repeats_bit_by_bit(mode):
    tensors = sides(300)
    runs = []
    for _ in range(3):
        out = linear_reverse_kl(*tensors, mode=mode)
        runs.append((out.loss.detach(), *torch.autograd.grad(out.loss, tensors[:2])))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def losses(tensors, allowed, ids, weights):
    rules: dict[str, Any] = dict(allowed_columns=allowed)
    weighted = rules | dict(token_weights=weights)
    student = tensors[:2]
    yield lambda: linear_reverse_kl(*tensors, **weighted, token_ids=ids).loss
    yield lambda: linear_reverse_kl(*tensors, **weighted, beta=0.3).loss
    yield lambda: linear_reverse_kl(*tensors, **weighted, mode="lowmem").loss
    yield lambda: linear_reverse_kl(*tensors, **weighted, token_ids=ids, estimator="sampled").loss
    yield lambda: linear_policy_loss(*student, ids, advantages=weights, **weighted).loss
    yield lambda: linear_cross_entropy(*student, ids, **weighted).loss
    yield lambda: linear_logprobs(*student, ids, **rules).logprobs.sum()


def test_the_host_never_waits():
    tensors = sides(64)
    allowed = torch.ones(V, dtype=torch.bool, device="cuda")
    allowed[::7] = False
    ids = torch.randint(V, (64,), device="cuda")
    weights = torch.rand(64, device="cuda")
    for loss in losses(tensors, allowed, ids, weights):
        loss().backward()  # Triton compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("mode", "limit", "itemsize"), [("fast", 2.6e9, 4), ("lowmem", 0.7e9, 2)])
def test_memory_at_16384_tokens(mode, limit, itemsize):
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return tensor / shape[1] ** 0.5

    hidden, head = randn(16_384, 2048).requires_grad_(), randn(V, 2048).requires_grad_()
    teacher = randn(16_384, 4096), randn(V, 4096)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_reverse_kl(hidden, head, *teacher, mode=mode).loss.backward()
    head_gradient = V * 2048 * itemsize  # summed over chunks in fp32, written once in bf16
    peak = torch.cuda.max_memory_allocated() - before - head_gradient
    print(f"{mode}: {peak / 1e9:.2f} GB beyond the head's gradient")
    assert peak <= limit


def test_offsets_beyond_two_to_the_31():
    from fused_kl import triton_rows

    num_rows = 2**31 // V + 64
    student = torch.randn(num_rows, V, device="cuda")
    teacher = torch.randn(num_rows, V, device="cuda")
    assert student.numel() > 2**31
    last = slice(num_rows - 8, num_rows)
    few = student[last].clone(), teacher[last].clone()
    scale = torch.ones(num_rows, device="cuda")
    banned = Banned.outside(torch.arange(V, device="cuda") % 5 != 0, torch.float32)
    rules: dict[str, Any] = dict(beta=1.0, banned=banned)
    kl, *_ = triton_rows.divergence_rows_(student, teacher, **rules, scale=scale, grad=student)
    expected, *_ = triton_rows.divergence_rows_(*few, **rules, scale=scale[:8], grad=few[0])
    assert torch.allclose(kl[last], expected, rtol=1e-5)
    assert torch.allclose(student[last], few[0], rtol=1e-4, atol=1e-9)


def test_compiles_whole():
    tensors = sides(32)
    plain = torch.autograd.grad(linear_reverse_kl(*tensors).loss, tensors[:2])
    compiled = torch.compile(lambda *x: linear_reverse_kl(*x).loss, fullgraph=True)
    tensor = torch.autograd.grad(compiled(*tensors), tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(plain, tensor, strict=True))

"""`[N, V]` is never allocated, and what is not needed is not computed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_kl import divergence as divergence_module
from fused_kl import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    tiles,
)
from fused_kl.arguments import DivergenceInputs, DivergenceOptions, NeedsGrad

N, V, H, CHUNK = 64, 1187, 4, 8
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def tensors(case, request):
    dtype = getattr(request, "param", torch.float32)
    return case.build(num_rows=N, student_size=H, teacher_size=H, bias=True, dtype=dtype)


def divergence(tensors, chunk_size=CHUNK):
    return linear_reverse_kl(
        tensors.student_hidden,
        tensors.student_lm_head,
        tensors.teacher_hidden,
        tensors.teacher_lm_head,
        student_bias=tensors.student_bias,
        teacher_bias=tensors.teacher_bias,
        allowed_columns=tensors.allowed_columns,
        token_weights=tensors.token_weights,
        chunk_size=chunk_size,
    ).loss


def token_losses(tensors, chunk_size=CHUNK):
    args = (tensors.student_hidden, tensors.student_lm_head, tensors.token_ids)
    options: dict[str, Any] = dict(bias=tensors.student_bias, chunk_size=chunk_size)
    return (
        linear_logprobs(*args, **options).logprobs.sum()
        + linear_policy_loss(*args, advantages=tensors.advantages, **options).loss
        + linear_cross_entropy(*args, token_weights=tensors.token_weights, **options).loss
    )


@pytest.mark.parametrize("tensors", DTYPES, indirect=True)
@pytest.mark.parametrize(("loss", "buffers"), [(divergence, 2), (token_losses, 1)])
def test_no_tensor_is_larger_than_a_chunk(tensors, loss, buffers, largest_tensor):
    with largest_tensor:
        loss(tensors).backward()
    assert largest_tensor.numel == buffers * CHUNK * V


def test_the_recorder_sees_a_dense_loss(tensors, largest_tensor):
    with largest_tensor:
        (tensors.student_hidden @ tensors.student_lm_head.t()).sum().backward()
    assert largest_tensor.numel == N * V


@pytest.mark.parametrize("loss", [divergence, token_losses])
@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_head_gets_no_gradient_buffer(case, loss, trained, largest_tensor):
    tensors = case.build(num_rows=2, student_size=64, teacher_size=64)
    tensors.student_lm_head.requires_grad_(trained)
    with largest_tensor:
        loss(tensors).backward()
    assert (largest_tensor.numel >= V * 64) is trained
    assert (tensors.student_lm_head.grad is not None) is trained


@pytest.mark.parametrize("loss", [divergence, token_losses])
def test_no_gradient_work_under_no_grad(tensors, loss, monkeypatch):
    expected = loss(tensors).detach()

    def fail(*_, **__):
        raise AssertionError("gradient work under no_grad")

    monkeypatch.setattr("fused_kl.gradients.GradientSums.add", fail)
    with pytest.raises(AssertionError):
        loss(tensors).backward()
    with torch.no_grad():
        value = loss(tensors)
    assert not value.requires_grad
    assert torch.equal(value, expected)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("num_rows", [0, 1, 32, 640, 16_384, 1_000_000])
def test_plans_stay_within_the_budget(device_type, mode, num_rows):
    table = {"fast": tiles.FAST_BYTES, "lowmem": tiles.LOWMEM_BYTES}[mode]
    budget = tiles.entry(table, device_type)
    rules: dict[str, Any] = dict(bytes_per_logit=10, device_type=device_type)
    plan = tiles.make_plan(mode, num_rows, 151_936, **rules, chunk_size=0)
    assert plan.mode == mode
    assert 1 <= plan.rows <= max(1, num_rows)
    assert 10 * plan.rows * plan.columns <= budget
    # Most of the budget is used, unless everything fits.
    everything = plan.columns == 151_936 and plan.rows == max(1, num_rows)
    assert everything or 10 * plan.rows * plan.columns > 0.6 * budget
    assert plan.columns == 151_936 or plan.columns >= 128
    assert tiles.make_plan(mode, 100, 50, **rules, chunk_size=7).rows == 7


def test_a_single_chunk_may_count_on_the_head_gradient():
    # 256 rows of fp32 logits fit once; the teacher's are gone before 512 columns of gradient come.
    rules: dict[str, Any] = dict(bytes_per_logit=8, freed_bytes=4, device_type="cpu", chunk_size=0)
    for gradient_rows, rows in ((512, 256), (256, 256), (255, 128), (0, 128)):
        plan = tiles.make_plan("fast", 256, 151_936, **rules, gradient_rows=gradient_rows)
        assert plan.rows == rows
    assert tiles.make_plan("fast", 300, 151_936, **rules, gradient_rows=512).rows == 128


def test_one_row_beyond_the_budget_is_still_a_row():
    plan = tiles.make_plan("fast", 5, 10**9, bytes_per_logit=8, device_type="cpu", chunk_size=0)
    assert plan == ("fast", 1, 10**9)


def test_the_plan_can_be_read_back(case):
    tensors = case.build(num_rows=20)
    sides = (tensors.student_hidden, tensors.student_lm_head)
    out = linear_reverse_kl(*sides, *(side.detach() for side in sides), chunk_size=6)
    assert out.plan == ("fast", 6, 1187)
    assert linear_policy_loss(
        *sides, tensors.token_ids, advantages=tensors.advantages, chunk_size=7
    ).plan == ("fast", 7, 1187)
    assert linear_logprobs(*sides, tensors.token_ids).plan == ("fast", 20, 1187)


def test_lowmem_holds_a_tile(case, monkeypatch, largest_tensor):
    monkeypatch.setattr(tiles, "MIN_TILE_COLUMNS", 100)
    monkeypatch.setattr(tiles, "LOWMEM_BYTES", {"cpu": N * 100 * 8, "gpu": N * 100 * 8})
    tensors = case.build(num_rows=N, student_size=H, teacher_size=H, dtype=torch.float32)
    student = (tensors.student_hidden, tensors.student_lm_head, None)
    teacher = (tensors.teacher_hidden, tensors.teacher_lm_head, None)
    inputs = DivergenceInputs(*student, *teacher, None, None, None)
    options = DivergenceOptions(beta=0.5, mode="lowmem")
    # The recorder does not see into a custom op, so the functions behind it are called.
    with largest_tensor:
        saved = divergence_module.lowmem(inputs, options).saved
        needs_grad = NeedsGrad(True, True, False)
        divergence_module.lowmem_gradients(inputs, options, needs_grad, saved, torch.ones(N))
    assert largest_tensor.numel == 2 * N * 100


@pytest.mark.parametrize("loss", [divergence, token_losses])
def test_many_rows_are_the_sum_of_few(case, loss, largest_tensor):
    """16,384 tokens, as of long answers, against 512 calls of 32."""
    rows, few, vocab = 16_384, 32, 4096
    tensors = case.build(num_rows=rows, vocab=vocab, student_size=H, teacher_size=H)
    of_rows = {name: x for name, x in vars(tensors).items() if x is not None and len(x) == rows}
    leaves = (tensors.student_hidden, tensors.student_lm_head)
    with largest_tensor:
        whole = loss(tensors, chunk_size="auto")
        gradients = torch.autograd.grad(whole, leaves)
    assert largest_tensor.numel * 8 <= tiles.FAST_BYTES["cpu"] < rows * vocab * 8
    total, head = torch.zeros(()), torch.zeros_like(gradients[1])
    for first in range(0, rows, few):
        part = SimpleNamespace(
            **vars(tensors) | {n: x[first : first + few] for n, x in of_rows.items()}
        )
        some = loss(part, chunk_size="auto")
        total = total + some.detach()
        d_hidden, d_head = torch.autograd.grad(some, (part.student_hidden, leaves[1]))
        torch.testing.assert_close(d_hidden, gradients[0][first : first + few], rtol=0, atol=1e-12)
        head += d_head
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(head, gradients[1], rtol=0, atol=1e-11 * float(head.abs().max()))


@pytest.mark.parametrize("loss", [divergence, token_losses])
def test_small_tiles_and_blocks_change_nothing(case, loss, monkeypatch):
    tensors = case.build(num_rows=7, dtype=torch.bfloat16, bias=True)
    leaves = (tensors.student_hidden, tensors.student_lm_head, tensors.student_bias)
    expected = torch.autograd.grad(loss(tensors), leaves)
    # 100 rows of the head per tile, a row of logits for each thread: both leave ragged ends.
    monkeypatch.setattr("fused_kl.tiles.HEAD_TILE_BYTES", 100 * 16 * 4)
    monkeypatch.setattr("fused_kl.tiles.CPU_THREAD_BLOCK_BYTES", V * 4)
    for gradient, wanted in zip(torch.autograd.grad(loss(tensors), leaves), expected, strict=True):
        # One rounding to bf16 apart at most.
        torch.testing.assert_close(gradient, wanted, rtol=2**-7, atol=1e-5)

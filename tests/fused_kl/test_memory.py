"""`[N, V]` is never allocated, and what is not needed is not computed."""

from typing import Any

import pytest
import torch

from fused_kl import linear_cross_entropy, linear_logprobs, linear_policy_loss, linear_reverse_kl

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

    monkeypatch.setattr("fused_kl.chunks.Gradients.add", fail)
    with pytest.raises(AssertionError):
        loss(tensors).backward()
    with torch.no_grad():
        value = loss(tensors)
    assert not value.requires_grad
    assert torch.equal(value, expected)


def test_auto_chunks_stay_within_the_budget_and_are_even(monkeypatch):
    from fused_kl import tiles

    assert tiles.token_chunks(256, 151_936, 2, 4, "auto") == [slice(0, 256)]
    chunks = tiles.token_chunks(1000, 151_936, 2, 4, "auto")
    sizes = {rows.stop - rows.start for rows in chunks}
    assert chunks[0].start == 0
    assert chunks[-1].stop == 1000
    assert max(sizes) * 151_936 * 2 * 4 <= tiles.LOGITS_BYTES
    assert max(sizes) - min(sizes) <= 2
    assert tiles.token_chunks(0, 10, 2, 4, "auto") == []
    monkeypatch.setattr(tiles, "LOGITS_BYTES", 1)
    assert len(tiles.token_chunks(3, 10, 2, 4, "auto")) == 3


@pytest.mark.parametrize("loss", [divergence, token_losses])
def test_small_tiles_and_blocks_change_nothing(case, loss, monkeypatch):
    tensors = case.build(num_rows=7, dtype=torch.bfloat16, bias=True)
    leaves = (tensors.student_hidden, tensors.student_lm_head, tensors.student_bias)
    expected = torch.autograd.grad(loss(tensors), leaves)
    # 100 rows of the head per tile, 2 rows of logits per block: both leave ragged ends.
    monkeypatch.setattr("fused_kl.tiles.HEAD_TILE_BYTES", 100 * 16 * 4)
    monkeypatch.setattr("fused_kl.tiles.CPU_ROW_BLOCK_BYTES", 2 * V * 4)
    for gradient, wanted in zip(torch.autograd.grad(loss(tensors), leaves), expected, strict=True):
        # One rounding to bf16 apart at most.
        torch.testing.assert_close(gradient, wanted, rtol=2**-7, atol=1e-5)

"""Attention and Liger's modules on a GPU, against fp64 on the CPU.

Not under deterministic mode: there sdpa never takes cuDNN, which is one of the things to be seen.
"""

import sys

import pytest
import torch
from torch import Tensor

from opd.config.models import BACKENDS
from opd.data.batch import to_device
from opd.models import liger
from opd.models.attention import attend, unusable
from opd.models.load import prepare
from tests.helpers import (
    FAMILIES,
    batch_of,
    build,
    gradients,
    ours,
    prefill_of,
    relative,
    unequal_prompts,
)
from tests.models.test_branches import CASES, errors, gradients_of, in_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_on_every_backend(backend: str, family: str) -> None:
    reason = unusable(backend, DEVICE, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    truth = ours("student", family)
    batch = batch_of(unequal_prompts(truth))
    expected = prefill_of(truth, batch)
    errors = []
    for name in ("eager", backend):
        lm = prepare(build("student", family).to(DEVICE, torch.bfloat16), name, name)
        lm.train_only("language")
        actual = prefill_of(lm, to_device(batch, DEVICE))
        errors.append(relative(actual.last_hidden.double().cpu(), expected.last_hidden))
    assert errors[1] < 2 * errors[0] + 1e-3


@pytest.mark.parametrize("keys", [9, 64, 1031])  # as they grow in a decode loop
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_attention(keys: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(keys)

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, 128, generator=generator).to(dtype)

    sides = randn(8, 5), randn(2, keys), randn(2, keys)
    mask = torch.rand(2, 1, 5, keys, generator=generator) > 0.4
    mask[..., 0] = True
    expected, _ = attend(torch.nn.Module(), *(x.double() for x in sides), mask)
    cotangent = torch.randn(expected.shape, generator=generator)
    leaves = [x.to(DEVICE).requires_grad_() for x in sides]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        actual, _ = attend(torch.nn.Module(), *leaves, mask.to(DEVICE))
        actual.backward(cotangent.to(DEVICE, dtype))
    names = [event.key for event in profile.key_averages()]
    assert names and not any("cudnn" in name.lower() for name in names), names
    assert relative(actual.double().cpu(), expected) < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("poisoned_memory")
def test_attention_in_parts(name: str, dtype: torch.dtype) -> None:
    expected = gradients_of(in_parts, CASES[name], torch.float64)
    actual = gradients_of(in_parts, CASES[name], dtype, DEVICE)
    assert errors(actual, expected) < (0.15 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_modules_are_the_stock_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    lm = prepare(build("student", family).to(DEVICE, torch.float32))
    lm.train_only("language")
    module = sys.modules[type(lm.language_model).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)  # put back
    batch = to_device(batch_of(unequal_prompts(lm)), DEVICE)

    def forward_and_backward() -> tuple[Tensor, dict[str, Tensor]]:
        lm.model.zero_grad()
        actual = prefill_of(lm, batch)
        (actual.last_hidden.square().sum() + actual.keys[-1].square().sum()).backward()
        return actual.last_hidden.detach(), gradients(lm.model)

    expected, truths = forward_and_backward()
    liger.install(lm.language_model)
    actual, grads = forward_and_backward()
    assert not torch.equal(actual, expected), "nothing was replaced"
    assert relative(actual, expected) < 1e-4
    assert all(relative(grads[name], truth) < 1e-3 for name, truth in truths.items())

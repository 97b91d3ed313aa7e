"""Fixtures that several files of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers may do
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: a read before a write cannot pass unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _rms_norm(self: Any, hidden: Tensor) -> Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


@pytest.fixture
def exact_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock norms and vision rotary go through fp32; here they stay in fp64, for 1e-12."""
    # Not at the top: the kernels' tests need no transformers.
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
        rotate_half = modeling_qwen3_vl.rotate_half
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    for module, norm in (
        (modeling_qwen3_vl, modeling_qwen3_vl.Qwen3VLTextRMSNorm),
        (modeling_qwen2_5_vl, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm),
    ):
        monkeypatch.setattr(norm, "forward", _rms_norm)
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.video_root` that runs share; the clips are written once."""
    return tmp_path_factory.mktemp("videos")

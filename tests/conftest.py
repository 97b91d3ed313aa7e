"""Fixtures that several files of tests share."""

import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers may do
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

# Of the project and of its tests: a GPU machine may lack them, and tests that import them are
# skipped there. Where the project is installed, all are present.
PACKAGES = (
    "accelerate",
    "build",
    "datasets",
    "decord",
    "deepspeed",
    "liger_kernel",
    "matplotlib",
    "pandas",
    "peft",
    "psutil",
    "skvideo",
    "tensorboard",
    "trl",
)


def _missing(error: BaseException | None) -> str | None:
    """Why a test cannot run here, if an error is about a package that is not installed."""
    while error is not None:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if name is not None and name.partition(".")[0] in PACKAGES:
            package = name.partition(".")[0]
            # Installed, but not the part of it that is looked for: an error.
            return None if find_spec(package) else f"{package} is not installed"
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that a missing package stops is skipped, with the package's name."""
    report = yield
    if call.excinfo is not None and (reason := _missing(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> Generator[None, pytest.Module, pytest.Module]:
    """A file that imports a missing package is skipped, with the package's name."""
    module = yield
    imported = module._getobj

    def getobj() -> Any:
        try:
            return imported()
        except module.CollectError as error:
            if reason := _missing(error):
                pytest.skip(reason, allow_module_level=True)
            raise

    module._getobj = getobj  # type: ignore[method-assign]
    return module


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: a read before a write cannot pass unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["one mask", "two parts"])
def in_two_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Completions attend to prefix and themselves in two parts, or with one mask over both."""
    fewest = {"cpu": 1 if request.param else 10**9}
    monkeypatch.setattr("opd.models.branches.FEWEST_TOKENS", fewest)
    monkeypatch.setattr("opd.generation.decoder.MOST_MASKED", {})
    return request.param


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

"""`fused_kl` by itself: its wheel, its source distribution and its folder for the Kernel Hub."""

import ast
import email
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fused_kl

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = {path.name for path in (KERNELS / "fused_kl").glob("*.py")}
BACKENDS = ("cpu", "cuda", "rocm")

# Runs as where torch and its requirements are the only packages, without Triton.
ALONE = """
import sys
from importlib.metadata import packages_distributions

sys.modules["triton"] = None  # an import of it raises ModuleNotFoundError
import torch
import torch._dynamo  # its requirements come with it

sys.modules["opd"] = None
for name in packages_distributions():
    if name not in ("torch", "fused_kl"):
        sys.modules.setdefault(name, None)

import fused_kl

hidden, teacher_hidden = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
lm_head, teacher_lm_head = torch.randn(11, 8), torch.randn(11, 8)
loss = fused_kl.linear_reverse_kl(hidden, lm_head, teacher_hidden, teacher_lm_head).loss
loss.backward()
log_p = (hidden @ lm_head.T).log_softmax(-1)
log_q = (teacher_hidden @ teacher_lm_head.T).log_softmax(-1)
expected = (log_p.exp() * (log_p - log_q)).sum()
(gradient,) = torch.autograd.grad(expected, hidden)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(hidden.grad, gradient)
print(fused_kl.__file__)
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )


# Wheel and source distribution.


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    pytest.importorskip("build.__main__", reason="build is not installed")
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(KERNELS, folder / "kernels", ignore=ignored)
    (folder / "torch.py").write_text("raise RuntimeError('a build imports no torch')\n")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = ("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "kernels")
    build = run(*command, env=environment, cwd=folder)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder / "dist"


@pytest.fixture
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture
def sdist(distributions: Path) -> Path:
    (path,) = distributions.glob("*.tar.gz")
    return path


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        f"fused_kl/{name}" for name in MODULES
    }


def test_the_source_distribution_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert names >= {"pyproject.toml", "README.md", *(f"fused_kl/{name}" for name in MODULES)}


def test_torch_is_the_only_requirement(wheel: Path) -> None:
    metadata = wheel_metadata(wheel)
    assert metadata.get_all("Requires-Dist") == ["torch>=2.11"]
    assert metadata["Provides-Extra"] is None
    assert (metadata["Name"], metadata["License-Expression"]) == ("fused-kl", "Apache-2.0")


def test_modules_import_torch_alone() -> None:
    """And Triton in the modules of Triton programs, which are imported on a GPU only."""
    for path in (KERNELS / "fused_kl").glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
        allowed = {"torch", "fused_kl"} | ({"triton"} if path.name.startswith("triton_") else set())
        assert names - sys.stdlib_module_names <= allowed, path


def test_the_version_has_one_source(wheel: Path, sdist: Path) -> None:
    settings = tomllib.loads((KERNELS / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert wheel_metadata(wheel)["Version"] == fused_kl.__version__
    assert sdist.name == f"fused_kl-{fused_kl.__version__}.tar.gz"


@pytest.mark.slow
def test_the_installed_wheel_works_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = run("-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel)
    assert install.returncode == 0, install.stderr
    environment = os.environ | {"PYTHONPATH": str(target)}
    result = run("-c", ALONE, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(target / "fused_kl" / "__init__.py")


# The folder for the Kernel Hub.


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fused-kl"
    written = run(KERNELS / "make_hub.py", folder)
    assert written.returncode == 0, written.stderr
    return folder


@pytest.fixture
def forget_kernels() -> Iterator[None]:
    """Removes the modules that a test has loaded from a hub folder."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "fused_kl" in name:
            del sys.modules[name]


def load(name: str, path: Path) -> ModuleType:
    """Import a package under a name, as the library `kernels` does."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernel_id(variant: Path) -> str:
    return json.loads((variant / "metadata.json").read_text())["id"]


def assert_same_results(kernel: ModuleType, case, **options) -> None:
    """Loss and gradients of the kernel are those of the installed package, bit for bit."""
    tensors = case.build(num_rows=7, vocab=90, dtype=torch.float32)
    leaves = tensors.student_hidden, tensors.student_lm_head
    for compiles in (False, True):
        results = []
        for package in (fused_kl, kernel):

            def loss(*leaves, package=package):
                teacher = tensors.teacher_hidden, tensors.teacher_lm_head
                weights = tensors.token_weights
                return package.linear_reverse_kl(
                    *leaves, *teacher, token_weights=weights, **options
                ).loss

            if compiles:
                loss = torch.compile(loss, fullgraph=True, backend="eager")
            value = loss(*leaves)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hub_folder_has_a_package_per_backend(hub: Path, backend: str) -> None:
    variant = hub / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"] == "fused-kl"
    assert metadata["backend"] == {"type": backend}
    assert metadata["python-depends"] == []
    files = {str(path.relative_to(variant)) for path in variant.rglob("*.py")}
    assert files == {*MODULES, "fused_kl/__init__.py"} == set(metadata["digest"]["files"])
    for path in variant.glob("*.py"):
        source = path.read_text()
        assert "from fused_kl" not in source and "import fused_kl" not in source
        assert "fused_kl::" not in source.replace(f"{metadata['id']}::", "")


@pytest.mark.usefixtures("forget_kernels")
@pytest.mark.parametrize("mode", ["fast", "lowmem"])
def test_the_hub_package_loads_beside_the_installed_one(hub: Path, case, mode: str) -> None:
    installed_op = torch.ops.fused_kl.fast.default
    variant = hub / "build" / "torch-cpu"
    kernel = load(kernel_id(variant), variant / "__init__.py")
    assert kernel.__all__ == fused_kl.__all__ and kernel.__version__ == fused_kl.__version__
    assert kernel.linear_reverse_kl is not fused_kl.linear_reverse_kl
    assert_same_results(kernel, case, mode=mode)
    assert torch.ops.fused_kl.fast.default is installed_op
    assert hasattr(getattr(torch.ops, kernel.__name__), "fast")


@pytest.mark.usefixtures("forget_kernels")
def test_old_versions_of_kernels_find_the_same_package(hub: Path) -> None:
    variant = hub / "build" / "torch-cpu"
    kernel = load("fused_kl_by_path", variant / "fused_kl" / "__init__.py")
    package = sys.modules[kernel_id(variant)]
    assert kernel.__all__ == package.__all__
    assert all(getattr(kernel, name) is getattr(package, name) for name in package.__all__)


@pytest.mark.usefixtures("forget_kernels")
def test_the_kernels_library_loads_the_folder(hub: Path, case) -> None:
    # The repository's own folder `kernels`, which may be on the path, has no such name.
    try:
        from kernels import get_local_kernel  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        pytest.skip("the package kernels is not installed")
    assert_same_results(get_local_kernel(hub, backend="cpu"), case)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        refused = run(KERNELS / "make_hub.py", folder)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1 and str(folder) in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

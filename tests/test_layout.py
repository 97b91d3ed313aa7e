"""The tree: imports go one way, `kernels/` is no package, the wheel holds what it should, every
YAML loads."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from opd.config import Config, load_config, to_yaml

ROOT = Path(__file__).parents[1]
FLOORS = (  # a module imports only from floors below its own, or from its own
    {
        "config",
        "options",
        "settings",
        "data_settings",
        "world",
        "forms",
        "answers",
        "prompts",
        "metrics",
        "official",
        "results",
    },
    {"data", "models"},
    {
        "prefix",
        "branches",
        "decode",
        "rollout",
        "rewards",
        "teacher",
        "objectives",
        "curriculum",
        "engine",
        "zero",
        "prefetch",
        "shapes",
        "checkpoint",
        "folder",
        "ledger",
    },
    {"train", "loop", "evaluate", "summary", "report", "evaluation", "check", "memory", "timeline"},
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def test_imports_go_one_way() -> None:
    for path in sorted((ROOT / "opd").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "opd.__init__":
            continue
        for name in imported(path):
            if name.startswith("opd."):
                assert floor_of(name) <= floor_of(module), f"{module} imports {name}"
            assert name.split(".")[0] not in ("bench", "tests"), f"{module} imports {name}"
            if name.startswith("fused_kl"):
                assert module == "opd.objectives", f"{module} imports {name}"


def test_the_kernel_library_imports_nothing_of_ours() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in ("opd", "bench", "tests"), f"{path} imports {name}"


def test_kernels_is_not_a_package() -> None:
    # transformers looks for an installed package `kernels` (the hub's loader); importable from
    # the working directory, ours would be taken for it and no model class would import.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_holds_two_ideas() -> None:
    for folder in ("opd", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 310, path


def test_the_wheel_holds_the_two_packages_only(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"opd", "fused_kl"}
    for model in ("teacher", "student"):
        assert f"opd/models/checkpoints/{model}/model.safetensors" in names
        assert f"opd/models/checkpoints/{model}/tokenizer.json" in names


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path, tmp_path: Path) -> None:
    config = load_config([str(path)])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config([str(resolved)]) == config


def test_the_defaults_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "defaults.yaml"
    path.write_text(to_yaml(Config()))
    assert load_config([str(path)]) == Config()

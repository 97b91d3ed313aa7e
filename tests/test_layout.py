"""The tree: imports go one way, `kernels/` is no package, the wheel holds what it should, every
YAML loads."""

import ast
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from opd.config.run import Config, load_config, to_yaml

ROOT = Path(__file__).parents[1]
FLOORS = (  # a room imports from the rooms above it in this list, never from those below
    "errors",
    "files",
    "distributed",
    "device",
    "text",
    "config",
    "data",
    "models",
    "generation",
    "scoring",
    "engine",
    "record",
    "planning",
    "method",
    "report",
    "check",
    "evaluate",
    "train",
)
LONGEST_CHAIN = 12  # modules, each importing the next


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / "opd").rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; names as `module.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of_ours(path: Path) -> set[str]:
    """Modules of `opd` that a file imports, or imports a name of."""
    names = {name for name in imported(path) if name.split(".")[0] == "opd"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {"opd"}


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


def test_rooms_import_one_way() -> None:
    for module, path in MODULES.items():
        if module == "opd":
            continue
        for other in imports_of_ours(path):
            assert floor_of(other) <= floor_of(module), f"{module} imports {other}"


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path through a graph of imports; CycleError, with the modules, for a circle."""
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in graph[module]), key=len, default=[])
        chains[module] = [module, *below]
    return max(chains.values(), key=len)


def test_no_circle_and_no_long_chain() -> None:
    """Also not between the modules of one room."""
    graph = {module: imports_of_ours(path) - {module} for module, path in MODULES.items()}
    chain = longest_chain(graph)
    assert len(chain) <= LONGEST_CHAIN, chain
    with pytest.raises(CycleError):
        longest_chain({"a": {"b"}, "b": {"a"}})


def test_only_the_objectives_use_the_kernels_and_nobody_the_benchmarks() -> None:
    for module, path in MODULES.items():
        for name in imported(path):
            assert name.split(".")[0] not in ("bench", "tests"), f"{module} imports {name}"
            if name.split(".")[0] == "fused_kl":
                assert module == "opd.method.objectives", f"{module} imports {name}"
    for path in (ROOT / "bench").rglob("*.py"):
        assert not any(name.split(".")[0] == "tests" for name in imported(path)), path


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

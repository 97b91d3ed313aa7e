"""kernels/README.md: its example runs as printed, and it names every function and every file."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "tensor(" in capsys.readouterr().out
    assert names["student_hidden"].grad.shape == (6, 32)
    assert names["student_lm_head"].grad.isfinite().all()
    assert torch.equal(names["student_hidden"].grad[-1], torch.zeros(32))


def test_the_readme_names_every_public_function():
    import fused_kl

    text = (KERNELS / "README.md").read_text()
    functions = [name for name in fused_kl.__all__ if name.islower()]
    assert functions
    assert all(f"import {name}" in text for name in functions)


def test_the_readme_names_every_file():
    text = (KERNELS / "README.md").read_text()
    named = re.findall(r"^(\w+\.py)(?:, (\w+\.py))?  ", text, re.MULTILINE)
    files = {path.name for path in (KERNELS / "fused_kl").glob("*.py")} - {"__init__.py"}
    assert sorted(name for line in named for name in line if name) == sorted(files)


def test_no_module_imports_itself_in_a_circle():
    imports = {}
    for path in (KERNELS / "fused_kl").glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                package, _, module = node.module.partition(".")
                if package == "fused_kl":
                    names |= {module} if module else {alias.name for alias in node.names}
        imports[path.stem] = names
    assert "arguments" in imports["divergence"] and "triton_rows" in imports["head"]
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_kernels_is_not_a_package():
    # transformers probes for a package named `kernels` and would take this folder for it.
    assert not (KERNELS / "__init__.py").exists()

"""The drop-in example of kernels/README.md runs as printed."""

import re
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[2] / "kernels"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
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


def test_kernels_is_not_a_package():
    # transformers probes for a package named `kernels` and would take this folder for it.
    assert not (KERNELS / "__init__.py").exists()

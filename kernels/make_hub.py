"""Write `fused_kl` as a repository of Hugging Face's Kernel Hub.

Usage: `python kernels/make_hub.py FOLDER`. The layout is that of kernels without compiled code
("Kernel requirements" in the documentation of the library `kernels`): one package per backend,
`build/torch-BACKEND`, with a `metadata.json`. The library imports each package under a name of its
own, several versions in one process. Therefore the copies import their own modules by relative
imports and have their own namespace of custom ops.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parent
PACKAGE = "fused_kl"
BACKENDS = ("cpu", "cuda", "rocm")

# `kernels` 0.10 loads `build/torch-BACKEND/fused_kl/__init__.py`, later versions
# `build/torch-BACKEND/__init__.py`.
FORWARDING_MODULE = '''\
"""Exports the package above this folder; old versions of `kernels` load this file."""

import importlib.util
import sys
from pathlib import Path

if "{kernel_id}" not in sys.modules:
    path = Path(__file__).absolute().parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location("{kernel_id}", path)
    package = importlib.util.module_from_spec(spec)
    sys.modules["{kernel_id}"] = package
    spec.loader.exec_module(package)

package = sys.modules["{kernel_id}"]
__all__ = package.__all__
globals().update({{name: getattr(package, name) for name in __all__}})
'''

CARD = """\
---
library_name: kernels
license: {license_id}
---

# {name}

{description}.

Version {version}, for Python {python} and {requirements}.

```python
from pathlib import Path

from kernels import get_local_kernel

{package} = get_local_kernel(Path("FOLDER"))
```
"""


def imports_of_package(source: str) -> list[ast.Import | ast.ImportFrom]:
    """The absolute imports of `fused_kl` and its modules, wherever they are in the source."""
    imports = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        if any(name.partition(".")[0] == PACKAGE for name in names):
            imports.append(node)
    return imports


def with_relative_imports(source: str) -> str:
    """The source with `from fused_kl.module import ...` as `from .module import ...`."""
    lines = source.splitlines(keepends=True)
    for node in imports_of_package(source):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = node.module.removeprefix(PACKAGE).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from .{module} ", 1)
    relative = "".join(lines)
    assert not imports_of_package(relative), "an import of fused_kl is still absolute"
    return relative


def with_namespace(source: str, namespace: str) -> str:
    """The source with its custom ops, `"fused_kl::name"`, in another namespace."""
    return source.replace(f'"{PACKAGE}::', f'"{namespace}::')


def version_of(source: str) -> str:
    """The literal that `__version__` is set to."""
    (version,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    return version


def sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def write_variant(
    folder: Path, sources: dict[str, str], kernel_id: str, metadata: dict[str, object]
) -> None:
    """Write the package of one backend, with its `metadata.json`."""
    files = {
        name: with_namespace(with_relative_imports(source), kernel_id)
        for name, source in sources.items()
    }
    files[f"{PACKAGE}/__init__.py"] = FORWARDING_MODULE.format(kernel_id=kernel_id)
    (folder / PACKAGE).mkdir(parents=True)
    for name, source in files.items():
        (folder / name).write_bytes(source.encode())
    digests = {name: sha256(source.encode()) for name, source in sorted(files.items())}
    metadata = {
        "id": kernel_id,
        **metadata,
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_hub_folder(folder: Path) -> None:
    """Write the packages of all backends, a README and the license."""
    project = tomllib.loads((KERNELS / "pyproject.toml").read_text())["project"]
    sources = {path.name: path.read_text() for path in sorted((KERNELS / PACKAGE).glob("*.py"))}
    # Part of the ids, so that two versions can be loaded into one process.
    unique = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:12]
    version = version_of(sources["__init__.py"])
    for backend in BACKENDS:
        metadata = {
            "name": project["name"],
            "version": int(version.partition(".")[0]),  # 0 means that the API may still change
            "license": project["license"],
            "python-depends": [],  # besides torch
            "backend": {"type": backend},
        }
        kernel_id = f"_{PACKAGE}_{backend}_{unique}"
        write_variant(folder / "build" / f"torch-{backend}", sources, kernel_id, metadata)
    card = CARD.format(
        name=project["name"],
        license_id=project["license"].lower(),
        description=project["description"],
        version=version,
        python=project["requires-python"],
        requirements=", ".join(project["dependencies"]),
        package=PACKAGE,
    )
    (folder / "README.md").write_text(card)
    shutil.copy(KERNELS.parent / "LICENSE", folder)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit code 2 if the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="make_hub.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    folder = parser.parse_args(arguments).folder
    try:
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder}: not empty; name a new folder")
        write_hub_folder(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

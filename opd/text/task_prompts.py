"""Prompts of an evaluation package's own tasks, read from the installed package.

`lmms_eval:TASK` uses the wording of that task without a copy of it here: the task's YAML file says
which function writes the prompt, and that function is called with `{query}` in place of the text.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as the text `module.name`."""


_Loader.add_constructor("!function", lambda _, node: str(node.value))


class _Document(dict[str, str]):
    """A record whose every field is the placeholder of the query."""

    def __missing__(self, _: str) -> str:
        return "{query}"

    def get(self, key: str, default: Any = None) -> Any:
        """The placeholder, whatever the field."""
        return self[key]


def task_prompt(package: str, task: str) -> str:
    """Return the prompt of a task, with {query} in the place of the query.

    Args:
        package: an installed package with a folder `tasks` of YAML files, such as lmms_eval.
        task: the name that one of these files gives as `task`.

    Raises:
        LookupError: if there is no such package or task, or its function cannot be used.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = package.replace("_", "-")
        raise LookupError(f"{package} is not installed (pip install {pip})")
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    settings = _settings(folder, task)
    if settings is None:
        raise LookupError(f"{package} has no task {task}")
    file, values = settings
    writer = values.get("doc_to_text")
    if not isinstance(writer, str) or "." not in writer:
        raise LookupError("the task has no function that writes its prompt")
    module, _, name = writer.rpartition(".")
    options = values.get("lmms_eval_specific_kwargs") or {}
    try:
        function = getattr(_module(file.with_name(f"{module}.py"), f"{package}_{task}"), name)
        prompt = function(_Document(), options.get("default", options))
    except Exception as error:  # another project's code raises almost anything
        raise LookupError(
            f"its prompt cannot be written: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(prompt, str) or prompt.count("{query}") != 1:
        raise LookupError("its prompt does not contain the query exactly once")
    return prompt


def _settings(folder: Path, task: str) -> tuple[Path, dict[str, Any]] | None:
    """The YAML file of a task, and its values with those that it includes."""
    for file in sorted(folder.rglob("*.yaml")):
        if task not in file.read_text(encoding="utf-8"):
            continue
        values = _read(file)
        if values.get("task") == task:
            return file, values
    return None


def _read(file: Path) -> dict[str, Any]:
    values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    values = values if isinstance(values, dict) else {}
    if "include" in values:
        return _read(file.with_name(values["include"])) | values
    return values


def _module(file: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

"""The two variants of an example side by side: lines, losses and weights, and memory."""

import ast
import contextlib
import difflib
import gc
import inspect
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from unittest import mock

import huggingface_hub
import torch
from torch import Tensor

from bench.examples.task import LARGE, SMALL, Size, Task
from bench.timing import peak_bytes
from opd.distributed import reuse_freed_memory

PACKAGES = {"plain_loop": "torch", "liger_jsd": "liger_kernel", "trl_distillation": "trl"}
Variant = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training, and the part of it that a user changes. Imports that change stand inside of that
    part, so that they are counted.

    Attributes:
        before: the part as it was.
        after: the part with `fused_kl`.
        train: trains a task's student with either, and returns the losses of all steps.
    """

    before: Callable[..., Any]
    after: Callable[..., Any]
    train: Callable[[Task, Any], list[float]]


class Training(NamedTuple):
    """The loss of each step, and how far each weight has moved at the end."""

    losses: list[float]
    moves: dict[str, Tensor]


def load(name: str) -> Example:
    """The example of this name."""
    return import_module(f"bench.examples.{name}").EXAMPLE


def missing(name: str) -> str | None:
    """Why an example cannot run here, and the command that helps; None where it can."""
    package = PACKAGES[name]
    if find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install {package.replace('_', '-')}"


def changed_lines(example: Example) -> dict[str, int]:
    """Lines of code that a user adds and removes."""
    changes = list(difflib.ndiff(code_lines(example.before), code_lines(example.after)))
    return {
        "lines_added": sum(line.startswith("+ ") for line in changes),
        "lines_removed": sum(line.startswith("- ") for line in changes),
    }


def code_lines(function: Callable[..., Any]) -> list[str]:
    """A function's lines of code, without its signature and docstring."""
    source = inspect.getsource(function)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    first = definition.body[ast.get_docstring(definition) is not None]
    lines = source.splitlines()[first.lineno - 1 :]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def train(example: Example, variant: Variant, size: Size = SMALL) -> Training:
    """Train from the same weights and seeds each time."""
    with TemporaryDirectory() as folder:
        task = Task.of(size, Path(folder))
        start = {name: p.detach().clone() for name, p in task.student.named_parameters()}
        losses = _losses(example, variant, task)
    weights = task.student.named_parameters()
    return Training(losses, {name: p.detach() - start[name] for name, p in weights})


def _losses(example: Example, variant: Variant, task: Task) -> list[float]:
    torch.manual_seed(0)
    # TRL reports its use to the hub unless it is told not to.
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True):
        return example.train(task, getattr(example, variant))


def errors(example: Example) -> dict[str, float]:
    """The largest relative difference of a step's loss, and the distance of the weights at the end
    as a share of the distance that they were trained."""
    with torch.compiler.set_stance("force_eager"):  # what a compiler rounds is not compared
        theirs, ours = train(example, "before"), train(example, "after")
    pairs = zip(ours.losses, theirs.losses, strict=True)
    apart = [ours.moves[name] - move for name, move in theirs.moves.items()]
    return {
        "loss_error": max(abs(a - b) / abs(b) for a, b in pairs),
        "weight_error": _norm(apart) / _norm(list(theirs.moves.values())),
    }


def _norm(tensors: list[Tensor]) -> float:
    return float(sum((t.double() ** 2).sum() for t in tensors)) ** 0.5


def peak(name: str, variant: Variant, size: Size = LARGE) -> int:
    """Bytes that a training needs at most beyond the weights of both models, measured in a process
    of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, name, variant, size).result()


def _peak(name: str, variant: Variant, size: Size) -> int:
    with contextlib.redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        example = load(name)
        reuse_freed_memory(False)
        train(example, variant, replace(size, steps=1))  # imports and compilers need memory, too
        gc.collect()  # TRL's trainer and its models refer to each other
        task = Task.of(size, Path(folder))
        return peak_bytes(lambda: _losses(example, variant, task))


def measure(name: str, size: Size = LARGE) -> dict[str, Any]:
    """One row: memory with `fused_kl` first, its ratio to that before, lines and errors."""
    if reason := missing(name):
        return {"skipped": reason}
    example = load(name)
    second, first = peak(name, "before", size), peak(name, "after", size)
    return {
        "ratio": first / second,
        "first_mb": first / 1e6,
        "second_mb": second / 1e6,
        **changed_lines(example),
        **errors(example),
    }

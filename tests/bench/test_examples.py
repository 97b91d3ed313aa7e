"""The examples train the same before and after the change, and their change is counted right."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_kl
from bench import record, report
from bench.examples import __main__ as command
from bench.examples import compare, plain_loop
from bench.examples.compare import PACKAGES, Example
from bench.examples.task import SMALL
from fused_kl import adapters

GPU = torch.cuda.is_available()
LOSS_ERROR, WEIGHT_ERROR = 1e-6, 1e-4  # Adam divides small gradients, and their rounding, by itself
ROW = {
    "ratio": 0.5,
    "first_mb": 100.0,
    "second_mb": 200.0,
    "lines_added": 3,
    "lines_removed": 1,
    "loss_error": 1e-7,
    "weight_error": 1e-5,
}


def installed(name: str, monkeypatch: pytest.MonkeyPatch) -> Example:
    """The example of this name, where its library is installed. Afterwards TRL has its own loss
    again."""
    if reason := compare.missing(name):
        pytest.skip(reason)
    example = compare.load(name)
    if name == "trl_distillation":
        trainer = sys.modules["trl.trainer.distillation_trainer"]
        replaced = "_chunked_divergence_loss"
        monkeypatch.setattr(trainer, replaced, getattr(trainer, replaced))
    return example


@pytest.fixture
def rows_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows that count in each call of `linear_reverse_kl`, as calls come."""
    rows = []
    compute = fused_kl.linear_reverse_kl

    def counted(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        weights = options.get("token_weights")
        rows.append(len(hidden) if weights is None else int((weights > 0).sum()))
        return compute(hidden, *arguments, **options)

    monkeypatch.setattr(fused_kl, "linear_reverse_kl", counted)
    monkeypatch.setattr(adapters, "linear_reverse_kl", counted)
    return rows


@pytest.mark.parametrize("name", PACKAGES)
def test_the_training_is_the_same(
    name: str, rows_of_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    differ = compare.errors(installed(name, monkeypatch))
    assert differ["loss_error"] < LOSS_ERROR and differ["weight_error"] < WEIGHT_ERROR
    # Afterwards the losses are of fused_kl, before none is, and completions differ in length.
    parts = SMALL.accumulation_steps if name == "trl_distillation" else 1
    assert len(rows_of_calls) == SMALL.steps * parts
    assert len(set(rows_of_calls)) > 1


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
def test_what_differs_is_rounding() -> None:
    differ = compare.errors(plain_loop.EXAMPLE)
    assert differ["loss_error"] < 1e-14 and differ["weight_error"] < 1e-11


def test_ligers_triton_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, against Liger's chunked loss without its cross-entropy."""
    installed("liger_jsd", monkeypatch)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from bench.examples.liger_jsd import FUSED

    def soft_alone() -> torch.nn.Module:
        return LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5, temperature=2.0)

    differ = compare.errors(FUSED if GPU else replace(FUSED, before=soft_alone))
    assert differ["loss_error"] < LOSS_ERROR and differ["weight_error"] < WEIGHT_ERROR


def test_another_loss_is_seen() -> None:
    def scaled(*arguments: Any) -> Tensor:
        return 1.001 * plain_loop.with_logits(*arguments)

    def another_gradient(*arguments: Any) -> Tensor:
        penalty = 1e-5 * arguments[0].lm_head.weight.square().sum()
        return plain_loop.with_logits(*arguments) + penalty - penalty.detach()

    differ = compare.errors(replace(plain_loop.EXAMPLE, after=scaled))
    assert differ["loss_error"] == pytest.approx(1e-3, rel=0.01)
    differ = compare.errors(replace(plain_loop.EXAMPLE, after=another_gradient))
    assert differ["weight_error"] > WEIGHT_ERROR


def before(x: int) -> int:
    """One docstring."""
    y = x + 1
    z = 2 * y
    return z


def after(x: int, more: int = 0) -> int:
    """Another docstring,

    of several lines.
    """
    # A comment is no line of code.
    y = x + 2

    print(y)
    z = 2 * y
    return z


def test_lines_by_hand() -> None:
    example = Example(before=before, after=after, train=lambda *_: [])
    assert compare.changed_lines(example) == {"lines_added": 2, "lines_removed": 1}
    same = replace(example, after=before)
    assert compare.changed_lines(same) == {"lines_added": 0, "lines_removed": 0}


@pytest.mark.parametrize(("name", "lines"), [("liger_jsd", (1, 1)), ("trl_distillation", (3, 0))])
def test_adapters_change_the_import_alone(
    name: str, lines: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = compare.changed_lines(installed(name, monkeypatch))
    assert (changes["lines_added"], changes["lines_removed"]) == lines


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        compare, "find_spec", lambda name: SimpleNamespace() if name != "trl" else None
    )
    reason = "trl is not installed: pip install trl"
    assert compare.measure("trl_distillation") == {"skipped": reason}
    rows = {"plain_loop": ROW, "trl_distillation": {"skipped": reason}}
    monkeypatch.setattr(command, "measure", lambda name: rows.get(name, ROW))
    path = tmp_path / "examples_cpu.json"
    command.main(["--output", str(path)])
    head, _, plain, liger, trl = capsys.readouterr().out.splitlines()
    assert head.startswith("| example | lines changed | MB before | MB after | after / before |")
    assert plain == "| plain_loop | +3 -1 | 200 | 100 | 0.5 | 1.0e-07 | 1.0e-05 |"
    assert liger.startswith("| liger_jsd | +3 -1 |")
    assert trl.startswith(f"| trl_distillation | skipped: {reason} |")
    kept = record.read(path)
    assert kept["benchmarks"]["examples"]["plain_loop"] == ROW
    assert kept["versions"].keys() >= {"python", "torch", "transformers"}
    page = report.document({path.stem: kept})
    assert "| plain_loop | 0.5 | 100 | 200 | 3 | 1 | 1.0e-07 | 1.0e-05 |" in page
    assert reason in page


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, a minute each."""
    installed(name, monkeypatch)
    assert compare.measure(name)["ratio"] < 0.6

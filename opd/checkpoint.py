"""What a run leaves on disk, and how it is stopped and resumed."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from opd.config import Config, ConfigError, load_config, to_yaml

WRITTEN = (  # by a run, into its folder
    "config.yaml",
    "environment.jsonl",
    "left_out.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "eval_*.jsonl",
    "curve.jsonl",
    "evaluation.jsonl",
    "student",
    "adapter",
    "curriculum/round_*.jsonl",  # scores stay: they are stored by what they are scores of
    "state.pt",
    "curve.png",
    "summary.json",
)
LIBRARIES = ("torch", "triton", "transformers", "deepspeed", "flash-attn", "decord", "av", "numpy")


class Stopped(Exception):
    """The run ends early: one line that says why, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Signals:
    """While watching, SIGINT and SIGTERM are remembered in `received` instead of obeyed; a second
    one is obeyed at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watch(self) -> Iterator["Signals"]:
        """Only the main thread can; elsewhere nothing is watched."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    def obey(self) -> None:
        """Raise Stopped if a signal came."""
        if self.received is not None:
            raise Stopped(f"{self.received.name}: stopped", 128 + self.received)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps done
    skipped: int = 0  # of them, without a finite loss and gradient
    skipped_in_a_row: int = 0
    prompt_tokens: int = 0
    rollouts: int = 0  # sampled to train on
    generated_tokens: int = 0  # in them, end tokens included
    trained_rollouts: int = 0  # of them; all, where none are told apart
    equal_groups: int = 0  # of method grpo: nothing to learn from
    first_step_s: float = 0.0  # from the start to its end
    train_s: float = 0.0  # in steps
    wall_s: float = 0.0

    def count(self, finite: bool, **more: int) -> None:
        """One more step is done; `more` is added to the fields of its names."""
        self.step += 1
        for name, number in more.items():
            setattr(self, name, getattr(self, name) + number)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state; an interruption leaves the one before it."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state saved there."""
    return torch.load(path, map_location="cpu", weights_only=True)


def environment() -> dict[str, Any]:
    """Versions, hardware, the commit of these sources where they are a checkout, and the command
    line."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with its build
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, **options).stdout
    except (OSError, subprocess.SubprocessError):
        commit = ""
    gpu = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "commit": commit.strip() or None,
        "versions": versions,
        "cuda": torch.version.cuda if gpu else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


class RunFolder:
    """What a run writes, and where. Nothing is touched before `open`."""

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.run_dir)
        self.state = self.path / "state.pt"
        try:
            self.resumed = config.resume == "auto" and self.state.is_file()
            used = self.path.exists() and any(self.path.iterdir())
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: {error.strerror}") from error
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ConfigError(f"run_dir={self.path}: {above} is no folder that can be written")
        ours = (self.path / "config.yaml").is_file()
        unfinished = ours and not (self.path / "summary.json").exists()
        if self.resumed:
            self._same_run()
        elif used and not config.overwrite and not (config.resume == "auto" and unfinished):
            told = f"run_dir={self.path}: not empty"
            raise ConfigError(f"{told}; choose another or say overwrite=true")

    def _same_run(self) -> None:
        before = to_yaml(load_config([str(self.path / "config.yaml")])).splitlines()
        for old, new in zip(before, to_yaml(self.config).splitlines(), strict=True):
            if old != new and new.partition(":")[0] not in ("resume", "overwrite", "run_dir"):
                raise ConfigError(
                    f"resume=auto: {new.strip()!r} here, {old.strip()!r} in {self.path}/config.yaml"
                )

    def open(self, first_step: int) -> None:
        """Make the folder, or go on in it from a step: later rows are dropped. What no run wrote
        stays."""
        self.path.mkdir(parents=True, exist_ok=True)
        for written in (w for name in WRITTEN for w in self.path.glob(name) if not self.resumed):
            shutil.rmtree(written) if written.is_dir() else written.unlink()
        (self.path / "config.yaml").write_text(to_yaml(self.config))
        if first_step < self.config.steps:
            (self.path / "eval_after.jsonl").unlink(missing_ok=True)
        environments = self.path / "environment.jsonl"  # a line for each time it was started
        with environments.open("a") as file:
            file.write(json.dumps(environment()) + "\n")
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in read_rows(self.path / name) if row["step"] < first_step]
            write_rows(self.path / name, kept)
        curve = self.path / "curve.jsonl"
        if curve.is_file():
            write_rows(curve, [row for row in read_rows(curve) if row["step"] <= first_step])
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._samples = (self.path / "samples.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step or None)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Steps' rows of metrics, and the samples that they hold."""
        for row in rows:
            if "step" not in row:  # what was spent between steps
                continue
            sample = row.pop("sample")
            if sample is not None:
                self._samples.write(json.dumps({"step": row["step"], **sample}) + "\n")
            self._metrics.write(json.dumps(row) + "\n")
            scalars = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
            seconds = {f"seconds/{name}": value for name, value in row["seconds"].items()}
            for key, value in (scalars | seconds).items():
                self._board.add_scalar(key, value, row["step"])

    def add_to_curve(self, point: dict[str, Any]) -> None:
        """Keep an evaluation and what it had cost until then, unless it is there already."""
        path = self.path / "curve.jsonl"
        points = read_rows(path)
        if all(row["step"] != point["step"] for row in points):
            write_rows(path, [*points, point])

    def write_left_out(self, left_out: dict[str, list[str]]) -> None:
        """Name every example that could not be used; no file where all could."""
        lines = [f"{split}: {line}\n" for split, found in left_out.items() for line in found]
        if lines:
            (self.path / "left_out.txt").write_text("".join(lines))

    def close(self) -> None:
        """Close the files that grow."""
        self._metrics.close()
        self._samples.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file. A last line cut short is left
    out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines; an interruption leaves what was there before."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)

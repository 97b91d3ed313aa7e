"""The folder that a run writes."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from opd import distributed
from opd.config.run import Config, load_config, to_yaml
from opd.errors import ConfigError
from opd.files import read_rows, write_rows
from opd.record.checkpoint import Checkpoints
from opd.record.environment import environment

WRITTEN = (  # by a run, into its folder, beside config.yaml
    "environment.jsonl",
    "left_out.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "eval_*.jsonl",
    "curve.jsonl",
    "evaluation.*",
    "student",
    "best",
    "best.part",
    "adapter",
    "curriculum/round_*.jsonl",  # scores stay: they are stored by what they are scores of
    "checkpoints",
    "curve.png",
    "summary.json",
    "summary.part",
)


class RunFolder:
    """What a run writes, and where; the first rank's alone. Nothing is touched before `open`."""

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.run_dir)
        self.states = Checkpoints(self.path / "checkpoints", config.keep_last)
        self.resumed, self.finished = distributed.from_first(self._check)

    def _check(self) -> tuple[bool, bool]:
        """Whether a stopped run goes on here, or has come to its end; ConfigError for a folder
        that cannot be used."""
        config = self.config
        try:
            resumed = config.resume == "auto" and bool(self.states.steps())
            used = self.path.exists() and any(self.path.iterdir())
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: {error.strerror}") from error
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ConfigError(f"run_dir={self.path}: {above} is no folder that can be written")
        ours = (self.path / "config.yaml").is_file()
        if ours:
            self._claim().close()
        known = ours and config.resume == "auto"  # even if it was stopped before its first state
        finished = known and (self.path / "summary.json").exists()
        if resumed or finished:
            self._same_run()
        elif used and not config.overwrite and not known:
            told = f"run_dir={self.path}: not empty"
            raise ConfigError(f"{told}; choose another or say overwrite=true")
        return resumed, finished

    def _same_run(self) -> None:
        before = to_yaml(load_config([str(self.path / "config.yaml")])).splitlines()
        for old, new in zip(before, to_yaml(self.config).splitlines(), strict=True):
            if old != new and new.partition(":")[0] not in ("resume", "overwrite", "run_dir"):
                raise ConfigError(
                    f"resume=auto: {new.strip()!r} here, {old.strip()!r} in {self.path}/config.yaml"
                )

    def _claim(self) -> IO[str]:
        """`config.yaml`, locked until it is closed: the rows of two runs would mix. ConfigError
        where another run has it."""
        held = (self.path / "config.yaml").open("a")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise ConfigError(f"run_dir={self.path}: another run is writing there") from None
        return held

    def open(self, first_step: int) -> None:
        """Make the folder, or go on in it from a step: later rows are dropped. What no run wrote
        stays."""
        if not distributed.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = self._claim()
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
        from torch.utils.tensorboard import SummaryWriter  # imports slowly

        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step or None)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Steps' rows of metrics, and the samples that they hold."""
        for row in rows if distributed.is_first() else ():
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
        if distributed.is_first() and all(row["step"] != point["step"] for row in points):
            write_rows(path, [*points, point])

    def write_left_out(self, left_out: dict[str, list[str]]) -> None:
        """Name every example that could not be used; no file where all could."""
        lines = [f"{split}: {line}\n" for split, found in left_out.items() for line in found]
        if lines and distributed.is_first():
            (self.path / "left_out.txt").write_text("".join(lines))

    def finish(self, summary: dict[str, Any]) -> None:
        """The summary is written last, whole or not at all: where it is, the run is finished."""
        if distributed.is_first():
            part = self.path / "summary.part"
            part.write_text(json.dumps(summary, indent=2) + "\n")
            part.replace(self.path / "summary.json")
            self.states.clear()

    def summary(self) -> dict[str, Any]:
        """Of a finished run."""
        return json.loads((self.path / "summary.json").read_text())

    def close(self) -> None:
        """Close the files that grow."""
        if distributed.is_first():
            self._metrics.close()
            self._samples.close()
            self._board.close()
            self._held.close()

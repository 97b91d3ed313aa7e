"""The folder of a run: its configuration, metrics, samples, curve, saved states and summary."""

import fcntl
import json
import os
import re
import shutil
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import IO, Any

from opd import distributed
from opd.config.options import leaves
from opd.config.run import Config, load_config, to_yaml
from opd.errors import ConfigError
from opd.files import read_rows, write_rows
from opd.record.checkpoint import Checkpoints
from opd.record.environment import environment

WRITTEN = (  # what a run writes into its folder besides config.yaml
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
    "curriculum/round_*.jsonl",  # but not curriculum/scores, which later runs may reuse
    "checkpoints",
    "curve.png",
    "summary.json",
    "summary.part",
)
FREE = (  # what may differ when a run resumes: it changes results by rounding at most
    "resume",
    "overwrite",
    "run_dir",
    "threads",
    "micro_batch_size",
    "engine",
    "prefix",
    "sample.together",
    "teacher",
)


class RunFolder:
    """Files of a run, written by the first rank only. Nothing is changed before `open`.

    Raises ConfigError for a folder that cannot be used, or that belongs to another run.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.run_dir)
        self.states = Checkpoints(self.path / "checkpoints", config.keep_last)
        self.resumed, self.finished = distributed.from_first(self._check)

    def _check(self) -> tuple[bool, bool]:
        """Whether the run resumes from a saved state, and whether it has finished already;
        ConfigError for a folder that cannot be used."""
        config = self.config
        try:
            resumed = config.resume == "auto" and bool(self.states.steps())
            used = self.path.exists() and any(self.path.iterdir())
        except OSError as error:
            raise ConfigError(f"run_dir={self.path}: {error.strerror}") from error
        above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ConfigError(f"run_dir={self.path}: {above} is not a writable folder")
        ours = (self.path / "config.yaml").is_file()
        if ours:
            self._claim().close()
        resumable = ours and config.resume == "auto"  # also before the first state was saved
        finished = resumable and (self.path / "summary.json").exists()
        if resumed or finished:
            self._same_run()
        elif used and not config.overwrite and not resumable:
            raise ConfigError(
                f"run_dir={self.path}: not empty; choose another folder or set overwrite=true"
            )
        else:
            self._check_inputs()
        return resumed, finished

    def _old(self) -> list[Path]:
        """What an earlier run wrote, which a new one removes."""
        return [self.path / found for name in WRITTEN for found in glob(name, root_dir=self.path)]

    def _check_inputs(self) -> None:
        """Raise ConfigError if the run would read from what it removes first."""
        removed = [path.resolve() for path in self._old()]
        for key, value in leaves(asdict(self.config)):
            parts = {value, *re.split("[,:?&=]", value)} if isinstance(value, str) else ()
            for part in parts:
                source = Path(part).resolve() if part and os.path.exists(part) else None
                if source and any(source.is_relative_to(path) for path in removed):
                    raise ConfigError(
                        f"{key}={value}: lies in run_dir={self.path}, whose earlier run would be "
                        "removed; copy it elsewhere, or choose another run_dir"
                    )

    def _same_run(self) -> None:
        """Raise ConfigError where the run in the folder has another configuration."""
        before = load_config([str(self.path / "config.yaml")])
        lines = (to_yaml(config, FREE).splitlines() for config in (before, self.config))
        for old, new in zip(*lines, strict=True):
            if old != new:
                raise ConfigError(
                    f"resume=auto: {new.strip()!r} here, {old.strip()!r} in {self.path}/config.yaml"
                )

    def _claim(self) -> IO[str]:
        """Open and lock `config.yaml`, so that no other run writes into the folder until it is
        closed. Raises ConfigError where another run holds the lock."""
        held = (self.path / "config.yaml").open("a")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise ConfigError(f"run_dir={self.path}: another run is writing there") from None
        return held

    def open(self, first_step: int) -> None:
        """Create the folder, or continue in it from `first_step` and drop later rows. Files that no
        run wrote are kept."""
        if not distributed.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = self._claim()
        for old in [] if self.resumed else self._old():
            is_folder = old.is_dir() and not old.is_symlink()
            shutil.rmtree(old) if is_folder else old.unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(to_yaml(self.config))
        if first_step < self.config.steps:
            (self.path / "eval_after.jsonl").unlink(missing_ok=True)
        environments = self.path / "environment.jsonl"  # one line per start
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
        """Append the rows of ended steps to `metrics.jsonl` and TensorBoard, and their samples to
        `samples.jsonl`."""
        for row in rows if distributed.is_first() else ():
            if "step" not in row:  # spent between steps
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
        """Append an evaluation and the cost until then, unless its step is on the curve already."""
        path = self.path / "curve.jsonl"
        points = read_rows(path)
        if distributed.is_first() and all(row["step"] != point["step"] for row in points):
            write_rows(path, [*points, point])

    def write_left_out(self, left_out: dict[str, list[str]]) -> None:
        """Write one line per example that cannot be used; no file if all can."""
        lines = [f"{split}: {line}\n" for split, of_split in left_out.items() for line in of_split]
        if lines and distributed.is_first():
            (self.path / "left_out.txt").write_text("".join(lines))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, last and atomically, as it marks the run as finished; remove the saved
        states."""
        if distributed.is_first():
            part = self.path / "summary.part"
            part.write_text(json.dumps(summary, indent=2) + "\n")
            part.replace(self.path / "summary.json")
            self.states.clear()

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return json.loads((self.path / "summary.json").read_text())

    def close(self) -> None:
        """Close all open files."""
        if distributed.is_first():
            self._metrics.close()
            self._samples.close()
            self._board.close()
            self._held.close()

"""Saved states of a run, from which it can be resumed, and its progress counters."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd import distributed
from opd.errors import ConfigError
from opd.files import checksum

MANIFEST = "manifest.json"


@dataclass
class Progress:
    """How far a run has come; saved with its state."""

    step: int = 0  # steps done
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    prompts: int = 0
    groups: int = 0  # of prompts about one video, forwarded together
    prompt_tokens: int = 0  # those that prompts of a group share once
    rollouts: int = 0  # sampled for training
    generated_tokens: int = 0  # of these rollouts, end tokens included
    trained_rollouts: int = 0  # rollouts with tokens in the loss
    trained_tokens: int = 0  # tokens in the loss, of rollouts or reference answers
    equal_groups: int = 0  # groups of equal rewards, method grpo
    first_step_s: float = 0.0  # from the start of the run to the end of its first step
    train_s: float = 0.0  # sum over steps
    wall_s: float = 0.0  # until the state was last saved, or the end

    def count(self, finite: bool, **counts: int) -> None:
        """Add a step, and `counts` to the fields of the same names."""
        self.step += 1
        for name, number in counts.items():
            setattr(self, name, getattr(self, name) + number)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1


class Checkpoints:
    """Saved states of a run, one folder `step_N` each, of which the last `keep` are retained.

    A state is written to a temporary folder together with a checksum of every file, and then
    renamed, so that an interrupted save leaves no partial state.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the saved states, ascending."""
        states = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted(int(path.name.removeprefix("step_")) for path in states)

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Save a state: on every rank, `write` is called with the folder to write to."""
        part, path = self.folder / "part", self.folder / f"step_{step}"
        if distributed.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        distributed.barrier()
        write(part)
        distributed.barrier()
        sums = _checksums(part)
        if distributed.is_first():
            (part / MANIFEST).write_text(json.dumps({"checksums": sums}, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)  # the same step, saved twice
            part.rename(path)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        distributed.barrier()

    def load(self, read: Callable[[Path], object]) -> None:
        """Load the last state: `read` is called with its folder. Raises ConfigError if the state is
        damaged."""
        *earlier, last = self.steps()
        path = self.folder / f"step_{last}"
        remedy = f"delete it to resume from {f'step_{earlier[-1]}' if earlier else 'the start'}"
        try:
            files = json.loads((path / MANIFEST).read_text())["checksums"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: no readable {MANIFEST}; {remedy}") from error
        checksums = _checksums(path)
        for name in sorted(files.keys() | checksums.keys()):
            if files.get(name) != checksums.get(name):
                state = "missing" if name not in checksums else "damaged"
                raise ConfigError(f"{path}: {name} is {state}; {remedy}")
        read(path)

    def clear(self) -> None:
        """Remove all saved states."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Checksum of every file in a folder, by its path there, after flushing it to disk; the ranks
    share the work."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    mine = paths[distributed.rank() :: distributed.world_size()]
    for path in mine:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return distributed.gather_dict({str(path.relative_to(folder)): checksum(path) for path in mine})

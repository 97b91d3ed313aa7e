"""How a run is stopped, what it goes on from, and the rows that it leaves."""

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


class Checkpoints:
    """The states of a run, a folder each (`step_N`): written aside, with a checksum of every file,
    then renamed, so that none is ever half there; the last `keep` of them stay."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Of the states that are there, in order."""
        found = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def save(self, step: int, write: Callable[[Path], object]) -> None:
        """Keep what `write` puts into the folder that it is given, on every rank."""
        part, path = self.folder / "part", self.folder / f"step_{step}"
        if distributed.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        distributed.barrier()
        write(part)
        distributed.barrier()
        sums = _checksums(part)
        if distributed.is_first():
            manifest = {"ranks": distributed.world_size(), "files": sums}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)  # the same step, saved twice
            part.rename(path)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        distributed.barrier()

    def load(self, read: Callable[[Path], object]) -> None:
        """Give the last state's folder to `read`. Raises ConfigError for one that is damaged or of
        another number of ranks."""
        *earlier, last = self.steps()
        path = self.folder / f"step_{last}"
        told = f"delete it to go on from {f'step_{earlier[-1]}' if earlier else 'the start'}"
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            ranks, files = manifest["ranks"], manifest["files"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: no readable {MANIFEST} in it; {told}") from error
        if ranks != distributed.world_size():
            here = distributed.world_size()
            raise ConfigError(f"{path}: saved by {ranks} ranks, these are {here}; start {ranks}")
        found = _checksums(path)
        for name in sorted(files.keys() | found.keys()):
            if files.get(name) != found.get(name):
                what = "missing" if name not in found else "not as it was written"
                raise ConfigError(f"{path}: {name} is {what}; {told}")
        read(path)

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Of every file below a folder, by its name there; the ranks share the work. Flushes them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    mine = paths[distributed.rank() :: distributed.world_size()]
    for path in mine:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return distributed.gather_dict({str(path.relative_to(folder)): checksum(path) for path in mine})

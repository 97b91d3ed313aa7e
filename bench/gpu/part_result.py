"""The result file of one part of `python -m bench.gpu` while it is measured: written after every
task, so that neither an error nor the end of the time loses what was measured.

A file says `complete: false` until its part is done. A later call on the same GPU, with the same
libraries and the same sources goes on with it and measures only what is missing. With $OUT set
every file is there too, beside the kernels' tuned sizes, for machines that hand back one folder.
"""

import gc
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.failures import DeviceLost, one_line
from bench.record import RESULTS, Refused, origin

TABLE = ROOT / "kernels" / "fused_kl" / "tuned.py"
MEASURED = ("bench", "kernels", "opd")  # folders whose sources make a result what it is

Entry = dict[str, Any]


def sources_digest() -> str:
    """A digest of the sources that are measured: all but the tuned sizes, which tuning rewrites."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != TABLE:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def kernel_sizes() -> Entry | str:
    """The sizes of the kernels' pieces on this device: tuned ones, or "defaults"."""
    from fused_kl.tuned import TUNED

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return TUNED[name]._asdict() if name in TUNED else "defaults"


def conditions() -> Entry:
    """What two measurements must have in common to stand in one file."""
    known = origin()
    keys = ("hardware", "versions")
    return {**{key: known[key] for key in keys}, "sources": sources_digest()}


def read(path: Path) -> Entry | None:
    """A result file; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def state(path: Path, now: Entry) -> str:
    """Of a part's file under the conditions `now`: "complete", "partial", or "none"."""
    content = read(path)
    if content is None or any(content.get(key) != value for key, value in now.items()):
        return "none"
    return "complete" if content.get("complete") else "partial"


class PartResult:
    """What is measured of a part, by task. With `path=None`, a smoke run, nothing is written."""

    def __init__(self, path: Path | None, command: str = "") -> None:
        self.path = path
        self.begun = time.perf_counter()
        self.done: dict[str, Entry] = {}  # of an earlier call, not to be measured again
        self.content: Entry = {"benchmarks": {}, "errors": {}, "broke_the_device": {}}
        self.seconds_before = 0.0
        if path is None:
            return
        now = conditions()
        kept = state(path, now)
        if kept != "none":  # what is measured anew replaces its entry when it is done, not before
            self.content["benchmarks"] = (read(path) or {})["benchmarks"]
        if kept == "partial":
            self.content = read(path) or {}
            self.done = dict(self.content["benchmarks"])
            self.seconds_before = self.content["seconds"]
        header = {**origin(), **now, "command": command, "kernel_sizes": kernel_sizes()}
        self.content |= header | {"complete": False, "seconds": self.seconds_before, "errors": {}}

    @property
    def benchmarks(self) -> dict[str, Entry]:
        return self.content["benchmarks"]

    @property
    def errors(self) -> dict[str, str]:
        """Of tasks that raised, by name."""
        return self.content["errors"]

    def earlier(self, name: str) -> Entry:
        """What an earlier, unfinished call measured of a task; empty where it did not begin."""
        return self.done.get(name, {})

    def save(self, name: str, entry: Entry) -> None:
        """Keep what a task has measured so far."""
        self.benchmarks[name] = entry
        self.write()

    def measure(self, name: str, task: Callable[[], Entry | None]) -> None:
        """Run a task unless an earlier call has; keep its entry, unless it saves them itself and
        returns None, or its error. Raises DeviceLost, when nothing else can run in this process."""
        if name in self.done:
            print(f"{name}: measured before", flush=True)
            return
        try:
            entry = task()
        except DeviceLost:
            raise
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = one_line(error)
            self.write()
        else:
            if entry is not None:
                self.save(name, entry)
            return
        gc.collect()  # outside of the handler, which holds the task's tensors
        torch.cuda.empty_cache()

    def broken(self, place: str) -> dict[str, str]:
        """Those that broke the device at a place in an earlier process, and their errors; a place
        is a task of a part, and they are not tried there again."""
        return dict(self.content["broke_the_device"].get(place, {}))

    def note_broken(self, place: str, lost: DeviceLost) -> None:
        """Keep who broke the device, for the process that goes on."""
        self.content["broke_the_device"].setdefault(place, {})[lost.name] = lost.reason
        self.write()

    def finish(self) -> None:
        """The part has run to its end; it is complete where no task failed."""
        self.content["complete"] = not self.errors
        self.write()

    def write(self) -> None:
        """Replace the file, at once."""
        if self.path is None:
            return
        self.content["seconds"] = self.seconds_before + time.perf_counter() - self.begun
        write_json(self.path, self.content)
        export(self.path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once, whoever may be killed meanwhile."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


def out_folder() -> Path | None:
    """The folder that $OUT names, made where it is missing; None where $OUT is not set.

    Raises Refused where it cannot be made.
    """
    name = os.environ.get("OUT")
    if not name:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"OUT={name}: no folder for results: {error.strerror}") from error
    return Path(name)


def export(results: Path = RESULTS) -> None:
    """Copy every part's file and the kernels' tuned sizes into $OUT."""
    out = out_folder()
    if out is None:
        return
    for path in (*results.glob("gpu_*.json"), TABLE):
        if path.is_file():
            shutil.copyfile(path, out / path.name)

"""A pool of decoding processes: a video that hangs or crashes the decoder is reported and does not
end the run."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opd.data.video.backends import Backend, check_backend
from opd.data.video.budget import Budget, Recipe
from opd.data.video.decoding import frame_grid
from opd.data.video.sampling import VideoFrames
from opd.data.video.worker_process import COMMAND, Worker, WorkerDied
from opd.errors import DataError

MAX_PLANS = 4096
"""Maximum number of cached plans; that of a long file takes 50 KB."""


class Decoders:
    """A pool of worker processes, each of which decodes one video at a time.

    Workers start on first use and end with `close()` or with this process, however it ends. A
    worker is replaced when it dies, exceeds the time limit or has decoded `recycle` videos, which
    bounds what a decoder leaks. Thread-safe; a call waits for a free worker. A file on which all
    attempts fail is reported, without effect on others.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        timeout_s: float = 60.0,
        retries: int = 1,
        recycle: int = 500,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Create a pool; its workers start later.

        Args:
            workers: maximum number of processes; each keeps about one core busy.
            timeout_s: time limit of one attempt at a file.
            retries: further attempts where one exceeds the time limit or kills the worker. A file
                that the decoder itself rejects is not tried again.
            recycle: number of videos after which a worker is replaced.
            command: the command line of a worker.

        Raises:
            ValueError: a setting is out of range.
        """
        if workers < 1 or not timeout_s > 0 or retries < 0 or recycle < 1:
            raise ValueError(f"out of range: {workers=}, {timeout_s=}, {retries=}, {recycle=}")
        self.timeout_s, self.retries, self.recycle = timeout_s, retries, recycle
        self.command = tuple(command)
        self._numbers = itertools.count(1)
        self._free: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._free.put(None)
        self._live: set[Worker] = set()
        self._plans: OrderedDict[tuple, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop_all, self._live)

    def decode(
        self,
        path: str | Path,
        *,
        fps: float,
        max_frames: int,
        min_frames: int = 4,
        backend: Backend = "decord",
        budget: Budget | Recipe | None = None,
        clip: Sequence[float] | None = None,
    ) -> VideoFrames:
        """Run `sample_frames` in a worker.

        Args:
            budget: the budget of the video processor that receives the frames, or the recipe that
                gives it for their number. The worker resizes the frames as that processor would,
                bit for bit, so that fewer bytes are sent.

        Raises:
            ConfigError: the backend cannot be imported.
            DataError: the file cannot be decoded, or no attempt came back in time; one line naming
                the file and the reason.
            ValueError: a setting is out of range.
            RuntimeError: no worker starts, or the pool is closed.
        """
        check_backend(backend)
        grid = {"fps": fps, "max_frames": max_frames, "min_frames": min_frames}
        kind = "recipe" if isinstance(budget, Recipe) else "budget"
        scaled = None if budget is None else {kind: asdict(budget)}
        head, frames = self._request(path, grid, {"backend": backend, "budget": scaled}, clip)
        plan = head["plan"]
        return VideoFrames(
            frames=torch.from_numpy(frames),
            indices=plan["indices"],
            source_fps=plan["source_fps"],
            source_frames=plan["source_frames"],
            duration_s=plan["duration_s"],
            decoder=head["decoder"],
            start_s=plan["start_s"],
        )

    def duration(
        self, path: str | Path, *, fps: float = 1.0, max_frames: int = 4, min_frames: int = 4
    ) -> float:
        """Run `probe_duration` in a worker; raises as `decode` does.

        With the sampling of a later `decode`, that need not probe the file again.
        """
        grid = {"fps": fps, "max_frames": max_frames, "min_frames": min_frames}
        return self._request(path, grid, None)[0]["plan"]["duration_s"]

    def forget(self) -> None:
        """Drop the cached plans, so that every file is probed again."""
        with self._lock:
            self._plans.clear()

    def close(self) -> None:
        """End all workers. Running and later calls raise RuntimeError."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()  # the thread that waits for its answer notices and returns it
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for worker in idle:
            self._give_back(worker, False)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        name: str | Path,
        grid: dict[str, Any],
        decode: dict[str, Any] | None,
        clip: Sequence[float] | None = None,
    ) -> tuple[dict[str, Any], Any]:
        """Return a worker's answer, with the plan of a file, and, given `decode`, its frames; try
        `retries` times more where a worker dies or exceeds the time limit."""
        frame_grid(1, 1.0, **grid)  # raises ValueError here rather than in the worker
        grid = grid | {"clip": None if clip is None else tuple(clip)}
        path = os.path.abspath(name)  # a worker keeps the working directory it started in
        key = (*_identity(path), *grid.values())
        request = {"path": path, "grid": grid, "plan": self._plans.get(key), "decode": decode}
        reason = ""
        for _ in range(self.retries + 1):
            worker = self._take()
            number = next(self._numbers)
            sound = False
            try:
                head, frames = worker.ask(number, request, self.timeout_s)
                sound = True
                self._remember(key, head["plan"])
                return head, frames
            except DataError:
                sound = True
                raise
            except TimeoutError:
                reason = f"decoding took longer than {self.timeout_s:g} s"
            except WorkerDied as error:
                reason = str(error)
            finally:  # after an interrupt the worker is in the middle of an answer: not sound
                self._give_back(worker, sound and worker.answered < self.recycle)
        if self._closed:
            raise RuntimeError("the decoders are closed")
        attempts = f", {self.retries + 1} attempts" if self.retries else ""
        raise DataError(f"{path}: {reason}{attempts}")

    def _remember(self, key: tuple, plan: dict[str, Any]) -> None:
        """Cache the plan of a file, under its identity from before the request."""
        with self._lock:
            self._plans[key] = plan
            self._plans.move_to_end(key)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)

    def _take(self) -> Worker:
        """Wait for a free place in the pool; start its worker if it has none."""
        worker = self._free.get()
        try:
            with self._lock:  # close() must see every worker
                if self._closed:
                    raise RuntimeError("the decoders are closed")
                if worker is not None:
                    return worker
                worker = Worker(self.command)
                self._live.add(worker)
            worker.await_ready()
        except BaseException:
            self._give_back(worker, False)
            raise
        return worker

    def _give_back(self, worker: Worker | None, sound: bool) -> None:
        """Free a place in the pool, with its worker if that can be used again."""
        if worker is not None and not sound:
            worker.stop()
            with self._lock:
                self._live.discard(worker)
            worker = None
        self._free.put(worker)


def _identity(path: str) -> tuple[object, ...]:
    """Return values that distinguish a file from any other, and from itself after a change."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (path,)
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _stop_all(workers: set[Worker]) -> None:
    while workers:
        workers.pop().stop()

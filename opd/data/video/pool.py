"""Decoding in processes of its own: a video that hangs or crashes the decoder costs a line in a
report, not the run."""

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

from opd.data.video.budget import Budget, Recipe
from opd.data.video.decoding import Backend, check_backend, frame_grid
from opd.data.video.sampling import VideoFrames
from opd.data.video.worker_process import COMMAND, Worker, WorkerDied
from opd.errors import DataError

MAX_PLANS = 4096
"""Files whose plan is remembered; a long one takes 50 KB."""


class Decoders:
    """A pool of processes that decode videos, one video each at a time.

    Workers start when they are first needed, end with `close()` or when this process ends, however
    it ends, and are replaced when they die, take too long or have decoded `recycle` videos, so that
    what a decoder leaks stays bounded. Safe to use from several threads; a call waits for a free
    worker. Where all go wrong on the same file, that file is reported and no other.
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
        """
        Args:
            workers: processes at most; each keeps about one core busy.
            timeout_s: seconds that one attempt at a file may take.
            retries: attempts after the first, where it took too long or the worker died. What the
                decoder itself refuses is refused at once.
            recycle: videos after which a worker is replaced.
            command: what starts a worker.
        """
        if workers < 1 or not timeout_s > 0 or retries < 0 or recycle < 1:
            raise ValueError(f"no pool with {workers=}, {timeout_s=}, {retries=}, {recycle=}")
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
    ) -> VideoFrames:
        """What `sample_frames` returns, decoded by a worker.

        Args:
            budget: of the video processor that sees the frames next, or what makes it of their
                number. Given it, the worker scales
                them as that processor would, bit for bit, so that fewer bytes come back.

        Raises:
            DataError: one line naming the file and what is wrong with it; "decoding took longer
                than 60 s, 2 attempts" where it never came back.
            ValueError: for settings out of range.
            RuntimeError: where no worker starts, and after `close()`.
        """
        check_backend(backend)
        grid = {"fps": fps, "max_frames": max_frames, "min_frames": min_frames}
        kind = "recipe" if isinstance(budget, Recipe) else "budget"
        scaled = None if budget is None else {kind: asdict(budget)}
        plan, frames = self._ask(path, grid, {"backend": backend, "budget": scaled})
        return VideoFrames(
            frames=torch.from_numpy(frames),
            indices=plan["indices"],
            source_fps=plan["source_fps"],
            source_frames=plan["source_frames"],
            duration_s=plan["source_frames"] / plan["source_fps"],
        )

    def duration(
        self, path: str | Path, *, fps: float = 1.0, max_frames: int = 4, min_frames: int = 4
    ) -> float:
        """What `probe_duration` returns, found out by a worker; raises as `decode` does. Given how
        the video is going to be sampled, `decode` need not look through the file again."""
        grid = {"fps": fps, "max_frames": max_frames, "min_frames": min_frames}
        plan, _ = self._ask(path, grid, None)
        return plan["source_frames"] / plan["source_fps"]

    def forget(self) -> None:
        """Look through every file again when it is decoded next."""
        with self._lock:
            self._plans.clear()

    def close(self) -> None:
        """End all workers. Calls in other threads raise RuntimeError."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()  # who waits for its answer notices, and gives it back
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

    def _ask(
        self, name: str | Path, grid: dict[str, Any], decode: dict[str, Any] | None
    ) -> tuple[dict[str, Any], Any]:
        """The plan of a file and its frames, `retries` more attempts where a worker takes too long
        or dies."""
        frame_grid(1, 1.0, **grid)  # raises here rather than in the worker
        path = os.path.abspath(name)  # a worker stays in the folder it started in
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
                return head["plan"], frames
            except DataError:
                sound = True
                raise
            except TimeoutError:
                reason = f"decoding took longer than {self.timeout_s:g} s"
            except WorkerDied as error:
                reason = str(error)
            finally:  # after an interrupt, too, the worker is in the middle of an answer
                self._give_back(worker, sound and worker.answered < self.recycle)
        if self._closed:
            raise RuntimeError("the decoders are closed")
        attempts = f", {self.retries + 1} attempts" if self.retries else ""
        raise DataError(f"{path}: {reason}{attempts}")

    def _remember(self, key: tuple, plan: dict[str, Any]) -> None:
        """Keep the plan of a file as it was when it was asked about, up to `MAX_PLANS`."""
        with self._lock:
            self._plans[key] = plan
            self._plans.move_to_end(key)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)

    def _take(self) -> Worker:
        """Wait for a free worker; start it if it is not there."""
        worker = self._free.get()
        try:
            with self._lock:  # so that close() sees every worker
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
        if worker is not None and not sound:
            worker.stop()
            with self._lock:
                self._live.discard(worker)
            worker = None
        self._free.put(worker)


def _identity(path: str) -> tuple[object, ...]:
    """What tells a file from any other, and from itself after a change."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (path,)
    return path, status.st_ino, status.st_size, status.st_mtime_ns


def _stop_all(workers: set[Worker]) -> None:
    while workers:
        workers.pop().stop()

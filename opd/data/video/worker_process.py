"""One process that decodes, as its parent sees it: requests go in, answers come out, in time or not
at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.data.video.worker import HEAD, HEADER, IMAGE, LOADING, PLAN, READY, REFUSED
from opd.errors import DataError

COMMAND = (sys.executable, "-P", "-m", "opd.data.video.worker")
STARTUP_S = 120.0
"""Seconds that a worker may take to start or to import torch, on a machine that is busy."""
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # glibc gives large blocks back at once, and each picture would pay its page faults again.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**24),
}
PIPE_BYTES = 2**20


class WorkerDied(RuntimeError):
    """A worker process ended, or answered what it was not asked; the message says how."""


class Worker:
    """One worker process, and the messages to and from it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.answered = 0
        package = Path(__file__).parents[3]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._errors: Any = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # an interrupt at the terminal is for the parent
        )
        self._replies: Any = self._process.stdout
        with contextlib.suppress(AttributeError, OSError):  # Linux only, and then up to a limit
            fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._deadline = time.monotonic() + STARTUP_S

    def await_ready(self) -> None:
        """Wait until the worker has started; RuntimeError where it does not."""
        try:
            kind, _ = self._header(0)
        except (WorkerDied, TimeoutError) as error:
            raise RuntimeError(f"no decoder starts: {error or 'it took too long'}") from error
        if kind != READY:
            raise RuntimeError(f"no decoder starts: {kind!r} is no greeting")

    def ask(
        self, number: int, request: dict[str, Any], timeout_s: float
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """The plan of a video, or the head of an answer and the frames `[F, 3, H, W]`.

        Raises DataError for what the worker refuses, TimeoutError after `timeout_s`, WorkerDied.
        """
        self.answered += 1
        request = request | {"number": number, "limit_s": timeout_s + STARTUP_S}
        self._deadline = time.monotonic() + timeout_s
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")  # pyright: ignore
        except OSError:
            raise self._death() from None
        kind, length = self._next(number, timeout_s)
        if kind == REFUSED:
            raise self._refusal(length, request["path"])
        _same(kind, PLAN if request["decode"] is None else HEAD)
        head = json.loads(self._bytes(length))
        _same(head["path"], request["path"])
        return head, None if kind == PLAN else self._frames(number, head, timeout_s)

    def _frames(self, number: int, head: dict[str, Any], timeout_s: float) -> np.ndarray:
        """The pictures that follow a head, each as often as it is shown."""
        frames, row = np.empty(head["shape"], dtype=np.uint8), 0
        for repeats in head["repeats"]:
            kind, length = self._next(number, timeout_s)
            if kind == REFUSED:
                raise self._refusal(length, head["path"])
            _same((kind, length), (IMAGE, frames[row].nbytes))
            self._fill(frames[row].data.cast("B"))
            frames[row + 1 : row + repeats] = frames[row]
            row += repeats
        _same(row, len(frames))
        return frames

    def _refusal(self, length: int, path: str) -> DataError:
        content = json.loads(self._bytes(length))
        _same(content["path"], path)
        return DataError(content["reason"])

    def _next(self, number: int, timeout_s: float) -> tuple[bytes, int]:
        """Kind and length of the next message; waits longer while the worker loads torch."""
        kind, length = self._header(number)
        if kind == LOADING:
            self._deadline = time.monotonic() + STARTUP_S
            _same(self._header(number), (READY, 0))
            self._deadline = time.monotonic() + timeout_s
            kind, length = self._header(number)
        return kind, length

    def _header(self, number: int) -> tuple[bytes, int]:
        kind, answers, length = HEADER.unpack(self._bytes(HEADER.size))
        _same(answers, number)
        return kind, length

    def _bytes(self, length: int) -> bytearray:
        content = bytearray(length)
        self._fill(memoryview(content))
        return content

    def _fill(self, view: memoryview) -> None:
        """Read until `view` is full."""
        filled = 0
        while filled < len(view):
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not self._poll.poll(1000 * left_s):
                raise TimeoutError
            read = self._replies.readinto(view[filled:])
            if not read:
                raise self._death()
            filled += read

    def _death(self) -> WorkerDied:
        """How the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        if code is None:
            return WorkerDied("the decoder closed its pipe")
        if code < 0:
            return WorkerDied(f"the decoder died ({signal.Signals(-code).name})")
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return WorkerDied(f"the decoder died ({lines[-1] if lines else f'exit code {code}'})")

    def kill(self) -> None:
        """End the process at once; it holds nothing that is worth keeping."""
        self._process.kill()

    def stop(self) -> None:
        """End the process and forget it."""
        self.kill()
        # One that hangs in the kernel, on a dead file system, outlives even that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pipe in (self._process.stdin, self._replies, self._errors):
            pipe.close()  # pyright: ignore


def _same(found: object, expected: object) -> None:
    """Raise WorkerDied for an answer to something else: better none than another video's."""
    if found != expected:
        raise WorkerDied(f"the decoder answered {found!r} instead of {expected!r}")

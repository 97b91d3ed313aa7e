"""The parent's side of one decoding process: send requests, read answers within a time limit."""

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
"""Time limit for a worker to start or to import torch, with room for a busy machine."""
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # By default glibc returns large blocks at once, so that each frame pays its page faults anew.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**24),
}
PIPE_BYTES = 2**20


class WorkerDied(RuntimeError):
    """A worker process ended, or gave an answer to something else; the message says how."""


class Worker:
    """One worker process and the messages to and from it.

    `answered` counts the requests that it was sent.
    """

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
            start_new_session=True,  # Ctrl-C at the terminal is for the parent alone
        )
        self._replies: Any = self._process.stdout
        with contextlib.suppress(AttributeError, OSError):  # Linux only, up to a system limit
            fcntl.fcntl(self._replies, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._deadline = time.monotonic() + STARTUP_S

    def await_ready(self) -> None:
        """Wait until the worker has started. Raises RuntimeError where it does not."""
        try:
            kind, _ = self._header(0)
        except (WorkerDied, TimeoutError) as error:
            raise RuntimeError(f"no decoder starts: {error or 'time limit exceeded'}") from error
        if kind != READY:
            raise RuntimeError(f"no decoder starts: unexpected first message {kind!r}")

    def ask(
        self, number: int, request: dict[str, Any], timeout_s: float
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Send a request; return the head of the answer and the frames `[F, 3, H, W]`, if any.

        Raises DataError for a file that the worker refuses, TimeoutError after `timeout_s`, and
        WorkerDied.
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
        _check_equal(kind, PLAN if request["decode"] is None else HEAD)
        head = json.loads(self._bytes(length))
        _check_equal(head["path"], request["path"])
        return head, None if kind == PLAN else self._frames(number, head, timeout_s)

    def _frames(self, number: int, head: dict[str, Any], timeout_s: float) -> np.ndarray:
        """Read the images that follow a head, and repeat each as the head says."""
        frames, row = np.empty(head["shape"], dtype=np.uint8), 0
        for repeats in head["repeats"]:
            kind, length = self._next(number, timeout_s)
            if kind == REFUSED:
                raise self._refusal(length, head["path"])
            _check_equal((kind, length), (IMAGE, frames[row].nbytes))
            self._fill(frames[row].data.cast("B"))
            frames[row + 1 : row + repeats] = frames[row]
            row += repeats
        _check_equal(row, len(frames))
        return frames

    def _refusal(self, length: int, path: str) -> DataError:
        content = json.loads(self._bytes(length))
        _check_equal(content["path"], path)
        return DataError(content["reason"])

    def _next(self, number: int, timeout_s: float) -> tuple[bytes, int]:
        """Read the next header; waits longer while the worker imports torch."""
        kind, length = self._header(number)
        if kind == LOADING:
            self._deadline = time.monotonic() + STARTUP_S
            _check_equal(self._header(number), (READY, 0))
            self._deadline = time.monotonic() + timeout_s
            kind, length = self._header(number)
        return kind, length

    def _header(self, number: int) -> tuple[bytes, int]:
        kind, answers, length = HEADER.unpack(self._bytes(HEADER.size))
        _check_equal(answers, number)
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
        """Return the error that says how the process ended."""
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
        """Kill the process; it has no state to save."""
        self._process.kill()

    def stop(self) -> None:
        """Kill the process and release its resources."""
        self.kill()
        # A process that hangs in the kernel, on a dead file system, outlives SIGKILL.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pipe in (self._process.stdin, self._replies, self._errors):
            pipe.close()  # pyright: ignore


def _check_equal(answer: object, expected: object) -> None:
    """Raise WorkerDied for an unexpected answer, so that no video gets another one's frames."""
    if answer != expected:
        raise WorkerDied(f"the decoder answered {answer!r} instead of {expected!r}")

"""SIGINT and SIGTERM: the first one stops a run after the step in progress."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd import distributed
from opd.errors import Stopped


class Interrupts:
    """Handlers that record the first SIGINT or SIGTERM in `received`, for `check` to act on at a
    safe place; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watch(self) -> Iterator["Interrupts"]:
        """Install the handlers; outside the main thread, where that is impossible, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._record) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    def check(self) -> None:
        """Raise Stopped on all ranks if any rank received a signal."""
        number = distributed.all_max(self.received or 0)
        if number:
            raise Stopped(f"{signal.Signals(number).name}: stopped", 128 + number)

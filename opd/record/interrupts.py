"""Signals that stop a run after the step in progress."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd import distributed
from opd.errors import Stopped


class Signals:
    """While watching, SIGINT and SIGTERM are remembered in `received` instead of obeyed; a second
    one is obeyed at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watch(self) -> Iterator["Signals"]:
        """Only the main thread can; elsewhere nothing is watched."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    def obey(self) -> None:
        """Raise Stopped, on all ranks, if a signal came to any."""
        number = distributed.all_max(self.received or 0)
        if number:
            raise Stopped(f"{signal.Signals(number).name}: stopped", 128 + number)

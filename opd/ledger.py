"""The ledger: device seconds of every phase of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES: tuple[str, ...] = (
    "decode-wait",
    "vision",
    "prefill",
    "sample",
    "teacher",
    "extend",
    "loss",
    "backward",
    "optimizer",
    "curriculum",
    "evaluate",
    "checkpoint",
    "idle",
)


class Ledger:
    """Adds up phases. Device time is process CPU seconds on a CPU, and on a GPU time between CUDA
    events.

    Events are read by `totals` only, so that timing never synchronises a step. Prefetching runs
    beside the phases: its CPU seconds fall into whichever phase was running. What lies between
    phases is `idle`.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._device: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._clock = time.perf_counter if self.on_gpu else time.process_time
        self._start = self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to a phase; phases do not nest."""
        begun = time.process_time()
        events = None
        if self.on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        try:
            yield
        finally:
            if events is None:
                self._device[name] += time.process_time() - begun
            else:
                events[1].record()
                self._events.append((name, *events))

    def totals(self) -> dict[str, float]:
        """Device seconds by phase so far, idle included."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._device[name] += start.elapsed_time(end) / 1000
            self._events.clear()
        busy = sum(seconds for name, seconds in self._device.items() if name != "idle")
        return self._device | {"idle": max(0.0, self._clock() - self._start - busy)}

    def device_hours(self) -> dict[str, float]:
        """`total` and one entry a phase."""
        totals = self.totals()
        return {"total": sum(totals.values()) / 3600} | {
            name: s / 3600 for name, s in totals.items()
        }

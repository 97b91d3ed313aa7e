"""The ledger: device seconds and wall seconds of every phase of a run."""

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
        self.wall: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._device: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = self._mark()

    def _mark(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to a phase; phases do not nest."""
        wall, cpu = self._mark()
        events = None
        if self.on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        try:
            yield
        finally:
            now_wall, now_cpu = self._mark()
            self.wall[name] += now_wall - wall
            if events is None:
                self._device[name] += now_cpu - cpu
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
        wall, cpu = (now - then for now, then in zip(self._mark(), self._start, strict=True))
        busy = sum(v for k, v in self._device.items() if k != "idle")
        return self._device | {"idle": max(0.0, (wall if self.on_gpu else cpu) - busy)}

    def device_hours(self) -> dict[str, float]:
        """`total` and one entry a phase."""
        totals = self.totals()
        return {"total": sum(totals.values()) / 3600} | {
            name: s / 3600 for name, s in totals.items()
        }

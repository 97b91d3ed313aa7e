"""The ledger of a run: device seconds of every phase, tokens, and FLOPs computed from shapes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from opd import distributed
from opd.record.flops import FLOPS

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


@dataclass
class _Passage:
    """One pass through a phase. On a GPU `device_s` is None until it is read from `events`."""

    name: str
    wall_s: float
    device_s: float | None
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def done(self) -> bool:
        return self.events is None or self.events[1].query()

    def seconds(self) -> float:
        """Device seconds; on a GPU only once `done`."""
        if self.device_s is None:
            assert self.events is not None
            self.device_s = self.events[0].elapsed_time(self.events[1]) / 1000
        return self.device_s


class Ledger:
    """Sums of device seconds by phase, FLOPs and tokens, per step and for the whole run.

    Device seconds are process CPU seconds on a CPU and the time between CUDA events on a GPU.
    Events are read once they are complete, if necessary steps later, so that timing never
    synchronises a step. Prefetching runs in parallel: its CPU seconds count for whichever phase was
    running. Time between phases is `idle`.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._device: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.flops: dict[str, float] = dict.fromkeys(FLOPS, 0.0)
        self.tokens = 0
        self._closed = (0, 0.0)  # tokens and FLOPs when the last step ended
        self._open: list[_Passage] = []
        self._steps: list[tuple[list[_Passage], dict[str, Any]]] = []
        self._clock = time.perf_counter if self.on_gpu else time.process_time
        self._start = self._clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside the context to a phase; phases do not nest."""
        events = None
        if self.on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        begun, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            wall_s, device_s = time.perf_counter() - wall, time.process_time() - begun
            if events is not None:
                events[1].record()
            self._open.append(_Passage(name, wall_s, None if events else device_s, events))

    def count(self, tokens: int, flops: dict[str, float]) -> None:
        """Add tokens of prompts and completions, and FLOPs by the names of `FLOPS`."""
        self.tokens += tokens
        for name, number in flops.items():
            self.flops[name] += number

    def close_step(self, row: dict[str, Any] | None = None) -> None:
        """End a step, and add what was spent since the last one to its row of metrics: `tokens` and
        `flops` at once; `seconds` by phase (wall clock on a CPU, between events on a GPU) when
        `closed` returns the row."""
        row = {} if row is None else row
        spent = self.tokens, sum(self.flops.values())
        row["tokens"], row["flops"] = (a - b for a, b in zip(spent, self._closed, strict=True))
        self._closed = spent
        self._steps.append((self._open, row))
        self._open = []

    def closed(self, wait: bool = False) -> list[dict[str, Any]]:
        """Rows of the ended steps whose timings are complete, in order; with `wait`, of all ended
        steps. Each row is returned once."""
        rows = []
        while self._steps and (wait or all(p.done() for p in self._steps[0][0])):
            passages, row = self._steps.pop(0)
            if wait and self.on_gpu:
                torch.cuda.synchronize()
            seconds: dict[str, float] = {}
            for passage in passages:
                self._device[passage.name] += passage.seconds()
                spent = passage.seconds() if self.on_gpu else passage.wall_s
                seconds[passage.name] = seconds.get(passage.name, 0.0) + spent
            row["seconds"] = seconds
            rows.append(row)
        return rows

    def totals(self) -> dict[str, float]:
        """Device seconds by phase so far, idle included; waits for the device."""
        assert not self._steps, "rows of ended steps must be read first"
        self.close_step()
        self.closed(wait=True)
        busy = sum(seconds for name, seconds in self._device.items() if name != "idle")
        return self._device | {"idle": max(0.0, self._clock() - self._start - busy)}

    def everywhere(self) -> dict[str, float]:
        """`totals`, summed over all ranks."""
        mine = self.totals()
        return dict(zip(mine, distributed.all_sum(list(mine.values())), strict=True))

    def shares(self) -> str:
        """The three largest phases of training so far with their shares, for a progress bar."""
        names = [name for name in PHASES if name not in ("evaluate", "checkpoint", "idle")]
        total = sum(self._device[name] for name in names) or 1.0
        largest = sorted(names, key=lambda name: -self._device[name])[:3]
        return " ".join(f"{name} {self._device[name] / total:.0%}" for name in largest)

    def device_hours(self) -> dict[str, float]:
        """Device hours of all ranks: `total`, and one entry per phase."""
        totals = self.everywhere()
        return {"total": sum(totals.values()) / 3600} | {
            name: s / 3600 for name, s in totals.items()
        }

    def state(self) -> dict[str, Any]:
        """State of all ranks from which a resumed run continues."""
        return {"device": self.everywhere(), "flops": dict(self.flops), "tokens": self.tokens}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; what this ledger has spent already is added to it. The first
        rank takes over the device seconds of all."""
        if distributed.is_first():
            self._start -= sum(state["device"].values())
            for name, seconds in state["device"].items():
                self._device[name] += seconds
            self._device["idle"] = 0.0
        self.count(state["tokens"], state["flops"])
        self._closed = self.tokens, sum(self.flops.values())

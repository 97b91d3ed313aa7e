"""A protocol: what a comparison runs, fixed before its first run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.record import RESULTS

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a protocol: the keys of its command line, and where its result is kept."""

    arm: str
    name: str
    keys: tuple[str, ...]
    result: Path

    def outcome(self) -> Result:
        """What it came to, once its result is there."""
        return json.loads(self.result.read_text())


@dataclass(frozen=True)
class Protocol:
    """What was fixed before the first run; the fields are those of the file."""

    name: str
    common: list[str]
    rates: list[str]
    tuning: list[str]
    seeds: list[int]
    scores: list[str]
    arms: dict[str, list[str]]
    chosen_by: dict[str, list[str]] = field(default_factory=dict)
    first: dict[str, Any] | None = None
    teacher_training: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "Protocol":
        return cls(name=path.stem, **yaml.safe_load(path.read_text()))

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    def run(self, arm: str, name: str, *more: str) -> Run:
        """A run of an arm with more keys."""
        keys = (*self.common, *self.arms[arm], *more)
        return Run(arm, name, keys, self.results / arm / f"{name}.json")

    def tuned(self, arm: str) -> list[Run]:
        """The arm at every rate."""
        rates = self.rates
        return [self.run(arm, f"rate-{r}", *self.tuning, f"optim.lr={r}") for r in rates]

    def final(self, arm: str) -> list[Run]:
        """The arm at its best rate, on every seed; none before every rate is measured."""
        rate = self.best_rate(arm)
        return [
            self.run(arm, f"rate-{rate}-seed-{seed}", f"optim.lr={rate}", f"seed={seed}")
            for seed in (self.seeds if rate else [])
        ]

    def best_rate(self, arm: str) -> str | None:
        """The rate with the highest mean, at the end, of the scores that the arm is chosen by."""
        runs = self.tuned(arm)
        if not all(run.result.is_file() for run in runs):
            return None
        scores = self.chosen_by.get(arm, self.scores)
        ends = [run.outcome()["curve"][-1] for run in runs]
        means = [sum(end[score] for score in scores) for end in ends]
        return self.rates[means.index(max(means))]

"""The methods against each other on the embedded task: python -m bench.methods [PROTOCOL.yaml]

Runs what is left of a protocol (`bench/methods.yaml`, or `bench/rlt.yaml`), or of the arms that are
named, each run a single-threaded `python -m opd.train`; keeps a result file a run below
`bench/results/PROTOCOL/`, and makes `PROTOCOL.json` and `PROTOCOL.png` beside it of all there are.
Stopped, it goes on where it was.
"""

import argparse
import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.record import hardware
from opd.checkpoint import read_rows
from opd.report import NOT_TRAINING, Curve, plot, thresholds

RESULTS, RUNS = Path("bench/results"), Path("runs/bench")


@dataclass(frozen=True)
class Run:
    """One run of a protocol: the keys of its command line, and where its result is kept."""

    arm: str
    name: str
    keys: tuple[str, ...]
    result: Path

    def outcome(self) -> dict[str, Any] | None:
        """What it came to; None before it is made."""
        return json.loads(self.result.read_text()) if self.result.is_file() else None


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
    first: dict[str, Any] | None = None
    teacher_training: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "Protocol":
        return cls(name=path.stem, **yaml.safe_load(path.read_text()))

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    def _run(self, arm: str, name: str, *more: str) -> Run:
        keys = (*self.common, *self.arms[arm], *more)
        return Run(arm, name, keys, self.results / arm / f"{name}.json")

    def tuned(self, arm: str) -> list[Run]:
        """The arm at every rate."""
        rates = self.rates
        return [self._run(arm, f"rate-{r}", *self.tuning, f"optim.lr={r}") for r in rates]

    def final(self, arm: str) -> list[Run]:
        """The arm at its best rate, on every seed; none before every rate is measured."""
        rate = self.best_rate(arm)
        seeds = self.seeds if rate else []
        return [self._run(arm, f"seed-{s}", f"optim.lr={rate}", f"seed={s}") for s in seeds]

    def best_rate(self, arm: str) -> str | None:
        """The rate with the highest mean of the scores at the end."""
        ends = [outcome["curve"][-1] for run in self.tuned(arm) if (outcome := run.outcome())]
        if len(ends) < len(self.rates):
            return None
        means = [sum(end[score] for score in self.scores) for end in ends]
        return self.rates[means.index(max(means))]


def train(keys: list[str], run_dir: Path) -> None:
    """A run in a process of its own, to its end; RuntimeError with its last line if it fails."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opd.train", *keys, f"run_dir={run_dir}", "resume=auto"]
    with run_dir.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode
    if code:
        told = run_dir.with_suffix(".log").read_text().splitlines()[-1:]
        raise RuntimeError(f"{run_dir}: exit code {code}: {' '.join(told)}")


def carry_out(run: Run, folder: Path) -> None:
    """Run it below `folder`, unless its result is there, and keep that."""
    if run.result.is_file():
        return
    run_dir = folder / run.arm / run.name
    if not (run_dir / "summary.json").is_file():
        train(list(run.keys), run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    environments = read_rows(run_dir / "environment.jsonl")
    kept = ("curve", "gain", "flops", "equal_groups", "trained_share", "left_out")
    result = {
        "arm": run.arm,
        "keys": list(run.keys),
        "hardware": hardware(),
        "versions": {k: v for k, v in environments[-1]["versions"].items() if v},
        "commit": sorted({str(e["commit"]) for e in environments}),
        "date": datetime.date.today().isoformat(),
        "tokens": sum(row["tokens"] for row in read_rows(run_dir / "metrics.jsonl")),
        **{name: summary.get(name) for name in kept},
    }
    run.result.parent.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps(result, indent=1) + "\n")
    end = {k: f"{v:.3f}" for k, v in result["curve"][-1].items() if "miou" in k or "accuracy" in k}
    print(f"{run.arm} {run.name}: {end}", flush=True)


def teacher(protocol: Protocol) -> dict[str, Any]:
    """The teacher's scores, and the device seconds that its last stage takes."""
    path, timed = protocol.results / "teacher.json", protocol.teacher_training
    assert timed is not None
    if not path.is_file():
        folder = RUNS / protocol.name / "teacher"
        keys = [f"run_dir={folder / 'scores'}", "overwrite=true", "threads=1"]
        command = [sys.executable, "-m", "opd.evaluate", "embedded:teacher", *keys]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        steps = timed["timed_steps"]
        short = [*timed["keys"], f"steps={steps}", "eval.draws=0", "data.limit_eval=2"]
        train(short, folder / "timed")
        spent = json.loads((folder / "timed" / "summary.json").read_text())["device_hours"]
        seconds = 3600 * sum(h for k, h in spent.items() if k not in ("total", *NOT_TRAINING))
        result = json.loads(told) | {"training_s": seconds * timed["steps"] / steps}
        result.pop("answers")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


def published_style_s(result: dict[str, Any]) -> float:
    """An estimate of the device seconds of the same steps in the published loop, from the seconds
    of this one: n rollouts are n sequences, each of them forwarded once to generate and three times
    beside (for the old log-probabilities, for nothing, to train), every forward with its prompt."""
    end = result["curve"][-1]
    spent = {k: v for k, v in end["device_s"].items() if k not in NOT_TRAINING}
    if not end["rollouts"]:
        return sum(spent.values())
    generated, prompts = end["generated_tokens"], result["tokens"] - end["generated_tokens"]
    options = dict(key.split("=", 1) for key in result["keys"])
    repeated = int(options.get("num_rollouts", 1)) * prompts
    longer = (repeated + generated) / (prompts + generated)  # than what is forwarded here
    forward = spent["prefill"] + spent["extend"]
    generating = forward * repeated / (prompts + generated)
    grown = longer * (3 * forward + spent["teacher"] + spent["backward"])
    apart = ("prefill", "extend", "teacher", "backward")
    return generating + grown + sum(s for name, s in spent.items() if name not in apart)


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, lowest and highest; no mean where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "seeds": values}
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "seeds": values}


def report(protocol: Protocol) -> dict[str, Any]:
    """Everything measured so far, side by side."""
    arms: dict[str, Any] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in protocol.arms:
        tuned = zip(protocol.rates, protocol.tuned(arm), strict=True)
        measured = {rate: outcome for rate, run in tuned if (outcome := run.outcome())}
        best = protocol.best_rate(arm)
        arms[arm] = {
            "rates": {
                rate: {score: outcome["curve"][-1][score] for score in protocol.scores}
                for rate, outcome in measured.items()
            },
            "best_rate": best,
            "inside_grid": best and best not in (protocol.rates[0], protocol.rates[-1]),
        }
        finals = [run.outcome() for run in protocol.final(arm)]
        if finals and all(finals):
            results[arm] = [outcome for outcome in finals if outcome]
    told: dict[str, Any] = {"protocol": protocol.name, "arms": arms}
    if not results:
        return told
    known = teacher(protocol) if protocol.teacher_training else None
    curves = {arm: [Curve(outcome["curve"]) for outcome in found] for arm, found in results.items()}
    plot(curves, protocol.results.with_suffix(".png"))
    every = [curve for found in curves.values() for curve in found]
    begun = [curve.points[0] for curve in next(iter(curves.values()))]
    start = {s: sum(point[s] for point in begun) / len(begun) for s in protocol.scores}
    steps = min(curve.along("step")[-1] for curve in every)
    budget = {
        "with_scoring": min(curve.seconds()[-1] for curve in every),
        "without_scoring": min(curve.seconds(scoring=False)[-1] for curve in every),
    }
    for arm, found in curves.items():
        entry = arms[arm]
        for score in protocol.scores:
            entry[score] = {
                "end": spread([c.points[-1][score] for c in found]),
                "at_equal_steps": spread([c.at(steps, score, "step") for c in found]),
                "at_equal_device_s": {
                    name: spread(
                        [c.at(s, score, "device_s", name == "with_scoring") for c in found]
                    )
                    for name, s in budget.items()
                },
            }
            if known:
                levels = thresholds(start[score], known[score])
                entry[score]["device_s_to"] = [
                    {"score": level} | _seconds_to(found, level, score, known["training_s"])
                    for level in levels
                ]
        entry["gain"] = [outcome["gain"] for outcome in results[arm]]
        entry["trained_share"] = spread([outcome["trained_share"] for outcome in results[arm]])
        entry["device_s"] = {
            "own_loop": spread([c.seconds()[-1] for c in found]),
            "of_it_scoring": spread([c.seconds()[-1] - c.seconds(False)[-1] for c in found]),
            "published_style_estimate": spread([published_style_s(o) for o in results[arm]]),
        }
    outcomes = [outcome for found in results.values() for outcome in found]
    return told | {
        "hardware": sorted({outcome["hardware"] for outcome in outcomes}),
        "commits": sorted({commit for outcome in outcomes for commit in outcome["commit"]}),
        "teacher": known,
        "start": start,
        "equal_steps": steps,
        "equal_device_s": budget,
        "valid": _valid(arms, start, known),
    }


def _seconds_to(found: list[Curve], level: float, score: str, training_s: float) -> dict[str, Any]:
    """Device seconds to a score: training alone, with the teacher's and the curriculum's scoring,
    and with the teacher's training too."""
    taught = [c.points[-1]["device_s"]["teacher"] > 0 for c in found]
    behind = [Curve(c.points, training_s if t else 0.0) for c, t in zip(found, taught, strict=True)]
    return {
        "without_scoring": spread([c.reaches(level, score, "device_s", False) for c in found]),
        "with_scoring": spread([c.reaches(level, score, "device_s") for c in found]),
        "with_teacher_training": spread([c.reaches(level, score, "device_s") for c in behind]),
    }


def _valid(arms: dict[str, Any], start: Any, known: dict[str, Any] | None) -> dict[str, Any]:
    """The protocol's conditions, as far as they are known."""
    told: dict[str, Any] = {"best_rates_inside": {a: e["inside_grid"] for a, e in arms.items()}}
    if known:
        gains = [gain for found in arms["grpo"].get("gain", []) for gain in found.values()]
        enough = all(gain["mean"] >= 0.05 and gain["interval"][0] > 0 for gain in gains)
        told["grpo_gains"] = enough if gains else None
        told["teacher_ahead"] = all(known[score] - start[score] >= 0.15 for score in start)
    return told


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.methods", description=__doc__)
    parser.add_argument("protocol", nargs="?", type=Path, default=Path("bench/methods.yaml"))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of the protocol; default all")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    if not given.protocol.is_file():
        parser.error(f"{given.protocol}: no such file")
    protocol = Protocol.read(given.protocol)
    unknown = [arm for arm in given.arms or [] if arm not in protocol.arms]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such arm (known: {', '.join(protocol.arms)})")
    first, failed = protocol.first, []
    if first and not Path(first["run_dir"], "summary.json").is_file():
        train(first["keys"], Path(first["run_dir"]))

    def attempt(run: Run) -> None:
        try:
            carry_out(run, RUNS / protocol.name)
        except RuntimeError as error:
            failed.append(run)
            print(error, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        for arm in given.arms or protocol.arms:
            list(pool.map(attempt, protocol.tuned(arm)))
            list(pool.map(attempt, protocol.final(arm)))
    target = protocol.results.with_suffix(".json")
    target.write_text(json.dumps(report(protocol), indent=1) + "\n")
    print(target)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

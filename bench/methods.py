"""The methods against each other on the embedded task: python -m bench.methods [--jobs 2] [ARM ...]

Runs what is left of the protocol `bench/methods.yaml` (of the named arms, or of all), each run a
single-threaded `python -m opd.train`; keeps a result file a run below `bench/results/methods`, and
makes `bench/results/methods.json` and `methods.png` of all there are. Stopped, it goes on where it
was.
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
from opd.report import NOT_TRAINING, SCORES, Curve, plot, thresholds

PROTOCOL = Path("bench/methods.yaml")
RESULTS = Path("bench/results/methods")
RUNS = Path("runs/methods")


@dataclass(frozen=True)
class Run:
    """One run of the protocol: the keys of its command line, and where its result is kept."""

    arm: str
    name: str
    keys: tuple[str, ...]

    @property
    def result(self) -> Path:
        return RESULTS / self.arm / f"{self.name}.json"


def tuning(protocol: dict[str, Any], arm: str) -> list[Run]:
    """The arm at every rate."""
    keys = (*protocol["common"], *protocol["arms"][arm], *protocol["tuning"])
    rates = protocol["rates"]
    return [Run(arm, f"rate-{rate}", (*keys, f"optim.lr={rate}")) for rate in rates]


def final(protocol: dict[str, Any], arm: str, rate: str) -> list[Run]:
    """The arm at its best rate, on every seed."""
    keys = (*protocol["common"], *protocol["arms"][arm], f"optim.lr={rate}")
    return [Run(arm, f"seed-{seed}", (*keys, f"seed={seed}")) for seed in protocol["seeds"]]


def score(result: dict[str, Any]) -> float:
    """What a rate is chosen by: the mean of greedy and sampled mIoU at the end."""
    return sum(result["curve"][-1][name] for name in SCORES) / len(SCORES)


def best_rate(protocol: dict[str, Any], arm: str) -> str | None:
    """The rate with the highest score; None where one is not measured yet."""
    runs = tuning(protocol, arm)
    if not all(run.result.is_file() for run in runs):
        return None
    scores = [score(json.loads(run.result.read_text())) for run in runs]
    return protocol["rates"][scores.index(max(scores))]


def train(keys: list[str], run_dir: Path) -> None:
    """A run in a process of its own, to its end; RuntimeError with its last line if it fails."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "opd.train", *keys, f"run_dir={run_dir}", "resume=auto"]
    with run_dir.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode
    if code:
        told = run_dir.with_suffix(".log").read_text().splitlines()[-1:]
        raise RuntimeError(f"{run_dir}: exit code {code}: {' '.join(told)}")


def carry_out(run: Run) -> None:
    """Run it, unless its result is there, and keep that."""
    if run.result.is_file():
        return
    run_dir = RUNS / run.arm / run.name
    if not (run_dir / "summary.json").is_file():
        train(list(run.keys), run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    environments = read_rows(run_dir / "environment.jsonl")
    rows = read_rows(run_dir / "metrics.jsonl")
    kept = (
        "curve",
        "gain",
        "flops",
        "equal_groups",
        "trained_share",
        "left_out",
        "peak_memory_mib",
    )
    result = {
        "arm": run.arm,
        "keys": list(run.keys),
        "hardware": hardware(),
        "versions": {k: v for k, v in environments[-1]["versions"].items() if v},
        "commit": sorted({str(e["commit"]) for e in environments}),
        "date": datetime.date.today().isoformat(),
        "tokens": sum(row["tokens"] for row in rows),
        **{name: summary.get(name) for name in kept},
    }
    run.result.parent.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps(result, indent=1) + "\n")
    end = result["curve"][-1]
    print(f"{run.arm} {run.name}: {end['miou']:.3f} {end['sampled_miou']:.3f}", flush=True)


def teacher(protocol: dict[str, Any]) -> dict[str, Any]:
    """The teacher's scores, and the device seconds that its last stage takes."""
    path = RESULTS / "teacher.json"
    if not path.is_file():
        folder, timed = RUNS / "teacher", protocol["teacher_training"]
        keys = ["run_dir=" + str(folder / "scores"), "overwrite=true", "threads=1"]
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
    """Mean, lowest and highest; None where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "seeds": values}
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "seeds": values}


def report(protocol: dict[str, Any]) -> dict[str, Any]:
    """Everything measured so far, side by side."""
    known = teacher(protocol)
    results: dict[str, list[dict[str, Any]]] = {}
    arms: dict[str, Any] = {}
    for arm in protocol["arms"]:
        rates = {}
        for rate, run in zip(protocol["rates"], tuning(protocol, arm), strict=True):
            if run.result.is_file():
                end = json.loads(run.result.read_text())["curve"][-1]
                rates[rate] = {name: end[name] for name in SCORES}
        best = best_rate(protocol, arm)
        inside = None if best is None else best not in (protocol["rates"][0], protocol["rates"][-1])
        arms[arm] = {"rates": rates, "best_rate": best, "inside_grid": inside}
        runs = final(protocol, arm, best) if best else []
        if runs and all(run.result.is_file() for run in runs):
            results[arm] = [json.loads(run.result.read_text()) for run in runs]
    if not results:
        return {"arms": arms, "teacher": known}
    curves = {arm: [Curve(r["curve"]) for r in found] for arm, found in results.items()}
    begun = [c.points[0] for c in next(iter(curves.values()))]
    start = {name: sum(point[name] for point in begun) / len(begun) for name in SCORES}
    plot(curves, RESULTS.with_suffix(".png"))
    steps = min(c.along("step")[-1] for found in curves.values() for c in found)
    budget = {
        told: min(c.seconds(scoring)[-1] for found in curves.values() for c in found)
        for told, scoring in (("with_scoring", True), ("without_scoring", False))
    }
    for arm, found in curves.items():
        with_training = [Curve(c.points, known["training_s"]) for c in found]
        for name in SCORES:
            levels = thresholds(start[name], known[name])
            arms[arm][name] = {
                "end": spread([c.points[-1][name] for c in found]),
                "at_equal_steps": spread([c.at(steps, name, "step") for c in found]),
                "at_equal_device_s": {
                    told: spread([c.at(s, name, "device_s", told == "with_scoring") for c in found])
                    for told, s in budget.items()
                },
                "device_s_to": [
                    {
                        "score": level,
                        "without_scoring": spread(
                            [c.reaches(level, name, "device_s", False) for c in found]
                        ),
                        "with_scoring": spread([c.reaches(level, name, "device_s") for c in found]),
                        "with_teacher_training": spread(
                            [c.reaches(level, name, "device_s") for c in with_training]
                        )
                        if _has_teacher(results[arm][0])
                        else None,
                    }
                    for level in levels
                ],
            }
        arms[arm]["gain"] = [r["gain"] for r in results[arm]]
        arms[arm]["device_s"] = {
            "own_loop": spread([c.seconds()[-1] for c in found]),
            "of_it_scoring": spread([c.seconds()[-1] - c.seconds(False)[-1] for c in found]),
            "published_style_estimate": spread([published_style_s(r) for r in results[arm]]),
        }
    return {
        "protocol": protocol,
        "hardware": sorted({r["hardware"] for found in results.values() for r in found}),
        "commits": sorted({c for found in results.values() for r in found for c in r["commit"]}),
        "teacher": known,
        "start": start,
        "equal_steps": steps,
        "equal_device_s": budget,
        "valid": _valid(arms, start, known),
        "arms": arms,
    }


def _has_teacher(result: dict[str, Any]) -> bool:
    return not any(key in ("method=sft", "method=grpo") for key in result["keys"])


def _valid(arms: dict[str, Any], start: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The protocol's conditions, each true, false or not known yet."""
    gains = [gain for found in arms.get("grpo", {}).get("gain", []) for gain in found.values()]
    return {
        "best_rates_inside": {arm: entry["inside_grid"] for arm, entry in arms.items()},
        "grpo_gains": bool(gains)
        and all(g["mean"] >= 0.05 and g["interval"][0] > 0 for g in gains),
        "teacher_ahead": all(known[name] - start[name] >= 0.15 for name in SCORES),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.methods", description=__doc__)
    parser.add_argument("arms", nargs="*", metavar="ARM")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    protocol = yaml.safe_load(PROTOCOL.read_text())
    unknown = [arm for arm in given.arms if arm not in protocol["arms"]]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such arm (known: {', '.join(protocol['arms'])})")
    failed = []

    def attempt(run: Run) -> None:
        try:
            carry_out(run)
        except RuntimeError as error:
            failed.append(run)
            print(error, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        for arm in given.arms or protocol["arms"]:
            list(pool.map(attempt, tuning(protocol, arm)))
            rate = best_rate(protocol, arm)
            if rate is not None:
                list(pool.map(attempt, final(protocol, arm, rate)))
    target = RESULTS.with_suffix(".json")
    target.write_text(json.dumps(report(protocol), indent=1) + "\n")
    print(target)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

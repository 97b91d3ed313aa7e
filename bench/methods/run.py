"""The methods against each other on the embedded task: python -m bench.methods [PROTOCOL.yaml]

Runs what is left of a protocol (`bench/methods.yaml`, or `bench/rlt.yaml`), or of the arms that are
named, each run a single-threaded `python -m opd.train`; keeps a result file a run below
`bench/results/PROTOCOL/`, and makes `PROTOCOL.json`, `PROTOCOL.md` and `PROTOCOL.png` beside it of
all there are (`bench.methods.report`). Stopped, it goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.methods.protocol import Protocol, Run
from bench.methods.report import write
from bench.record import origin
from opd.files import read_rows
from opd.models.load import checksums
from opd.report import read

RUNS = Path("runs/bench")


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
    known = origin()
    kept = ("curve", "gain", "flops", "equal_groups", "trained_share", "left_out")
    result = {
        "arm": run.arm,
        "keys": list(run.keys),
        **known,
        "versions": {k: v for k, v in environments[-1]["versions"].items() if v},
        "commit": sorted({e["commit"] or known["commit"] for e in environments}),
        "tokens": sum(row["tokens"] for row in read_rows(run_dir / "metrics.jsonl")),
        **{name: summary.get(name) for name in kept},
    }
    run.result.parent.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps(result, indent=1) + "\n")
    end = {k: f"{v:.3f}" for k, v in result["curve"][-1].items() if "miou" in k or "accuracy" in k}
    print(f"{run.arm} {run.name}: {end}", flush=True)


def begin(protocol: Protocol) -> None:
    """Train the model that every arm starts from, unless it is there. ValueError where the results
    so far began with another one: a CPU of another make trains other weights."""
    first = protocol.first
    if not first:
        return
    run_dir, kept = Path(first["run_dir"]), protocol.results / "first.json"
    if not (run_dir / "summary.json").is_file():
        train(first["keys"], run_dir)
    weights = checksums(run_dir / "student")
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({**origin(), "weights": weights}, indent=1) + "\n")
    elif json.loads(kept.read_text())["weights"] != weights:
        raise ValueError(
            f"{run_dir / 'student'}: not what the runs in {kept.parent} started from "
            f"({kept.name}): bring that, or remove them"
        )


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
        seconds = read(folder / "timed").seconds()[-1]
        result = json.loads(told) | {"training_s": seconds * timed["steps"] / steps}
        result.pop("answers")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())


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
    failed: list[Run] = []
    try:
        begin(protocol)
    except ValueError as error:
        parser.error(str(error))

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
    print(write(protocol, teacher(protocol) if protocol.teacher_training else None))
    raise SystemExit(1 if failed else 0)

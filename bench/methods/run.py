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
from bench.methods.report import write_report
from bench.record import origin, write
from opd.errors import UserError
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
        last_line = run_dir.with_suffix(".log").read_text().splitlines()[-1:]
        raise RuntimeError(f"{run_dir}: exit code {code}: {' '.join(last_line)}")


def carry_out(run: Run, folder: Path) -> None:
    """Run it below `folder`, unless its result is there, and keep that."""
    if run.result.is_file():
        return
    run_dir = folder / run.arm / run.name
    if not (run_dir / "summary.json").is_file():
        train(list(run.keys), run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    source = origin()
    commits = {e["commit"] or source["commit"] for e in read_rows(run_dir / "environment.jsonl")}
    kept = ("curve", "gain", "flops", "equal_groups", "trained_share", "left_out")
    result = {
        "arm": run.arm,
        "keys": list(run.keys),
        **source,
        "commit": sorted(commits),
        "tokens": sum(row["tokens"] for row in read_rows(run_dir / "metrics.jsonl")),
        **{name: summary.get(name) for name in kept},
    }
    write(run.result, result)
    end = {k: f"{v:.3f}" for k, v in result["curve"][-1].items() if "miou" in k or "accuracy" in k}
    print(f"{run.arm} {run.name}: {end}", flush=True)


def begin(protocol: Protocol) -> None:
    """Train the model that every arm starts from, unless it is there. UserError where the results
    so far began with another one: a CPU of another make trains other weights."""
    if protocol.first is None:
        return
    run_dir, kept = Path(protocol.first["run_dir"]), protocol.results / "first.json"
    if not (run_dir / "summary.json").is_file():
        train(protocol.first["keys"], run_dir)
    weights = checksums(run_dir / "student")
    if not kept.is_file():
        write(kept, {**origin(), "weights": weights})
    elif json.loads(kept.read_text())["weights"] != weights:
        raise UserError(
            f"{run_dir / 'student'}: not what the runs in {kept.parent} started from "
            f"({kept.name}): bring that, or remove them"
        )


def teacher(protocol: Protocol) -> dict[str, Any] | None:
    """The teacher's scores, and the device seconds that its last stage takes; None where no arm is
    compared with it."""
    path, timed = protocol.results / "teacher.json", protocol.teacher_training
    if timed is None:
        return None
    if not path.is_file():
        folder = RUNS / protocol.name / "teacher"
        keys = [f"run_dir={folder / 'scores'}", "overwrite=true", "threads=1"]
        keys += [key for key in protocol.common if key.startswith("data.eval=")]
        command = [sys.executable, "-m", "opd.evaluate", "embedded:teacher", *keys]
        scores = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        del scores["answers"]
        steps = timed["timed_steps"]
        train([*timed["keys"], f"steps={steps}", "eval.draws=0", "data.limit_eval=2"], folder / "t")
        seconds = read(folder / "t").seconds()[-1] * timed["steps"] / steps
        write(path, scores | {"training_s": seconds})
    return json.loads(path.read_text())


def main() -> None:
    """The command."""
    hidden = argparse.SUPPRESS  # a mistake is one line, without the usage
    parser = argparse.ArgumentParser(prog="bench.methods", usage=hidden, description=__doc__)
    parser.add_argument("protocol", nargs="?", type=Path, default=Path("bench/methods.yaml"))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of the protocol; default all")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    if not options.protocol.is_file():
        parser.error(f"{options.protocol}: no such file")
    protocol = Protocol.read(options.protocol)
    unknown = [arm for arm in options.arms or [] if arm not in protocol.arms]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such arm (known: {', '.join(protocol.arms)})")
    failed: list[Run] = []

    def attempt(run: Run) -> None:
        try:
            carry_out(run, RUNS / protocol.name)
        except RuntimeError as error:
            failed.append(run)
            print(error, file=sys.stderr, flush=True)

    try:
        begin(protocol)
    except UserError as error:
        parser.error(str(error))
    with ThreadPoolExecutor(options.jobs) as pool:
        for arm in options.arms or protocol.arms:
            list(pool.map(attempt, protocol.tuned(arm)))
            list(pool.map(attempt, protocol.final(arm)))
    print(write_report(protocol, teacher(protocol)))
    raise SystemExit(1 if failed else 0)

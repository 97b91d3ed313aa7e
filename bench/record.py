"""Keep what a benchmark run measured: python -m bench.record BENCHMARK.json bench/results/NAME.json

BENCHMARK.json is what `pytest bench --benchmark-only --benchmark-json=BENCHMARK.json` wrote. Kept
are each benchmark's `extra_info`, and what the run said of itself (`origin`): the hardware that it
ran on, versions, commit and date. `python -m bench.report` makes tables of all that are kept.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import ROOT

RESULTS = ROOT / "bench" / "results"
LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "trl")


def hardware() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} cores of {_cpu()}, no GPU"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    return next((n.split(": ")[1] for n in names if n.startswith("model name")), "a CPU")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout that these sources are in, with a + where tracked files differ
    from it (kept results and the kernels' tuned sizes aside). Without git or a checkout it is what
    the environment's BENCH_COMMIT says, or "", with which no result is accepted."""
    try:
        head = _git("rev-parse", "--short=7", "HEAD")
        aside = (":!bench/results", ":!kernels/fused_kl/tuned.py")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".", *aside)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BENCH_COMMIT", "")
    return head + "+" if changed else head


def _git(*arguments: str) -> str:
    told = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    return told.stdout.strip()


def origin() -> dict[str, Any]:
    """What every result file says of itself: hardware, versions, date and commit, as of now."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


class Refused(ValueError):
    """A file that says nothing that can be shown or compared."""


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises Refused, naming it, where it does not say what it was measured on, of
    what and when."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path}: not JSON: {error}") from error
    for key in ("hardware", "commit", "date"):
        if not (isinstance(found, dict) and isinstance(found.get(key), str) and found[key]):
            raise Refused(f"{path}: does not say its {key}")
    return found


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The part of pytest-benchmark's report that is worth keeping; ValueError where the run did not
    say where it came from."""
    known = run.get("machine_info", {}).get("origin")
    if known is None:
        raise ValueError("no run of bench/: it does not say its hardware")
    if not known["commit"]:
        raise ValueError("does not say its commit; without git, set BENCH_COMMIT when measuring")
    names = {b["fullname"].rpartition("/")[2]: b["extra_info"] for b in run["benchmarks"]}
    return {**known, "benchmarks": names}


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m bench.record BENCHMARK.json RESULT.json")
    source, target = (Path(argument) for argument in arguments)
    try:
        result = record(json.loads(source.read_text()))
    except OSError as error:
        told = error.strerror
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"no report of pytest-benchmark: {error}"
    else:
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(target)
        return
    print(f"error: {source}: {told}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])

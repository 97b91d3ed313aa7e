"""Keep what a benchmark run measured: python -m bench.record BENCHMARK.json bench/results/NAME.json

BENCHMARK.json is what `pytest bench --benchmark-only --benchmark-json=BENCHMARK.json` wrote. Kept
are hardware, versions, commit and date, and each benchmark's `extra_info`.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

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


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The part of pytest-benchmark's report that is worth keeping."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "date": run["datetime"][:10],
        "commit": run["commit_info"]["id"][:7],
        "uncommitted_changes": run["commit_info"]["dirty"],
        "benchmarks": {
            b["fullname"].rpartition("/")[2]: b["extra_info"] for b in run["benchmarks"]
        },
    }


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m bench.record BENCHMARK.json RESULT.json")
    source, target = (Path(argument) for argument in arguments)
    result = record(json.loads(source.read_text()))
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])

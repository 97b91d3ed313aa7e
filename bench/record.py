"""Keep what a benchmark run measured: python -m bench.record BENCHMARK.json bench/results/NAME.json

BENCHMARK.json is what `pytest bench --benchmark-only --benchmark-json=BENCHMARK.json` wrote. Kept
are each benchmark's `extra_info`, and of pytest-benchmark's machine and commit information the
hardware, versions, commit and date. `python -m bench.report` makes tables of all that are kept.
"""

import datetime
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import ROOT
from opd.record.environment import environment

RESULTS = ROOT / "bench" / "results"
LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "trl")


def hardware() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    known = environment()
    if known["gpus"]:
        return known["gpus"][0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{known['cores']} cores of {next(names, 'a CPU')}, no GPU"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    installed = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def short(commit: str) -> str:
    """Seven digits of a commit, with a + where tracked files differ from it."""
    return commit[:7] + ("+" if commit.endswith(("-dirty", "+")) else "")


def commit() -> str:
    """The commit of these sources; without a git checkout what BENCH_COMMIT says, or "", with
    which no result is accepted."""
    return short(environment()["commit"] or os.environ.get("BENCH_COMMIT", ""))


def origin() -> dict[str, Any]:
    """Hardware, versions, date and commit, as of now, of a result that pytest did not measure."""
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
        content = json.loads(path.read_text())
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path}: not JSON: {error}") from error
    for key in ("hardware", "commit", "date"):
        if not (isinstance(content, dict) and isinstance(content.get(key), str) and content[key]):
            raise Refused(f"{path}: does not say its {key}")
    return content


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The part of pytest-benchmark's report that is worth keeping. Raises ValueError where the run
    does not say where it came from."""
    machine, source = run["machine_info"], run["commit_info"]
    if "hardware" not in machine:
        raise ValueError("no run of bench/: it does not say its hardware")
    unknown = source["id"] in ("unversioned", "unknown")
    commit = os.environ.get("BENCH_COMMIT", "") if unknown else source["id"]
    if not commit:
        raise ValueError("does not say its commit; without git, set BENCH_COMMIT")
    return {
        "hardware": machine["hardware"],
        "versions": machine["versions"],
        "date": run["datetime"][:10],
        "commit": short(commit + "-dirty" * source["dirty"]),
        "benchmarks": {
            b["fullname"].rpartition("/")[2]: b["extra_info"] for b in run["benchmarks"]
        },
    }


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m bench.record BENCHMARK.json RESULT.json")
    source, target = (Path(argument) for argument in arguments)
    try:
        result = record(json.loads(source.read_text()))
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no report of pytest-benchmark: {error}"
    else:
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(target)
        return
    print(f"error: {source}: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])

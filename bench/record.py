"""Where a result comes from, by pytest-benchmark, and the results that are kept.

A kept result is a JSON file of bench/results: what `pytest bench --benchmark-only
--benchmark-json=FILE` wrote, or its short form with `hardware`, `versions`, `commit`, `date` and
`benchmarks`, the `extra_info` of each benchmark by name.
"""

import datetime
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import ROOT
from opd.errors import UserError

RESULTS = ROOT / "bench" / "results"
LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "trl")


class Refused(UserError):
    """A file that is not a result, or does not say where it is from."""


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def complete_machine(machine_info: dict[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's machine information with the GPU and versions of libraries, and without
    the machine's name."""
    import torch  # not at the top: bench.gpu installs packages before it needs them

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    added = {"gpu": gpu, "cores": cores, "versions": versions()}
    return {key: value for key, value in machine_info.items() if key != "node"} | added


def complete_commit(commit_info: dict[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's commit information; without a git checkout what BENCH_COMMIT says."""
    if commit_info["id"] in ("unversioned", "unknown"):
        return commit_info | {"id": os.environ.get("BENCH_COMMIT", "")}
    return commit_info


def short(commit: str) -> str:
    """Seven digits of a commit, with a + where tracked files differ from it."""
    differs = commit.endswith(("-dirty", "+"))
    return commit.removesuffix("-dirty").rstrip("+")[:7] + "+" * differs


def origin() -> dict[str, Any]:
    """Hardware, versions, commit and date, as of now."""
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
    from pytest_benchmark.utils import get_commit_info

    return described(
        complete_machine(pytest_benchmark_generate_machine_info()),
        complete_commit(get_commit_info()),
        datetime.date.today().isoformat(),
    )


def described(machine: dict[str, Any], commit: dict[str, Any], date: str) -> dict[str, Any]:
    """The same, of pytest-benchmark's information as completed above."""
    cpu = f"{machine['cores']} cores of {machine['cpu'].get('brand_raw', 'a CPU')}, no GPU"
    return {
        "hardware": machine["gpu"] or cpu,
        "versions": {"python": machine["python_version"], **machine["versions"]},
        "commit": short(commit["id"] + "-dirty" * commit["dirty"]),
        "date": date[:10],
    }


def infos(report: dict[str, Any]) -> dict[str, Any]:
    """The `extra_info` of each benchmark of pytest-benchmark's report, by file and test."""
    return {b["fullname"].rpartition("/")[2]: b["extra_info"] for b in report["benchmarks"]}


def read(path: Path) -> dict[str, Any]:
    """A kept result in its short form. Raises Refused, naming the file, where it does not say what
    it was measured on, of what and when."""
    try:
        content = json.loads(path.read_text())
        if "machine_info" in content:
            about = content["machine_info"], content["commit_info"], content["datetime"]
            content = described(*about) | {"benchmarks": infos(content)}
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path}: no result: {error}") from error
    for key in ("hardware", "commit", "date"):
        if not (isinstance(content, dict) and isinstance(content.get(key), str) and content[key]):
            raise Refused(f"{path}: does not say its {key}")
    return content


def write(path: Path, content: Any) -> None:
    """Write a JSON file, atomically: an interrupted write leaves the old file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.new")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)

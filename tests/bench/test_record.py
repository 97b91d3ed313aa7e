"""A result says what it was measured on, of what and when, or it is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import record

ORIGIN = {
    "hardware": "2 cores of X, no GPU",
    "versions": {"python": "3", "torch": "2"},
    "date": "2026-11-21",
    "commit": "0ab",
}
MACHINE = {
    "gpu": None,
    "cores": 2,
    "cpu": {"brand_raw": "X"},
    "python_version": "3",
    "versions": {"torch": "2"},
}


def report(**changes: Any) -> dict[str, Any]:
    """What pytest-benchmark writes, with the hooks of the suite."""
    return {
        "machine_info": MACHINE,
        "commit_info": {"id": "0ab", "dirty": False},
        "datetime": "2026-11-21T10:11:12",
        "benchmarks": [{"fullname": "bench/bench_x.py::test_y[1]", "extra_info": {"ratio": 0.5}}],
    } | changes


def written(folder: Path, content: Any) -> Path:
    path = folder / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_both_forms_of_a_result_are_read(tmp_path: Path) -> None:
    short = {**ORIGIN, "benchmarks": {"bench_x.py::test_y[1]": {"ratio": 0.5}}}
    assert record.read(written(tmp_path, report())) == short
    assert record.read(written(tmp_path, short)) == short
    changes = {"machine_info": MACHINE | {"gpu": "GPU X"}}
    changes |= {"commit_info": {"id": "0ab", "dirty": True}}
    result = record.read(written(tmp_path, report(**changes)))
    assert result["hardware"] == "GPU X" and result["commit"] == "0ab+"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "x.json: no result: "),
        ("[]", "x.json: does not say its hardware"),
        (report(machine_info={}), "x.json: no result: 'cores'"),
        (report(commit_info={"id": "", "dirty": False}), "x.json: does not say its commit"),
        (None, "No such file"),
        *((ORIGIN | {key: None}, f"does not say its {key}") for key in ("hardware", "commit")),
        (ORIGIN | {"date": 7}, "x.json: does not say its date"),
    ],
)
def test_what_says_nothing_of_itself_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json" if content is None else written(tmp_path, content)
    with pytest.raises(record.Refused) as error:
        record.read(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_of_the_suite_says_where_it_ran(tmp_path: Path) -> None:
    """The suite's own conftest, in a real run of pytest with one trivial benchmark beside it."""
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    (tmp_path / "test_x.py").write_text(
        "def test_x(benchmark):\n"
        "    benchmark.pedantic(sum, ([1],), rounds=1)\n"
        "    benchmark.extra_info['ratio'] = 0.5\n"
    )
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(record.ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), f"--benchmark-json={path}", str(tmp_path)]
    command += ["-p", "no:cacheprovider"]
    # Not a worker's: beside others nothing is timed.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": str(record.ROOT), "BENCH_COMMIT": "0123456789"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    result = record.read(path)
    assert result.pop("benchmarks") == {"test_x.py::test_x": {"ratio": 0.5}}
    # The run is not in a checkout.
    assert result == record.origin() | {"commit": "0123456"}
    assert result["versions"]["torch"] and result["hardware"]
    assert "node" not in json.loads(path.read_text())["machine_info"]


def test_a_commit_says_whether_sources_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "0123456789")
    assert record.complete_commit({"id": "unversioned", "dirty": False})["id"] == "0123456789"
    assert record.complete_commit({"id": "89abcdef" * 5, "dirty": True})["id"] == "89abcdef" * 5
    assert record.short("89abcdef" * 5) == "89abcde"
    assert record.short("89abcdef" * 5 + "-dirty") == record.short("89abcde+") == "89abcde+"


def test_a_result_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "x.json"
    record.write(path, {"a": 1})

    def interrupted(self: Path, text: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}

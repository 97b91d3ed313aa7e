"""A result says what it was measured on, of what and when, or it is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import record

ORIGIN = {"hardware": "2 cores of X, no GPU", "versions": {}, "date": "2026-11-21", "commit": "0ab"}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def report(**commit_info: Any) -> dict[str, Any]:
    return {
        "machine_info": {name: ORIGIN[name] for name in ("hardware", "versions")},
        "commit_info": {"id": "0ab", "dirty": False} | commit_info,
        "datetime": "2026-11-21T10:11:12",
        "benchmarks": [{"fullname": "bench/bench_x.py::test_y[1]", "extra_info": {"ratio": 0.5}}],
    }


def test_records_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    record.main([str(write(tmp_path / "run.json", report())), str(target)])
    kept = record.read(target)
    assert kept == {**ORIGIN, "benchmarks": {"bench_x.py::test_y[1]": {"ratio": 0.5}}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no report of pytest-benchmark"),
        ("[]", "no report of pytest-benchmark"),
        (report() | {"machine_info": {}}, "it does not say its hardware"),
        (report(id="unversioned"), "does not say its commit; without git, set BENCH_COMMIT"),
        (None, "No such file"),
    ],
)
def test_what_says_nothing_of_itself_is_not_kept(
    content: Any,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    source, target = tmp_path / "run.json", tmp_path / "result.json"
    if content is not None:
        write(source, content)
    with pytest.raises(SystemExit) as error:
        record.main([str(source), str(target)])
    found = capsys.readouterr().err
    assert error.value.code == 2 and found.count("\n") == 1 and not target.exists()
    assert found.startswith(f"error: {source}: ") and told in found


@pytest.mark.parametrize("key", ["hardware", "commit", "date"])
@pytest.mark.parametrize("value", [None, "", 7])
def test_a_result_without_its_origin_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", ORIGIN | {key: value})
    with pytest.raises(record.Refused, match=rf"x\.json: does not say its {key}"):
        record.read(path)


def test_a_run_says_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's own conftest, in a real run of pytest with one trivial benchmark beside it."""
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    (tmp_path / "test_x.py").write_text(
        "def test_x(benchmark):\n"
        "    benchmark.pedantic(sum, ([1],), rounds=1)\n"
        "    benchmark.extra_info['ratio'] = 0.5\n"
    )
    source, target = tmp_path / "run.json", tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(record.ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), f"--benchmark-json={source}", str(tmp_path)]
    command += ["-p", "no:cacheprovider"]
    # Not a worker's: beside others nothing is timed.
    found = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    found["PYTHONPATH"] = str(record.ROOT)
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=found)
    monkeypatch.setenv("BENCH_COMMIT", "0123456")
    record.main([str(source), str(target)])
    kept = record.read(target)
    assert kept.pop("benchmarks") == {"test_x.py::test_x": {"ratio": 0.5}}
    expected = record.origin()
    # The run is not in a checkout.
    assert kept == expected | {"commit": "0123456"}
    assert kept["versions"]["torch"] and kept["hardware"]


def test_a_commit_says_whether_sources_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, Any] = {"commit": None}
    monkeypatch.setattr(record, "environment", lambda: known)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert record.commit() == ""
    monkeypatch.setenv("BENCH_COMMIT", "0123456")
    assert record.commit() == "0123456"
    known["commit"] = "89abcdef" * 5
    assert record.commit() == "89abcde"
    known["commit"] += "-dirty"
    assert record.commit() == "89abcde+"
    for dirty, commit in ((False, "89abcde"), (True, "89abcde+")):
        run = report(id="89abcdef" * 5, dirty=dirty)
        assert record.record(run)["commit"] == commit

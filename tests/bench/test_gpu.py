"""`python -m bench.gpu`: parts are kept, fail and hang without taking others with them, and a
further call goes on with what is missing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import PARTS, Part
from bench.kernels import measure, tune
from tests.processes import is_gone

ROOT = Path(__file__).parents[2]
NOW = {"hardware": "GPU X", "versions": {"torch": "2"}, "sources": "s", "commit": "0ab"}
NOW |= {"date": "2026-11-21"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.gpu` in the clone, with nothing of it on the import path; as from a shell,
    for pytest-benchmark measures nothing in a worker of pytest-xdist."""
    hidden = ("PYTHONPATH", "PYTEST_XDIST")
    environment = {k: value for k, value in os.environ.items() if not k.startswith(hidden)}
    options: dict[str, Any] = dict(cwd=ROOT, capture_output=True, text=True, env=environment)
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], **options)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    run = command()
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: no CUDA device")
    gpu.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


@pytest.mark.slow
def test_every_part_runs_shrunken() -> None:
    """From a clone that is not installed, with PYTHONPATH empty."""
    before = set(gpu.RESULTS.glob("gpu_*.json"))
    run = command("--smoke")
    outcomes = run.stdout.partition("== what became of each part\n")[2].splitlines()
    assert [line.split()[0] for line in outcomes] == list(PARTS), run.stderr
    for line in outcomes[1:]:
        assert re.search(r" finished after \d+ s, [1-9]\d* passed, 0 failed", line), line
    assert " 0 failed" in outcomes[0] and run.returncode == 0
    assert set(gpu.RESULTS.glob("gpu_*.json")) == before


def selects(expression: str, name: str) -> bool:
    """Whether `-k EXPRESSION`, whose words are parts of names, selects a test."""
    words = [word for word in re.findall(r"\w+", expression) if word not in ("and", "not")]
    return bool(words) and eval(re.sub("|".join(words), lambda m: str(m[0] in name), expression))


def test_every_kernel_is_in_one_part() -> None:
    names = [f"test_loss[reverse_kl-{shape.name}]" for shape in measure.real_shapes()]
    names += ["test_precision[torch.float32]"]
    names += [f"test_tune[{size}, {s.name}]" for size in tune.CANDIDATES for s in tune.shapes(size)]
    expressions = [part.selection.partition(" -k ")[2].strip("'") for part in PARTS.values()]
    for name in names:
        assert sum(selects(expression, name) for expression in expressions) == 1, name


def test_every_test_of_a_gpu_is_in_the_part_of_tests() -> None:
    folders = [ROOT / word for word in PARTS["tests"].selection.split() if "/" in word]
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    outside = [p for p in marked if not any(p.is_relative_to(folder) for folder in folders)]
    assert marked and outside == [Path(__file__)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "step_odp"], "step_odp: no such part (python -m bench.gpu --list)"),
        (["--lease", "soon"], "argument --lease: invalid float value: 'soon'"),
        (["--lease", "-1"], "--lease -1.0: not a positive number of minutes"),
        (["--leese"], "unrecognized arguments: --leese"),
        (["--wheels", "none"], "none: no wheels (*.whl) there"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1 and line.endswith(f"error: {message}\n")


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"omegaconf", "trl"}
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in missing else 1)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert capsys.readouterr().err.startswith("error: not installed: omegaconf; --wheels ")
    (tmp_path / "omegaconf-2.4.0-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(SystemExit):
        gpu.main(["--wheels", str(tmp_path)])
    message = capsys.readouterr().err
    assert "its wheels cannot be installed" in message and message.count("\n") == 1


def test_results_need_a_commit_and_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "origin", lambda: {"commit": ""})
    with pytest.raises(SystemExit):
        gpu.conditions()
    assert "set BENCH_COMMIT" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "out"))
    with pytest.raises(SystemExit):
        gpu.main(["--smoke"])
    assert capsys.readouterr().err.startswith(f"error: OUT={tmp_path / 'file' / 'out'}: no folder")


TESTS = """
import os, subprocess, time, pytest

def test_first(benchmark):
    benchmark.pedantic(print, ("first runs",), rounds=1)
    benchmark.extra_info["ratio"] = 0.5

def test_wrong():
    assert 1 == 2

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

def test_end(benchmark):
    {end}
    benchmark.pedantic(print, rounds=1)
    benchmark.extra_info["ratio"] = 0.25
"""


def run(folder: Path, end: str, limit_s: float = 600, again: bool = False) -> dict[str, Any]:
    """A real part, which goes on with what its file has: its record, which is in that file."""
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "pytest.ini").touch()
    test = folder / "bench" / "test_x.py"
    test.write_text(TESTS.format(end=end))
    path = folder / "gpu_x.json"
    earlier = {} if again else gpu.kept(path, NOW)
    return gpu.run_part(Part("", 9, str(test)), limit_s, path, NOW, earlier)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not a worker's, beside which pytest-benchmark times nothing, nor a background job's, which
    ignores SIGINT; what it starts would, too."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("alone")
def test_a_part_is_kept_with_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    record = run(tmp_path, "pass")
    assert record.items() >= NOW.items() and record["finished"]
    assert record["benchmarks"] == {"test_x.py::test_first": {"ratio": 0.5}} | {
        "test_x.py::test_end": {"ratio": 0.25}
    }
    assert record["passed"] == 2 and re.fullmatch(
        r"finished after \d+ s, 2 passed, 1 failed, 1 skipped", record["outcome"]
    )
    ((name, text),) = record["failed"].items()
    assert name.endswith("test_x.test_wrong") and "assert 1 == 2" in text
    assert list(record["skipped"].values()) == ["not here"]
    for path in (tmp_path / "gpu_x.json", tmp_path / "out" / "gpu_x.json"):
        assert json.loads(path.read_text()) == record


@pytest.mark.usefixtures("alone")
def test_a_part_that_hangs_is_stopped_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it has measured is kept and not repeated; what it started is ended, too."""
    new, path, real = tmp_path / "new", tmp_path / "pid", subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = real(*arguments, **options)
        while not path.exists():  # the limit counts from here
            time.sleep(0.01)
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setattr(gpu, "GRACE_S", 200)  # pytest-benchmark reads about the machine first
    hang = f"open({str(new)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); "
    record = run(tmp_path, f"{hang} os.rename({str(new)!r}, {str(path)!r}); time.sleep(600)", 1)
    assert not record["finished"] and record["passed"] == 1
    assert list(record["benchmarks"]) == ["test_x.py::test_first"]
    assert json.loads((tmp_path / "gpu_x.json").read_text()) == record
    assert is_gone(int(path.read_text()))
    assert "first runs" in capfd.readouterr().out
    record = run(tmp_path, "pass")
    assert record["finished"] and len(record["benchmarks"]) == 2
    assert list(record["failed"]) == ["bench.test_x.test_wrong"], "what failed is repeated"
    assert "first runs" not in capfd.readouterr().out
    assert run(tmp_path, "os.abort()", again=True)["outcome"].startswith("exit code -6 after ")
    kept = json.loads((tmp_path / "gpu_x.json").read_text())
    assert kept == record, "a broken run does not replace a finished one"


def test_parts_follow_one_another_within_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, seen = [0.0], []

    def run_part(part: Part, limit_s: float, path: Path, now: Any, earlier: Any) -> dict[str, Any]:
        seen.append((part.about, limit_s))
        clock[0] += 100
        record = now | {"finished": part.about != "hangs", "failed": {}, "outcome": part.about}
        path.write_text(json.dumps(record))
        return record

    parts = {"a": Part("fine", 50, ""), "b": Part("hangs", 200, ""), "c": Part("huge", 900, "")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "conditions", lambda: NOW)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    assert gpu.run_all(list(parts), 600, False, False) == 1
    assert seen == [("fine", 150), ("hangs", 480)]
    outcomes = capsys.readouterr().out.splitlines()[-3:]
    assert [" ".join(line.split()[1:]) for line in outcomes] == [
        *("fine", "hangs", "skipped: 380 s left, takes about 900")
    ]
    seen.clear()
    parts["b"] = Part("well", 200, "")
    assert gpu.run_all(list(parts), float("inf"), False, False) == 0
    assert seen == [("well", 600), ("huge", 2700)], "a is finished"
    seen.clear()
    gpu.run_all(["a"], float("inf"), False, True)
    assert seen == [("fine", 150)], "a part that is named is run again"
    monkeypatch.setattr(gpu, "conditions", lambda: NOW | {"sources": "others"})
    assert gpu.kept(tmp_path / "gpu_a.json", gpu.conditions()) == {}


def test_a_clone_needs_no_pythonpath(tmp_path: Path) -> None:
    """In this process and in those that it starts; -S: nothing that is installed is seen."""
    code = "import bench, subprocess, sys; assert not [m for m in sys.modules if 'opd' in m];"
    code += "print(*sys.path[:2]); subprocess.run([sys.executable, '-S', '-c', "
    code += "'import sys; print(*sys.path[1:3]); import fused_kl.tuned'], cwd=sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options: dict[str, Any] = dict(cwd=ROOT, capture_output=True, text=True, env=environment)
    run = subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path)], **options)
    here, below = run.stdout.splitlines()
    assert str(ROOT / "kernels") in here
    assert below.split() == [str(ROOT), str(ROOT / "kernels")]
    # Torch is no part of -S; the library itself was imported.
    assert "No module named 'torch'" in run.stderr

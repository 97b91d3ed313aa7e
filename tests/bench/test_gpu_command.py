"""`python -m bench.gpu` in its shrunken form: every part through the code that a GPU runs, and what
may become a GPU's result."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.failures import DeviceLost
from bench.gpu import command as gpu
from bench.gpu import parts as gpu_parts
from bench.gpu.part_result import PartResult
from bench.gpu.parts import Part
from bench.kernels import registers, tune
from bench.kernels.tune import Trial, chosen
from bench.steps import full_size
from fused_kl import tiles, tuned
from fused_kl.tuned import Sizes
from tests.processes import is_gone

pytest.importorskip("fused_kl.triton_rows")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """torch.compile would take longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA device") and done.stderr.count("\n") == 1
    gpu.main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(gpu.PARTS)
    assert listed[:6] == ["tests", "step_opd", "kernels_2b", "kernels_2b_long", "tune", "step_grpo"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.gpu` in the clone, with nothing of it on the import path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=kept | environment,
    )


def test_a_clone_needs_no_pythonpath(tmp_path: Path) -> None:
    """In this process and in those that it starts; -S: nothing that is installed is seen."""
    code = "import bench, subprocess, sys; assert not [m for m in sys.modules if 'opd' in m];"
    code += "print(*sys.path[:2]); subprocess.run([sys.executable, '-S', '-c', "
    code += "'import sys; print(*sys.path[1:3]); import fused_kl.tuned'], cwd=sys.argv[1])"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=kept,
    )
    here, below = done.stdout.splitlines()
    assert str(ROOT / "kernels") in here
    assert below.split() == [str(ROOT), str(ROOT / "kernels")]
    # Torch is no part of -S; the library itself was found.
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "step_odp"], "step_odp: no such part; the nearest is step_opd"),
        (["--lease", "soon"], "soon: not a positive number of minutes"),
        (["--lease", "-1"], "-1: not a positive number of minutes"),
        (["--leese"], "unrecognized arguments: --leese"),
        (["--wheels", "none"], "none: no wheels (*.whl) there"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert message in told


def test_missing_packages_are_named_with_the_wheels_that_are_there(
    monkeypatch, tmp_path, capsys
) -> None:
    missing = {"omegaconf", "trl"}
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in missing else 1)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as ended:
        gpu.check_packages()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: not installed: omegaconf\n"
    wheel = tmp_path / ".whl" / "omegaconf-2.4.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_text("no wheel")
    with pytest.raises(SystemExit):
        gpu.check_packages()
    assert "; --wheels .whl installs what is there" in capsys.readouterr().err
    missing.remove("omegaconf")
    gpu.check_packages()
    assert "peers that are not installed: trl; --wheels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.install(wheel.parent)
    told = capsys.readouterr().err
    assert "its wheels cannot be installed" in told and told.count("\n") == 1


Run = Callable[[PartResult, bool], None]
ONE = {"entry": {"x": 1}}


def use(monkeypatch: pytest.MonkeyPatch, run: Run, results: Path) -> None:
    """One part, on a GPU that there is not."""
    monkeypatch.setitem(gpu.PARTS, "part", Part(about="", run=run))
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "GPU X")
    monkeypatch.setattr(gpu, "commit", lambda: "abc1234")
    monkeypatch.setattr("bench.record.commit", lambda: "abc1234")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)


def run_part(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        gpu.main([*arguments, "part"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def save_one(result: PartResult, smoke: bool) -> None:
    result.measure("entry", lambda: {"x": 1})


def test_a_result_says_where_it_comes_from(monkeypatch, tmp_path) -> None:
    use(monkeypatch, save_one, tmp_path)
    assert run_part() == 0
    content = json.loads((tmp_path / "gpu_part.json").read_text())
    assert content["hardware"] == "GPU X" and content["commit"] == "abc1234" and content["date"]
    assert content["versions"]["torch"] and content["benchmarks"] == ONE
    assert content["command"] == "python -m bench.gpu part" and content["complete"] is True
    assert content["kernel_sizes"] == "defaults" and content["seconds"] > 0


def test_without_a_commit_nothing_is_measured(monkeypatch, tmp_path, capsys) -> None:
    use(monkeypatch, lambda result, smoke: pytest.fail("measured"), tmp_path)
    monkeypatch.setattr(gpu, "commit", lambda: "")
    assert run_part() == 2
    assert "set BENCH_COMMIT" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_smoke_run_leaves_nothing(monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    use(monkeypatch, lambda r, smoke: r.save("entry", {"failed": ["a test"] * smoke}), tmp_path)
    assert run_part("--smoke") == 1, "failed tests are told"
    assert "failed: a test" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(out.iterdir())


def test_each_task_is_kept_when_it_ends_and_an_error_loses_nothing(
    monkeypatch, tmp_path, capsys
) -> None:
    """Also copied into $OUT at once; a later call measures only what is missing."""
    path, out = tmp_path / "gpu_part.json", tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    measured: list[str] = []

    def three(result: PartResult, smoke: bool) -> None:
        for name in "abc":

            def task(name: str = name) -> dict[str, Any]:
                measured.append(name)
                if measured == ["a", "b", "c"]:  # what the two before measured is there already
                    kept = json.loads(path.read_text())
                    assert kept["complete"] is False and kept["errors"] == {"b": "TypeError: once"}
                    assert kept["benchmarks"] == {"a": {"task": "a"}}
                    assert json.loads((out / path.name).read_text()) == kept
                if measured.count(name) == 1 and name == "b":
                    raise TypeError("once")
                return {"task": name}

            result.measure(name, task)

    use(monkeypatch, three, tmp_path)
    assert run_part() == 1
    assert "not measured: b: TypeError: once" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["complete"] is False and list(content["benchmarks"]) == ["a", "c"]
    assert run_part() == 0 and measured == ["a", "b", "c", "b"], "only what was missing"
    content = json.loads(path.read_text())
    assert content["complete"] is True and content["benchmarks"].keys() == {"a", "b", "c"}
    assert not content["errors"]
    assert sorted(p.name for p in out.iterdir()) == ["gpu_part.json", "tuned.py"]
    assert (out / "tuned.py").read_bytes() == tune.TABLE.read_bytes()
    assert run_part() == 0 and measured[4:] == ["a", "b", "c"], "a complete part is measured anew"
    monkeypatch.setattr("bench.gpu.part_result.sources_digest", lambda: "other")
    path.write_text(json.dumps(content | {"complete": False}))
    assert run_part() == 0 and measured[7:] == ["a", "b", "c"], "of other sources nothing is kept"


def test_results_come_back_in_one_folder(monkeypatch, tmp_path) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(out))
    use(monkeypatch, save_one, tmp_path)
    run_part()
    assert (out / "gpu_part.json").read_bytes() == (tmp_path / "gpu_part.json").read_bytes()
    monkeypatch.setenv("OUT", str(tmp_path / "gpu_part.json"))
    assert run_part() == 2


def test_a_part_goes_on_without_those_that_broke_the_device(monkeypatch, tmp_path) -> None:
    def breaks(result: PartResult, smoke: bool) -> None:
        def task() -> dict[str, Any]:
            failures = result.broken("task")
            for name in {"good", "peer", "other"} - {"good"} - failures.keys():
                lost = DeviceLost(name, "CUDA error")
                result.note_broken("task", lost)
                raise lost
            return {"failures": failures}

        result.measure("before", lambda: {"x": 1})
        result.measure("task", task)

    use(monkeypatch, breaks, tmp_path)
    assert [run_part() for _ in range(3)] == [gpu.RESTART, gpu.RESTART, 0]
    content = json.loads((tmp_path / "gpu_part.json").read_text())
    failures = {"peer": "CUDA error", "other": "CUDA error"}
    assert content["benchmarks"] == {"before": {"x": 1}, "task": {"failures": failures}}
    assert content["complete"] is True


def test_a_process_is_begun_again_and_ended_in_time(monkeypatch, tmp_path) -> None:
    """A part whose device broke is begun again; one that takes too long is ended, and so is what it
    started."""
    real, code, pid_file = subprocess.Popen, "", tmp_path / "pid"

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert command[1:] == ["-m", "bench.gpu", "part"] and options["start_new_session"]
        process = real([sys.executable, "-S", "-c", code, str(tmp_path)], **options)
        while "sleep" in code and not pid_file.exists():  # the limit counts from here
            time.sleep(0.01)
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    code = "import pathlib, sys; f = pathlib.Path(sys.argv[1], 'n'); f.touch();"
    code += "n = f.stat().st_size; f.write_bytes(b'x' * (n + 1)); sys.exit(75 if n < 2 else 0)"
    assert gpu.run_process("part", False, 600).startswith("done")
    assert (tmp_path / "n").stat().st_size == 3
    code = "import os; os.abort()"
    assert gpu.run_process("part", False, 600).startswith("exit code -6")
    code = "import os, subprocess, sys; p = subprocess.Popen(['sleep', '600']);"
    code += "new = sys.argv[1] + '/new'; open(new, 'w').write(str(p.pid));"
    code += "os.rename(new, sys.argv[1] + '/pid'); p.wait()"
    assert gpu.run_process("part", False, 1) == "stopped after 1 s"
    assert is_gone(int(pid_file.read_text()))


def test_a_lease_keeps_everything_and_the_next_one_goes_on(monkeypatch, tmp_path, capsys) -> None:
    clock = [0.0]
    stopped: list[str] = ["slow"]
    begun: list[tuple[str, float]] = []

    def two(result: PartResult, smoke: bool) -> None:
        result.measure("first", lambda: {"x": 1})
        if stopped:
            raise TimeoutError("the process was ended here")
        result.measure("second", lambda: {"x": 2})

    def process(name: str, smoke: bool, limit_s: float) -> str:
        begun.append((name, limit_s))
        clock[0] += limit_s if name in stopped else 10
        try:
            gpu.run_part(name, smoke)
        except TimeoutError:
            return f"stopped after {limit_s:.0f} s"
        return "done in 10 s"

    use(monkeypatch, save_one, tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "check_packages", lambda: None)
    monkeypatch.setattr(gpu, "run_process", process)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    parts = {
        "fine": Part(about="", run=save_one, usual_s=100),
        "slow": Part(about="", run=two, usual_s=300),
        "huge": Part(about="", run=save_one, usual_s=4000),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)

    def lease() -> tuple[object, dict[str, str]]:
        with pytest.raises(SystemExit) as ended:
            gpu.main(["--lease", "10"])
        lines = capsys.readouterr().out.partition("what became of each part\n")[2].splitlines()
        return ended.value.code, dict(line.split(maxsplit=1) for line in lines)

    code, outcomes = lease()
    assert code == 1 and begun == [("fine", (600 - 15) / 4), ("slow", 575)]
    assert outcomes["fine"] == "done in 10 s"
    assert outcomes["slow"] == "stopped after 575 s; partial: a further call goes on with it"
    assert outcomes["huge"] == "skipped: 0 s left, takes about 4000"
    kept = json.loads((tmp_path / "gpu_slow.json").read_text())
    assert kept["benchmarks"] == {"first": {"x": 1}} and kept["complete"] is False
    assert json.loads((tmp_path / "out" / "gpu_slow.json").read_text()) == kept
    assert len(list((tmp_path / "out").glob("gpu_*.json"))) == 2

    stopped.clear()
    begun.clear()
    code, outcomes = lease()
    assert code == 0 and [name for name, _ in begun] == ["slow"], "huge has not even a third"
    assert outcomes["fine"] == "complete before" and outcomes["slow"] == "done in 10 s"
    assert json.loads((tmp_path / "gpu_slow.json").read_text())["complete"] is True


def test_a_lease_is_divided_in_the_order_of_worth() -> None:
    usual = {"a": 100.0, "b": 300.0, "c": 50.0}
    parts = {n: Part(about="", run=save_one, usual_s=s) for n, s in usual.items()}
    assert gpu.allotted(parts, 900) == {"a": 200, "b": 600, "c": 100}, "all, stretched"
    assert gpu.allotted(parts, 300) == {"a": 200, "c": 100}, "b does not fit behind a"
    assert gpu.allotted(parts, 40) == {"a": 40}, "begun: what it measures is kept"
    assert gpu.allotted(parts, 20) == {"c": 20} and gpu.allotted(parts, 10) == {}
    whole = gpu.allotted(gpu.PARTS, 30 * 60 - gpu.MARGIN_S)
    assert list(whole) == list(gpu.PARTS), "half an hour is enough for all"
    short = gpu.allotted(gpu.PARTS, 10 * 60 - gpu.MARGIN_S)
    assert list(short)[:4] == ["tests", "step_opd", "kernels_2b", "kernels_2b_long"]


def test_a_part_that_fails_does_not_stop_the_rest(monkeypatch, capsys) -> None:
    outcomes = {"tests": "exit code 1 after 3 s", "tune": "stopped after 480 s"}
    seen = []

    def run(name: str, smoke: bool, limit_s: float) -> str:
        seen.append(name)
        assert limit_s <= 480
        return outcomes.get(name, "done in 3 s")

    monkeypatch.setattr(gpu, "run_process", run)
    assert gpu.run_all(["tests", "tune", "precision"], True, None) == 1
    assert seen == ["tests", "tune", "precision"]
    told = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(maxsplit=1)[1] for line in told] == [*outcomes.values(), "done in 3 s"]


def shrunken(name: str) -> dict[str, Any]:
    """What a part measures in its smoke run."""
    result = PartResult(None)
    gpu.PARTS[name].run(result, True)
    assert not result.errors
    json.dumps(result.benchmarks)
    return result.benchmarks


def test_the_part_of_tests() -> None:
    (outcome,) = shrunken("tests").values()
    assert outcome["failed"] == [] and outcome["passed"] + outcome["skipped"] >= 15
    assert (outcome["passed"] > 0) == torch.cuda.is_available() and outcome["seconds"] > 0


def test_a_test_that_takes_pytest_down_is_named(tmp_path) -> None:
    path = tmp_path / "test_down.py"
    path.write_text(
        "import os, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_down(): os.abort()\n"
    )
    saved: list[dict[str, Any]] = []
    entry = gpu_parts.run_tests(path, saved.append)
    assert entry["passed"] == 1 and entry["skipped"] == 0 and entry["seconds"] > 0
    bad, down = entry["failed"]
    assert bad.endswith("test_bad") and down.startswith("pytest ended with -6 in ")
    assert down.endswith("test_down") and "assert 1 == 2" in entry["reports"][0]
    assert saved and saved[0]["seconds"] is None, "known while it runs"


def test_the_part_of_kernels() -> None:
    entries = shrunken("kernels_2b")
    assert [name.partition("[")[0] for name in entries] == [
        f"bench_kernels.py::test_{task}" for task in ("reverse_kl", "policy_loss", "logprobs")
    ]
    for entry in entries.values():
        rows = {name: row for name, row in entry["providers"].items() if "failed" not in row}
        assert {"gemms", "fast", "fast_allowed_columns", "dense", "compiled"} <= rows.keys()
        assert "trl" in entry["providers"].keys() | entry["skipped"].keys()
        assert all(row["rounds"] == 3 and row["tflops"] > 0 for row in rows.values())
        assert all(row["gradient_error"] < 0.2 for n, row in rows.items() if n != "gemms")


def test_few_tokens_and_many_are_parts_of_their_own(monkeypatch) -> None:
    shapes: list[int] = []

    def measured(task: Any, found: Any, shape: Any, failures: Any) -> None:
        shapes.append(shape.num_rows)
        raise MemoryError  # of a whole task: the others are tried

    monkeypatch.setattr("bench.kernels.measure.peaks", measured)
    for name, counts in (("kernels_8b", [32] * 3 + [640] * 3), ("kernels_8b_long", [16_384] * 3)):
        result = PartResult(None)
        gpu.PARTS[name].run(result, False)
        assert shapes == counts and len(result.errors) == len(counts) and not result.benchmarks
        shapes.clear()


def test_the_part_of_precision() -> None:
    (entry,) = shrunken("precision").values()
    assert len(entry["rows"]) == 9 and entry["rows"][0]["fast"] < 1e-2


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_the_parts_of_steps(method: str) -> None:
    entry = shrunken(f"step_{method}")[f"step_{method}"]
    longest = 16 + 8 * 10 + 64
    assert entry["video_tokens"] == 16 and entry["prompt_tokens"] == [longest, longest - 12 + 3]
    assert (entry["teacher"] is None) == (method == "grpo")
    assert list(entry["recompute"]) == ["none", "3", "all"] and entry["auto"] == "none"
    for mode, row in entry["recompute"].items():
        assert row["steps"] == (2 if mode == "none" else 1) and not row["skipped"]
        assert row["step_s"] >= 0.9 * sum(row["seconds"].values()) > 0
        assert row["peak_gib"] > 0 and row["planned_gib"] > 0
        assert all(norm > 0 for norm in row["grad_norms"]), "something is learnt from"
        assert ("teacher" in row["seconds"]) == (method == "opd") == (row["flops"]["teacher"] > 0)
        assert (row["flops"]["recompute"] > 0) == (mode != "none")


def test_a_mode_that_does_not_fit_is_told(monkeypatch, tmp_path) -> None:
    steps = full_size.run_steps

    def run(trainer: Any, *arguments: Any) -> Any:
        if trainer.config.prefix.recompute == "3":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return steps(trainer, *arguments)

    monkeypatch.setattr(full_size, "run_steps", run)
    student, teacher = full_size.tiny_models(tmp_path)
    sizes: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=1, length=3, steps=1, short=1)
    scale = full_size.Scale(student=student, teacher=teacher, **sizes)
    result = PartResult(None)
    full_size.measure("opd", scale, result, "step")
    modes = result.benchmarks["step"]["recompute"]
    assert modes["3"] == {"failed": "out of memory at 1 prompts of up to 160 tokens"}
    assert modes["all"]["steps"] == 1 and full_size.told(modes["3"]).startswith("out of memory")


def test_modes_are_kept_and_not_measured_again(monkeypatch, tmp_path) -> None:
    """One mode fails; the next call measures that one alone."""
    steps, seen = full_size.run_steps, []

    def run(trainer: Any, *arguments: Any) -> Any:
        mode = trainer.config.prefix.recompute
        if mode == "3" and mode not in seen:
            seen.append(mode)
            raise TypeError("once")
        seen.append(mode)
        return steps(trainer, *arguments)

    monkeypatch.setattr(full_size, "run_steps", run)
    student, teacher = full_size.tiny_models(tmp_path)
    sizes: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=1, length=3, steps=1, short=1)
    scale = full_size.Scale(student=student, teacher=teacher, **sizes)
    result = PartResult(None)
    full_size.measure("grpo", scale, result, "step")
    assert list(result.benchmarks["step"]["recompute"]) == ["none", "all"]
    assert result.errors == {"step, recompute 3": "TypeError: once"}
    seen[:] = ["3"]
    result.done, result.content["errors"] = dict(result.benchmarks), {}
    full_size.measure("grpo", scale, result, "step")
    assert seen == ["3", "3", "3"] and not result.errors, "warm-up and steps of that mode"
    assert result.benchmarks["step"]["recompute"]["3"]["steps"] == 1


def test_completions_have_the_length_that_is_asked_for(tmp_path) -> None:
    student, teacher = full_size.tiny_models(tmp_path)
    sizes: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=2, length=5)
    scale = full_size.Scale(student=student, teacher=teacher, rollouts=3, **sizes)
    device = torch.device("cpu")
    config = full_size.configured("grpo", scale, str(tmp_path / "run"))
    trainer = full_size.make_trainer(full_size.resolve_auto(config, device), scale, device)
    prompt = full_size.make_prompt(trainer.student, scale, 0)
    full_size.run_steps(trainer, [full_size.collate([prompt], 0, device)], 0, 1)
    plan = full_size.Shapes.of(config, torch.float32)
    assert (plan.tokens, plan.video_tokens) == (len(prompt.input_ids), 16), "as is planned for"
    counts = trainer.progress
    assert counts.generated_tokens == 3 * 5 and counts.equal_groups == 0


def trial(value: int, *ratios: float, refused: str | None = None) -> Trial:
    places = {f"{i}": {"ratio": ratio} for i, ratio in enumerate(ratios)}
    return Trial(value=value, refused=refused, over_default=places or None)


def test_the_winner_is_faster_by_more_than_noise() -> None:
    default = trial(1, 1.0, 1.0)
    assert chosen([default, trial(2, 0.99, 0.985)]) == 1
    assert chosen([default, trial(2, 0.9, 1.0), trial(3, 0.97, 0.97)]) == 2
    assert chosen([default, trial(2, 0.5, 2.1), trial(3, refused="spills")]) == 1


def test_no_budget_is_above_the_promised_memory() -> None:
    scale = tune.Scale()
    assert max(scale.fast_bytes) == scale.fast_bytes[0] == 2_400_000_000
    assert max(scale.lowmem_bytes) == scale.lowmem_bytes[0] == 450_000_000
    assert scale.blocks[0] == (2048, 8) and scale.programs[0] == 528


def used(architecture: int, shapes: Any) -> dict[Any, dict[str, int]]:
    large = {shape: shape[0] > 2048 for shape in shapes}
    return {s: {"registers": 60 + 68 * large[s], "spilled": 16 * large[s]} for s in shapes}


def test_what_spills_or_is_wrong_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(tune, "usage_of", used)
    error = tune.Rows.error

    def wrong(self: tune.Rows) -> float:
        return 0.5 if tiles.row_program(1, 5000).block == 1024 else error(self)

    monkeypatch.setattr(tune.Rows, "error", wrong)
    places = []

    def timed(size: str, values: Any, *_: Any) -> Any:
        places.append(values)
        return {str(value): {"here": {"ratio": 1.0}} for value in values}

    monkeypatch.setattr(tune, "timed", timed)
    blocks = ((2048, 8), (4096, 8), (1024, 4))
    trials = tune.block_trials(tune.Scale(blocks=blocks, rows=(2,), columns=5000))
    assert places == [[{1024: 4, 2048: 8}]]
    assert [t.refused for t in trials] == [None, "128 registers, 16 bytes spilled", "wrong by 0.5"]


def test_the_part_of_tuning(monkeypatch) -> None:
    monkeypatch.setattr(tune, "usage_of", used)  # which has a test of its own, and takes seconds
    before = {name: dict(table) for name, table in tune.TABLES.items()}
    table = tune.TABLE.read_text()
    entry = shrunken("tune")["tune"]
    sizes = Sizes(**entry["sizes"])
    searches = entry["searches"]
    assert sizes.programs in (8, 2) and sizes.fast_bytes in (80_000, 40_000)
    assert sizes.row_blocks == {1024: 4, 2048: 8}, "the other one spills"
    assert "registers" in searches["row_blocks"]["trials"][1]["refused"]
    assert searches["programs"]["trials"][0]["over_default"]["1 rows"]["ratio"] == 1.0
    peaks = [t["known"]["peak_bytes"] for t in searches["fast_bytes"]["trials"]]
    assert len(peaks) == 2 and searches.keys() == entry["sizes"].keys()
    assert before == tune.TABLES and tune.TABLE.read_text() == table, "a smoke run changes nothing"


def test_searches_are_kept_and_not_repeated(monkeypatch) -> None:
    default, other = Trial(value=1, over_default={"here": {"ratio": 1.0}}), 3
    blocks = [Trial(value={2048: 8}, over_default={"here": {"ratio": 1.0}})]
    monkeypatch.setattr(tune, "block_trials", lambda scale: blocks)
    monkeypatch.setattr(tune, "row_trials", lambda size, values, rows, scale: [default])

    def fails(size: str, *_: Any) -> list[Trial]:
        if size == "lowmem_bytes":
            raise RuntimeError("the lease ended")
        return [replace(default, value=other)]

    monkeypatch.setattr(tune, "budget_trials", fails)
    saved: list[dict[str, Any]] = []
    with pytest.raises(RuntimeError, match="ended"):
        tune.tune(tune.Scale(), {}, saved.append)
    assert [list(entry["sizes"]) for entry in saved][-1] == ["row_blocks", "programs", "fast_bytes"]
    kept = json.loads(json.dumps(saved[-1]))
    monkeypatch.setattr(tune, "block_trials", lambda scale: pytest.fail("repeated"))
    monkeypatch.setattr(tune, "budget_trials", lambda size, *_: [replace(default, value=size)])
    sizes, searches = tune.tune(tune.Scale(), kept)
    assert sizes == Sizes({2048: 8}, 1, other, "lowmem_bytes")  # pyright: ignore
    assert searches.keys() == sizes._asdict().keys()


def test_another_size_is_really_used() -> None:
    with tune.trying("row_blocks", {1024: 4, 4096: 16}):
        assert tiles.row_program(3, 9000)[:2] == (4096, 16)
    with tune.trying("programs", 6):
        assert tiles.row_program(3, 9000).splits == 2
    with tune.trying("fast_bytes", 8 * 100 * 5):
        rules: dict[str, Any] = dict(bytes_per_logit=8, chunk_size=0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert tiles.make_plan("fast", 50, 100, **rules, device_type=device).rows == 5


def load(path: Path) -> dict[str, Sizes]:
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: Sizes(*sizes) for name, sizes in module.TUNED.items()}


def test_the_table_is_written(monkeypatch, tmp_path) -> None:
    path = tmp_path / "tuned.py"
    path.write_text(tune.TABLE.read_text())
    old, new = Sizes({2048: 8}, 528, 10**9, 10**8), Sizes({1024: 4, 4096: 16}, 264, 6 * 10**8, 9)
    monkeypatch.setattr(tuned, "TUNED", {"GPU B": old})
    result = tmp_path / "gpu_tune.json"
    told = {"hardware": "GPU A", "benchmarks": {"tune": {"sizes": new._asdict()}}}
    result.write_text(json.dumps(told))
    monkeypatch.setattr(tune, "TABLE", path)
    tune.main([str(result)])
    assert load(path) == {"GPU A": new, "GPU B": old}
    checked = [sys.executable, "-m", "ruff", "format", "--check", "--line-length=100", str(path)]
    assert subprocess.run(checked, capture_output=True).returncode == 0
    path.write_text("nothing")
    with pytest.raises(ValueError, match="no table"):
        tune.write_table({}, path)


def test_registers_are_found_without_a_gpu() -> None:
    small, large = registers.usage_of(90, [(2048, 8), (4096, 8)]).values()
    assert 16 < small["registers"] <= tune.REGISTERS and small["spilled"] == 0 < small["shared"]
    assert large["registers"] > small["registers"], "twice the columns for as many threads"

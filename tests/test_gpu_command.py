"""`python -m bench.gpu` in its shrunken form: every part through the code that a GPU runs, and what
may become a GPU's result."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import full_size, gpu, registers, tune
from bench.tune import Trial, chosen, split_by_place
from fused_kl import tiles, tuned
from fused_kl.tuned import Sizes

pytest.importorskip("fused_kl.triton_kernels")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """torch.compile would take longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA device") and done.stderr.count("\n") == 1
    gpu.main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(gpu.PARTS) and {"tests", "tune", "step_opd", "step_grpo"} <= {*listed}


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--smoke", "step_odp"])
    assert ended.value.code == 2
    assert "step_odp: no such part; the nearest is step_opd" in capsys.readouterr().err


def use(monkeypatch: pytest.MonkeyPatch, run: Callable[[bool], Any], results: Path) -> None:
    monkeypatch.setitem(gpu.PARTS, "part", gpu.Part("", run))
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GPU X")


def test_a_result_says_where_it_comes_from(monkeypatch, tmp_path, capsys) -> None:
    use(monkeypatch, lambda smoke: {"entry": {"x": 1}}, tmp_path)
    monkeypatch.setattr("bench.record.commit", lambda: "abc1234")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["part"])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "gpu_part.json").read_text())
    assert found["hardware"] == "GPU X" and found["commit"] == "abc1234" and found["date"]
    assert found["versions"]["torch"] and found["benchmarks"] == {"entry": {"x": 1}}
    assert found["command"] == "python -m bench.gpu part"


def test_without_a_commit_nothing_is_measured(monkeypatch, tmp_path, capsys) -> None:
    use(monkeypatch, lambda smoke: pytest.fail("measured"), tmp_path)
    monkeypatch.setattr("bench.record.commit", lambda: "")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["part"])
    assert ended.value.code == 2 and "set BENCH_COMMIT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_smoke_run_leaves_nothing(monkeypatch, tmp_path, capsys) -> None:
    use(monkeypatch, lambda smoke: {"entry": {"failed": ["a test"]}} if smoke else {}, tmp_path)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--smoke", "part"])
    assert ended.value.code == 1, "failed tests are told"
    assert "failed: a test" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_part_that_fails_does_not_stop_the_rest(monkeypatch, capsys) -> None:
    seen = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command[3])
        assert options["timeout"] <= 480
        if seen[-1] == "tune":
            raise subprocess.TimeoutExpired(command, 480)
        return subprocess.CompletedProcess(command, int(seen[-1] == "tests"))

    monkeypatch.setattr("bench.gpu.subprocess.run", run)
    assert gpu.run_each(["tests", "tune", "precision"], True) == 1
    assert seen == ["tests", "tune", "precision"]
    told = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(maxsplit=1)[1] for line in told] == [
        "exit code 1",
        "stopped after 480 s",
        "done",
    ]


def test_the_part_of_tests() -> None:
    outcome = gpu.gpu_tests(True)["gpu_tests"]
    assert outcome["failed"] == [] and outcome["passed"] + outcome["skipped"] >= 15
    assert (outcome["passed"] > 0) == torch.cuda.is_available()


def test_the_part_of_kernels() -> None:
    found = gpu.PARTS["kernels_2b"].run(True)
    assert [name.partition("[")[0] for name in found] == [
        f"bench_kernels.py::test_{task}" for task in ("reverse_kl", "policy_loss", "logprobs")
    ]
    for entry in found.values():
        rows = entry["providers"]
        assert {"gemms", "fast", "dense", "compiled", "trl"} <= rows.keys()
        assert all(row["rounds"] == 3 and row["tflops"] > 0 for row in rows.values())
        assert all(row["gradient_error"] < 0.2 for n, row in rows.items() if n != "gemms")
    json.dumps(found)


def test_the_part_of_precision() -> None:
    (entry,) = gpu.PARTS["precision"].run(True).values()
    assert len(entry["rows"]) == 9 and entry["rows"][0]["fast"] < 1e-2


@pytest.mark.parametrize("method", ["opd", "grpo"])
def test_the_parts_of_steps(method: str) -> None:
    found = gpu.PARTS[f"step_{method}"].run(True)[f"step_{method}"]
    assert found["video_tokens"] == 16 and found["prompt_tokens"] == 16 + 8 * 10 + 64
    assert (found["teacher"] is None) == (method == "grpo")
    assert list(found["recompute"]) == ["none", "3", "all"] and found["auto"] == "none"
    for mode, row in found["recompute"].items():
        assert row["steps"] == (2 if mode == "none" else 1) and not row["skipped"]
        assert row["step_s"] >= 0.9 * sum(row["seconds"].values()) > 0
        assert row["peak_gib"] > 0 and row["planned_gib"] > 0
        assert all(norm > 0 for norm in row["grad_norms"]), "something is learnt from"
        assert ("teacher" in row["seconds"]) == (method == "opd") == (row["flops"]["teacher"] > 0)
        assert (row["flops"]["recompute"] > 0) == (mode != "none")
    json.dumps(found)


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
    found = full_size.measure("opd", scale)["recompute"]
    assert found["3"] == {"failed": "out of memory at 1 prompts of 160 tokens"}
    assert found["all"]["steps"] == 1 and full_size.told(found["3"]).startswith("out of memory")


def test_completions_have_the_length_that_is_asked_for(tmp_path) -> None:
    student, teacher = full_size.tiny_models(tmp_path)
    sizes: dict[str, Any] = dict(pairs=8, rows=1, columns=2, prompts=2, length=5)
    scale = full_size.Scale(student=student, teacher=teacher, rollouts=3, **sizes)
    device = torch.device("cpu")
    config = full_size.configured("grpo", scale, str(tmp_path / "run"))
    trainer = full_size.make_trainer(full_size.settled(config, device), scale, device)
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
    alone = split_by_place([default, trial(2, 0.6, 1.2)])
    assert alone["0"] == {"value": 2, "over_chosen": 1.0}
    assert alone["1"] == {"value": 1, "over_chosen": pytest.approx(1 / 1.2)}


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
    entry = gpu.PARTS["tune"].run(True)["tune"]
    sizes = Sizes(**entry["sizes"])
    searches = entry["searches"]
    assert sizes.programs in (8, 2) and sizes.fast_bytes in (80_000, 40_000)
    assert sizes.row_blocks == {1024: 4, 2048: 8}, "the other one spills"
    assert "registers" in searches["row_blocks"]["trials"][1]["refused"]
    assert searches["programs"]["trials"][0]["over_default"]["1 rows"]["ratio"] == 1.0
    peaks = [t["known"]["peak_bytes"] for t in searches["fast_bytes"]["trials"]]
    assert len(peaks) == 2 and searches.keys() == entry["sizes"].keys()
    assert before == tune.TABLES and tune.TABLE.read_text() == table, "a smoke run changes nothing"
    json.dumps(entry)


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

"""The kernel benchmarks compare like with like: who computes another loss is not timed, who is
slower is told so, and who fails does not stop the others. Tuning chooses the fastest size."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from bench.kernels import losses, measure, tune
from bench.kernels.losses import REVERSE_KL, TASKS, Provider, Task
from bench.kernels.problems import Problem, Shape, gradient_error
from bench.tables import provider_rows
from fused_kl import tiles, tuned
from fused_kl.tuned import Sizes

SMALL = Shape("small", 8, 4001, 64, 96)
FAST = Provider(loss=losses.kl)


def measured(pedantic: Any, rounds: int = 3, **providers: Any) -> dict[str, dict[str, Any]]:
    named = {n: p if isinstance(p, Provider) else Provider(loss=p) for n, p in providers.items()}
    return measure.measure(pedantic, REVERSE_KL, named, SMALL, rounds)


def test_no_provider_of_another_loss_is_timed(pedantic: Any) -> None:
    def scaled(problem: Problem) -> torch.Tensor:
        return 1.1 * losses.kl_dense(problem)

    def gradient_alone(problem: Problem) -> torch.Tensor:
        value = losses.kl_dense(problem)
        return value + 0.1 * (value - value.detach())

    rows = measured(pedantic, fast=FAST, scaled=scaled, gradient_alone=gradient_alone)
    assert rows["scaled"] == {"failed": "AssertionError: another loss: off by 0.1"}
    assert rows["gradient_alone"] == {"failed": "AssertionError: another gradient: off by 0.1"}
    assert rows["fast"]["rounds"] == 3 and rows["fast"]["gradient_error"] < 1e-3


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_provider_computes_the_loss(task: Task) -> None:
    failures: dict[str, str] = {}
    with torch.compiler.set_stance("force_eager"):  # the compiler's own tests are not ours
        providers, skipped = task.available()
        proof = measure.prove_equal(task, providers, 4001, failures)
    assert not failures and proof.keys() == providers.keys()
    assert providers.keys() >= {"fast", "fast_allowed_columns", "dense", "compiled"}
    assert providers.keys() | skipped.keys() == task.providers.keys()


@pytest.mark.filterwarnings("ignore:ORDA:RuntimeWarning")
@pytest.mark.parametrize("name", ["orda", "cce"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_kernels_of_a_gpu_compute_the_loss_in_plain_torch_too(task: Task, name: str) -> None:
    if (provider := task.providers.get(name)) is None:
        assert (task.name == "reverse_kl") == (name == "cce")
        return
    pytest.importorskip(provider.library or "")
    failures: dict[str, str] = {}
    with torch.compiler.set_stance("force_eager"):
        proof = measure.prove_equal(task, {name: provider}, 4001, failures)
    assert not failures and proof.keys() == {name}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_trainers_call_leaves_columns_out(task: Task) -> None:
    """It is proved against the definition over the allowed columns, which another mask misses."""
    shape = Shape("small", 64, 4001, 64, 96)
    problem = Problem.of(shape, dtype=torch.float32, device="cpu", teacher=task.teacher)
    allowed = problem.allowed_columns
    assert int((~allowed).sum()) == 4 + 4001 * 267 // 151_936 and not allowed[-1]
    assert allowed[problem.token_ids].all(), "the sampler draws none of the others"
    masked = task.providers["fast_allowed_columns"]
    masked.step(problem)
    head_gradient = problem.student_lm_head.grad
    assert head_gradient is not None and not head_gradient[~allowed].any()
    assert head_gradient[allowed].any(-1).all()
    whole = {"whole": Provider(loss=task.providers["fast"].loss, masked=True)}
    failures: dict[str, str] = {}
    measure.prove_equal(task, whole, 40, failures)
    assert "another" in failures["whole"]


def test_some_tokens_of_the_policy_loss_are_clipped() -> None:
    shape = Shape("two completions", 64, 4001, 64, 96)
    problem = Problem.of(shape, dtype=torch.float32, device="cpu", teacher=False)
    value = losses.dense(problem, losses.clipped)
    value.backward()
    exact = problem.wide()
    assert exact.completion_length == 32 and exact.advantages.unique().tolist() == [-1, 2]
    logits = exact.student_hidden @ exact.student_lm_head.T
    logprobs = logits.log_softmax(-1).gather(-1, exact.token_ids[:, None])[:, 0]
    moved, advantages = (logprobs - exact.old_logprobs).detach(), exact.advantages
    # By hand: exp(0.5) > 1.2 stops where the advantage is positive, exp(-0.5) < 0.8 where it is
    # negative; 0.1 either way does not.
    stopped = ((moved > 0.4) & (advantages > 0)) | ((moved < -0.4) & (advantages < 0))
    assert 0.15 < stopped.double().mean() < 0.25
    ratio = torch.where(stopped, torch.where(moved > 0, 1.2, 0.8), moved.exp())
    assert float(value.detach()) == pytest.approx(float(-(ratio * advantages).mean()), rel=1e-4)
    slope = torch.where(stopped, 0, -moved.exp() * advantages) / len(moved)
    (slope * logprobs).sum().backward()
    assert gradient_error(problem, exact) < 1e-4


def test_a_slow_provider_is_told_slower(pedantic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the calls themselves advance, so that a busy machine changes nothing."""
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds: float, call: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        def timed(problem: Problem) -> Any:
            clock[0] += seconds
            return call(problem)

        return timed

    monkeypatch.setattr(measure, "bare_products", taking(1.0, measure.bare_products))
    slow, fast = taking(5.0, losses.kl), taking(2.0, losses.kl)
    rows = measured(pedantic, 7, fast=fast, slow=slow, same=fast)
    ratios = {name: row["ratio"] for name, row in rows.items()}
    assert ratios == {"gemms": 1, "fast": 2, "slow": 5, "same": 2}
    assert rows["slow"]["over_fast_interval"] == [2.5, 2.5]
    assert rows["same"]["over_fast"] == rows["fast"]["over_fast"] == 1
    assert rows["gemms"]["tflops"] == pytest.approx(5 * rows["slow"]["tflops"])
    assert rows["same"]["gradient_error"] == rows["fast"]["gradient_error"] < 1e-3


ERRORS = {
    "CUDA": (lambda: torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    "CPU": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "Python": (MemoryError, "out of memory"),
    "other": (lambda: TypeError("no kernel for this\nand more"), "TypeError: no kernel for this"),
}


@pytest.mark.parametrize(("error", "reason"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("call", [0, 1, 3])  # in the proof, and while timing
def test_who_fails_does_not_stop_the_others(
    pedantic: Any, error: Callable[[], Exception], reason: str, call: int
) -> None:
    calls = []

    def failing(problem: Problem) -> torch.Tensor:
        calls.append(problem)
        if len(calls) > call:
            raise error()
        return losses.kl(problem)

    rows = measured(pedantic, fast=FAST, failing=failing)
    assert rows["failing"] == {"failed": reason} and rows["fast"]["rounds"] == 3
    assert len(calls) == call + 1, "it is not asked again"
    text = "\n".join(provider_rows(rows, {"peer": "not there"}))
    assert f"| failing | {reason} |" in text and "| peer | skipped: not there |" in text


def test_memory_is_beyond_the_gradient_of_the_head() -> None:
    def hungry(problem: Problem) -> torch.Tensor:
        held = torch.ones(25_000_000)
        return losses.kl(problem) + 0 * held[0]

    def failing(problem: Problem) -> torch.Tensor:
        raise MemoryError

    providers = {"fast": FAST, "hungry": Provider(loss=hungry), "none": Provider(loss=failing)}
    rows = measure.memory(REVERSE_KL, providers, SMALL)
    fast, hungry_mb = (rows[n]["peak_mb_beyond_head_gradient"] for n in ("fast", "hungry"))
    assert 90 < hungry_mb - fast < 110 and rows["none"] == {"failed": "out of memory"}


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "find_spec", lambda name: None if name == "trl" else 1)
    providers, skipped = REVERSE_KL.available()
    assert "trl" not in providers and {"fast", "dense"} <= providers.keys()
    assert skipped["trl"] == "trl is not installed"
    if not torch.cuda.is_available():
        assert skipped["liger_fused"] == "needs a GPU"


def test_the_shapes_are_those_of_real_pairs() -> None:
    shapes = {shape.name: shape for shape in measure.real_shapes()}
    assert len(shapes) == 9
    large = shapes["Qwen3-VL 2B from 8B, 16384 tokens"]
    assert (large.num_rows, large.vocab) == (16_384, 151_936)
    assert (large.student_size, large.teacher_size, large.completion_length) == (2048, 4096, 2048)


def test_ratios_by_hand() -> None:
    result = timing.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 4.0])
    assert (result["rounds"], result["ratio"], result["first_ms"]) == (3, 2.0, 3000.0)
    assert result["ratio_interval"] == [2.0, 3.0]


def test_calls_take_turns_and_pytest_benchmark_times_the_first(pedantic: Any) -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda n, name=name: seen.append((name, n)) for name in "abc"}
    times = timing.interleaved(pedantic, calls, 3, warmup=1)
    assert seen == [(name, n) for n in range(4) for name in "bca"]
    assert pedantic.calls == [("a", n) for n in range(4)]
    assert all(len(values) == 3 and min(values) >= 0 for values in times.values())


def test_the_clock_is_read_when_the_device_is_done(
    pedantic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    clock = time.perf_counter

    def read() -> float:
        seen.append("clock")
        return clock()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", read)
    timing.interleaved(pedantic, {"a": lambda _: seen.append("call")}, 2, warmup=1)
    assert seen == 3 * ["wait", "clock", "call", "wait", "clock"]


def test_peak_memory_is_what_a_call_allocates() -> None:
    timing.peak_bytes(lambda: torch.ones(1000))
    for size in (50_000_000, 200_000_000):
        peak = timing.peak_bytes(lambda size=size: torch.ones(size // 4).sum())
        assert abs(peak - size) < 20_000_000


def test_precision_by_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CASES", [(10.0, 0.1)])
    with torch.compiler.set_stance("force_eager"):
        (row,) = measure.precision(torch.bfloat16, Shape("small", 16, 4001, 32, 64))
    assert row["fast"] < 0.01 and row["lowmem"] < 0.01 < 0.2 < row["dense"]


class TestTuning:
    """Sizes of the kernels' pieces."""

    def test_no_budget_is_above_the_promised_memory(self) -> None:
        defaults = {size: values[0] for size, values in tune.CANDIDATES.items()}
        assert defaults == {name: table["gpu"] for name, table in tune.TABLES.items()}
        for size in ("fast_bytes", "lowmem_bytes"):
            assert max(tune.CANDIDATES[size]) == defaults[size]

    def test_another_size_is_really_used(self) -> None:
        with tune.trying("row_blocks", {1024: 4, 4096: 16}):
            assert tiles.row_program(3, 9000)[:2] == (4096, 16)
        with tune.trying("programs", 6):
            assert tiles.row_program(3, 9000).splits == 2
        with tune.trying("fast_bytes", 8 * 100 * 5):
            rules: dict[str, Any] = dict(bytes_per_logit=8, chunk_size=0)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            assert tiles.make_plan("fast", 50, 100, **rules, device_type=device).rows == 5

    def test_candidates_are_proved_and_timed(
        self, pedantic: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tune, "CANDIDATES", {"lowmem_bytes": (80_000, 40_000)})
        rows = tune.measure_candidates(pedantic, "lowmem_bytes", SMALL)
        assert list(rows) == ["gemms", "80000", "40000"]
        assert rows["80000"]["over_fast"] == 1 and rows["40000"]["gradient_error"] < 1e-3

    def test_the_winner_is_faster_by_more_than_noise(self) -> None:
        def winner(*shapes: tuple[float | None, ...]) -> Any:
            """Of candidates 0, 1 and so on; None stands for a failure."""
            return tune.winner(
                [
                    {"gemms": {}}
                    | {str(i): {"over_fast": x} if x else {"failed": "x"} for i, x in enumerate(s)}
                    for s in shapes
                ]
            )

        assert winner((1, 0.99), (1, 0.985)) == 0
        assert winner((1, 0.9, 0.97), (1, 1.0, 0.97)) == 1
        assert winner((1, 0.5), (1, 2.1)) == 0 and winner((1, None), (1, 0.5)) == 0
        rows = {'{"1024": 4}': {"over_fast": 1.0}, '{"1024": 8}': {"over_fast": 0.5}}
        assert tune.winner([rows]) == {1024: 8}

    def test_the_winners_are_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "tuned.py"
        path.write_text(tune.TABLE.read_text())
        old = Sizes({2048: 8}, 528, 10**9, 10**8)
        monkeypatch.setattr(tuned, "TUNED", {"GPU B": old})
        monkeypatch.setattr(tune, "TABLE", path)
        chosen = {"row_blocks": {"1024": 8}, "programs": 264, "fast_bytes": 600, "lowmem_bytes": 9}
        benchmarks = {
            size: {"size": size, "candidates": {json.dumps(value): {"over_fast": 1.0}}}
            for size, value in chosen.items()
        }
        result = tmp_path / "gpu_tune.json"
        content = {"hardware": "GPU A", "commit": "0ab", "date": "2026-11-21"}
        result.write_text(json.dumps(content | {"benchmarks": benchmarks}))
        tune.main([str(result)])
        spec = importlib.util.spec_from_file_location("written", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        written = {name: Sizes(*sizes) for name, sizes in module.TUNED.items()}
        assert written == {"GPU A": Sizes({1024: 8}, 264, 600, 9), "GPU B": old}
        check = [sys.executable, "-m", "ruff", "format", "--check", "--line-length=100", str(path)]
        assert subprocess.run(check, capture_output=True).returncode == 0
        del benchmarks["programs"]
        result.write_text(json.dumps(content | {"benchmarks": benchmarks}))
        with pytest.raises(SystemExit) as ended:
            tune.main([str(result)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith("gpu_tune.json: not measured: programs\n")

"""The kernel benchmarks compare like with like: who computes another loss is not timed, who is
slower is told so, and who runs out of memory does not stop the others."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import failures, tables, timing
from bench.kernels import measure as kernels
from bench.kernels import precision, providers
from bench.kernels.problems import Problem, Shape, relative_errors
from bench.kernels.providers import REVERSE_KL, Peer, Provider
from bench.kernels.token_losses import policy_dense

SMALL = Shape("small", 8, 4001, 64, 96)
LIMIT = f"out of memory at {SMALL}"
PROOF = "out of memory at 64 x 4001 from 64 and 96"


def found_of(**losses: Callable[[Problem], torch.Tensor]) -> dict[str, Provider]:
    return {name: Provider(loss) for name, loss in losses.items()}


def measured(found: dict[str, Provider], rounds: int = 7) -> dict[str, dict[str, Any]]:
    failures: dict[str, str] = {}
    memory = kernels.peaks(REVERSE_KL, found, SMALL, failures)
    return kernels.measure(REVERSE_KL, found, SMALL, memory, failures, rounds)


def test_no_provider_of_another_loss_is_timed() -> None:
    ours = found_of(fast=providers.fast, lowmem=providers.lowmem)
    proof = kernels.prove_equal(REVERSE_KL, ours, SMALL)
    assert all(max(errors.values()) < 1e-3 for errors in proof.values())
    wrong = found_of(fast=providers.fast, wrong=lambda p: 1.1 * providers.dense(p))
    with pytest.raises(AssertionError, match=r"another loss: off by 0\.1"):
        kernels.prove_equal(REVERSE_KL, wrong, SMALL)
    rows = measured(wrong)
    assert rows["wrong"] == {"failed": "AssertionError: another loss: off by 0.1"}
    assert rows["fast"]["rounds"] == 7


def test_a_right_loss_with_a_wrong_gradient_is_not_timed() -> None:
    def wrong(problem: Problem) -> torch.Tensor:
        value = providers.dense(problem)
        return value + 0.1 * (value - value.detach())

    with pytest.raises(AssertionError, match="student_lm_head"):
        kernels.prove_equal(REVERSE_KL, found_of(wrong=wrong), SMALL)


@pytest.mark.parametrize("task", kernels.TASKS, ids=lambda task: task.name)
def test_every_provider_computes_the_loss(task: providers.Task) -> None:
    with torch.compiler.set_stance("force_eager"):  # the compiler's own tests are not ours
        found, skipped = task.find("cpu")
        proof = kernels.prove_equal(task, found, Shape("small", 48, 4001, 64, 96))
    assert proof.keys() == found.keys() >= {"fast", providers.MASKED, "dense", "compiled"}
    assert "trl" in found.keys() | skipped.keys()
    assert set(task.peers) == (found.keys() | skipped.keys()) & task.peers.keys()


def test_some_tokens_of_the_policy_loss_are_clipped() -> None:
    shape = Shape("two completions", 64, 4001, 64, 96)
    problem = Problem.of(shape, dtype=torch.float32, device="cpu", tokens=True)
    value = policy_dense(problem)
    value.backward()
    exact = problem.wide()
    tokens = exact.tokens
    assert tokens.sequence_length == 32 and tokens.advantages.unique().tolist() == [-1, 2]
    logits = exact.student_hidden @ exact.student_lm_head.T
    logprobs = logits.log_softmax(-1).gather(-1, tokens.ids[:, None])[:, 0]
    moved, advantages = (logprobs - tokens.old_logprobs).detach(), tokens.advantages
    # By hand: exp(0.5) > 1.2 stops where the advantage is positive, exp(-0.5) < 0.8 where it is
    # negative; 0.1 either way does not.
    stopped = ((moved > 0.4) & (advantages > 0)) | ((moved < -0.4) & (advantages < 0))
    assert 0.15 < stopped.double().mean() < 0.25
    ratio = torch.where(stopped, torch.where(moved > 0, 1.2, 0.8), moved.exp())
    assert float(value.detach()) == pytest.approx(float(-(ratio * advantages).mean()), rel=1e-4)
    slope = torch.where(stopped, 0, -moved.exp() * advantages) / len(moved)
    (slope * logprobs).sum().backward()
    assert max(relative_errors(problem, exact).values()) < 1e-4


def test_a_slow_provider_is_told_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the calls themselves advance, so that a busy machine changes nothing."""
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds: float, call: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        def timed(problem: Problem) -> Any:
            clock[0] += seconds
            return call(problem)

        return timed

    task = replace(REVERSE_KL, gemms=taking(1.0, REVERSE_KL.gemms))
    slow, fast = taking(5.0, providers.fast), taking(2.0, providers.fast)
    found = found_of(fast=fast, slow=slow, same=fast)
    rows = kernels.measure(task, found, SMALL, dict.fromkeys(found, 0), {}, 7)
    assert {name: row["ratio"] for name, row in rows.items()} == {
        "gemms": 1,
        "fast": 2,
        "slow": 5,
        "same": 2,
    }
    assert rows["slow"]["over_fast_interval"] == [2.5, 2.5]
    assert rows["same"]["over_fast"] == rows["fast"]["over_fast"] == 1
    assert rows["gemms"]["tflops"] == pytest.approx(5 * rows["slow"]["tflops"])
    assert rows["same"]["gradient_error"] == rows["fast"]["gradient_error"] < 1e-3


OUT = {
    "CUDA": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory"),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError,
}


@pytest.mark.parametrize("error", OUT.values(), ids=OUT)
@pytest.mark.parametrize("call", [0, 1, 2, 4])  # in the memory pass, the proof, while timing
def test_who_runs_out_of_memory_does_not_stop_the_others(
    error: Callable[[], Exception], call: int
) -> None:
    calls = []

    def large(problem: Problem) -> torch.Tensor:
        calls.append(len(problem.student_hidden))
        if len(calls) > call:
            raise error()
        return providers.fast(problem)

    rows = measured(found_of(large=large, fast=providers.fast), rounds=3)
    assert rows["large"] == {"failed": PROOF if call == 1 else LIMIT}
    assert len(calls) == call + 1, "it is not asked again"
    assert rows["fast"]["rounds"] == 3 and rows["fast"]["ratio_interval"]
    text = "\n".join(tables.providers({"providers": rows}))
    assert "| large | out of memory at " in text and "| fast | " in text


def test_ours_may_run_out_of_memory_too() -> None:
    def large(problem: Problem) -> torch.Tensor:
        raise MemoryError

    rows = measured(found_of(fast=large, dense=providers.dense), rounds=3)
    assert "failed" in rows["fast"] and "over_fast" not in rows["dense"]
    assert kernels.shown(REVERSE_KL, SMALL, rows, {})["providers"] == rows


@pytest.mark.parametrize("call", [0, 1, 2, 4])  # in the memory pass, the proof, while timing
def test_the_error_of_one_provider_loses_nothing_of_the_others(call: int) -> None:
    calls = []

    def broken(problem: Problem) -> torch.Tensor:
        calls.append(problem)
        if len(calls) > call:
            raise TypeError("no kernel for this\nand a second line")
        return providers.fast(problem)

    rows = measured(found_of(broken=broken, fast=providers.fast), rounds=3)
    assert rows["broken"] == {"failed": "TypeError: no kernel for this"}
    assert rows["fast"]["rounds"] == 3 and len(calls) == call + 1, "it is not asked again"


def test_an_error_that_breaks_the_device_is_nobody_elses() -> None:
    def broken(problem: Problem) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(failures.DeviceLost, match="broken: RuntimeError: CUDA error") as lost:
        measured(found_of(fast=providers.fast, broken=broken))
    assert lost.value.name == "broken"
    with pytest.raises(TypeError, match="not kept"):
        failures.attempt({}, "a", SMALL, lambda: (_ for _ in ()).throw(TypeError("not kept")))


@pytest.mark.parametrize("task", kernels.TASKS, ids=lambda task: task.name)
def test_the_trainers_call_leaves_columns_out(task: providers.Task) -> None:
    """It is proved against the definition over the allowed columns, which another mask misses."""
    found, _ = task.find("cpu")
    ours = found[providers.MASKED]
    shape = Shape("small", 48, 4001, 64, 96)
    (proof,) = kernels.prove_equal(task, {providers.MASKED: ours}, shape).values()
    assert proof["loss_error"] < 1e-4 and proof["gradient_error"] < 1e-3
    problem = Problem.of(shape, dtype=torch.float32, device="cpu", tokens=task.needs_tokens)
    allowed = problem.allowed_columns
    assert allowed.dtype == torch.bool and int((~allowed).sum()) == 4 + 4001 * 267 // 151_936
    assert not allowed[-1]
    if task.needs_tokens:
        assert allowed[problem.tokens.ids].all(), "the sampler draws none of the others"
    ours.step(problem)
    head_gradient = problem.student_lm_head.grad
    assert head_gradient is not None and not head_gradient[~allowed].any()
    assert head_gradient[allowed].any(-1).all()
    with pytest.raises(AssertionError, match="another"):
        whole = {"whole": Provider(task.ours["fast"], truth=ours.truth)}
        kernels.prove_equal(task, whole, Shape("small", 48, 40, 64, 96))


def test_a_peer_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    found, skipped = REVERSE_KL.find("cpu")
    assert "trl" not in found and {"fast", "dense"} <= found.keys()
    assert skipped["trl"] == "not installed (pip install trl==1.16.0)"
    assert skipped["liger_fused"] == "needs a CUDA device"
    peer = Peer("liger_kernel.no_such_module", lambda library: library.nothing)
    told = peer.provider("cpu")
    assert isinstance(told, str) and told.startswith("cannot be imported: No module named ")
    assert told.endswith("(pip install liger-kernel==0.8.5)")


def test_the_shapes_are_those_of_real_pairs() -> None:
    (small, middle, large) = kernels.shapes_of("Qwen3-VL 2B from 8B")
    assert (small.num_rows, middle.num_rows, large.num_rows) == (32, 640, 16_384)
    assert (large.vocab, large.student_size, large.teacher_size) == (151_936, 2048, 4096)
    assert (small.sequence_length, middle.sequence_length, large.sequence_length) == (32, 32, 2048)


def test_ratios_by_hand() -> None:
    found = timing.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 4.0])
    assert (found["rounds"], found["ratio"], found["first_ms"]) == (3, 2.0, 3000.0)
    low, high = found["ratio_interval"]  # pyright: ignore
    assert low == 2.0 and high == 3.0


def test_calls_are_interleaved_and_counted() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda n, name=name: seen.append((name, n)) for name in "ab"}
    times = timing.interleaved(calls, 3, warmup=1)
    assert seen == [(name, n) for n in range(4) for name in "ab"]
    assert all(len(values) == 3 and min(values) >= 0 for values in times.values())


def test_the_clock_is_read_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clock = time.perf_counter

    def read() -> float:
        seen.append("clock")
        return clock()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", read)
    timing.interleaved({"a": lambda _: seen.append("call")}, 2, warmup=1)
    begun, done = ["wait", "clock", "call", "wait"], ["clock"]
    assert seen == begun + 2 * (begun + done)  # the warm-up's end is nobody's


def test_peak_memory_is_what_a_call_allocates() -> None:
    timing.peak_bytes(lambda: torch.ones(1000))
    for size in (50_000_000, 200_000_000):
        peak = timing.peak_bytes(lambda size=size: torch.ones(size // 4).sum())
        assert abs(peak - size) < 20_000_000


def test_precision_by_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CASES", [(10.0, 0.1)])
    with torch.compiler.set_stance("force_eager"):
        shape = Shape("small", 16, 4001, 32, 64)
        (row,) = precision.table("cpu", torch.bfloat16, shape)
    assert row["fast"] < 0.01 and row["lowmem"] < 0.01 < 0.2 < row["dense"]

"""How the kernels are measured: each provider is proved to compute the loss, then all are timed in
turn.

Quoted are medians of paired ratios to the bare products of the same round, and to ours. A provider
that runs out of memory, raises or computes another loss is left with that in its row, and the
others are measured.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from bench import SMOKE
from bench.kernels.losses import LOGPROBS, POLICY_LOSS, REVERSE_KL, Provider, Task
from bench.kernels.problems import Problem, Shape, bare_products, gradient_error
from bench.timing import Failures, attempt, interleaved, peak_bytes, ratio

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDS = 3 if SMOKE else 25 if GPU else 5
VOCAB = 151_936
PAIRS = {  # hidden sizes of student and teacher
    "Qwen3-VL 2B from 8B": (2048, 4096),
    "Qwen3-VL 8B from 32B": (4096, 5120),
    "Qwen2.5-VL 3B from 7B": (2048, 3584),
}
COUNTS = (32, 640, 16_384)  # tokens of grounding answers, and with thinking
PRECISION = Shape("precision", 64, 32_000, 256, 512)
# Standard deviation of the logits, and of the teacher's distance from them.
CASES = [(std, gap) for std in (3.0, 10.0, 30.0) for gap in (1.0, 0.1, 0.01)]

Row = dict[str, Any]
Providers = Mapping[str, Provider]


def real_shapes() -> list[Shape]:
    """Every real pair of models at every token count; in a smoke run their names alone."""
    pairs = [(pair, count) for pair in PAIRS for count in COUNTS]
    sizes = [(8, 4099, 32, 48) if SMOKE else (count, VOCAB, *PAIRS[pair]) for pair, count in pairs]
    names = [f"{pair}, {count} tokens" for pair, count in pairs]
    return [Shape(name, *size) for name, size in zip(names, sizes, strict=True)]


def cases() -> list[tuple[Task, Shape]]:
    """What is measured here: on a CPU heads and token counts shrink, the vocabulary does not."""
    if GPU or SMOKE:
        tasks = REVERSE_KL, POLICY_LOSS, LOGPROBS
        return [(task, shape) for shape in real_shapes() for task in tasks]
    pairs = [(REVERSE_KL, 32), (REVERSE_KL, 256), (POLICY_LOSS, 128), (LOGPROBS, 128)]
    return [(task, Shape(f"512 from 1024, {n} tokens", n, VOCAB, 512, 1024)) for task, n in pairs]


def prove_equal(
    task: Task, providers: Providers, vocab: int, failures: Failures
) -> dict[str, dict[str, float]]:
    """Loss and gradient errors against the definition, on a few rows. Those that raise or compute
    something else are in `failures`."""
    few = Shape("proof", 64, vocab, 64, 96)  # in fp64 the logits of all rows would not fit
    problem = Problem.of(few, dtype=DTYPE, device=DEVICE, teacher=task.teacher)
    definitions: dict[bool, tuple[Problem, float]] = {}

    def errors(provider: Provider) -> dict[str, float]:
        if provider.masked not in definitions:
            exact = problem.wide()
            truth = task.truth(exact, problem.allowed_columns if provider.masked else None)
            truth.backward()
            definitions[provider.masked] = exact, float(truth.detach())
        exact, truth = definitions[provider.masked]
        problem.clear()
        loss_error = abs(float(provider.step(problem)) / truth - 1)
        error = gradient_error(problem, exact)
        # Rounding logits to bf16 costs some percent here; another loss is off by far more.
        if not loss_error < (5e-2 if GPU else 1e-4):
            raise AssertionError(f"another loss: off by {loss_error:.2g}")
        if not error < (0.2 if GPU else 1e-3):
            raise AssertionError(f"another gradient: off by {error:.2g}")
        return {"loss_error": loss_error, "gradient_error": error}

    proof = {n: attempt(failures, n, lambda p=p: errors(p)) for n, p in providers.items()}
    return {name: row for name, row in proof.items() if row is not None}


def step(provider: Provider, problem: Problem) -> None:
    """Forward and backward; the gradients are dropped."""
    try:
        provider.step(problem)
    finally:
        problem.clear()


def memory(task: Task, providers: Providers, shape: Shape) -> dict[str, Row]:
    """Megabytes that a step of each provider needs at most, beyond what is held before it and the
    gradient of the head. Nothing may have been timed before in this process, because that keeps
    freed memory inside it."""
    problem = Problem.of(shape, dtype=DTYPE, device=DEVICE, teacher=task.teacher)
    bare_products(problem)  # buffers of the library that multiplies
    head_gradient = problem.student_lm_head.numel() * DTYPE.itemsize
    failures: Failures = {}

    def peak(provider: Provider) -> dict[str, float]:
        if provider.compiled or provider.library:
            step(provider, problem)  # compilers and imports need memory of their own
        peak = peak_bytes(lambda: step(provider, problem))
        return {"peak_mb_beyond_head_gradient": (peak - head_gradient) / 1e6}

    rows = {name: attempt(failures, name, lambda p=p: peak(p)) for name, p in providers.items()}
    return {name: row or {"failed": failures[name]} for name, row in rows.items()}


def measure(
    benchmark: Any, task: Task, providers: Providers, shape: Shape, rounds: int = ROUNDS
) -> dict[str, Row]:
    """The row of each provider, and of the bare products, `gemms`. The first provider is ours."""
    failures: Failures = {}
    problem = Problem.of(shape, dtype=DTYPE, device=DEVICE, teacher=task.teacher)
    proof = prove_equal(task, providers, shape.vocab, failures)

    def call(name: str) -> Any:
        return lambda _: attempt(failures, name, lambda: step(providers[name], problem))

    ours, *_ = providers
    calls = {name: call(name) for name in proof} | {"gemms": lambda _: bare_products(problem)}
    times = interleaved(benchmark, calls, rounds, warmup=1)
    sizes = 3 * shape.student_size + task.teacher * shape.teacher_size
    flops = 2 * shape.num_rows * shape.vocab * sizes
    rows: dict[str, Row] = {}
    for name in ("gemms", *providers):
        if name in failures:
            rows[name] = {"failed": failures[name]}
            continue
        rows[name] = {
            **ratio(times[name], times["gemms"]),
            "tflops": flops / statistics.median(times[name]) / 1e12,
            **proof.get(name, {}),
        }
        if ours not in failures:
            over = ratio(times[name], times[ours])
            rows[name] |= {"over_fast": over["ratio"], "over_fast_interval": over["ratio_interval"]}
    return rows


def precision(dtype: torch.dtype, shape: Shape = PRECISION) -> list[Row]:
    """The error of each provider's gradient against fp64 of the same inputs, by logit size and
    distance of the teacher. A gradient that is written in bf16 is off by 0.17% from that alone.
    None stands for a provider that fails."""
    providers, _ = REVERSE_KL.available()
    del providers["compiled"]  # the arithmetic of dense
    failures: Failures = {}
    rows = []
    for std, gap in CASES:
        problem = Problem.of(shape, dtype=dtype, device=DEVICE, logit_std=std, gap=gap)
        exact = problem.wide()
        REVERSE_KL.truth(exact, None).backward()

        def error(provider: Provider, problem: Problem = problem, exact: Problem = exact) -> float:
            problem.clear()
            provider.step(problem)
            return gradient_error(problem, exact)

        unmasked = {n: p for n, p in providers.items() if not p.masked}
        errors = {n: attempt(failures, n, lambda p=p: error(p)) for n, p in unmasked.items()}
        rows.append({"logit_std": std, "gap": gap} | errors)
    return rows

"""How the kernels are measured: each provider is proved to compute the loss, then its memory is
read, then all are timed in turn.

Rounds are interleaved; quoted are medians of paired ratios to the bare products of the same round,
and to ours. A provider that runs out of memory, raises or computes another loss is left with that
in its row, and the others are measured.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.failures import attempt
from bench.kernels.problems import Loss, Problem, Shape, relative_errors
from bench.kernels.providers import REVERSE_KL, Provider, Task
from bench.kernels.token_losses import LOGPROBS, POLICY_LOSS
from bench.tables import providers
from bench.timing import interleaved, peak_bytes, ratio

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TASKS = (REVERSE_KL, POLICY_LOSS, LOGPROBS)
ROUNDS = 25 if GPU else 5
VOCAB = 151_936
PAIRS = {  # hidden sizes of student and teacher
    "Qwen3-VL 2B from 8B": (2048, 4096),
    "Qwen3-VL 8B from 32B": (4096, 5120),
    "Qwen2.5-VL 3B from 7B": (2048, 3584),
}
COUNTS = (32, 640, 16_384)  # tokens of grounding answers, and with thinking
SMALL = 64  # rows on which equality is proved; fp64 logits of all would not fit

Found = Mapping[str, Provider]
Failures = dict[str, str]  # of providers, and why


def shapes_of(pair: str, counts: Sequence[int] = COUNTS) -> list[Shape]:
    """A real pair of models at each token count."""
    return [Shape(f"{pair}, {count} tokens", count, VOCAB, *PAIRS[pair]) for count in counts]


def here(task: Task) -> list[Shape]:
    """Real pairs on a GPU; on a CPU heads and token counts shrink, the vocabulary does not."""
    if GPU:
        return [shape for pair in PAIRS for shape in shapes_of(pair)]
    counts = (128,) if task.needs_tokens else (32, 256)
    return [Shape(f"512 from 1024, {n} tokens", n, VOCAB, 512, 1024) for n in counts]


def prove_equal(
    task: Task, found: Found, shape: Shape, failures: Failures | None = None
) -> dict[str, dict[str, float]]:
    """Loss and gradient errors on a few rows. A provider that computes something else is kept in
    `failures`, with those that raise; without `failures` it raises AssertionError."""
    small = Shape(shape.name, SMALL, shape.vocab, 64, 96)
    problem = Problem.of(small, dtype=DTYPE, device=DEVICE, tokens=task.needs_tokens)
    definitions: dict[Loss, tuple[Problem, float]] = {}
    proof = {}

    def errors_of(provider: Provider) -> dict[str, float]:
        truth = provider.truth or task.truth
        if truth not in definitions:
            exact = problem.wide()
            right = truth(exact)
            right.backward()
            definitions[truth] = exact, float(right.detach())
        exact, right = definitions[truth]
        problem.clear()
        value_error = abs(float(provider.step(problem)) / right - 1)
        errors = relative_errors(problem, exact)
        # Rounding logits to bf16 costs some percent here; another loss is off by far more.
        if not value_error < (5e-2 if GPU else 1e-4):
            raise AssertionError(f"another loss: off by {value_error:.2g}")
        if not max(errors.values()) < (0.2 if GPU else 1e-3):
            sides = ", ".join(f"{name} by {error:.2g}" for name, error in errors.items())
            raise AssertionError(f"another gradient: off in {sides}")
        return {"loss_error": value_error, "gradient_error": max(errors.values())}

    for name, provider in found.items():
        if failures is None:
            proof[name] = errors_of(provider)
            continue
        errors = attempt(failures, name, small, lambda p=provider: errors_of(p), keep_errors=True)
        if errors is not None:
            proof[name] = errors
    return proof


def step(provider: Provider, problem: Problem) -> None:
    """Forward and backward; the gradients are dropped."""
    try:
        provider.step(problem)
    finally:
        problem.clear()


def peaks(task: Task, found: Found, shape: Shape, failures: Failures) -> dict[str, int]:
    """Bytes that a step of each provider needs at most beyond what is held before it."""
    problem = Problem.of(shape, dtype=DTYPE, device=DEVICE, tokens=task.needs_tokens)
    needed = {}
    task.gemms(problem)  # buffers of the library that multiplies
    for name, provider in found.items():

        def one(provider: Provider = provider) -> int:
            if provider.compiled:
                step(provider, problem)  # compilers need memory of their own
            return peak_bytes(lambda: step(provider, problem))

        needed[name] = attempt(failures, name, shape, one, keep_errors=True)
    return needed


def measure(
    task: Task,
    found: Found,
    shape: Shape,
    memory: Mapping[str, int],
    failures: Failures,
    rounds: int = ROUNDS,
) -> dict[str, dict[str, Any]]:
    """The row of each provider, and of the bare products, `gemms`."""
    proof = prove_equal(task, found, shape, failures)
    problem = Problem.of(shape, dtype=DTYPE, device=DEVICE, tokens=task.needs_tokens)
    head = problem.student_lm_head
    calls = {"gemms": lambda _: task.gemms(problem)}
    for name, provider in found.items():
        calls[name] = lambda _, name=name, provider=provider: attempt(
            failures, name, shape, lambda: step(provider, problem), keep_errors=True
        )
    able = {name: call for name, call in calls.items() if name not in failures}
    times = interleaved(able, rounds, warmup=int(GPU))  # on a CPU the memory pass was one
    sizes = 3 * shape.student_size + (task is REVERSE_KL) * shape.teacher_size
    flops = 2 * shape.num_rows * shape.vocab * sizes
    rows: dict[str, dict[str, Any]] = {}
    for name in calls:
        if name in failures:
            rows[name] = {"failed": failures[name]}
            continue
        rows[name] = {
            **ratio(times[name], times["gemms"]),
            "tflops": flops / statistics.median(times[name]) / 1e12,
            "peak_mb_beyond_head_gradient": None,
            **proof.get(name, {}),
        }
        if name != "gemms":
            beyond = memory[name] - head.numel() * head.element_size()
            rows[name]["peak_mb_beyond_head_gradient"] = beyond / 1e6
        if "fast" in times and "fast" not in failures:
            over_fast = ratio(times[name], times["fast"])
            rows[name]["over_fast"] = over_fast["ratio"]
            rows[name]["over_fast_interval"] = over_fast["ratio_interval"]
    return rows


def shown(
    task: Task, shape: Shape, rows: dict[str, dict[str, Any]], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """The rows as a result file keeps them, printed."""
    info = {"shape": shape.name, "providers": rows, "skipped": dict(skipped)}
    title = f"\n{task.name}, {shape.name}, {DTYPE}, {torch.get_num_threads()} threads"
    print("\n".join([title, *providers(info)]), flush=True)
    return info

"""Kernel benchmarks: reverse KL, policy loss and log-probabilities, forward and backward, by every
provider (`bench.kernels.measure` says how); gradient errors against fp64; sizes of the kernels'
pieces."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import SMOKE
from bench.kernels import measure, tune
from bench.kernels.measure import GPU
from bench.kernels.problems import Problem, Shape, bare_products
from bench.tables import listed, provider_rows
from bench.timing import interleaved, ratio
from fused_kl import linear_reverse_kl

CASES = {f"{task.name}-{shape.name}": (task, shape) for task, shape in measure.cases()}
SIZES = {f"{size}, {s.name}": (size, s) for size in tune.CANDIDATES for s in tune.shapes(size)}


@pytest.fixture(autouse=True)
def compiler() -> None:
    """What is compiled for one of a GPU's nine shapes counts against a limit, beyond which nothing
    is compiled any more. A smoke run on a CPU does not compile, which would take minutes."""
    if GPU:
        torch.compiler.reset()
    elif SMOKE:
        torch.compiler.set_stance("force_eager")


def keep(benchmark: Any, **info: Any) -> None:
    """Keep what was measured. Ours must have run, and a peer may only run out of memory."""
    benchmark.extra_info.update(info)
    rows = info.get("providers") or info["candidates"]
    print("\n".join(["", benchmark.name, *provider_rows(rows, info.get("skipped", {}))]))
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    ours = next(name for name in rows if name != "gemms")
    assert ours not in failed, failed
    assert all(reason == "out of memory" for reason in failed.values()), failed


@pytest.mark.parametrize("case", CASES)
def test_memory(benchmark: Any, case: str) -> None:
    """First in this file: `measure.memory` says why."""
    task, shape = CASES[case]
    providers, skipped = task.available()
    rows = benchmark.pedantic(measure.memory, (task, providers, shape), rounds=1)
    keep(benchmark, shape=shape.name, providers=rows, skipped=skipped)


@pytest.mark.parametrize("case", CASES)
def test_loss(benchmark: Any, case: str) -> None:
    task, shape = CASES[case]
    providers, skipped = task.available()
    rows = measure.measure(benchmark, task, providers, shape)
    keep(benchmark, shape=shape.name, providers=rows, skipped=skipped)


# Mean entropy of the student's rows in nats, and the tolerance; the ratio to the bare products, and
# the gradient's error, to stay below.
INPUTS: dict[str, tuple[float, float, float, float]] = {
    "realistic": (0.3, 1e-3, 0.45, 5e-3),
    "peaked": (0.05, 3e-4, 0.35, 1e-3),
}


@pytest.mark.parametrize("name", [*INPUTS, "flat"])
def test_sparse(benchmark: Any, name: str) -> None:
    """Mode "sparse" against mode "fast" and the bare products, forward and backward; on flat rows
    it takes the dense path, at most 1.1 of fast's seconds."""
    dtype, device = (torch.bfloat16, "cuda") if GPU else (torch.float32, "cpu")
    shape = Shape("smoke", 16, 2003, 32, 64) if SMOKE else Shape("sparse", 256, 151_936, 512, 1024)
    nats, tolerance, target, limit = INPUTS.get(name, (0.0, 1e-4, 1.1, 0.0))
    if name == "flat":
        problem = Problem.of(shape, dtype=dtype, device=device)
    else:
        problem = Problem.predictable(shape, nats, dtype=dtype, device=device)
    found: dict[str, Any] = {}

    def call(mode: str, _: int) -> None:
        problem.clear()
        rules = {"mode": mode, "tolerance": tolerance, "token_weights": problem.token_weights}
        out = linear_reverse_kl(*problem.both, **rules)
        out.loss.backward()
        found[mode] = out

    calls = {mode: partial(call, mode) for mode in ("sparse", "fast")}
    gradients = {}
    for mode, run in calls.items():
        run(0)
        gradients[mode] = [side.grad for side in problem.student]
    errors = [
        float((mine - exact).norm() / exact.norm())
        for mine, exact in zip(gradients["sparse"], gradients["fast"], strict=True)
    ]
    del gradients
    times = interleaved(benchmark, calls | {"gemms": lambda _: bare_products(problem)}, 7)
    to_products, to_fast = (ratio(times["sparse"], times[other]) for other in ("gemms", "fast"))
    support = found["sparse"].support
    asked = to_fast if name == "flat" else to_products
    asked["target"] = target
    info = {
        "entropy": float(found["fast"].student_entropy.mean()),
        "tolerance": tolerance,
        "columns": support.columns.tolist(),
        "dense_rows": support.dense_rows.tolist(),
        "left_out": float(support.left_out.max()),
        "gradient_error": {"ratio": max(errors), "target": limit},
        "sparse / products": to_products,
        "sparse / fast": to_fast,
        "fast / products": ratio(times["fast"], times["gemms"]),
    }
    benchmark.extra_info.update(info)
    print(f"\n{benchmark.name}", *(f"    {key}: {value}" for key, value in info.items()), sep="\n")
    assert SMOKE or max(errors) <= limit


@pytest.mark.parametrize("num_rows", [32, 256])
def test_shared_head(benchmark: Any, num_rows: int) -> None:
    """A head that student and teacher share, read once, by a copy of it for the teacher."""
    dtype, device = (torch.bfloat16, "cuda") if GPU else (torch.float32, "cpu")
    shape = Shape("smoke", 16, 2003, 32, 32) if SMOKE else Shape("", num_rows, 151_936, 512, 512)
    problem = Problem.of(shape, dtype=dtype, device=device)
    hidden, head, teacher_hidden, copy = problem.both
    heads = {"shared": head.detach(), "apart": copy.copy_(head.detach())}

    def call(name: str, _: int) -> None:
        problem.clear()
        out = linear_reverse_kl(hidden, head, teacher_hidden, heads[name])
        (out.loss * 1.0).backward()

    times = interleaved(benchmark, {name: partial(call, name) for name in heads}, 7)
    seconds = ratio(times["shared"], times["apart"]) | {"better": "lower"}
    benchmark.extra_info["shared / apart"] = seconds
    print(f"\nshared head by two, {shape.num_rows} rows: {seconds}")


@pytest.mark.skipif(GPU, reason="two ranks on the cores of a CPU")
def test_vocabulary_parallel(benchmark: Any, tmp_path: Path) -> None:
    """Two ranks with half of the vocabulary each, by one process with all of it; a thread each."""
    shape = (16, 2003, 32, 64) if SMOKE else (256, 151_936, 512, 1024)
    out, rounds = tmp_path / "seconds.json", 1 if SMOKE else 7
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launch, "-m", "bench.kernels.sharded", out, rounds, *shape]
    benchmark.pedantic(subprocess.run, (list(map(str, command)),), {"check": True}, rounds=1)
    found = json.loads(out.read_text())
    seconds = ratio(found["sharded"], found["alone"]) | {"better": "lower", "target": 0.6}
    benchmark.extra_info.update({"sharded / alone": seconds, "gradient_error": found["error"]})
    print(f"\nvocabulary-parallel by one process: {seconds}, error {found['error']:.1e}")
    assert found["error"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_precision(benchmark: Any, dtype: str) -> None:
    """A row per case with the error of each provider; smaller in a smoke run."""
    shape = Shape("smoke", 16, 2003, 32, 64) if SMOKE else measure.PRECISION
    rows = benchmark.pedantic(measure.precision, (getattr(torch, dtype), shape), rounds=1)
    benchmark.extra_info.update({"shape": str(shape), "rows": rows})
    print("\n".join(["", benchmark.name, *listed(rows)]))


@pytest.mark.skipif(not (GPU or SMOKE), reason="sizes of a GPU")
@pytest.mark.parametrize("case", SIZES)
def test_tune(benchmark: Any, case: str) -> None:
    size, shape = SIZES[case]
    rows = tune.measure_candidates(benchmark, size, shape)
    keep(benchmark, shape=shape.name, size=size, candidates=rows)

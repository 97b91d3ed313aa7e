"""Gradient error of every provider against fp64, by logit size and distance of the teacher.

The truth is computed in fp64 from the same bf16 or fp32 inputs, so what is measured is what each
implementation loses. The larger of the two gradients' relative errors is quoted; a gradient that is
written in bf16 is off by 0.17% from that alone.
"""

from typing import Any

import torch

from bench.failures import attempt
from bench.kernels.measure import DEVICE, Failures
from bench.kernels.problems import Problem, Shape, relative_errors
from bench.kernels.providers import MASKED, REVERSE_KL
from bench.tables import listed

SHAPE = Shape("precision", 64, 32_000, 256, 512)
CASES = [(std, gap) for std in (3.0, 10.0, 30.0) for gap in (1.0, 0.1, 0.01)]
DTYPES = (torch.bfloat16, torch.float32)
Row = dict[str, Any]  # logit_std, gap, and the error of each provider


def table(device: str, dtype: torch.dtype, shape: Shape = SHAPE) -> list[Row]:
    """One row per case. A provider that fails has None in its place."""
    providers, _ = REVERSE_KL.find(device)
    providers.pop("compiled")  # the arithmetic of dense
    providers.pop(MASKED)  # that of fast, of another loss
    failures: Failures = {}
    rows = []
    for std, gap in CASES:
        problem = Problem.of(shape, dtype=dtype, device=device, logit_std=std, gap=gap)
        exact = problem.wide()
        REVERSE_KL.truth(exact).backward()
        row: Row = {"logit_std": std, "gap": gap}
        for name, provider in providers.items():
            problem.clear()
            value = attempt(
                failures,
                name,
                shape,
                lambda p=provider, x=problem: p.step(x),
                keep_errors=True,
            )
            worst = None if value is None else max(relative_errors(problem, exact).values())
            row[name] = worst
        rows.append(row)
    return rows


def measure(dtype: torch.dtype, shape: Shape = SHAPE) -> dict[str, Any]:
    """The table of a dtype on this device, printed and as a result file keeps it."""
    rows = table(DEVICE, dtype, shape)
    print(
        "\n".join([f"\n{dtype}, {shape}: relative error of the gradient", *listed(rows)]),
        flush=True,
    )
    return {"dtype": str(dtype), "shape": str(shape), "rows": rows}

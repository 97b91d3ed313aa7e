"""Gradient error of every provider against fp64, by logit size and distance of the teacher:
python -m bench.precision [OUT.json]

The truth is computed in fp64 from the same bf16 or fp32 inputs, so what is measured is what each
implementation loses. The larger of the two gradients' relative errors is quoted; a gradient that is
written in bf16 is off by 0.17% from that alone.
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.providers import Problem, Shape, providers, relative_errors, truth
from bench.record import hardware, versions

SHAPE = Shape("precision", 64, 32_000, 256, 512)
CASES = [(std, gap) for std in (3.0, 10.0, 30.0) for gap in (1.0, 0.1, 0.01)]


def table(device: str, dtype: torch.dtype) -> list[dict[str, float]]:
    """One row per case: logit_std, gap, and the error of each provider."""
    found = providers(device)
    found.pop("compiled")
    rows = []
    for std, gap in CASES:
        problem = Problem.of(SHAPE, dtype=dtype, device=device, logit_std=std, gap=gap)
        exact = problem.wide()
        truth(exact).backward()
        row = {"logit_std": std, "gap": gap}
        for name, loss in found.items():
            problem.clear()
            loss(problem).backward()
            row[name] = max(relative_errors(problem, exact).values())
        rows.append(row)
    return rows


def main(arguments: list[str]) -> None:
    results: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m bench.precision",
    }
    for dtype in (torch.bfloat16, torch.float32):
        rows = table("cuda" if torch.cuda.is_available() else "cpu", dtype)
        names = list(rows[0])[2:]
        print(f"\n| {dtype}: logit std / gap | " + " | ".join(names) + " |")
        print("|" + "---|" * (1 + len(names)))
        for row in rows:
            cells = (f"{100 * row[name]:.2g}%" for name in names)
            print(f"| {row['logit_std']:g} / {row['gap']:g} | " + " | ".join(cells) + " |")
        results[str(dtype)] = rows
    if arguments:
        Path(arguments[0]).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

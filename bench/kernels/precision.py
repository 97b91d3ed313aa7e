"""Gradient error of every provider against fp64, by logit size and distance of the teacher:
python -m bench.precision [OUT.json], which also writes OUT.png

The truth is computed in fp64 from the same bf16 or fp32 inputs, so what is measured is what each
implementation loses. The larger of the two gradients' relative errors is quoted; a gradient that is
written in bf16 is off by 0.17% from that alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.failures import attempt
from bench.kernels.measure import DEVICE, Failures
from bench.kernels.problems import Problem, Shape, relative_errors
from bench.kernels.providers import MASKED, REVERSE_KL
from bench.record import origin
from bench.tables import table as markdown

SHAPE = Shape("precision", 64, 32_000, 256, 512)
CASES = [(std, gap) for std in (3.0, 10.0, 30.0) for gap in (1.0, 0.1, 0.01)]
DTYPES = (torch.bfloat16, torch.float32)
Row = dict[str, Any]  # logit_std, gap, and the error of each provider


def table(device: str, dtype: torch.dtype, shape: Shape = SHAPE) -> list[Row]:
    """One row per case. A provider that fails has None in its place."""
    found, _ = REVERSE_KL.find(device)
    found.pop("compiled")  # the arithmetic of dense
    found.pop(MASKED)  # that of fast, of another loss
    failures: Failures = {}
    rows = []
    for std, gap in CASES:
        problem = Problem.of(shape, dtype=dtype, device=device, logit_std=std, gap=gap)
        exact = problem.wide()
        REVERSE_KL.truth(exact).backward()
        row: Row = {"logit_std": std, "gap": gap}
        for name, provider in found.items():
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


def told(dtype: torch.dtype, rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0])[2:]
    body = []
    for row in rows:
        errors = (row[name] for name in names)
        cells = ("failed" if error is None else f"{100 * error:.2g}%" for error in errors)
        body.append([f"{row['logit_std']:g} / {row['gap']:g}", *cells])
    return "\n".join(markdown([f"{dtype}: logit std / gap", *names], body)).rstrip("\n")


def plot(tables: dict[str, list[Row]], title: str, path: Path) -> None:
    """Error against the teacher's distance: a panel for each dtype and logit size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["logit_std"] for rows in tables.values() for row in rows})
    figure, grid = plt.subplots(
        len(tables),
        len(sizes),
        figsize=(3.6 * len(sizes), 3.2 * len(tables)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for axes, (dtype, rows) in zip(grid, tables.items(), strict=True):
        for axis, size in zip(axes, sizes, strict=True):
            here = [row for row in rows if row["logit_std"] == size]
            for name in list(rows[0])[2:]:
                known = [row for row in here if row[name] is not None]
                gaps, errors = ([row[key] for row in known] for key in ("gap", name))
                axis.loglog(gaps, errors, marker="o", markersize=3, label=name)
            axis.set_title(f"{dtype.removeprefix('torch.')}, logits of std {size:g}", fontsize=9)
            axis.axhline(1.0, color="grey", linewidth=0.5)
        axes[0].set_ylabel("relative error of the gradient")
    for axis in grid[-1]:
        axis.set_xlabel("distance of the teacher's logits")
    grid[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure() -> dict[str, list[Row]]:
    """The table of each dtype, printed as it is made."""
    tables = {}
    for dtype in DTYPES:
        tables[str(dtype)] = table(DEVICE, dtype)
        print("\n" + told(dtype, tables[str(dtype)]))
    return tables


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or any(not a.endswith(".json") for a in arguments):
        print("usage: python -m bench.precision [OUT.json]", file=sys.stderr)
        raise SystemExit(2)
    results = {**origin(), "command": "python -m bench.precision", **measure()}
    for path in map(Path, arguments):
        path.write_text(json.dumps(results, indent=2) + "\n")
        title = f"{results['hardware']}, {results['date']}, {results['commit']}"
        plot({str(dtype): results[str(dtype)] for dtype in DTYPES}, title, path.with_suffix(".png"))
        print(f"{path} and {path.with_suffix('.png')}")

"""All examples, before and after: python -m bench.examples [--output FILE]

Prints a table, and with --output writes it as a result file. Takes about five minutes on a CPU.
"""

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.examples.compare import PACKAGES, measure
from bench.examples.task import LARGE
from bench.record import origin, write
from bench.tables import cell, table

COLUMNS = {
    "second_mb": "MB before",
    "first_mb": "MB after",
    "ratio": "after / before",
    "loss_error": "losses differ by",
    "weight_error": "weights differ by",
}


def lines_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table."""
    body = []
    for name, row in rows.items():
        if "skipped" in row:
            body.append([name, f"skipped: {row['skipped']}", *[""] * len(COLUMNS)])
        else:
            lines = f"+{row['lines_added']} -{row['lines_removed']}"
            body.append([name, lines, *(cell(row[key]) for key in COLUMNS)])
    return table(["example", "lines changed", *COLUMNS.values()], body)


def main(arguments: list[str]) -> None:
    """The command."""
    hidden = argparse.SUPPRESS  # a mistake is one line, without the usage
    parser = argparse.ArgumentParser(prog="bench.examples", usage=hidden, description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON, with where it is from")
    options = parser.parse_args(arguments)
    rows = {}
    for name in PACKAGES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # TRL prints its losses
            rows[name] = measure(name)
    print("\n".join(lines_of(rows)), end="")
    if options.output:
        tokens = LARGE.batch_size * LARGE.max_completion_length
        note = (
            f"With fused_kl / before. Memory of two steps beyond both models' weights, "
            f"{tokens} completion tokens a step; errors and lines are of the small size."
        )
        content = {"command": "python -m bench.examples", "note": note, "size": asdict(LARGE)}
        write(options.output, origin() | content | {"benchmarks": {"examples": rows}})


if __name__ == "__main__":
    main(sys.argv[1:])

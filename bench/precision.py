"""Gradient error of every provider against fp64: python -m bench.precision [OUT.json]"""

import json
import sys
from pathlib import Path

from bench.kernels.precision import DTYPES, measure
from bench.record import origin


def main(arguments: list[str]) -> None:
    """The command."""
    if len(arguments) > 1 or any(not argument.endswith(".json") for argument in arguments):
        print("usage: python -m bench.precision [OUT.json]", file=sys.stderr)
        raise SystemExit(2)
    result = {**origin(), "benchmarks": {str(dtype): measure(dtype) for dtype in DTYPES}}
    for path in map(Path, arguments):
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])

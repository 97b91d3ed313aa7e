"""What things cost: run with `pytest bench/ --benchmark-only`.

Works from a clone that is not installed: its sources are put on the import path of this process and
of the processes that it starts, in front of an installed version, so that what is measured is what
the commit names.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOKE = bool(os.environ.get("BENCH_SMOKE"))  # shrink what is measured on GPUs to any machine
SOURCES = (str(ROOT), str(ROOT / "kernels"))


def use_sources() -> None:
    """Put `SOURCES` on the import path, here and in `PYTHONPATH`."""
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in SOURCES if path not in sys.path]
    missing = [path for path in SOURCES if path not in inherited]
    os.environ["PYTHONPATH"] = os.pathsep.join([*missing, *inherited])


use_sources()

"""What rounding costs: gradient error of every provider against fp64, by logit size and distance of
the teacher. `python -m bench.precision OUT.json` makes the plot of it."""

import pytest
import torch

from bench.kernels import precision
from bench.kernels.measure import DEVICE


@pytest.mark.parametrize("dtype", precision.DTYPES, ids=str)
def test_precision(benchmark, dtype: torch.dtype) -> None:
    rows = benchmark.pedantic(precision.table, (DEVICE, dtype), rounds=1)
    benchmark.extra_info.update(dtype=str(dtype), shape=str(precision.SHAPE), rows=rows)
    print("\n" + precision.told(dtype, rows))

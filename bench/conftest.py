"""Hooks of a run of the suite."""

from typing import Any

import pytest

from bench.record import hardware, versions


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add what pytest-benchmark does not know: the GPU, and versions of libraries."""
    machine_info |= {"hardware": hardware(), "versions": versions()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels first: what others leave free in the process's heap would be counted as theirs."""
    items.sort(key=lambda item: item.path.name != "bench_kernels.py")

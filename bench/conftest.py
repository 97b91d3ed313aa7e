"""Every run of the suite says where it ran and of what."""

from typing import Any

import pytest

from bench.record import origin

STARTED = origin()  # not at the end: what is committed meanwhile is not what was measured


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """For `bench.record`."""
    machine_info["origin"] = STARTED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels first: what others leave free in the process's heap would be counted as theirs."""
    items.sort(key=lambda item: item.path.name != "bench_kernels.py")

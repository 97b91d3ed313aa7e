"""Hooks of a run of the suite: its order, and where pytest-benchmark's report comes from."""

from typing import Any

import pytest

from bench.record import complete_commit, complete_machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add the GPU and versions of libraries, and leave out the machine's name."""
    complete = complete_machine(machine_info)
    machine_info.clear()
    machine_info |= complete


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Name the commit where these sources are no git checkout."""
    commit_info |= complete_commit(commit_info)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels first: what others leave free in the process's heap would be counted as theirs."""
    items.sort(key=lambda item: item.path.name != "bench_kernels.py")

"""Every run of the suite says where it ran and of what."""

from typing import Any

from bench.record import origin

STARTED = origin()  # not at the end: what is committed meanwhile is not what was measured


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """For `bench.record`."""
    machine_info["origin"] = STARTED

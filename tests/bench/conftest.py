"""Fixtures of the tests of the benchmarks."""

from collections.abc import Callable
from typing import Any

import pytest


class Pedantic:
    """pytest-benchmark's fixture without its statistics; beside others it would time nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []  # arguments of the timed function

    def pedantic(
        self,
        target: Callable[..., Any],
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
        rounds: int,
        warmup_rounds: int,
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            arguments, options = setup()
            self.calls.append(arguments)
            target(*arguments, **options)


@pytest.fixture
def pedantic() -> Pedantic:
    return Pedantic()

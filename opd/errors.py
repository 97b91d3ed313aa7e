"""A user's mistakes, each told in one line: the commands print it and end with exit code 2."""

from __future__ import annotations

from pathlib import Path


class Stopped(Exception):
    """The run ends early: one line that says why, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DataError(ValueError):
    """A data file that cannot be used; its one-line message names the file and the place."""


class ModelError(ValueError):
    """A checkpoint that cannot be used, told in one line."""


class ConfigError(ValueError):
    """A user's mistake in the configuration, told in one line."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def shown(value: object) -> str:
    """A value as one line can hold it; a path is never cut short."""
    text = "null" if value is None else str(value)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 80 or isinstance(value, Path) else f"{text[:77]}..."

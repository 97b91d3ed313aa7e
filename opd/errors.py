"""Errors that end a command with one line on stderr instead of a traceback."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A user's mistake, described in one line; the commands print it and end with exit code 2."""


class ConfigError(UserError):
    """A mistake in the configuration or on the command line; the message begins with the key."""


class DataError(UserError):
    """A data file that cannot be used; the message names the file and the place in it."""


class ModelError(UserError):
    """A checkpoint that cannot be used; the message names the checkpoint."""


class Stopped(Exception):
    """The early end of a run, which is no mistake: one line with the reason, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def printable(value: object) -> str:
    """A value as text for a one-line message: cut to 80 characters unless it is a Path."""
    text = "null" if value is None else str(value)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 80 or isinstance(value, Path) else f"{text[:77]}..."


def raised(error: Exception) -> str:
    """Type and first line of an exception, for a message that quotes it."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"

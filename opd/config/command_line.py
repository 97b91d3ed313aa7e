"""Handling of arguments, flags and errors that the commands share."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from opd import distributed
from opd.config.help import help_text
from opd.config.run import Config, load_config, to_yaml
from opd.errors import Stopped, UserError, printable, require

FLAGS = ("-h", "--help", "--print-config")


def command_line(usage: str, arguments: list[str]) -> list[str]:
    """Return the arguments of a command that are no flags; `--help` and `--print-config` print
    and exit.

    Args:
        usage: name of the command and its arguments, such as `opd.train [CONFIG.yaml]`.
        arguments: those of the process, without the name of the command.

    Raises:
        ConfigError: for an unknown flag.
        SystemExit: with code 0 after a flag.
    """
    # The deepspeed launcher adds --local_rank; ranks come from the environment instead.
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    for flag in flags:
        require(flag in FLAGS, f"{printable(flag)}: no such flag; use {' or '.join(FLAGS[1:])}")
    rest = [a for a in arguments if a not in flags]
    if "--print-config" in flags:
        print(to_yaml(load_config(rest)), end="")
    elif flags:
        print(help_text(usage, Config()), end="")
    if flags:
        raise SystemExit(0)
    return rest


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Context, or decorator, of a whole command: a user's mistake, an early end, and SIGINT where a
    run does not handle it end with one line on stderr and their exit code."""
    try:
        yield
    except UserError as error:
        fail(error)
    except Stopped as stopped:
        distributed.leave_at_exit()
        fail(stopped, stopped.exit_code)
    except KeyboardInterrupt:
        fail("SIGINT: stopped", 128 + signal.SIGINT)


def fail(message: object, exit_code: int = 2) -> NoReturn:
    """Exit with one line on the first rank's stderr; exit code 2 stands for a user's mistake."""
    if distributed.is_first():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)

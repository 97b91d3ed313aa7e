"""The command line that the commands share."""

import sys
from typing import NoReturn

from opd import distributed
from opd.config.options import describe
from opd.config.run import Config, load_config, to_yaml
from opd.errors import printable, require


def command_line(command: str, arguments: list[str]) -> list[str]:
    """The arguments of a command without its flags; `--help` and `--print-config` print what they
    say and end it."""
    arguments = [a for a in arguments if not a.startswith("--local_rank=")]  # DeepSpeed's launcher
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    known = ("-h", "--help", "--print-config")
    for flag in flags:
        require(flag in known, f"{printable(flag)}: no such flag (known: {', '.join(known)})")
    rest = [a for a in arguments if a not in flags]
    if "--print-config" in flags:
        print(to_yaml(load_config(rest)), end="")
    elif flags:
        print(f"usage: python -m {command}\n")
        print("--print-config prints the whole configuration; as a file it repeats the run.\n")
        print("\n".join(describe(Config())))
    if flags:
        raise SystemExit(0)
    return rest


def fail(message: object, exit_code: int = 2) -> NoReturn:
    """End with one line on stderr, of the first rank; exit code 2 is a user's mistake."""
    if distributed.is_first():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)

"""Video-OPD: on-policy distillation of multimodal models for temporal video grounding."""

import sys
from types import TracebackType


def _in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report SIGINT during the imports of a command, which take seconds, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: SIGINT: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # `python -m opd.COMMAND` imports this package before the command
    sys.excepthook = _in_one_line

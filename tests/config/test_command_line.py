"""How commands end: one line on stderr and an exit code."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.data.convert import CONVERTERS
from opd.errors import ConfigError, Stopped

ROOT = Path(__file__).parents[2]
# A command, what it calls first, and its arguments.
COMMANDS = {
    "opd.train": ("load_config", []),
    "opd.evaluate": ("command_line", ["runs/none"]),
    "opd.check": ("load_config", []),
    "opd.report": ("read", ["runs/none"]),
    "opd.data.convert": ("convert", [next(iter(CONVERTERS)), "in.json", "out.jsonl"]),
}
ENDS = {
    "a mistake": (ConfigError("seed=x: expected an integer"), 2, "seed=x: expected an integer"),
    "an early end": (Stopped("SIGTERM: stopped after step 3", 143), 143, None),
    "SIGINT": (KeyboardInterrupt(), 130, "SIGINT: stopped"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_one_line(
    command: str, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(command)
    (called, arguments), (error, code, line) = COMMANDS[command], ENDS[end]

    def raises(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module, called, raises)
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {line or error}\n"


def test_sigint_while_a_command_imports(tmp_path: Path) -> None:
    """Imports take seconds, in which no function of the command runs yet."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    run = subprocess.run(
        [sys.executable, "-m", "opd.train", "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.returncode == -signal.SIGINT and run.stderr == "error: SIGINT: stopped\n"

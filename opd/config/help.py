"""The `--help` text of the commands that take a configuration."""

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import Field, is_dataclass
from typing import Any, get_args, get_type_hints

from opd.config.options import keys_of, limits_of
from opd.errors import printable

MOST_COLUMNS, LEAST_COLUMNS = 100, 40
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
ARGUMENTS = {
    "TARGET": "Run folder, checkpoint folder, Hub id, `embedded:NAME`, or a file of stored answers "
    "(JSON lines of `id` and `answer`).",
    "CONFIG.yaml": "YAML file whose values replace the defaults.",
    "dotted.key=value": "Value of a key listed below, such as optim.lr=1e-5; it replaces the "
    "default and the file's value. ${key} in a value stands for the value of another key.",
    "--explain": "Print the scores of one target also under other conventions of reading and "
    "scoring, and with each key=value behind it alone, for which the target is evaluated again.",
    "-h, --help": "Print this help and exit.",
    "--print-config": "Print the merged configuration as YAML and exit; as CONFIG.yaml it repeats "
    "the run.",
}
"""Descriptions of arguments; a command has those that its usage line names, and the flags."""

COMMANDS = {
    "opd.train": (
        "Train a student by on-policy distillation, GRPO or SFT, evaluate it before and after, and "
        "write a run folder.",
        (
            ("The embedded run: a few minutes on two CPU cores.", "python -m opd.train"),
            (
                "The same with other settings.",
                "python -m opd.train run_dir=runs/mine steps=100 optim.lr=5e-4",
            ),
            (
                "Continue that run after an interruption.",
                "python -m opd.train run_dir=runs/mine steps=100 optim.lr=5e-4 resume=auto",
            ),
            (
                "Settings from a file, on 8 GPUs.",
                "torchrun --nproc-per-node 8 -m opd.train configs/video_opd_8b.yaml",
            ),
        ),
    ),
    "opd.evaluate": (
        "Evaluate checkpoints, runs or stored answers on any data set; several targets are "
        "compared with the first.",
        (
            ("The student of a run on its own held-out data.", "python -m opd.evaluate runs/mine"),
            (
                "A model on another split.",
                "python -m opd.evaluate embedded:teacher data.eval=synthetic:tune",
            ),
            (
                "Two runs on the same queries.",
                "python -m opd.evaluate runs/default runs/mine run_dir=runs/compared",
            ),
            (
                "How the score depends on conventions, and on the frame rate.",
                "python -m opd.evaluate runs/mine resume=auto --explain data.fps=2",
            ),
        ),
    ),
}
"""By command: what it does, and examples, each a comment and a command line."""


def help_text(usage: str, default: Any) -> str:
    """The help of a command: usage, examples, arguments, and every key by section.

    Lines are as wide as the terminal, between 40 and 100 columns.

    Args:
        usage: name of the command, a key of `COMMANDS`, and its arguments.
        default: the configuration with its default values.
    """
    width = max(LEAST_COLUMNS, min(MOST_COLUMNS, shutil.get_terminal_size().columns))
    summary, examples = COMMANDS[usage.partition(" ")[0]]
    lines = textwrap.wrap(f"usage: python -m {usage}", width, subsequent_indent="  ")
    lines += ["", *textwrap.wrap(summary, width), "", "Examples:"]
    for comment, example in examples:
        lines += [*_wrap(f"# {comment}", width, 2), *_wrap(example, width, 2)]
    lines += ["", "Arguments:"]
    column = 4 + max(map(len, ARGUMENTS))
    for name, doc in ARGUMENTS.items():
        if name in usage or name.startswith(("-h", "--print-config")):
            lines += _entry(name, [doc], column, width)
    return "\n".join([*lines, *_sections(default, width)]) + "\n"


def _sections(default: Any, width: int) -> Iterator[str]:
    """Every section: its heading, a sentence about it, and its keys."""
    keys = list(keys_of(type(default)))
    column = 4 + max(len(key) for key, _, _ in keys)
    for name, section in _sections_of(default):
        heading, _, about = (inspect.getdoc(type(section)) or "").partition("\n")
        yield ""
        yield heading.rstrip(".") + (f" ({name}.*):" if name else ":")
        yield from _wrap(" ".join(about.split()), width, 2)
        yield ""
        for key, entry, kind in keys:
            if key.rpartition(".")[0] == name:
                value = getattr(section, entry.name)
                yield from _entry(
                    key, [entry.metadata["doc"], _values(entry, kind, value)], column, width
                )


def _sections_of(default: Any) -> Iterator[tuple[str, Any]]:
    """The configuration itself, for the keys outside any section, and each section by its name."""
    yield "", default
    for name, kind in get_type_hints(type(default)).items():
        if is_dataclass(kind):
            yield name, getattr(default, name)


def _values(entry: Field[Any], kind: Any, default: object) -> str:
    """Possible values of a key and its default, such as `number above 0; default: 0.001`."""
    optional = type(None) in get_args(kind)
    plain = get_args(kind)[0] if optional else kind
    choices = entry.metadata["choices"]
    text = f"one of {', '.join(choices)}" if choices else KINDS[plain]
    limits = limits_of(entry)
    text += f" {limits}" if limits.startswith(("in ", "above ")) else f", {limits}" * bool(limits)
    text += ", or null" if optional else ""
    value = str(default).lower() if plain is bool else printable(default)
    return f"{text}; default: {value}"


def _entry(name: str, paragraphs: list[str], column: int, width: int) -> Iterator[str]:
    """A name with paragraphs beside it, or below it where the terminal is narrow."""
    narrow = width < 2 * column
    lines = [line for text in paragraphs for line in _wrap(text, width, 6 if narrow else column)]
    if narrow:
        yield f"  {name}"
    else:
        lines[0] = f"  {name}".ljust(column) + lines[0][column:]
    yield from lines


def _wrap(text: str, width: int, indent: int) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )

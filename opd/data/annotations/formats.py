"""Readers of the public annotation formats, named or recognised, and the writer of our own data.

A format says how its file splits into records and what example a record holds; `read_examples`
does the rest for all of them: locations in messages, video look-up, unique ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from opd.data.annotations import records
from opd.data.annotations.fields import (
    VIDEO_EXTENSIONS,
    Place,
    Records,
    json_lines,
    json_list,
    json_records,
    lines,
    one_line,
    read_text,
)
from opd.data.annotations.records import Fields
from opd.data.examples import Example
from opd.errors import DataError

_LOOKED_AT = 20  # records that tell a format


@dataclass(frozen=True)
class Format:
    """How a file splits into records and what one of them holds."""

    split: Callable[[str, Path], Records]  # the file's text and path
    parse: Callable[[Place, Any], Fields]  # ValueError says what is wrong
    unit: Literal["line", "record"] = "line"  # what the first part of a place counts


def _split(function: Callable[[str], Records]) -> Callable[[str, Path], Records]:
    return lambda text, _: function(text)


FORMATS: dict[str, Format] = {
    "timerft": Format(_split(json_list), records.timerft, "record"),
    "charades": Format(_split(lines), records.charades),
    "activitynet": Format(_split(records.activitynet_records), records.activitynet, "record"),
    "rextime": Format(_split(json_records), records.rextime),
    "qvhighlights": Format(_split(json_lines), records.qvhighlights),
    "tacos": Format(_split(json_lines), records.qvhighlights),
    "timelens": Format(_split(records.timelens_records), records.timelens, "record"),
    "timelens_100k": Format(_split(records.timelens_100k_records), records.timelens_100k),
    "tvgbench": Format(_split(json_list), records.tvgbench, "record"),
    "nextgqa": Format(records.nextgqa_records, records.nextgqa),
    "mcq": Format(_split(json_lines), records.mcq),
}
"""The one registry of formats, by the name used in configurations. Of two that fit a file the
earlier one is recognised: every ReXTime record would pass for one of QVHighlights."""


def read_examples(
    path: str | Path,
    format: str = "auto",
    video_root: str | Path = ".",
    left_out: list[str] | None = None,
) -> list[Example]:
    """Read an annotation file.

    Args:
        path: the annotation file, UTF-8.
        format: one of `FORMATS`, or "auto": the one that `recognise` finds.
        video_root: folder of the videos, as in `find_video`.
        left_out: takes one line, naming file and place, for each record that is malformed, whose
            video is missing or whose id occurred before; without it the first one is an error.

    Raises:
        DataError: a file that cannot be read, holds no record or is plainly of another format; one
            line naming it.
        ValueError: for a format that is not known.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown data format {format!r}; known: {', '.join(FORMATS)}")
    path = Path(path)
    text = read_text(path)
    format = _recognise(text, path) if format == "auto" else format
    form, videos = FORMATS[format], _Videos(Path(video_root))
    try:
        found = list(form.split(text, path))
    except DataError:
        raise
    except ValueError as error:
        _raise_mistaken(text, path, format, str(error))
        raise DataError(f"{path}:{error}") from error

    parsed, first = 0, ""
    examples: dict[str, Example] = {}
    for place, record in found:
        source = f"{path}:{one_line(str(place))}"
        try:
            if isinstance(record, ValueError):
                raise record
            fields = form.parse(place, record)
            parsed += 1
            video = videos.find(fields.pop("video"))
            example = Example(**fields, video=video, source=source)
            if example.id in examples:
                before = examples[example.id].source
                raise ValueError(f"id {example.id!r} was used at {before} already")
            examples[example.id] = example
        except (ValueError, OSError) as error:
            reason = one_line(str(error))
            first = first or f"{form.unit} {place}: {reason}"
            if left_out is None:
                if not parsed:
                    _raise_mistaken(text, path, format, first)
                raise DataError(f"{source}: {reason}") from error
            left_out.append(f"{source}: {reason}")
    if not found:
        raise DataError(f"{path}: holds no examples")
    if not parsed:
        _raise_mistaken(text, path, format, first)
    return list(examples.values())


def recognise(path: str | Path) -> str:
    """The format, one of `FORMATS`, that one at least of the first records of a file is of.

    Raises:
        DataError: where none fits or the file cannot be read.
    """
    path = Path(path)
    return _recognise(read_text(path), path)


def find_video(video_root: Path, name: str) -> Path:
    """The file below `video_root` of a video named with or without its extension.

    Raises:
        ValueError: where there is none, or where the name (absolute, or with `..`) or a link leads
            out of the root, which itself may be a link.
    """
    return _Videos(video_root).find((name,))


class _Videos:
    """The videos below a root; each name is looked for once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = os.path.realpath(root)
        self._found: dict[str, Path | None] = {}

    def find(self, names: tuple[str, ...]) -> Path:
        """The first of these names that there is a file of; ValueError where there is none."""
        for name in names:
            if name not in self._found:
                self._found[name] = self._look_up(name)
            if found := self._found[name]:
                return found
        extensions = ", ".join(VIDEO_EXTENSIONS)
        raise ValueError(f"no video {names[0]!r} in {self.root}, nor with {extensions}")

    def _look_up(self, name: str) -> Path | None:
        outside = ValueError(f"video {name!r} is outside {self.root}")
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise outside
        for extension in ("", *VIDEO_EXTENSIONS):
            # Appended, never substituted: `NUs_210.0_360.0` only looks as if it had a suffix.
            candidate = self.root / (name + extension)
            if candidate.is_file():
                real = os.path.realpath(candidate)
                if os.path.commonpath([self._real, real]) != self._real:
                    raise outside
                return candidate
        return None


def _recognise(text: str, path: Path) -> str:
    if not text.strip():
        raise DataError(f"{path}: holds no examples")
    format = _like(text, path)
    if format is None:
        raise DataError(f"{path}: is of none of the formats {', '.join(FORMATS)}")
    return format


def _like(text: str, path: Path) -> str | None:
    for name, form in FORMATS.items():
        try:
            found = list(islice(form.split(text, path), _LOOKED_AT))
        except DataError:  # of this format, but incomplete
            raise
        except ValueError:
            continue
        if any(_parses(form, place, record) for place, record in found):
            return name
    return None


def _parses(form: Format, place: Place, record: Any) -> bool:
    try:
        return not isinstance(record, ValueError) and bool(form.parse(place, record))
    except ValueError:
        return False


def _raise_mistaken(text: str, path: Path, format: str, reason: str) -> None:
    """Raise DataError where a file that is not of the format named is of another one."""
    other = _like(text, path)
    if other not in (None, format):
        reason = one_line(f"line {reason}" if reason[:1].isdigit() else reason)
        raise DataError(f"{path}: not {format} ({reason}); it looks like {other}")

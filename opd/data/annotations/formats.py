"""The registry of public annotation formats, and reading a file of any of them.

A format defines how its file splits into records and how a record is parsed. `read_examples` does
what all formats share: locations in messages, video look-up, unique ids, recognition of a format.
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
    clip_name,
    json_lines,
    json_list,
    json_records,
    lines,
    one_line,
    read_text,
)
from opd.data.annotations.records import Fields
from opd.data.examples import Example
from opd.data.video.clips import Footage
from opd.errors import DataError
from opd.text.forms import Span

_NUM_TRIED = 20  # first records of a file, from which its format is recognised


@dataclass(frozen=True)
class Format:
    """How a file splits into records, and how one of them is parsed."""

    split: Callable[[str, Path], Records]  # takes the file's text and path
    parse: Callable[[Place, Any], Fields]  # raises ValueError with the reason
    unit: Literal["line", "record"] = "line"  # what the first part of a place numbers


def _text_only(function: Callable[[str], Records]) -> Callable[[str, Path], Records]:
    """Adapt a splitter that does not need the path of the file."""
    return lambda text, _: function(text)


FORMATS: dict[str, Format] = {
    "timerft": Format(_text_only(json_list), records.timerft, "record"),
    "charades": Format(_text_only(lines), records.charades),
    "activitynet": Format(_text_only(records.activitynet_records), records.activitynet, "record"),
    "rextime": Format(_text_only(json_records), records.rextime),
    "qvhighlights": Format(_text_only(json_lines), records.qvhighlights),
    "tacos": Format(_text_only(json_lines), records.qvhighlights),
    "timelens": Format(_text_only(records.timelens_records), records.timelens, "record"),
    "timelens_100k": Format(_text_only(records.timelens_100k_records), records.timelens_100k),
    "tvgbench": Format(_text_only(json_list), records.tvgbench, "record"),
    "nextgqa": Format(records.nextgqa_records, records.nextgqa),
    "mcq": Format(_text_only(json_lines), records.mcq),
}
"""All formats, by their names in configurations. Where two fit a file, the first is recognised:
every record of ReXTime is a valid record of QVHighlights."""


def read_examples(
    path: str | Path,
    format: str = "auto",
    video_root: str | Path = ".",
    left_out: list[str] | None = None,
) -> list[Example]:
    """Read an annotation file.

    Args:
        path: the annotation file, UTF-8.
        format: one of `FORMATS`, or "auto" to recognise it.
        video_root: the folder that videos are named relative to; see `find_video`.
        left_out: a list that receives one line, naming file and place, for each record that is
            malformed, whose video is missing or whose id is a duplicate. Without it, the first
            such record raises DataError.

    Raises:
        DataError: the file cannot be read, holds no record or is plainly of another format; one
            line naming it.
        ValueError: the format is unknown.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown data format {format!r}; known: {', '.join(FORMATS)}")
    path = Path(path)
    text = read_text(path)
    format = _recognise(text, path) if format == "auto" else format
    reader, videos = FORMATS[format], _Videos(Path(video_root))
    try:
        entries = list(reader.split(text, path))
    except DataError:
        raise
    except ValueError as error:
        _raise_if_of_another(text, path, format, str(error))
        raise DataError(f"{path}:{error}") from error

    parsed, first = 0, ""
    examples: dict[str, Example] = {}
    for place, record in entries:
        source = f"{path}:{one_line(str(place))}"
        try:
            if isinstance(record, ValueError):
                raise record
            fields = reader.parse(place, record)
            parsed += 1
            video, clip = videos.footage(fields.pop("video"), fields.pop("clip", None))
            example = Example(**fields, video=video, clip=clip, source=source)
            if example.id in examples:
                first_use = examples[example.id].source
                raise ValueError(f"duplicate id {example.id!r}, first used at {first_use}")
            examples[example.id] = example
        except (ValueError, OSError) as error:
            reason = one_line(str(error))
            first = first or f"{reader.unit} {place}: {reason}"
            if left_out is None:
                if not parsed:
                    _raise_if_of_another(text, path, format, first)
                raise DataError(f"{source}: {reason}") from error
            left_out.append(f"{source}: {reason}")
    if not entries:
        raise DataError(f"{path}: holds no examples")
    if not parsed:
        _raise_if_of_another(text, path, format, first)
    return list(examples.values())


def recognise(path: str | Path) -> str:
    """Return the format, one of `FORMATS`, that fits at least one of the first records of a file.

    Raises:
        DataError: no format fits, or the file cannot be read.
    """
    path = Path(path)
    return _recognise(read_text(path), path)


def find_video(video_root: Path, name: str) -> Path:
    """Return the path below `video_root` of a video that is named with or without extension.

    Raises:
        ValueError: there is no such file, or the name (absolute, or with `..`) or a link leads out
            of the root. The root itself may be a link.
    """
    return _Videos(video_root).find((name,))


class _Videos:
    """The videos below a root folder; each name is looked up once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = os.path.realpath(root)
        self._paths: dict[str, Path | None] = {}

    def find(self, names: tuple[str, ...]) -> Path:
        """Return the path of the first of these names that is a file. Raises as `find_video`."""
        if path := self._first(names):
            return path
        extensions = ", ".join(VIDEO_EXTENSIONS)
        raise ValueError(f"no video {names[0]!r} in {self.root}, nor with {extensions}")

    def footage(self, names: tuple[str, ...], clip: Span | None) -> Footage:
        """Return the file and the clip of it; raises as `find_video` does. A file of that clip
        alone, named as `clip_name` does, is taken in place of the whole one."""
        if clip is not None:
            cut = self._first(tuple(clip_name(name, *clip) for name in names))
            if cut is not None:
                return cut, None
        return self.find(names), clip

    def _first(self, names: tuple[str, ...]) -> Path | None:
        """Return the path of the first of these names that is a file, None where none is."""
        for name in names:
            if name not in self._paths:
                self._paths[name] = self._look_up(name)
            if path := self._paths[name]:
                return path
        return None

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
    format = _first_fitting(text, path)
    if format is None:
        raise DataError(f"{path}: fits none of the formats {', '.join(FORMATS)}")
    return format


def _first_fitting(text: str, path: Path) -> str | None:
    for name, format in FORMATS.items():
        try:
            entries = list(islice(format.split(text, path), _NUM_TRIED))
        except DataError:  # this format, but a file that belongs to it is missing
            raise
        except ValueError:
            continue
        if any(_parses(format, place, record) for place, record in entries):
            return name
    return None


def _parses(format: Format, place: Place, record: Any) -> bool:
    try:
        return not isinstance(record, ValueError) and bool(format.parse(place, record))
    except ValueError:
        return False


def _raise_if_of_another(text: str, path: Path, format: str, reason: str) -> None:
    """Raise DataError where a file that does not fit the format named fits another one."""
    other = _first_fitting(text, path)
    if other not in (None, format):
        reason = one_line(f"line {reason}" if reason[:1].isdigit() else reason)
        raise DataError(f"{path}: not {format} ({reason}); it looks like {other}")

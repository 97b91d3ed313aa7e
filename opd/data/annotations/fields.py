"""Splitting annotation files into records, and typed access to the fields of a record."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.text.forms import Span

Place = int | str
"""Location of a record in its file: line number, index or key."""

Records = Iterator[tuple[Place, Any]]
"""Records with their places. An unreadable record is represented by the ValueError about it."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
VIDOR_MAP = "map_vid_vidorID.json"  # NExT-QA's map from video ids to paths in VidOR

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dictionary; ValueError for a duplicate key, which would lose a value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {shown(duplicate)} in one object")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines, stripped, numbered from 1."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def json_lines(text: str) -> Records:
    """Yield one JSON value per line."""
    for number, line in lines(text):
        try:
            yield number, _JSON.decode(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"unreadable JSON: {error}")


def json_file(text: str, kind: type) -> Any:
    """Parse a file that holds one JSON object (`kind` dict) or list.

    Raises ValueError with a text to put behind the file's path and a colon: it begins with the line
    number where there is one, else with a space.
    """
    try:
        content = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f" unreadable JSON: {error}") from error
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f" expected {expected}, got {type(content).__name__}")
    return content


def json_list(text: str) -> Records:
    """Return the entries of a JSON list; places are indices."""
    return enumerate(json_file(text, list))


def json_records(text: str) -> Records:
    """Return the records of a JSON list (places are indices) or of JSON lines."""
    if text.lstrip().startswith("["):
        return json_list(text)
    return json_lines(text)


def csv_rows(text: str, columns: tuple[str, ...]) -> Records:
    """Yield rows as dictionaries with their line numbers.

    Raises ValueError, beginning with the line number, where the header lacks a column.
    """
    header: list[str] = []
    # Parsed line by line, so that an unclosed quotation mark cannot swallow the rows below it.
    for place, line in lines(text):
        try:
            row = next(csv.reader([line], strict=True))
        except csv.Error as error:
            yield place, ValueError(f"not CSV: {error}")
            continue
        if not header:
            header = row
            if missing := [column for column in columns if column not in header]:
                raise ValueError(f"{place}: the header lacks {', '.join(missing)}")
        elif len(row) == len(header):
            yield place, dict(zip(header, row, strict=True))
        else:
            yield place, ValueError(f"{len(row)} columns where the header has {len(header)}")


def shown(value: Any) -> str:
    """Represent a value in a message, in at most 80 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def get(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Return a required field of the given type; an empty string is an error."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    if key not in record:
        raise ValueError(f'missing "{key}"')
    value = record[key]
    # bool is a subclass of int, but a number in no data set.
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise ValueError(f'invalid "{key}": {shown(value)}')
    if isinstance(value, str):
        _check_encodable(value, key)
    return value


def sentence(record: Any, key: str) -> str:
    """Return a required text, stripped; a blank one is an error."""
    value = get(record, key, str).strip()
    if not value:
        raise ValueError(f'"{key}" is empty')
    return value


def has_value(record: Any, key: str) -> bool:
    """Return whether an optional field is present and not null."""
    return isinstance(record, dict) and record.get(key) is not None


def number(record: Any, key: str) -> float:
    """Return a required finite number; a numeric string is an error."""
    value = get(record, key, (int, float))
    if not abs(value) < 1e300:  # infinite, NaN, or an integer beyond all floats
        raise ValueError(f'invalid "{key}": {shown(value)}')
    return float(value)


def one_line(text: str) -> str:
    """Return a text on one line, with unprintable characters escaped."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def identifier(record: Any, key: str = "qid") -> str:
    """Return an id, which some data sets write as a number."""
    return str(get(record, key, (str, int)))


def category(record: Any, key: str = "category") -> str | None:
    """Return the optional category of a query."""
    return get(record, key, str) if has_value(record, key) else None


def options(record: Any, key: str = "options") -> tuple[str, ...]:
    """Return the answer options, stripped."""
    values = get(record, key, list)
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'invalid "{key}": {shown(values)}')
        _check_encodable(value, key)
    return tuple(value.strip() for value in values)


def choice(value: Any, options: tuple[str, ...]) -> str:
    """Return the option that `value` names by text, by letter or by index from 0."""
    index = -1
    if isinstance(value, str):
        if value.strip() in options:
            return value.strip()
        index = LETTERS.find(value) if len(value) == 1 else -1
    elif isinstance(value, int) and not isinstance(value, bool):
        index = value
    if not 0 <= index < len(options):
        raise ValueError(f"answer {shown(value)} is not among the options {shown(options)}")
    return options[index]


def span(value: Any) -> Span:
    """Return a [start, end] pair as a span."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{shown(value)} is not a [start, end] pair")
    ends = {"start": value[0], "end": value[1]}
    return number(ends, "start"), number(ends, "end")


def spans(record: Any, key: str) -> tuple[Span, ...]:
    """Return the spans of a field that holds a [start, end] pair or a non-empty list of pairs."""
    values = get(record, key, list)
    if not values:
        raise ValueError(f'"{key}" is empty')
    if not isinstance(values[0], list):
        return (span(values),)
    return tuple(span(value) for value in values)


def clip(record: Any, start: str, end: str) -> Span | None:
    """Return the clip between two fields, None where the first is not given."""
    return (number(record, start), number(record, end)) if has_value(record, start) else None


def clip_name(video: str, start_s: float, end_s: float) -> str:
    """Return the file name of a clip of a video, `x_210.0_360.0.mp4` as in QVHighlights."""
    suffix = Path(video).suffix
    suffix = suffix if suffix in VIDEO_EXTENSIONS else ""
    return f"{video.removesuffix(suffix)}_{start_s}_{end_s}{suffix}"


def sibling_object(path: Path, file: str) -> dict[str, Any] | None:
    """Return the JSON object in `file` next to an annotation file, None where it is missing.

    Raises DataError where the file cannot be read.
    """
    path = path.with_name(file)
    if not path.exists():
        return None
    text = read_text(path)
    try:
        return json_file(text, dict)
    except ValueError as error:
        raise DataError(f"{path}:{error}") from error


def vidor_names(path: Any, vid: str) -> tuple[str, ...]:
    """Return the names of a NExT-QA video: its path in VidOR, then its id for a flat folder."""
    return (path, vid) if isinstance(path, str) and path else (vid,)


def _check_encodable(value: str, key: str) -> None:
    """Raise ValueError for a lone surrogate: JSON allows it, but no file or tokenizer takes it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f'"{key}" contains a lone surrogate: {shown(value)}') from None

"""How annotation files split into records, and typed reading of what a record holds."""

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
"""Where in its file a record stands: line, index or key."""

Records = Iterator[tuple[Place, Any]]
"""Records with their places; one that cannot be read is the error that says why."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
VIDOR_MAP = "map_vid_vidorID.json"  # of NExT-QA: which folder of VidOR a video is in

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dictionary; of a key that is there twice one value would be lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice in one object")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def read_text(path: Path) -> str:
    """A UTF-8 file. DataError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def json_lines(text: str) -> Records:
    """One JSON value a line."""
    for number, line in lines(text):
        try:
            yield number, _JSON.decode(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not JSON that can be read: {error}")


def json_file(text: str, kind: type) -> Any:
    """A file that is one JSON value of that type. ValueError begins with the line, if known."""
    try:
        content = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f" not JSON that can be read: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f" holds a {type(content).__name__} where a {kind.__name__} belongs")
    return content


def json_list(text: str) -> Records:
    """The entries of a JSON list; places are indices."""
    return enumerate(json_file(text, list))


def json_records(text: str) -> Records:
    """A JSON list (places are indices), or one JSON object a line."""
    if text.lstrip().startswith("["):
        return json_list(text)
    return json_lines(text)


def csv_rows(text: str, columns: tuple[str, ...]) -> Records:
    """Rows as dictionaries; places are lines. ValueError where the header lacks a column."""
    header: list[str] = []
    # Line by line: a quotation mark that is never closed must not swallow the rows below it.
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
    """A value in a message: short however long, deep or strange it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def get(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the given type, not an empty string."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object belongs")
    if key not in record:
        raise ValueError(f'no "{key}"')
    value = record[key]
    # bool is an int to Python, never to a data set.
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise ValueError(f'"{key}" is {shown(value)}')
    if isinstance(value, str):
        _writable(value, key)
    return value


def sentence(record: Any, key: str) -> str:
    """A text that says something, without the space around it."""
    value = get(record, key, str).strip()
    if not value:
        raise ValueError(f'"{key}" is empty')
    return value


def known(record: Any, key: str) -> bool:
    """Whether an optional field is there and not null."""
    return isinstance(record, dict) and record.get(key) is not None


def number(record: Any, key: str) -> float:
    """A finite number; a string of one is none."""
    value = get(record, key, (int, float))
    if not abs(value) < 1e300:  # neither infinite, nor NaN, nor a whole number beyond all floats
        raise ValueError(f'"{key}" is {shown(value)}')
    return float(value)


def one_line(text: str) -> str:
    """A text as a message or a terminal can show it."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name(record: Any, key: str = "qid") -> str:
    """An id, which some data sets write as a number."""
    return str(get(record, key, (str, int)))


def category(record: Any, key: str = "category") -> str | None:
    """The optional kind of query."""
    return get(record, key, str) if known(record, key) else None


def options(record: Any, key: str = "options") -> tuple[str, ...]:
    """What can be chosen from."""
    values = get(record, key, list)
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'"{key}" is {shown(values)}')
        _writable(value, key)
    return tuple(value.strip() for value in values)


def choice(value: Any, options: tuple[str, ...]) -> str:
    """The option that is named by its text, by its letter or by its place counted from 0."""
    place = -1
    if isinstance(value, str):
        if value.strip() in options:
            return value.strip()
        place = LETTERS.find(value) if len(value) == 1 else -1
    elif isinstance(value, int) and not isinstance(value, bool):
        place = value
    if not 0 <= place < len(options):
        raise ValueError(f"answer {shown(value)} is not among the options {shown(options)}")
    return options[place]


def span(value: Any) -> Span:
    """A [start, end] pair."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{shown(value)} is not a [start, end] pair")
    ends = {"start": value[0], "end": value[1]}
    return number(ends, "start"), number(ends, "end")


def spans(record: Any, key: str) -> tuple[Span, ...]:
    """One [start, end] pair or a list of such pairs, at least one."""
    values = get(record, key, list)
    if not values:
        raise ValueError(f'"{key}" is empty')
    if not isinstance(values[0], list):
        return (span(values),)
    return tuple(span(value) for value in values)


def clip_name(video: str, start_s: float, end_s: float) -> str:
    """The file that holds those seconds of a video: `x_210.0_360.0.mp4`, named as QVHighlights
    names its own."""
    if not 0 <= start_s < end_s:
        raise ValueError(f"clip {start_s:g} to {end_s:g} is not 0 <= start < end")
    suffix = Path(video).suffix
    suffix = suffix if suffix in VIDEO_EXTENSIONS else ""
    return f"{video.removesuffix(suffix)}_{start_s}_{end_s}{suffix}"


def beside(path: Path, file: str) -> dict[str, Any] | None:
    """The JSON object in a file that belongs to an annotation file, None where it is missing.
    DataError for one that cannot be read."""
    path = path.with_name(file)
    if not path.exists():
        return None
    text = read_text(path)
    try:
        return json_file(text, dict)
    except ValueError as error:
        raise DataError(f"{path}:{error}") from error


def vidor_names(path: Any, vid: str) -> tuple[str, ...]:
    """Where the video of NExT-QA's id is: below the folder that VidOR keeps it in, or beside all
    the others."""
    return (path, vid) if isinstance(path, str) and path else (vid,)


def _writable(value: str, key: str) -> None:
    """Half a character (a lone surrogate) passes JSON, but no file or tokenizer takes it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f'"{key}" holds half a character: {shown(value)}') from None

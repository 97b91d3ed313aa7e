"""Readers of the public annotation formats, chosen by name, and the writer of our own data.

A format says how its file splits into records and what example a record holds; `read_examples`
does the rest for all of them: locations in messages, video look-up, unique ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.answers import Span
from opd.data.examples import DataError, Example

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")

_Fields = dict[str, Any]  # of Example, `video` still a name


@dataclass(frozen=True)
class _Format:
    split: Callable[[str], Iterable[tuple[int | str, Any]]]  # text -> (line, index or key; record)
    parse: Callable[[int | str, Any], _Fields]  # ValueError says what is wrong


def read_examples(
    path: str | Path, format: str, video_root: str | Path, left_out: list[str] | None = None
) -> list[Example]:
    """Read an annotation file.

    Args:
        path: the annotation file, UTF-8.
        format: one of `FORMATS`.
        video_root: folder of the videos; a name is looked up as given, then with each of
            `VIDEO_EXTENSIONS` appended.
        left_out: takes one line, naming file and place, for each record that is malformed, whose
            video is missing or whose id occurred before; without it the first one is an error.

    Raises:
        DataError: a file that cannot be read or holds no record; one line naming it.
        ValueError: for a format that is not known.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown data format {format!r}; known: {', '.join(FORMATS)}")
    path, video_root = Path(path), Path(video_root)
    try:
        records = list(FORMATS[format].split(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{error}") from error

    examples: dict[str, Example] = {}
    for place, record in records:
        source = f"{path}:{place}"
        try:
            if isinstance(record, ValueError):
                raise record
            fields = FORMATS[format].parse(place, record)
            video = find_video(video_root, fields.pop("video"))
            example = Example(**fields, video=video, source=source)
            if example.id in examples:
                before = examples[example.id].source
                raise ValueError(f"id {example.id!r} was used at {before} already")
            examples[example.id] = example
        except (ValueError, OSError) as error:
            line = f"{source}: {' '.join(str(error).split())}"
            if left_out is None:
                raise DataError(line) from error
            left_out.append(line)
    if not records:
        raise DataError(f"{path}: holds no examples")
    return list(examples.values())


def find_video(video_root: Path, name: str) -> Path:
    """The file of a video named with or without its extension.

    Raises:
        ValueError: where there is none.
    """
    for extension in ("", *VIDEO_EXTENSIONS):
        # Appended, never substituted: `NUs_210.0_360.0` only looks as if it had a suffix.
        candidate = video_root / (name + extension)
        if candidate.is_file():
            return candidate
    raise ValueError(f"no video {name!r} in {video_root}, nor with {', '.join(VIDEO_EXTENSIONS)}")


def write_timerft(
    path: str | Path, examples: Iterable[Example], video_root: str | Path | None = None
) -> None:
    """Write examples as TimeRFT JSON, one record a line, as `read_examples` reads it back.

    An example with an `answer` in words has that and its `options` beside the time or in place of
    it (an addition to the format).

    Args:
        path: file to write.
        examples: each with one span, an answer or both, a duration and a video under
            `video_root`.
        video_root: what `video` is stored relative to; default the folder of `path`.

    Raises:
        ValueError: for an example that the format cannot hold.
    """
    path = Path(path)
    root = path.parent if video_root is None else Path(video_root)
    lines = []
    for example in examples:
        spans = len(example.spans)
        if spans > 1 or not (spans or example.answer) or example.duration_s is None:
            raise ValueError(f"example {example.id!r} needs one span and a duration for timerft")
        known: dict[str, Any] = {"timestamp": list(example.spans[0])} if spans else {}
        if example.answer is not None:
            known["answer"] = example.answer
        if example.options is not None:
            known["options"] = list(example.options)
        record = {
            "video": example.video.relative_to(root).as_posix(),
            "duration": example.duration_s,
            **known,
            "sentence": example.query,
            "qid": example.id,
            "difficulty": example.difficulty,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


# How files split into records. A record that cannot be read is the error that says why.


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(text):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg} at column {error.colno}")


def _json_file(text: str, kind: type) -> Any:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error
    if not isinstance(content, kind):
        raise ValueError(f" holds a {type(content).__name__} where a {kind.__name__} belongs")
    return content


def _json_list(text: str) -> Iterator[tuple[int, Any]]:
    return enumerate(_json_file(text, list))


def _json_sentences(text: str) -> Iterator[tuple[str, Any]]:
    """One record per sentence of a file that holds one per video."""
    for video, record in _json_file(text, dict).items():
        try:
            timestamps, sentences = (_get(record, key, list) for key in ("timestamps", "sentences"))
            duration = _number(record, "duration")
            if len(timestamps) != len(sentences):
                raise ValueError(f"{len(timestamps)} timestamps for {len(sentences)} sentences")
        except ValueError as error:
            yield video, error
            continue
        for k, (timestamp, sentence) in enumerate(zip(timestamps, sentences, strict=True)):
            yield (
                f"{video}:{k}",
                {
                    "video": video,
                    "duration": duration,
                    "timestamp": timestamp,
                    "sentence": sentence,
                },
            )


# What a record holds. Each function names the record it reads.


def _charades(place: int | str, line: str) -> _Fields:
    """`3MSZA 24.3 30.4##person turn a light on.`"""
    head, found, query = line.partition("##")
    words = head.split()
    if not found or len(words) != 3 or not query.strip():
        raise ValueError("expected `video start end##sentence`")
    try:
        span = (float(words[1]), float(words[2]))
    except ValueError:
        raise ValueError(f"{words[1]!r} and {words[2]!r} are not two times") from None
    # Charades-STA has no ids; the line number makes one that no other line has.
    return {
        "id": f"{words[0]}:{place}",
        "video": words[0],
        "query": query.strip(),
        "spans": (span,),
        "duration_s": None,
    }


def _activitynet(place: int | str, record: Any) -> _Fields:
    """`"v_uqi": {"duration": 55.15, "timestamps": [[0, 4.14]], "sentences": ["..."]}`, of which a
    record is one sentence."""
    return {
        "id": str(place),
        "video": record["video"],
        "query": _get(record, "sentence", str).strip(),
        "spans": (_span(record["timestamp"]),),
        "duration_s": record["duration"],
    }


def _qvhighlights(place: int | str, record: Any) -> _Fields:
    """`{"qid": 2579, "query": "...", "duration": 150, "vid", "relevant_windows": [[82, 150]]}`"""
    windows = _get(record, "relevant_windows", list)
    if not windows:
        raise ValueError('"relevant_windows" is empty')
    return {
        "id": _id(record),
        "video": _get(record, "vid", str),
        "query": _get(record, "query", str).strip(),
        "spans": tuple(_span(window) for window in windows),
        "duration_s": _number(record, "duration"),
    }


def _timerft(place: int | str, record: Any) -> _Fields:
    """`{"video", "duration": 93.29, "timestamp": [1.0, 4.0], "sentence", "qid", "difficulty"}`;
    with "answer", and "options" if it has any, the sentence is a question."""
    query = _get(record, "sentence", str).strip()
    answered = "answer" in record
    timed = not answered or "timestamp" in record
    options = _get(record, "options", list) if answered and "options" in record else None
    if options is not None and not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f'"options" is {options!r:.60}')
    graded = record.get("difficulty") is not None
    return {
        "id": _id(record),
        "video": _get(record, "video", str),
        "query": query,
        "question": query if answered else None,
        "answer": _get(record, "answer", str) if answered else None,
        "options": None if options is None else tuple(options),
        "spans": (_span(_get(record, "timestamp", list)),) if timed else (),
        "duration_s": _number(record, "duration"),
        "difficulty": _number(record, "difficulty") if graded else None,
    }


FORMATS: dict[str, _Format] = {
    "timerft": _Format(_json_list, _timerft),
    "charades": _Format(_lines, _charades),
    "activitynet": _Format(_json_sentences, _activitynet),
    "qvhighlights": _Format(_json_lines, _qvhighlights),
    "tacos": _Format(_json_lines, _qvhighlights),
}
"""The one registry of formats, by the name used in configurations."""

_REQUIRED = object()


def _get(record: Any, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    """A field of the given type; a missing one is an error unless there is a default."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object belongs")
    value = record.get(key, default)
    if value is _REQUIRED:
        raise ValueError(f'no "{key}"')
    # bool is an int to Python, never to a data set.
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise ValueError(f'"{key}" is {value!r:.60}')
    return value


def _number(record: Any, key: str) -> float:
    value = _get(record, key, (int, float))
    if not abs(value) < 1e300:  # neither infinite, nor NaN, nor a whole number beyond all floats
        raise ValueError(f'"{key}" is {value!r:.60}')
    return float(value)


def _id(record: Any) -> str:
    return str(_get(record, "qid", (str, int)))


def _span(value: Any) -> Span:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r:.60} is not a [start, end] pair")
    ends = {"start": value[0], "end": value[1]}
    return _number(ends, "start"), _number(ends, "end")

"""Parsers of the records of the public annotation formats.

The docstring of a parser shows the record that it takes; for any other it raises ValueError with
the reason. A function `*_records` splits the text of a file where a record is not simply a line or
an entry of a list.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from opd.data.annotations.fields import (
    VIDOR_MAP,
    Place,
    Records,
    category,
    choice,
    clip,
    csv_rows,
    get,
    has_value,
    identifier,
    json_file,
    json_lines,
    number,
    options,
    sentence,
    shown,
    sibling_object,
    span,
    spans,
    vidor_names,
)
from opd.errors import DataError

Fields = dict[str, Any]
"""Arguments of `Example`; `video` holds the names its file may have, the preferred one first."""

_RANGE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*-\s*([0-9]+(?:\.[0-9]+)?)\s*")
_CUT = re.compile(r"_\d\d:\d\d:\d\d:\d+$")  # InternVid names a clip by its start and end
_TIME_R1 = re.compile(r"(?:\./)?dataset/timer1/videos/[^/]+/(.+)")
_ROUNDING_S = 0.5  # a start of NExT-GQA may be negative by rounding, up to this


def charades(place: Place, line: str) -> Fields:
    """`3MSZA 24.3 30.4##person turn a light on.`"""
    head, separator, query = line.partition("##")
    words = head.split()
    if not separator or len(words) != 3 or not query.strip():
        raise ValueError("expected `video start end##sentence`")
    try:
        times = (float(words[1]), float(words[2]))
    except ValueError:
        raise ValueError(f"{words[1]!r} and {words[2]!r} are not two times") from None
    # Charades-STA has no ids; the line number makes a unique one.
    return {
        "id": f"{words[0]}:{place}",
        "video": (words[0],),
        "query": query.strip(),
        "spans": (times,),
        "duration_s": None,
    }


def activitynet_records(text: str) -> Records:
    """Yield one record per sentence of a file with one entry per video."""
    return _per_query(json_file(text, dict), "timestamps", "sentences")


def timelens_records(text: str) -> Records:
    """Yield one record per query of a file with one entry per video."""
    return _per_query(json_file(text, dict), "spans", "queries")


def _per_query(videos: dict[str, Any], times: str, queries: str) -> Records:
    """Yield one record per query; `times` and `queries` name an entry's parallel lists."""
    for video, record in videos.items():
        try:
            all_times, texts = (get(record, key, list) for key in (times, queries))
            duration = number(record, "duration")
            if len(all_times) != len(texts):
                raise ValueError(f"{len(all_times)} {times} for {len(texts)} {queries}")
            if not texts:
                raise ValueError(f'"{queries}" is empty')
        except ValueError as error:
            yield video, error
            continue
        for k, (time, query) in enumerate(zip(all_times, texts, strict=True)):
            one = {"video": video, "duration": duration, times: time, queries: query}
            yield f"{video}:{k}", one


def activitynet(place: Place, record: Any) -> Fields:
    """`"v_uqi": {"duration": 55.15, "timestamps": [[0, 4.14]], "sentences": ["..."]}`, split into
    one record per sentence."""
    return {
        "id": str(place),
        "video": (get(record, "video", str),),
        "query": sentence(record, "sentences"),
        "spans": (span(record["timestamps"]),),
        "duration_s": record["duration"],
    }


def timelens(place: Place, record: Any) -> Fields:
    """TimeLens-Bench: `"v_uqi": {"duration": 55.15, "spans": [[0, 4.1]], "queries": ["..."]}`,
    split into one record per query."""
    return {
        "id": str(place),
        "video": (get(record, "video", str),),
        "query": sentence(record, "queries"),
        "spans": spans(record, "spans"),
        "duration_s": record["duration"],
    }


def timelens_100k_records(text: str) -> Records:
    """Yield one record per event of a file with one line per video."""
    for place, record in json_lines(text):
        try:
            if isinstance(record, ValueError):
                raise record
            events = get(record, "events", list)
            if not events:
                raise ValueError('"events" is empty')
        except ValueError as error:
            yield place, error
            continue
        for k, event in enumerate(events):
            yield f"{place}:{k}", record | {"events": event}


def timelens_100k(place: Place, record: Any) -> Fields:
    """`{"source", "video_path", "duration": 117.4, "events": [{"query", "span": [[0.0, 5.0]]}]}`,
    split into one record per event."""
    event = record["events"]
    video = get(record, "video_path", str)
    return {
        "id": f"{video}:{place}",
        "video": (video,),
        "query": sentence(event, "query"),
        "spans": spans(event, "span"),
        "duration_s": number(record, "duration"),
    }


def qvhighlights(place: Place, record: Any) -> Fields:
    """`{"qid": 2579, "query": "...", "duration": 150, "vid", "relevant_windows": [[82, 150]]}`"""
    return {
        "id": identifier(record),
        "video": (get(record, "vid", str),),
        "query": sentence(record, "query"),
        "spans": spans(record, "relevant_windows"),
        "duration_s": number(record, "duration"),
    }


def rextime(place: Place, record: Any) -> Fields:
    """`{"qid", "query", "duration": 150, "vid", "relevant_windows": [[0, 28]], "ans": "A"}`; as
    released with the options, `{"qid", "question", "duration", "vid", "span": [0, 28], "ans": "A",
    "options": ["..."], "category"}`. Without options the letter answers nothing, so the first form
    is plain grounding."""
    letter = get(record, "ans", str)
    query = sentence(record, "question" if "question" in record else "query")
    chosen = options(record) if has_value(record, "options") else None
    windows = "span" if "span" in record else "relevant_windows"
    return {
        "id": identifier(record),
        "video": (get(record, "vid", str),),
        "query": query,
        "question": query if chosen else None,
        "options": chosen,
        "answer": choice(letter, chosen) if chosen else None,
        "spans": spans(record, windows),
        "duration_s": number(record, "duration"),
        "category": category(record),
    }


def tvgbench(place: Place, record: Any) -> Fields:
    """`{"path", "question", "answer": "13.4-28.1", "duration": 30.12, "qsemtype"}`; with "start"
    and "end", in seconds, answer and duration refer to that clip of the video."""
    query, answer = sentence(record, "question"), get(record, "answer", str)
    times = _RANGE.fullmatch(answer)
    if times is None:
        raise ValueError(f'"answer" is {shown(answer)}, not start-end')
    return {
        "id": f"tvgbench:{place}",
        "video": _time_r1_names(get(record, "path", str)),
        "clip": clip(record, "start", "end"),
        "query": query,
        "spans": ((float(times[1]), float(times[2])),),
        "duration_s": number(record, "duration"),
        "category": category(record, "qsemtype"),
    }


def timerft(place: Place, record: Any) -> Fields:
    """`{"video", "duration": 93.29, "timestamp": [1.0, 4.0], "sentence", "qid", "difficulty"}`;
    with "answer" (and optionally "options") the sentence is a question. With "video_start" and
    "video_end" the record is about that clip of the video."""
    query, video = sentence(record, "sentence"), get(record, "video", str)
    answered = "answer" in record
    timed = not answered or "timestamp" in record
    is_cut = _CUT.search(Path(video).stem)
    return {
        "id": identifier(record),
        "video": _time_r1_names(video),
        "clip": None if is_cut else clip(record, "video_start", "video_end"),
        "query": query,
        "question": query if answered else None,
        "answer": sentence(record, "answer") if answered else None,
        "options": options(record) if answered and "options" in record else None,
        "spans": (span(get(record, "timestamp", list)),) if timed else (),
        "duration_s": number(record, "duration"),
        "difficulty": number(record, "difficulty") if has_value(record, "difficulty") else None,
        "category": category(record),
    }


NEXTGQA_COLUMNS = ("video_id", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")


def nextgqa_records(text: str, path: Path) -> Records:
    """Yield the rows of a csv with their entries of `gsub_val.json` (for `val.csv`) and of the
    optional `map_vid_vidorID.json` in the same folder.

    Raises DataError where the former is missing, except for `train.csv`, which has none.
    """
    rows = list(csv_rows(text, NEXTGQA_COLUMNS))
    moments = sibling_object(path, f"gsub_{path.stem}.json")
    if moments is None and path.stem != "train":
        raise DataError(f"{path}: gsub_{path.stem}.json with the moments is missing in its folder")
    folders = sibling_object(path, VIDOR_MAP) or {}
    for place, row in rows:
        if isinstance(row, dict):
            vid = row["video_id"]
            row |= {"moments": (moments or {}).get(vid), "path": folders.get(vid)}
        yield place, row


def nextgqa(place: Place, record: Any) -> Fields:
    """A row `video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4`, whose
    answer is the text of an option; optional moments `"video_id": {"duration": 34, "location":
    {"qid": [[1.2, 5.8]]}}`."""
    vid, qid = get(record, "video_id", str), get(record, "qid", str)
    query = sentence(record, "question")
    moments, true_spans = record["moments"], ()
    duration = None
    if moments is not None:
        duration = number(moments, "duration")
        location = get(moments, "location", dict)
        annotated = spans(location, qid) if qid in location else ()
        true_spans = tuple((0.0 if -_ROUNDING_S < s < 0 else s, e) for s, e in annotated)
    return {
        "id": f"{vid}_{qid}",
        "video": vidor_names(record["path"], vid),
        "query": query,
        "question": query,
        "options": tuple(sentence(record, f"a{k}") for k in range(5)),
        "answer": sentence(record, "answer"),
        "spans": true_spans,
        "duration_s": duration,
        "category": category(record, "type"),
    }


def mcq(place: Place, record: Any) -> Fields:
    """Our own format: `{"id", "video", "question", "options": ["..."], "answer": text, letter or
    index, "spans": [[s, e]], "duration", "clip": [s, e], "category"}`; only the first three are
    required. With spans alone, the question is the query to localise."""
    query, video = sentence(record, "question"), get(record, "video", str)
    chosen = options(record) if has_value(record, "options") else None
    answered = has_value(record, "answer")
    if chosen and not answered:
        raise ValueError('"options" but no "answer"')
    if not answered and not has_value(record, "spans"):
        raise ValueError('neither "answer" nor "spans"')
    answer = choice(record["answer"], chosen) if chosen else None
    duration = number(record, "duration") if has_value(record, "duration") else None
    part = span(record["clip"]) if has_value(record, "clip") else None
    if part is not None and duration is None:
        duration = part[1] - part[0]
    return {
        "id": identifier(record, "id"),
        "video": (video,),
        "clip": part,
        "query": query,
        "question": query if answered else None,
        "options": chosen,
        "answer": answer if chosen or not answered else sentence(record, "answer"),
        "spans": spans(record, "spans") if has_value(record, "spans") else (),
        "duration_s": duration,
        "category": category(record),
    }


def _time_r1_names(video: str) -> tuple[str, ...]:
    """Return the name of a video and, for a path in Time-R1's repository, its part below there."""
    official = _TIME_R1.fullmatch(video)
    return (video, official[1]) if official else (video,)

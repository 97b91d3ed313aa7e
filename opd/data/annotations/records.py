"""What a record of each public annotation format holds. Each reader names the record it reads and
raises ValueError, saying what is wrong, for one that is not such a record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from opd.data.annotations.fields import (
    VIDOR_MAP,
    Place,
    Records,
    beside,
    category,
    choice,
    clip_name,
    csv_rows,
    get,
    json_file,
    json_lines,
    known,
    name,
    number,
    options,
    sentence,
    shown,
    span,
    spans,
    vidor_names,
)
from opd.errors import DataError

Fields = dict[str, Any]
"""Of `Example`, with `video` still the names under which its file may be found, the best first."""

_RANGE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*-\s*([0-9]+(?:\.[0-9]+)?)\s*")
_CUT = re.compile(r"_\d\d:\d\d:\d\d:\d+$")  # InternVid names a clip by its start and end
_TIME_R1 = re.compile(r"(?:\./)?dataset/timer1/videos/[^/]+/(.+)")
_ROUNDING_S = 0.5


def charades(place: Place, line: str) -> Fields:
    """`3MSZA 24.3 30.4##person turn a light on.`"""
    head, found, query = line.partition("##")
    words = head.split()
    if not found or len(words) != 3 or not query.strip():
        raise ValueError("expected `video start end##sentence`")
    try:
        times = (float(words[1]), float(words[2]))
    except ValueError:
        raise ValueError(f"{words[1]!r} and {words[2]!r} are not two times") from None
    # Charades-STA has no ids; the line number makes one that no other line has.
    return {
        "id": f"{words[0]}:{place}",
        "video": (words[0],),
        "query": query.strip(),
        "spans": (times,),
        "duration_s": None,
    }


def activitynet_records(text: str) -> Records:
    """One record per sentence of a file that holds one per video."""
    return _per_query(json_file(text, dict), "timestamps", "sentences")


def timelens_records(text: str) -> Records:
    """One record per query of a file that holds one per video."""
    return _per_query(json_file(text, dict), "spans", "queries")


def _per_query(videos: dict[str, Any], times: str, queries: str) -> Records:
    for video, record in videos.items():
        try:
            found, texts = (get(record, key, list) for key in (times, queries))
            duration = number(record, "duration")
            if len(found) != len(texts):
                raise ValueError(f"{len(found)} {times} for {len(texts)} {queries}")
            if not texts:
                raise ValueError(f'"{queries}" is empty')
        except ValueError as error:
            yield video, error
            continue
        for k, (time, query) in enumerate(zip(found, texts, strict=True)):
            one = {"video": video, "duration": duration, times: time, queries: query}
            yield f"{video}:{k}", one


def activitynet(place: Place, record: Any) -> Fields:
    """`"v_uqi": {"duration": 55.15, "timestamps": [[0, 4.14]], "sentences": ["..."]}`, of which a
    record is one sentence."""
    return {
        "id": str(place),
        "video": (get(record, "video", str),),
        "query": sentence(record, "sentences"),
        "spans": (span(record["timestamps"]),),
        "duration_s": record["duration"],
    }


def timelens(place: Place, record: Any) -> Fields:
    """`"v_uqi": {"duration": 55.15, "spans": [[0, 4.1]], "queries": ["..."]}`, of which a record is
    one query; TimeLens-Bench."""
    return {
        "id": str(place),
        "video": (get(record, "video", str),),
        "query": sentence(record, "queries"),
        "spans": spans(record, "spans"),
        "duration_s": record["duration"],
    }


def timelens_100k_records(text: str) -> Records:
    """One record per event of a file that holds one line per video."""
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
    of which a record is one event."""
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
        "id": name(record),
        "video": (get(record, "vid", str),),
        "query": sentence(record, "query"),
        "spans": spans(record, "relevant_windows"),
        "duration_s": number(record, "duration"),
    }


def rextime(place: Place, record: Any) -> Fields:
    """`{"qid", "query", "duration": 150, "vid", "relevant_windows": [[0, 28]], "ans": "A"}`; as
    released with the options, `{"qid", "question", "duration", "vid", "span": [0, 28], "ans": "A",
    "options": ["..."], "category"}`. A letter without options answers nothing, so that the former
    is plain grounding."""
    letter = get(record, "ans", str)
    query = sentence(record, "question" if "question" in record else "query")
    chosen = options(record) if known(record, "options") else None
    windows = "span" if "span" in record else "relevant_windows"
    return {
        "id": name(record),
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
    and "end", answer and duration are those of the clip between these seconds of the video."""
    query, answer = sentence(record, "question"), get(record, "answer", str)
    times = _RANGE.fullmatch(answer)
    if times is None:
        raise ValueError(f'"answer" is {shown(answer)}, not start-end')
    video = get(record, "path", str)
    if known(record, "start"):
        video = clip_name(video, number(record, "start"), number(record, "end"))
    return {
        "id": f"tvgbench:{place}",
        "video": _time_r1(video),
        "query": query,
        "spans": ((float(times[1]), float(times[2])),),
        "duration_s": number(record, "duration"),
        "category": category(record, "qsemtype"),
    }


def timerft(place: Place, record: Any) -> Fields:
    """`{"video", "duration": 93.29, "timestamp": [1.0, 4.0], "sentence", "qid", "difficulty"}`;
    with "answer", and "options" if it has any, the sentence is a question. With "video_start" the
    record is about the clip from there to "video_end"."""
    query, video = sentence(record, "sentence"), get(record, "video", str)
    answered = "answer" in record
    timed = not answered or "timestamp" in record
    stem = Path(video).stem
    if known(record, "video_start") and record["video_start"] != 0 and not _CUT.search(stem):
        video = clip_name(video, number(record, "video_start"), number(record, "video_end"))
    return {
        "id": name(record),
        "video": _time_r1(video),
        "query": query,
        "question": query if answered else None,
        "answer": sentence(record, "answer") if answered else None,
        "options": options(record) if answered and "options" in record else None,
        "spans": (span(get(record, "timestamp", list)),) if timed else (),
        "duration_s": number(record, "duration"),
        "difficulty": number(record, "difficulty") if known(record, "difficulty") else None,
        "category": category(record),
    }


NEXTGQA_COLUMNS = ("video_id", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")


def nextgqa_records(text: str, path: Path) -> Records:
    """Rows of the csv with their entry of `gsub_val.json` (for `val.csv`) and of
    `map_vid_vidorID.json`, both beside it; the former is missing for `train.csv` alone."""
    rows = list(csv_rows(text, NEXTGQA_COLUMNS))
    moments = beside(path, f"gsub_{path.stem}.json")
    if moments is None and path.stem != "train":
        raise DataError(f"{path}: gsub_{path.stem}.json, which holds the moments, is not beside it")
    folders = beside(path, VIDOR_MAP) or {}
    for place, row in rows:
        if isinstance(row, dict):
            vid = row["video_id"]
            row |= {"moments": (moments or {}).get(vid), "path": folders.get(vid)}
        yield place, row


def nextgqa(place: Place, record: Any) -> Fields:
    """A row `video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4`, where
    the answer is the text of an option, and `"video_id": {"duration": 34, "location": {"qid":
    [[1.2, 5.8]]}}`, which may be missing."""
    vid, qid = get(record, "video_id", str), get(record, "qid", str)
    query = sentence(record, "question")
    moments, true = record["moments"], ()
    duration = None
    if moments is not None:
        duration = number(moments, "duration")
        location = get(moments, "location", dict)
        # A start may be a tenth or two below zero, where a time was rounded.
        found = spans(location, qid) if qid in location else ()
        true = tuple((0.0 if -_ROUNDING_S < s < 0 else s, e) for s, e in found)
    return {
        "id": f"{vid}_{qid}",
        "video": vidor_names(record["path"], vid),
        "query": query,
        "question": query,
        "options": tuple(sentence(record, f"a{k}") for k in range(5)),
        "answer": sentence(record, "answer"),
        "spans": true,
        "duration_s": duration,
        "category": category(record, "type"),
    }


def mcq(place: Place, record: Any) -> Fields:
    """Our own: `{"id", "video", "question", "options": ["..."], "answer": text, letter or place,
    "spans": [[s, e]], "duration", "clip": [s, e], "category"}`, of which all but the first three
    may be missing; with spans alone the question is what to localise."""
    query, video = sentence(record, "question"), get(record, "video", str)
    chosen = options(record) if known(record, "options") else None
    answered = known(record, "answer")
    if chosen and not answered:
        raise ValueError('"options" but no "answer"')
    if not answered and not known(record, "spans"):
        raise ValueError('neither "answer" nor "spans"')
    answer = choice(record["answer"], chosen) if chosen else None
    duration = number(record, "duration") if known(record, "duration") else None
    if known(record, "clip"):
        start_s, end_s = span(record["clip"])
        video = clip_name(video, start_s, end_s)
        duration = end_s - start_s if duration is None else duration
    return {
        "id": name(record, "id"),
        "video": (video,),
        "query": query,
        "question": query if answered else None,
        "options": chosen,
        "answer": answer if chosen or not answered else sentence(record, "answer"),
        "spans": spans(record, "spans") if known(record, "spans") else (),
        "duration_s": duration,
        "category": category(record),
    }


def _time_r1(video: str) -> tuple[str, ...]:
    """Time-R1's files name their videos from the root of its repository; the videos may be in the
    video root itself."""
    official = _TIME_R1.fullmatch(video)
    return (video, official[1]) if official else (video,)

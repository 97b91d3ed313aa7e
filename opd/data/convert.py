"""Convert a question answering data set to our own JSON lines, format `mcq`:

    python -m opd.data.convert NAME SOURCE OUT.jsonl

Each record that cannot be used is reported in one line on stderr. Videos are named relative to the
data set's own video folder.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opd.config.command_line import ends_in_one_line
from opd.data.annotations.fields import (
    LETTERS,
    VIDOR_MAP,
    Place,
    Records,
    csv_rows,
    get,
    has_value,
    identifier,
    json_file,
    json_list,
    json_records,
    number,
    one_line,
    options,
    read_text,
    sentence,
    sibling_object,
    span,
    vidor_names,
)
from opd.data.annotations.records import mcq
from opd.data.examples import Example
from opd.errors import ConfigError, DataError

Parse = Callable[[Place, Any], dict[str, Any]]

_OPTION = re.compile(r"([A-Z])[.):]\s*(.*)")

MVBENCH_FOLDERS = {  # of each task, below MVBench's own `video` folder
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}


def mvbench_records(path: Path) -> Records:
    """Yield the records of a task's file, or of a folder of such files."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        task = re.sub(r"_\d{8}$", "", file.stem)  # corrected files carry their date
        if task not in MVBENCH_FOLDERS:
            raise DataError(f"{file}: {task!r} is not a task of MVBench")
        text = read_text(file)
        try:
            records = json_list(text)
        except ValueError as error:
            raise DataError(f"{file}:{error}") from error
        for place, record in records:
            yield f"{task}:{place}", record


def mvbench(place: Place, record: Any) -> dict[str, Any]:
    """`{"video", "question", "candidates": ["..."], "answer": text, "start", "end"}`; with
    the optional last two, in seconds, the question is about that clip of the video."""
    task = str(place).partition(":")[0]
    if task == "episodic_reasoning":
        raise ValueError("videos of this task are folders of frames, which are not supported")
    is_clip = has_value(record, "start") and has_value(record, "end")
    return {
        "id": place,
        "video": f"{MVBENCH_FOLDERS[task]}/{get(record, 'video', str)}",
        "question": sentence(record, "question"),
        "options": options(record, "candidates"),
        "answer": sentence(record, "answer"),
        "clip": [number(record, "start"), number(record, "end")] if is_clip else None,
        "category": task,
    }


def tempcompass_records(path: Path) -> Records:
    """Yield one record per question of a file that groups them by video and temporal aspect."""
    for video, aspects in json_file(read_text(path), dict).items():
        if not isinstance(aspects, dict):
            yield video, ValueError(f"expected an object, got {type(aspects).__name__}")
            continue
        for aspect, entries in aspects.items():
            if not isinstance(entries, list):
                error = ValueError(f"expected a list, got {type(entries).__name__}")
                yield f"{video}:{aspect}", error
                continue
            for k, entry in enumerate(entries):
                yield f"{video}:{aspect}:{k}", {"video": video, "aspect": aspect, "entry": entry}


def tempcompass(place: Place, record: Any) -> dict[str, Any]:
    """`multi-choice.json`: `"1034419625": {"action": [{"question": "What ...?\\nA. one\\nB. other",
    "answer": "A. one"}]}`, split into one record per question."""
    question, *rest = sentence(record["entry"], "question").split("\n")
    choices = _unlettered([line for line in rest if line.strip()])
    return {
        "id": place,
        "video": get(record, "video", str),
        "question": question.strip(),
        "options": choices,
        "answer": _lettered(sentence(record["entry"], "answer"), choices),
        "category": record["aspect"],
    }


def videomme_records(path: Path) -> Records:
    """Return the rows of the parquet file, or of its export as a JSON list or JSON lines."""
    if path.suffix != ".parquet":
        return json_records(read_text(path))
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow); or convert it to jsonl"
        ) from None
    try:
        with path.open("rb") as file:
            return enumerate(parquet.read_table(file).to_pylist())
    except OSError as error:
        raise DataError(f"{path}: {one_line(error.strerror or str(error))}") from error
    except ValueError as error:
        raise DataError(f"{path}: not parquet: {one_line(str(error))}") from error


def videomme(place: Place, record: Any) -> dict[str, Any]:
    """`{"videoID", "question_id", "question", "options": ["A. one", ...], "answer": "A",
    "duration": "short"}`; the duration is a class, kept as the category."""
    choices = _unlettered(list(options(record)))
    return {
        "id": identifier(record, "question_id"),
        "video": get(record, "videoID", str),
        "question": sentence(record, "question"),
        "options": choices,
        "answer": _lettered(sentence(record, "answer"), choices),
        "category": sentence(record, "duration"),
    }


def nextqa_records(path: Path) -> Records:
    """Yield the rows of the csv with their video paths from the optional `map_vid_vidorID.json`."""
    columns = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
    folders = sibling_object(path, VIDOR_MAP) or {}
    for place, row in csv_rows(read_text(path), columns):
        if isinstance(row, dict):
            row |= {"path": folders.get(row["video"])}
        yield place, row


def nextqa(place: Place, record: Any) -> dict[str, Any]:
    """A row `video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4`, whose
    answer is the index of an option."""
    video, qid = get(record, "video", str), get(record, "qid", str)
    answer = sentence(record, "answer")
    if answer not in ("0", "1", "2", "3", "4"):
        raise ValueError(f'"answer" is {answer!r:.60}, not 0 to 4')
    return {
        "id": f"{video}_{qid}",
        "video": vidor_names(record["path"], video)[0],
        "question": sentence(record, "question"),
        "options": [sentence(record, f"a{k}") for k in range(5)],
        "answer": int(answer),
        "category": get(record, "type", str),
    }


def temporal_r1(place: Place, record: Any) -> dict[str, Any]:
    """`{"dataset", "video", "problem", "solution": [0.1, 0.4], "video_length": 30.5}`: the fields
    that Temporal-R1's loader reads, the solution as fractions of the video's length."""
    start, end = span(get(record, "solution", list))
    length_s = number(record, "video_length")
    if not 0 <= start < end <= 1:
        raise ValueError(f'"solution" {start:g} to {end:g} is not between 0 and 1')
    dataset = sentence(record, "dataset")
    return {
        "id": f"{dataset}:{place}",
        "video": get(record, "video", str),
        "question": sentence(record, "problem"),
        "spans": [[start * length_s, end * length_s]],
        "duration": length_s,
        "category": dataset,
    }


CONVERTERS: dict[str, tuple[Callable[[Path], Records], Parse]] = {
    "mvbench": (mvbench_records, mvbench),
    "tempcompass": (tempcompass_records, tempcompass),
    "videomme": (videomme_records, videomme),
    "nextqa": (nextqa_records, nextqa),
    "temporal_r1": (lambda path: json_records(read_text(path)), temporal_r1),
}
"""By name: a function that splits a source into records, and the parser of one record."""


def convert(converter: str, source: str | Path, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the usable records of a source in format `mcq`.

    Args:
        converter: one of `CONVERTERS`.
        left_out: a list that receives one line, naming source and place, for each other record.

    Raises:
        DataError: the source cannot be read.
    """
    split, parse = CONVERTERS[converter]
    seen: set[str] = set()
    try:
        for place, record in split(Path(source)):
            try:
                if isinstance(record, ValueError):
                    raise record
                line = {k: v for k, v in parse(place, record).items() if v is not None}
                line = json.loads(json.dumps(line))
                fields = mcq(place, line)
                fields["video"] = Path(fields["video"][0])
                Example(**fields)
                if fields["id"] in seen:
                    raise ValueError(f"duplicate id {fields['id']!r}")
                seen.add(fields["id"])
            except ValueError as error:
                left_out.append(f"{source}:{one_line(str(place))}: {one_line(str(error))}")
            else:
                yield line
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{source}:{error}") from error


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Run the command. A user's mistake ends with one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "usage: python -m opd.data.convert NAME SOURCE OUT.jsonl"
    names = f"NAME is one of {', '.join(CONVERTERS)}"
    if arguments in (["-h"], ["--help"]):
        print(f"{usage}\n\n{names}")
        return
    if len(arguments) != 3 or arguments[0] not in CONVERTERS:
        raise ConfigError(f"{usage}; {names}")
    converter, source, target = arguments
    out = Path(target)
    if out.exists():
        raise ConfigError(f"{out}: already exists; remove it or name another file")
    left_out: list[str] = []
    records = convert(converter, source, left_out)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not lines:
        raise DataError(f"{source}: contains no usable question")
    try:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from error
    print(f"{out}: {len(lines)} written, {len(left_out)} left out")


def _unlettered(lines: list[str]) -> list[str]:
    """Return the texts of options written `A. one`, `B. other` and so on."""
    texts = []
    for letter, line in zip(LETTERS, lines, strict=False):
        match = _OPTION.fullmatch(line.strip())
        if match is None or match[1] != letter or not match[2]:
            raise ValueError(f"option {line!r:.60} does not begin with letter {letter}")
        texts.append(match[2])
    return texts


def _lettered(answer: str, choices: list[str]) -> int:
    """Return the index of the option that an answer `A` or `A. one` names."""
    match = _OPTION.fullmatch(answer)
    index = LETTERS.find(match[1] if match else answer) if match or len(answer) == 1 else -1
    if not 0 <= index < len(choices) or (match and match[2] not in ("", choices[index])):
        raise ValueError(f"answer {answer!r:.60} is not among the options")
    return index


if __name__ == "__main__":
    main()

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd.data.annotations.formats import FORMATS, find_video, read_examples, recognise
from opd.data.annotations.write import write_timerft
from opd.data.examples import Example
from opd.errors import DataError

QV = {
    "qid": 2579,
    "query": "A girl dances.",
    "duration": 150,
    "vid": "NUs_210.0_360.0",
    "relevant_windows": [[82, 150], [10, 12]],
    "saliency_scores": [[1, 1, 2]],
}
RFT = {
    "video": "a/clip.mp4",
    "duration": 93.29,
    "timestamp": [1.0, 4.0],
    "sentence": "a man runs",
    "qid": "q7",
    "difficulty": 50.0,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of videos; readers look only at their names."""
    for name in ("3MSZA.mp4", "v_uqi.webm", "NUs_210.0_360.0.mkv", "a/clip.mp4", "old.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def _write(root: Path, content: object) -> Path:
    path = root / "annotations"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_charades(root):
    path = _write(root, "3MSZA 24.3 30.4##person turn a light on.\n\n3MSZA 0.0 5##person ## sits\n")
    first, second = read_examples(path, "charades", root)
    assert first == Example(
        id="3MSZA:1",
        video=root / "3MSZA.mp4",
        query="person turn a light on.",
        spans=((24.3, 30.4),),
        duration_s=None,
        source=f"{path}:1",
    )
    assert (second.id, second.query, second.source) == ("3MSZA:3", "person ## sits", f"{path}:3")


def test_activitynet(root):
    record = {"duration": 55.15, "timestamps": [[0, 4.14], [3, 60]], "sentences": ["One. ", "Two."]}
    first, second = read_examples(_write(root, {"v_uqi": record}), "activitynet", root)
    assert (first.id, first.query, first.spans) == ("v_uqi:0", "One.", ((0, 4.14),))
    assert (second.id, second.query, second.spans) == ("v_uqi:1", "Two.", ((3, 60),))
    assert first.video == root / "v_uqi.webm"
    assert first.duration_s == 55.15
    assert first.source.endswith("annotations:v_uqi:0")


@pytest.mark.parametrize("name", ["qvhighlights", "tacos"])
def test_qvhighlights(root, name):
    path = _write(root, json.dumps(QV) + "\n" + json.dumps(QV | {"qid": 1, "vid": "old"}) + "\n")
    first, second = read_examples(path, name, root)
    assert first == Example(
        id="2579",
        video=root / "NUs_210.0_360.0.mkv",
        query="A girl dances.",
        spans=((82, 150), (10, 12)),
        duration_s=150,
        source=f"{path}:1",
    )
    assert second.video == root / "old.avi"


def test_timerft(root):
    path = _write(root, [RFT, {k: v for k, v in RFT.items() if k != "difficulty"} | {"qid": 8}])
    first, second = read_examples(path, "timerft", root)
    assert (first.id, first.query, first.spans) == ("q7", "a man runs", ((1, 4),))
    assert (first.video, first.duration_s, first.difficulty) == (root / "a/clip.mp4", 93.29, 50)
    assert (second.id, second.difficulty, second.source) == ("8", None, f"{path}:1")


def test_written_timerft_is_read_back(root):
    examples = [
        Example(
            id=f"train/{k}",
            video=root / "a" / "clip.mp4",
            query="le carré «rouge»",
            spans=((1.25, 4.0),),
            duration_s=8.0,
            difficulty=difficulty,
            source=f"{root / 'train.json'}:{k}",
        )
        for k, difficulty in enumerate([2.0, None])
    ]
    question = {"query": "who runs", "question": "who runs", "answer": "a man", "spans": ()}
    source = f"{root / 'train.json'}:2"
    examples.append(dataclasses.replace(examples[1], **question, id="qa", source=source))
    part = {"id": "part", "clip": (2.5, 10.5), "source": f"{root / 'train.json'}:3"}
    examples.append(dataclasses.replace(examples[0], **part))
    path = root / "train.json"
    write_timerft(path, examples)
    assert read_examples(path, "timerft", root) == examples
    assert json.loads(path.read_text("utf-8"))[0]["video"] == "a/clip.mp4"
    write_timerft(path, examples, root / "a")
    assert read_examples(path, "timerft", root / "a") == examples


def test_timerft_refuses_what_it_cannot_hold(root):
    example = Example(id="x", video=root / "old.avi", query="q", spans=(), duration_s=8.0)
    with pytest.raises(ValueError, match="'x' does not fit timerft"):
        write_timerft(root / "out.json", [example])


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("charades", "3MSZA 24.3 30.4 person", ":1: expected `video start end##sentence`"),
        ("charades", "\n3MSZA x 30.4##sits", ":2: 'x' and '30.4' are not two times"),
        ("charades", "3MSZA 30.4 24.3##sits", ":1: span 30.4 to 24.3 is not 0 <= start < end"),
        ("charades", "3MSZA nan 24.3##sits", ":1: span nan to 24.3 is not"),
        ("charades", "NOPE 1 2##sits", ":1: no video 'NOPE' in "),
        ("charades", "", ": holds no examples"),
        ("qvhighlights", json.dumps(QV) + "\n{oops", ":2: not JSON: "),
        (
            "qvhighlights",
            json.dumps(QV) + "\n" + json.dumps(QV),
            ":2: duplicate id '2579', first used at ",
        ),
        ("qvhighlights", json.dumps(QV | {"duration": "150"}), ":1: invalid \"duration\": '150'"),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": []}), ':1: "relevant_windows" is'),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": [[1]]}), ":1: [1] is not a [start"),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": [[160, 170]]}), ":1: a span starts"),
        ("qvhighlights", "[]", ":1: expected an object, got list"),
        ("activitynet", [1], ": expected an object, got list"),
        ("activitynet", {"v_uqi": {"sentences": []}}, ':v_uqi: missing "timestamps"'),
        (
            "activitynet",
            {"v_uqi": {"duration": 9, "timestamps": [[0, 1]], "sentences": []}},
            ":v_uqi: 1 timestamps for 0 sentences",
        ),
        ("timerft", '[\n{"video": "a",\n]', ":3: not JSON: "),
        ("timerft", [RFT, RFT | {"qid": True}], ':1: invalid "qid": True'),
        ("timerft", [RFT | {"sentence": ""}], ":0: invalid \"sentence\": ''"),
        ("timerft", [RFT | {"duration": float("nan")}], ':0: invalid "duration": nan'),
        ("timerft", [RFT | {"difficulty": "hard"}], ":0: invalid \"difficulty\": 'hard'"),
        ("timerft", "[" * 100_000, "annotations:"),
        (
            "timerft",
            [RFT | {"video_start": 9, "video_end": 9}],
            ":0: clip 9 to 9 is not 0 <= start < end",
        ),
        ("timerft", [RFT | {"video_start": 9}], ':0: missing "video_end"'),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(root, format, content, message):
    path = _write(root, content)
    with pytest.raises(DataError) as caught:
        read_examples(path, format, root)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_and_unknown_formats(root):
    with pytest.raises(DataError, match=r"absent\.json: No such file"):
        read_examples(root / "absent.json", "timerft", root)
    (root / "latin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="latin: not UTF-8 text"):
        read_examples(root / "latin", "charades", root)
    with pytest.raises(ValueError, match="unknown data format 'coco'; known: timerft, charades"):
        read_examples(root / "latin", "coco", root)


def test_the_registry_holds_the_documented_formats():
    assert list(FORMATS) == [
        "timerft",
        "charades",
        "activitynet",
        "rextime",
        "qvhighlights",
        "tacos",
        "timelens",
        "timelens_100k",
        "tvgbench",
        "nextgqa",
        "mcq",
    ]


# The formats of question answering and of TimeLens. Every fixture is written from the format's
# own description.

REX = {
    "qid": "anet_val92",
    "query": "What does the woman do?",
    "duration": 100.5,
    "vid": "v_uqi",
    "relevant_windows": [[5, 8]],
    "ans": "B",
}
REX_OPTIONS = {
    "qid": "qvh_val1",
    "vid": "NUs_210.0_360.0",
    "duration": 150,
    "question": "Why?",
    "answer": "From <s0> to <e0>, <option>.",
    "source": "qvhighlights_val",
    "category": "cause_effect",
    "options": ["one", "two", "three", "four"],
    "ans": "C",
    "span": [0, 28],
}
TVG = {
    "path": "./dataset/timer1/videos/tvgbench_data/3MSZA.mp4",
    "question": "person sits. ",
    "answer": "13.4-28.1",
    "start": None,
    "end": None,
    "duration": 30.12,
    "dataset_name": "charades",
    "qsemtype": "Human Pose",
}
HEADER = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
ROW = "old,2697,640,480,why did he run,a bus,1,CW,a dog,a bus,fun,rain,a friend"
MOMENTS = {"old": {"duration": 34, "location": {"1": [[-0.1, 5.8], [7, 9.5]]}, "fps": 29.97}}
MCQ = {
    "id": "q1",
    "video": "a/clip",
    "question": "what is red?",
    "options": ["a hat", "a car"],
    "answer": "a car",
    "category": "colour",
}


def test_timelens(root):
    record = {"duration": 30, "spans": [[0.5, 4], [[3, 6], [8, 9]]], "queries": ["One", "Two "]}
    first, second = read_examples(_write(root, {"3MSZA": record}), "timelens", root)
    assert (first.id, first.query, first.spans) == ("3MSZA:0", "One", ((0.5, 4),))
    assert (second.id, second.query, second.spans) == ("3MSZA:1", "Two", ((3, 6), (8, 9)))
    assert (second.video, second.duration_s) == (root / "3MSZA.mp4", 30)


def test_timelens_100k(root):
    events = [{"query": "one", "span": [[0, 5], [7, 8]]}, {"query": "two", "span": [8.5, 12]}]
    line = {"source": "didemo", "video_path": "a/clip.mp4", "duration": 117.4, "events": events}
    path = _write(root, f"{json.dumps(line)}\n{json.dumps(line)}\n")
    examples = read_examples(path, "timelens_100k", root)
    # A video that occurs twice loses nothing.
    assert [e.id for e in examples] == [f"a/clip.mp4:{n}:{k}" for n in (1, 2) for k in (0, 1)]
    assert [e.spans for e in examples[:2]] == [((0, 5), (7, 8)), ((8.5, 12),)]
    assert examples[1] == Example(
        id="a/clip.mp4:1:1",
        video=root / "a/clip.mp4",
        query="two",
        spans=((8.5, 12),),
        duration_s=117.4,
        source=f"{path}:1:1",
    )


def test_tvgbench(root):
    (root / "3MSZA_329.27_454.71.mp4").touch()
    clipped = TVG | {"start": 329.27, "end": 454.71, "answer": "79.09-81.67", "duration": 125.44}
    path = _write(root, [TVG, clipped, *(clipped | {"path": name} for name in ("old", "gone"))])
    left_out: list[str] = []
    first, second, third = read_examples(path, "tvgbench", root, left_out)
    assert first == Example(
        id="tvgbench:0",
        video=root / "3MSZA.mp4",
        query="person sits.",
        spans=((13.4, 28.1),),
        duration_s=30.12,
        category="Human Pose",
        source=f"{path}:0",
    )
    # The answer counts from the start of the clip, be it in a file of its own or in the whole one.
    assert second.footage == (root / "3MSZA_329.27_454.71.mp4", None)
    assert third.footage == (root / "old.avi", (329.27, 454.71))
    assert second.spans == third.spans == ((79.09, 81.67),)
    assert second.duration_s == third.duration_s == 125.44
    assert left_out == [
        f"{path}:3: no video 'gone' in {root}, nor with .mp4, .mkv, .webm, .avi, .mov"
    ]


def test_a_clip_of_timerft(root):
    cut = {"video": "a/x_00:00:58:200_00:01:27:600.mp4", "video_start": 58.2, "video_end": 87.6}
    whole = {"video": "a/clip.mp4", "video_start": 0, "video_end": 93.29}
    part = {"video": "a/clip.mp4", "video_start": 10, "video_end": 93.5}
    old = {"video": "old", "video_start": 10, "video_end": 93.5}
    for name in (cut["video"], "a/clip_10.0_93.5.mp4"):
        (root / name).touch()
    path = _write(root, [RFT | clip | {"qid": k} for k, clip in enumerate((cut, whole, part, old))])
    assert [e.footage for e in read_examples(path, "timerft", root)] == [
        (root / cut["video"], None),
        (root / "a/clip.mp4", (0, 93.29)),
        (root / "a/clip_10.0_93.5.mp4", None),
        (root / "old.avi", (10, 93.5)),
    ]


def test_nextgqa(root):
    path = root / "val.csv"
    rows = [ROW, ROW.replace(",1,CW,", ",2,TN,"), ROW.replace("old,", "v_uqi,")]
    path.write_text("\n".join([HEADER, *rows]))
    (root / "gsub_val.json").write_text(json.dumps(MOMENTS))
    first, second, third = read_examples(path, "nextgqa", root)
    assert first == Example(
        id="old_1",
        video=root / "old.avi",
        query="why did he run",
        question="why did he run",
        options=("a dog", "a bus", "fun", "rain", "a friend"),
        answer="a bus",
        spans=((0, 5.8), (7, 9.5)),
        duration_s=34,
        category="CW",
        source=f"{path}:2",
    )
    assert (second.id, second.spans, second.duration_s, second.category) == ("old_2", (), 34, "TN")
    assert (third.id, third.spans, third.duration_s) == ("v_uqi_1", (), None)
    # The map says in which folder a video is; a video in a flat folder is found too.
    (root / "0101").mkdir()
    (root / "0101/old.mp4").touch()
    (root / "map_vid_vidorID.json").write_text('{"old": "0101/old", "v_uqi": "1000/v_uqi"}')
    videos = [e.video for e in read_examples(path, "auto", root)]
    assert videos == [root / "0101/old.mp4", root / "0101/old.mp4", root / "v_uqi.webm"]


def test_nextgqa_without_its_moments(root):
    path = root / "val.csv"
    path.write_text(f"{HEADER}\n{ROW}\n")
    for format in ("nextgqa", "auto"):
        with pytest.raises(
            DataError, match=r"val\.csv: gsub_val\.json with the moments is missing"
        ):
            read_examples(path, format, root)
    (root / "gsub_val.json").write_text("{")
    with pytest.raises(DataError, match=r"gsub_val\.json:1: not JSON"):
        read_examples(path, "nextgqa", root)
    path.rename(root / "train.csv")  # NExT-GQA's training questions have none
    (example,) = read_examples(root / "train.csv", "auto", root)
    assert example.spans == ()


def test_rextime(root):
    path = _write(root, json.dumps(REX) + "\n" + json.dumps(REX_OPTIONS))
    first, second = read_examples(path, "rextime", root)
    # The letter B of options that are not there is no answer.
    assert (first.query, first.question, first.answer) == ("What does the woman do?", None, None)
    assert (first.spans, first.duration_s) == (((5, 8),), 100.5)
    assert second == Example(
        id="qvh_val1",
        video=root / "NUs_210.0_360.0.mkv",
        query="Why?",
        question="Why?",
        options=("one", "two", "three", "four"),
        answer="three",
        spans=((0, 28),),
        duration_s=150,
        category="cause_effect",
        source=f"{path}:2",
    )
    as_list = read_examples(_write(root, [REX, REX_OPTIONS]), "rextime", root)
    assert [dataclasses.replace(e, source="") for e in as_list] == [
        dataclasses.replace(e, source="") for e in (first, second)
    ]


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        (["a hat", "a car"], "a car", "a car"),
        (["a hat", "a car"], " a car ", "a car"),
        (["a hat", "a car"], "A", "a hat"),
        (["a hat", "a car"], 1, "a car"),
        (["B", "A"], "A", "A"),  # the text before the letter
        (None, "in the park ", "in the park"),
    ],
)
def test_mcq_answers(root, options, answer, right):
    path = _write(root, json.dumps(MCQ | {"options": options, "answer": answer}))
    (example,) = read_examples(path, "mcq", root)
    assert (example.answer, example.options) == (right, tuple(options) if options else None)
    assert example.question == example.query == "what is red?"


def test_mcq_spans_clips_and_grounding(root):
    clipped = MCQ | {"id": 1, "clip": [3, 7.5]}
    timed = MCQ | {"id": 2, "spans": [[1, 2], [4, 5]], "duration": 9}
    where = {"id": 3, "video": "old", "question": "a dog", "spans": [[1, 2]]}
    path = _write(root, "\n".join(json.dumps(r) for r in (clipped, timed, where)))
    first, second, third = read_examples(path, "mcq", root)
    assert first.footage == (root / "a/clip.mp4", (3, 7.5))
    assert (first.duration_s, first.spans) == (4.5, ())
    (root / "a/clip_3.0_7.5.mp4").touch()
    assert read_examples(path, "mcq", root)[0].footage == (root / "a/clip_3.0_7.5.mp4", None)
    assert (second.spans, second.duration_s) == (((1, 2), (4, 5)), 9)
    assert (third.query, third.question, third.answer) == ("a dog", None, None)


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("mcq", MCQ | {"answer": 2}, "answer 2 is not among the options ('a hat', 'a car')"),
        ("mcq", MCQ | {"answer": "C"}, "answer 'C' is not among"),
        ("mcq", MCQ | {"answer": True}, "answer True is not among"),
        ("mcq", MCQ | {"answer": None}, '"options" but no "answer"'),
        ("mcq", MCQ | {"answer": None, "options": None}, 'neither "answer" nor "spans"'),
        ("mcq", MCQ | {"options": ["a car"]}, "answer 'a car' is not among the options"),
        ("mcq", MCQ | {"options": ["a car", 5]}, "invalid \"options\": ['a car', 5]"),
        ("mcq", MCQ | {"question": " "}, '"question" is empty'),
        ("mcq", MCQ | {"id": "\ud800"}, '"id" contains a lone surrogate'),
        ("mcq", MCQ | {"spans": [[2, 1]]}, "span 2 to 1 is not 0 <= start < end"),
        ("mcq", MCQ | {"spans": [[-1, 1]]}, "span -1 to 1 is not 0 <= start < end"),
        ("mcq", MCQ | {"spans": [["1", 2]]}, "invalid \"start\": '1'"),
        ("mcq", MCQ | {"spans": [[1, float("nan")]]}, 'invalid "end": nan'),
        ("mcq", MCQ | {"spans": [[1, float("inf")]]}, 'invalid "end": inf'),
        ("mcq", MCQ | {"spans": []}, '"spans" is empty'),
        ("mcq", MCQ | {"video": "../clip"}, "video '../clip' is outside"),
        ("mcq", '{"id": 1, "id": 2}', "duplicate key 'id'"),
        ("mcq", '{"id": ' + "1" * 5000 + "}", "unreadable JSON: Exceeds the limit"),
        ("mcq", "[" * 50_000, "unreadable JSON: maximum recursion"),
        ("rextime", REX_OPTIONS | {"ans": "E"}, "answer 'E' is not among"),
        ("tvgbench", [TVG | {"answer": "5"}], "\"answer\" is '5', not start-end"),
        ("tvgbench", [TVG | {"answer": "5-5"}], "span 5 to 5 is not"),
        ("timelens", {"old": {"duration": 9, "spans": [[0, 1]], "queries": []}}, "1 spans for 0"),
        ("timelens", {"old": {"duration": 9, "spans": [], "queries": []}}, '"queries" is empty'),
        ("timelens_100k", '{"events": []}', '"events" is empty'),
        ("timelens_100k", '{"events": [3], "video_path": "old"}', "expected an object, got int"),
        ("nextgqa", "video,question\n", ":1: the header lacks video_id, answer, qid"),
        ("nextgqa", f"{HEADER}\n{ROW},more", "14 columns where the header has 13"),
        ("nextgqa", f'{HEADER}\n"{ROW}', "not CSV: unexpected end of data"),
        ("nextgqa", f"{HEADER}\n{ROW.replace('a bus,1', 'a train,1')}", "'a train' is not among"),
    ],
)
def test_a_bad_record_of_the_newer_formats(root, format, content, message):
    (root / "gsub_annotations.json").write_text("{}")
    path = _write(root, content)
    with pytest.raises(DataError) as caught:
        read_examples(path, format, root)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_place_of_a_record_cannot_break_its_line(root):
    left_out: list[str] = []
    read_examples(_write(root, {"a\nb\x1b[2J": 3}), "activitynet", root, left_out)
    assert left_out == [f"{root / 'annotations'}:a b\\x1b[2J: expected an object, got int"]


# Recognition of formats


def _sample(format: str) -> str:
    """A file of each format as text, of which a record begins or makes up a line."""
    texts: dict[str, Any] = {
        "timerft": [RFT],
        "charades": "3MSZA 24.3 30.4##person turn a light on.",
        "activitynet": {"v_uqi": {"duration": 9, "timestamps": [[0, 4]], "sentences": ["One."]}},
        "rextime": json.dumps(REX),
        "qvhighlights": json.dumps(QV),
        "tacos": json.dumps(QV),
        "timelens": {"v_uqi": {"duration": 9, "spans": [[0, 4]], "queries": ["One."]}},
        "timelens_100k": json.dumps(
            {
                "source": "didemo",
                "video_path": "old",
                "duration": 9,
                "events": [{"query": "one", "span": [[0, 5]]}],
            }
        ),
        "tvgbench": [TVG],
        "nextgqa": f"{HEADER}\n{ROW}",
        "mcq": json.dumps(MCQ),
    }
    text = texts[format]
    return text if isinstance(text, str) else json.dumps(text)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_recognised(root, format):
    (root / "gsub_annotations.json").write_text(json.dumps(MOMENTS))
    path = _write(root, _sample(format))
    expected = "qvhighlights" if format == "tacos" else format
    assert recognise(path) == expected
    assert read_examples(path, video_root=root) == read_examples(path, format, root)
    for other in FORMATS:
        if other in (format, "qvhighlights", "tacos") and expected in ("qvhighlights", "rextime"):
            continue  # one of ReXTime is one of QVHighlights too
        if other != format:
            with pytest.raises(DataError) as caught:
                read_examples(path, other, root)
            assert str(caught.value).startswith(f"{path}: not {other} (")
            assert str(caught.value).endswith(f"); it looks like {expected}")
            with pytest.raises(DataError, match="it looks like"):
                read_examples(path, other, root, [])


def test_a_wrong_format_name_is_reported_with_the_right_one(root):
    path = _write(root, json.dumps(QV))
    message = f"{path}: not charades (line 1: expected `video start end##sentence`); it looks like"
    with pytest.raises(DataError) as caught:
        read_examples(path, "charades", root, [])
    assert str(caught.value) == f"{message} qvhighlights"
    # One bad record does not hide the format; one good record is enough for the named format.
    path = _write(root, "oops\n" + json.dumps(QV))
    assert recognise(path) == "qvhighlights"
    left_out: list[str] = []
    path = _write(root, "3MSZA 1 2##sits\n" + json.dumps(QV))
    assert len(read_examples(path, "qvhighlights", root, left_out)) == len(left_out) == 1


@pytest.mark.parametrize("content", ["{}", "[]", "words", '{"a": 1}', "[[]]", "{" * 9999])
def test_a_file_that_fits_no_format_is_an_error(root, content):
    path = _write(root, content)
    with pytest.raises(DataError, match="fits none of the formats timerft, charades"):
        read_examples(path, video_root=root)
    with pytest.raises(DataError, match="holds no examples"):
        recognise(_write(root, " \n"))
    with pytest.raises(DataError, match="No such file"):
        recognise(root / "absent")


# Look-up of videos


def test_no_name_leads_out_of_the_video_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").touch()
    (root / "link.mp4").symlink_to(outside / "clip.mp4")
    (root / "folder").symlink_to(outside)
    (root / "within.mp4").symlink_to(root / "a/clip.mp4")
    for name in (str(root / "a/clip.mp4"), "../outside/clip", "a/../a/clip", "link", "folder/clip"):
        with pytest.raises(ValueError, match=rf"^video '{name}' is outside {root}$"):
            find_video(root, name)
    assert find_video(root, "within") == root / "within.mp4"
    assert find_video(root, "./a/clip") == root / "a/clip.mp4"
    # The root itself may be a link, and its neighbour `root2` is not below it.
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2/clip.mp4").touch()
    (root / "beside").symlink_to(tmp_path / "root2")
    (tmp_path / "linked").symlink_to(root)
    assert find_video(tmp_path / "linked", "a/clip") == tmp_path / "linked/a/clip.mp4"
    with pytest.raises(ValueError, match="outside"):
        find_video(tmp_path / "linked", "beside/clip")


def test_a_video_is_looked_up_once(root, monkeypatch):
    looked: list[str] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda p: looked.append(p.name) or is_file(p))
    path = _write(root, "\n".join(["old 1 2##sits", "3MSZA 1 2##sits", "gone 1 2##sits"] * 50))
    read_examples(path, "charades", root, [])
    assert sorted(looked) == sorted({*looked})
    assert looked.count("old.avi") == looked.count("3MSZA.mp4") == 1


def test_the_same_root_under_any_working_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    assert find_video(Path("."), "old") == Path("old.avi")
    assert find_video(Path("a"), "clip") == Path("a/clip.mp4")
    assert os.path.exists("old.avi")


# Damaged annotations

VIDEOS = 12
STRANGE: list[Any] = [
    *(None, True, -1, 0, 3, "12", "", " ", [], {}, [5, 1], [[5, 1]], [[1, 2], [3, 4]], 10**400),
    *(float("nan"), float("inf"), -float("inf"), 1e308, "\ud800", "caf\u00e9 \u202e", "x\u2028y"),
    *("a" * 5000, "\x00", "../v3", "/v3", "v3", {"a": {"b": []}}, "A", "1-2", [None], ["x", "x"]),
]


def _records(format: str) -> list[Any]:
    """Twelve valid records of a format about as many videos, v0 to v11."""

    def record(k: int) -> Any:
        spans, duration = [[k, k + 2.5], [k + 4, k + 5]], 60.0 + k
        query, video, qid = f"query {k}", f"v{k}", f"id{k}"
        question = {"question": query, "options": [f"no {k}", f"yes {k}"], "answer": f"yes {k}"}
        match format:
            case "timerft":
                fields = {"video": video, "duration": duration, "timestamp": spans[0], "qid": qid}
                return fields | {"sentence": query, "difficulty": 5.0 * k}
            case "charades":
                return f"{video} {k}.5 {k + 3}##{query}"
            case "activitynet":
                return {"duration": duration, "timestamps": spans, "sentences": [query, "other"]}
            case "rextime" | "qvhighlights" | "tacos":
                fields = {"vid": video, "duration": duration, "relevant_windows": spans, "qid": qid}
                return fields | {"query": query} | ({"ans": "A"} if format == "rextime" else {})
            case "timelens":
                return {"duration": duration, "spans": spans, "queries": [query, "other"]}
            case "timelens_100k":
                events = [{"query": query, "span": spans}, {"query": "other", "span": spans[:1]}]
                return {"video_path": video, "duration": duration, "events": events}
            case "tvgbench":
                fields = {"path": video, "duration": duration, "answer": f"{k}-{k + 1.5}"}
                return fields | {"question": query, "qsemtype": f"kind {k}"}
            case "nextgqa":
                return f"{video},9,640,480,{query},yes {k},{k},CW,a,b,c,d,yes {k}"
            case _:
                fields = {"id": qid, "video": video, "duration": duration, "spans": spans}
                return fields | question | {"category": f"kind {k}"}

    return [record(k) for k in range(VIDEOS)]


def _damaged(value: Any, rng: random.Random) -> Any:
    """The same structure with one thing in it deleted, replaced, repeated or nested."""
    if isinstance(value, dict | list) and value and rng.random() < 0.75:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        action = rng.random()
        if action < 0.2:
            del copy[key]
        elif action < 0.3 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = _damaged(value[key], rng)
        return copy
    if rng.random() < 0.1:
        for _ in range(rng.choice((1, 3, 300))):
            value = [value]
        return value
    return rng.choice(STRANGE)


def _scratched(line: str, rng: random.Random) -> str:
    """The same line with a few of its characters gone, doubled or others, or its end cut off."""
    if rng.random() < 0.2:
        return line[: rng.randrange(1, len(line))]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(line))
        new = rng.choice(
            ["", line[at] * 2, *'"{}[],:#.-\\0 \t', "\u00e9", "\u2028", "\x85", "\x1c"]
        )
        line = line[:at] + new + line[at + 1 :]
    return line if line.strip() else "#"


def _file(format: str, records: list[Any], spoiled: dict[int, str]) -> str:
    """The text of a file; `spoiled` are records that are text already."""
    if format in ("activitynet", "timelens"):
        return json.dumps({f"v{k}": record for k, record in enumerate(records)})
    if format in ("timerft", "tvgbench"):
        return json.dumps(records)
    plain = format in ("charades", "nextgqa")
    texts = [record if plain else json.dumps(record) for record in records]
    texts = [spoiled.get(k, text) for k, text in enumerate(texts)]
    return "\n".join([HEADER, *texts] if format == "nextgqa" else texts)


def _place(format: str) -> Callable[[int], str]:
    """Where the record of that index is."""
    if format in ("activitynet", "timelens"):
        return lambda k: f"v{k}"
    first = {"timerft": 0, "tvgbench": 0, "nextgqa": 2}.get(format, 1)
    return lambda k: str(first + k)


@pytest.mark.parametrize("format", FORMATS)
def test_damage_costs_the_damaged_records_alone(tmp_path, format):
    # 46 files of 4 damaged records each, 11 formats: 2,024 in all.
    rng = random.Random(format)
    for k in range(VIDEOS):
        (tmp_path / f"v{k}.mp4").touch()
    path, place = tmp_path / "val.csv", _place(format)
    location = {"location": {str(k): [[k, k + 1]] for k in range(VIDEOS)}, "duration": 60}
    moments = {f"v{k}": location for k in range(VIDEOS)}
    (tmp_path / "gsub_val.json").write_text(json.dumps(moments))
    records = _records(format)
    path.write_text(_file(format, records, {}), "utf-8")
    intact = {e.source: e for e in read_examples(path, format, tmp_path)}
    assert len(intact) >= VIDEOS
    spoiled_files = 0
    for _ in range(46):
        hit = rng.sample(range(VIDEOS), 4)
        texts, damaged = {}, list(records)
        for k in hit:
            if isinstance(records[k], str):
                texts[k] = _scratched(records[k], rng)
            else:
                damaged[k] = _damaged(records[k], rng)
                if rng.random() < 0.3:
                    texts[k] = _scratched(json.dumps(damaged[k]), rng)
        path.write_text(_file(format, damaged, texts), "utf-8")
        left_out: list[str] = []
        try:
            examples = {e.source: e for e in read_examples(path, format, tmp_path, left_out)}
        except DataError as error:  # a JSON file cannot be read in part
            assert format in ("timerft", "tvgbench", "activitynet", "timelens"), error
            assert "\n" not in str(error)
            spoiled_files += 1
            continue
        for source, example in intact.items():
            if not any(f"{source}:".startswith(f"{path}:{place(k)}:") for k in hit):
                assert examples[source] == example
        for k in hit:
            at = f"{path}:{place(k)}:"
            assert any(line.startswith(at) for line in left_out) or any(
                f"{source}:".startswith(at) for source in examples
            )
        for line in left_out:
            assert line.isprintable() and any(line.startswith(f"{path}:{place(k)}:") for k in hit)
    assert spoiled_files < 5


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_was_cut_off_or_scratched(tmp_path, format):
    rng = random.Random(format)
    (tmp_path / "gsub_val.json").write_text("{}")
    whole, path = _file(format, _records(format), {}), tmp_path / "val.csv"
    for _ in range(20):
        path.write_text(_scratched(whole, rng), "utf-8")
        for name in (format, "auto"):
            try:
                read_examples(path, name, tmp_path, [])
            except DataError as error:
                assert "\n" not in str(error)

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.data.annotations.formats import read_examples, recognise
from opd.data.convert import CONVERTERS, main

DOCS = Path(__file__).parents[2] / "docs" / "data.md"

MVBENCH = {
    "video": "166583.webm",
    "question": "What is the action?",
    "candidates": ["Not sure", "Scattering something", "Piling something"],
    "answer": "Piling something",
}
STAR = MVBENCH | {"video": "ZS9XR.mp4", "start": 11.1, "end": 19.6}
TEMPCOMPASS = {
    "1034419625": {
        "action": [
            {
                "question": "What is the man doing?\nA. dunking: a ball\nB. dribbling",
                "answer": "A. dunking: a ball",
            },
            {"question": "Which one?\nA. passing\nB. dribbling", "answer": "B"},
        ],
        "direction": [{"question": "Whither?\nA. up\nB. down", "answer": "B. down"}],
    }
}
VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. None."],
    "answer": "C",
}
NEXTQA = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
TEMPORAL_R1 = {
    "dataset": "anet_train",
    "video": "v_x.mp4",
    "problem": "When does a man run?",
    "solution": [0.25, 0.5],
    "video_length": 40.0,
}


def _converted(folder: Path, name: str, source: Path) -> list[dict[str, Any]]:
    main([name, str(source), str(folder / "out.jsonl")])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]


def _json(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_mvbench(tmp_path, capsys):
    _json(tmp_path / "json/action_antonym.json", [MVBENCH, MVBENCH | {"answer": "Nothing"}])
    _json(tmp_path / "json/action_sequence_20250131.json", [STAR])
    _json(tmp_path / "json/episodic_reasoning.json", [MVBENCH])
    first, second = _converted(tmp_path, "mvbench", tmp_path / "json")
    assert first == {
        "id": "action_antonym:0",
        "video": "ssv2_video/166583.webm",
        "question": "What is the action?",
        "options": MVBENCH["candidates"],
        "answer": "Piling something",
        "category": "action_antonym",
    }
    assert second["video"] == "star/Charades_v1_480/ZS9XR.mp4"
    assert (second["clip"], second["category"]) == ([11.1, 19.6], "action_sequence")
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'out.jsonl'}: 2 written, 2 left out\n"
    left_out = output.err.splitlines()
    assert left_out[0].startswith(
        f"left out: {tmp_path / 'json'}:action_antonym:1: answer 'Nothing'"
    )
    assert left_out[1].endswith(
        "episodic_reasoning:0: videos of this task are folders of frames, which are not supported"
    )
    # The clip is a file of its own; the whole video would be another question.
    for video in ("ssv2_video/166583.webm", "star/Charades_v1_480/ZS9XR_11.1_19.6.mp4"):
        (tmp_path / video).parent.mkdir(parents=True)
        (tmp_path / video).touch()
    examples = read_examples(tmp_path / "out.jsonl", "mcq", tmp_path)
    assert [e.video.name for e in examples] == ["166583.webm", "ZS9XR_11.1_19.6.mp4"]


def test_tempcompass(tmp_path):
    first, second, third = _converted(
        tmp_path, "tempcompass", _json(tmp_path / "multi-choice.json", TEMPCOMPASS)
    )
    assert first == {
        "id": "1034419625:action:0",
        "video": "1034419625",
        "question": "What is the man doing?",
        "options": ["dunking: a ball", "dribbling"],
        "answer": 0,
        "category": "action",
    }
    assert (second["answer"], third["answer"], third["category"]) == (1, 1, "direction")
    (tmp_path / "1034419625.mp4").touch()
    answers = [e.answer for e in read_examples(tmp_path / "out.jsonl", "auto", tmp_path)]
    assert answers == ["dunking: a ball", "dribbling", "down"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_videomme(tmp_path, kind):
    rows, path = [VIDEOMME, VIDEOMME | {"question_id": "001-2"}], tmp_path / f"test.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        _json(path, rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    first, second = _converted(tmp_path, "videomme", path)
    assert first == {
        "id": "001-1",
        "video": "fFjv93ACGo8",
        "question": "How many?",
        "options": ["Apples.", "Candles.", "Berries.", "None."],
        "answer": 2,
        "category": "short",
    }
    assert second["id"] == "001-2"


def test_parquet_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    path = tmp_path / "test.parquet"
    path.write_text("no parquet")
    pytest.importorskip("pyarrow")
    assert "not parquet: " in _failure(capsys, "videomme", path, tmp_path)
    assert "No such file" in _failure(capsys, "videomme", tmp_path / "absent.parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "reading parquet needs pyarrow" in _failure(capsys, "videomme", path, tmp_path)


def test_nextqa(tmp_path):
    path = tmp_path / "val.csv"
    row = "4010069381,369,640,480,how do they dance,3,6,CH,kneel,roll,sway,hands,no"
    path.write_text(f"{NEXTQA}\n{row}\n{row.replace('4010069381', '2435100235')}\n")
    (tmp_path / "map_vid_vidorID.json").write_text('{"4010069381": "1164/4010069381"}')
    first, second = _converted(tmp_path, "nextqa", path)
    assert first == {
        "id": "4010069381_6",
        "video": "1164/4010069381",
        "question": "how do they dance",
        "options": ["kneel", "roll", "sway", "hands", "no"],
        "answer": 3,
        "category": "CH",
    }
    assert second["video"] == "2435100235"


def test_temporal_r1(tmp_path):
    (line,) = _converted(tmp_path, "temporal_r1", _json(tmp_path / "a.json", [TEMPORAL_R1]))
    assert line == {
        "id": "anet_train:0",
        "video": "v_x.mp4",
        "question": "When does a man run?",
        "spans": [[10, 20]],
        "duration": 40,
        "category": "anet_train",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mvbench", [MVBENCH | {"candidates": "abc"}], "invalid \"candidates\": 'abc'"),
        ("mvbench", [MVBENCH | {"start": "1", "end": 2}], "invalid \"start\": '1'"),
        ("mvbench", [MVBENCH | {"start": -1, "end": 2}], "clip -1 to 2 is not 0 <= start < end"),
        ("mvbench", [7], "expected an object, got int"),
        ("tempcompass", {"1": []}, ":1: expected an object, got list"),
        ("tempcompass", {"1": {"action": {}}}, ":1:action: expected a list, got dict"),
        ("tempcompass", {"1": {"action": [3]}}, ":1:action:0: expected an object, got int"),
        (
            "tempcompass",
            {"1": {"x": [{"question": "Q\nB. a", "answer": "B"}]}},
            "does not begin with letter A",
        ),
        ("tempcompass", {"1": {"x": [{"question": "Q", "answer": "A"}]}}, "not among the options"),
        (
            "tempcompass",
            {"1": {"x": [{"question": "Q\nA. a\nB. b", "answer": "A. b"}]}},
            "answer 'A. b' is not among the options",
        ),
        ("videomme", [VIDEOMME | {"answer": "E"}], ":0: answer 'E' is not among the options"),
        (
            "videomme",
            [VIDEOMME | {"options": ["x", "y"]}],
            "option 'x' does not begin with letter A",
        ),
        ("videomme", [VIDEOMME, VIDEOMME], "duplicate id '001-1'"),
        ("nextqa", f"{NEXTQA}\n1,9,6,4,why,5,0,CW,a,b,c,d,e", "\"answer\" is '5', not 0 to 4"),
        ("nextqa", f"{NEXTQA}\n1,9,6,4,why,0,0,CW,a,b,c,d", "12 columns where the header has 13"),
        ("temporal_r1", [TEMPORAL_R1 | {"solution": [10, 20]}], "is not between 0 and 1"),
        ("temporal_r1", [TEMPORAL_R1 | {"solution": "A"}], "invalid \"solution\": 'A'"),
    ],
)
def test_a_bad_record_is_a_line_and_is_counted(tmp_path, capsys, name, content, message):
    source = tmp_path / "action_count.json"
    source.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises(SystemExit) as caught:
        main([name, str(source), str(tmp_path / "out.jsonl")])
        raise SystemExit(0)  # where one of two could be used
    *lines, last = capsys.readouterr().err.splitlines()
    lines += [last] if caught.value.code == 0 else []
    assert len(lines) == 1 and lines[0].startswith(f"left out: {source}:") and message in lines[0]
    assert caught.value.code == 0 or last == f"error: {source}: contains no usable question"


def _failure(capsys: pytest.CaptureFixture[str], name: str, source: Path, folder: Path) -> str:
    """The one line of a conversion that ends with exit code 2 and writes nothing."""
    with pytest.raises(SystemExit) as caught:
        main([name, str(source), str(folder / "out.jsonl")])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (folder / "out.jsonl").exists()
    assert line.startswith("error: ")
    return line


def test_errors_that_end_a_conversion(tmp_path, capsys):
    bad = _json(tmp_path / "scene_transition.json", [])
    bad.write_text("[\n{")
    assert f"{bad}:2: not JSON" in _failure(capsys, "mvbench", bad, tmp_path)
    assert f"{bad}:2: not JSON" in _failure(capsys, "videomme", bad, tmp_path)
    assert f"{bad}:2: not JSON" in _failure(capsys, "tempcompass", bad, tmp_path)
    assert f"{bad}:1: the header lacks video" in _failure(capsys, "nextqa", bad, tmp_path)
    other = _json(tmp_path / "a/other.json", [])
    assert "'other' is not a task of MVBench" in _failure(capsys, "mvbench", other, tmp_path)
    assert "contains no usable question" in _failure(capsys, "videomme", other, tmp_path)
    absent = tmp_path / "action_count.json"
    for name in CONVERTERS:
        assert f"{absent}: No such file" in _failure(capsys, name, absent, tmp_path)
    assert "usage: python -m opd.data.convert NAME" in _failure(capsys, "coco", bad, tmp_path)


def test_nothing_is_overwritten(tmp_path, capsys):
    source = _json(tmp_path / "test.json", [VIDEOMME])
    with pytest.raises(SystemExit) as caught:
        main(["videomme", str(source), str(source)])
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: {source}: already exists; remove it or name another file\n"
    )
    with pytest.raises(SystemExit):
        main(["videomme", str(source), str(tmp_path / "absent/out.jsonl")])
    assert "No such file" in capsys.readouterr().err
    main(["--help"])
    assert "mvbench, tempcompass, videomme, nextqa, temporal_r1" in capsys.readouterr().out


def test_the_documented_questions_are_read(tmp_path):
    (block,) = re.findall(r"```jsonl\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    path = tmp_path / "mine.jsonl"
    path.write_text(block, "utf-8")
    for line in block.splitlines():
        record = json.loads(line)
        file = f"{record['video']}.mp4"
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert recognise(path) == "mcq"
    examples = read_examples(path, "mcq", tmp_path)
    assert len(examples) == len(block.splitlines()) >= 4
    assert [e.clip for e in examples].count((10, 22.5)) == 1
    kinds = [(bool(e.options), e.answer is not None, bool(e.spans)) for e in examples]
    assert set(kinds) == {
        (True, True, False),
        (True, True, True),
        (False, True, False),
        (False, False, True),
    }

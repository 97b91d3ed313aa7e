import dataclasses
import json
from pathlib import Path

import pytest

from opd.data.examples import DataError, Example
from opd.data.formats import FORMATS, read_examples, write_timerft

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
    path = root / "train.json"
    write_timerft(path, examples)
    assert read_examples(path, "timerft", root) == examples
    assert json.loads(path.read_text("utf-8"))[0]["video"] == "a/clip.mp4"
    write_timerft(path, examples, root / "a")
    assert read_examples(path, "timerft", root / "a") == examples


def test_timerft_refuses_what_it_cannot_hold(root):
    example = Example(id="x", video=root / "old.avi", query="q", spans=(), duration_s=8.0)
    with pytest.raises(ValueError, match="'x' needs one span and a duration"):
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
        ("qvhighlights", json.dumps(QV) + "\n" + json.dumps(QV), ":2: id '2579' was used at "),
        ("qvhighlights", json.dumps(QV | {"duration": "150"}), ":1: \"duration\" is '150'"),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": []}), ':1: "relevant_windows" is'),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": [[1]]}), ":1: [1] is not a [start"),
        ("qvhighlights", json.dumps(QV | {"relevant_windows": [[160, 170]]}), ":1: a span starts"),
        ("qvhighlights", "[]", ":1: a list where an object belongs"),
        ("activitynet", [1], ": holds a list where a dict belongs"),
        ("activitynet", {"v_uqi": {"sentences": []}}, ':v_uqi: no "timestamps"'),
        (
            "activitynet",
            {"v_uqi": {"duration": 9, "timestamps": [[0, 1]], "sentences": []}},
            ":v_uqi: 1 timestamps for 0 sentences",
        ),
        ("timerft", '[\n{"video": "a",\n]', ":3: not JSON: "),
        ("timerft", [RFT, RFT | {"qid": True}], ':1: "qid" is True'),
        ("timerft", [RFT | {"sentence": ""}], ":0: \"sentence\" is ''"),
        ("timerft", [RFT | {"duration": float("nan")}], ':0: "duration" is nan'),
        ("timerft", [RFT | {"difficulty": "hard"}], ":0: \"difficulty\" is 'hard'"),
        ("timerft", "[" * 100_000, "annotations:"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(root, format, content, message):
    path = _write(root, content)
    with pytest.raises(DataError) as caught:
        read_examples(path, format, root)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(root):
    with pytest.raises(DataError, match=r"absent\.json: No such file"):
        read_examples(root / "absent.json", "timerft", root)
    (root / "latin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="latin: not UTF-8 text"):
        read_examples(root / "latin", "charades", root)
    with pytest.raises(ValueError, match="unknown data format 'coco'; known: timerft, charades"):
        read_examples(root / "latin", "coco", root)


def test_registry_holds_the_formats_promised():
    assert {"timerft", "charades", "activitynet", "qvhighlights"} <= set(FORMATS)

"""An annotation given back as the answer scores 100, also where it goes on past its video."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from opd.config.data import FORMATS, DataConfig
from opd.config.method import RewardConfig
from opd.config.run import Config
from opd.data.annotations import formats
from opd.data.examples import Example
from opd.data.sources import load_examples
from opd.scoring.evaluation import EvaluationRow
from opd.scoring.judge import reward
from opd.scoring.official import score
from tests.videos import write_coded

DURATION_S, TRUTH = 2.0, (1.2, 3.5)  # seconds
REAL = Path(os.environ.get("OPD_ANNOTATIONS", Path(__file__).parents[3] / "shared" / "annotations"))
# Queries with a true span, how many of them end past their video, how many are about a clip of a
# file, and records whose true span is empty, which are left out.
REAL_FILES = {
    "charades_sta_test.json": (3720, 562, 0, 0),
    "activitynet_val_2.json": (17_031, 111, 0, 0),
    "qvhighlights_val.jsonl": (1550, 0, 0, 0),
    "nextgqa_val.csv": (3358, 3, 0, 0),
    "rextime_val.jsonl": (919, 4, 0, 2),
    "tvgbench.json": (789, 27, 241, 11),
    "timerft_train_2k5.json": (2500, 48, 156, 0),
}

TINY = {  # one file of each format: its name, and its text or record
    "timerft": {
        "video": "old.mp4",
        "duration": DURATION_S,
        "timestamp": TRUTH,
        "sentence": "he runs",
        "qid": "q",
    },
    "charades": "old 1.2 3.5##person runs.\n",
    "activitynet": {"old": {"duration": 2, "timestamps": [TRUTH], "sentences": ["He runs."]}},
    "rextime": {
        "qid": "q",
        "query": "Why?",
        "duration": 2,
        "vid": "old",
        "relevant_windows": [TRUTH],
        "ans": "A",
    },
    "qvhighlights": {
        "qid": 1,
        "query": "He runs.",
        "duration": 2,
        "vid": "old",
        "relevant_windows": [TRUTH],
    },
    "timelens": {"old": {"duration": 2, "spans": [TRUTH], "queries": ["He runs."]}},
    "timelens_100k": {
        "source": "didemo",
        "video_path": "old.mp4",
        "duration": 2,
        "events": [{"query": "he runs", "span": [TRUTH]}],
    },
    "tvgbench": {"path": "old.mp4", "question": "he runs", "answer": "1.2-3.5", "duration": 2},
    "nextgqa": "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    "old,8,64,48,why,a,1,CW,a,b,c,d,e\n",
    "mcq": {"id": "q", "video": "old", "question": "he runs", "spans": [TRUTH]},
}
TINY["tacos"] = TINY["qvhighlights"]


def scores(examples: Sequence[Example]) -> dict[str, float]:
    """Scores of all true spans given back as the answers."""
    rows = []
    for example in examples:
        times = [{"start_time": start_s, "end_time": end_s} for start_s, end_s in example.spans]
        answer = json.dumps(times)
        assert reward(answer, example, RewardConfig()) == 1.0, example
        rows.append(EvaluationRow.of(example, answer, [], Config()))
    return score(rows, "grounding")


@pytest.mark.parametrize("format", FORMATS)
def test_a_truth_that_ends_past_its_video(format, tmp_path):
    write_coded(tmp_path / "old.mp4", num_frames=8, fps=4)
    path, content = tmp_path / "val.csv", TINY[format]
    if format in ("timerft", "tvgbench"):
        content = [content]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    moments = {"old": {"duration": 2, "location": {"1": [TRUTH]}}}
    (tmp_path / "gsub_val.json").write_text(json.dumps(moments))
    (example,) = load_examples(f"{format}:{path}?root={tmp_path}", DataConfig(), None)
    assert (example.spans, example.duration_s) == ((TRUTH,), DURATION_S)
    assert scores([example])["miou"] == 1.0
    # (1.2, 3.5) and (1.2, 2.0) overlap by 0.8 of 2.3 s; what is said is never cut to the video.
    for said, tiou in (
        ("1.2 to 2.0", 0.8 / 2.3),
        ("1.2 to 5.8", 2.3 / 4.6),
        ("2.5 to 3.5", 1 / 2.3),
    ):
        row = EvaluationRow.of(example, said, [said], Config())
        assert row.tiou == pytest.approx(tiou) and row.sampled_tious == (row.tiou,)
        assert reward(said, example, RewardConfig()) == row.tiou


SLOW = pytest.param("activitynet_val_2.json", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [SLOW if "val_2" in name else name for name in REAL_FILES])
def test_the_annotations_of_public_data_sets(name, tmp_path, monkeypatch):
    if not (REAL / name).is_file():
        pytest.skip(f"{REAL / name}: not there; OPD_ANNOTATIONS names the folder")
    path = REAL / name
    if name.startswith("nextgqa"):
        for file in REAL.glob("nextgqa_*"):
            (tmp_path / file.name.removeprefix("nextgqa_")).symlink_to(file)
        path = tmp_path / "val.csv"
    monkeypatch.setattr(formats._Videos, "find", lambda videos, names: Path("a.mp4"))
    left_out: list[str] = []
    timed = [e for e in formats.read_examples(path, left_out=left_out) if e.spans]
    past = [e for e in timed if any(end_s > (e.duration_s or 0) for _, end_s in e.spans)]
    clips = [e for e in timed if e.clip is not None]
    assert (len(timed), len(past), len(clips), len(left_out)) == REAL_FILES[name], left_out
    assert all(re.search(r": span (\S+) to \1 is not 0 <= start < end$", line) for line in left_out)
    for example in clips:
        start_s, end_s = example.clip or (0, 0)
        assert example.duration_s == pytest.approx(end_s - start_s)
    actual = scores(timed)
    assert {actual[name] for name in ("miou", "recall@0.3", "recall@0.5", "recall@0.7")} == {1.0}

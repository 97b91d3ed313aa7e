"""Sources: their syntax, weights and parts, and the check that evaluation is held out."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from opd.check import main as check
from opd.config import data
from opd.config.data import DataConfig
from opd.config.run import Config
from opd.data import sources
from opd.data.annotations.formats import FORMATS
from opd.data.checked import checked_path
from opd.data.examples import Example
from opd.data.schedule import plan_steps, schedule, shuffled
from opd.data.sources import check_leak, load_examples, sources_of
from opd.errors import DataError
from tests.videos import one_query_each, write_coded


@pytest.fixture
def root(videos: Path, tmp_path: Path) -> Path:
    """Six clips in a folder, a Charades file of two queries for each, a TimeRFT file of one."""
    one_query_each(videos, 6)
    shutil.copytree(videos / "eval", tmp_path / "clips")
    records = json.loads((videos / "eval-6.json").read_text())
    charades, timerft = [], []
    for record in records:
        name = Path(record["video"]).stem
        charades += [f"{name} 1.0 2.5##one.", f"{name} 3.0 4.0##two."]
        timerft.append(record | {"video": f"{name}.mp4"})
    (tmp_path / "charades.txt").write_text("\n".join(charades))
    (tmp_path / "timerft.json").write_text(json.dumps(timerft))
    return tmp_path


def config_of(root: Path, **more: object) -> DataConfig:
    return DataConfig(video_root=str(root / "clips"), **more)  # type: ignore[arg-type]


def test_a_format_is_named_or_recognised_and_reported(root, capsys):
    config = config_of(root)
    named = load_examples(f"charades:{root}/charades.txt", config, None)
    assert capsys.readouterr().err == ""
    examples = load_examples(f"{root}/charades.txt, {root}/timerft.json", config, None)
    assert capsys.readouterr().err.splitlines() == [
        f"{root}/charades.txt: read as charades",
        f"{root}/timerft.json: read as timerft",
    ]
    assert examples[:12] == named and len(examples) == 18
    # Charades has no durations; they come from the files.
    assert all(e.duration_s == pytest.approx(12, abs=0.2) for e in examples)


def test_each_source_has_a_root(root, videos):
    config = DataConfig(video_root="nowhere")
    text = f"{root}/charades.txt?root={root}/clips,{videos}/eval-6.json?root={videos}"
    examples = load_examples(text, config, None)
    assert Counter(example.video.parent for example in examples) == {
        root / "clips": 12,
        videos / "eval": 6,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}?weigth=2", "{file}?weigth=2: unknown option 'weigth'; known: root, weight"),
        ("{file}?weight=0", "{file}?weight=0: weight=0 is not a positive number"),
        ("{file}?weight=nan", "{file}?weight=nan: weight=nan is not a positive number"),
        ("{file}?part=test", "{file}?part=test: part must be one of train, held_out"),
        ("{file}?holdout=0.2", "{file}?holdout=0.2: holdout needs part=train or part=held_out"),
        (
            "{file}?part=train&holdout=1",
            "{file}?part=train&holdout=1: holdout=1 is not between 0 and 1",
        ),
        ("{file}?weight=2,{file}", "{file}: needs a weight, because other sources have one"),
        ("{file}.gone", "{file}.gone: no such annotation file"),
        (
            "synthetic:eval?part=train",
            "synthetic:eval?part=train: synthetic splits have no options",
        ),
    ],
)
def test_an_invalid_source_is_an_error(root, text, message):
    file = f"charades:{root}/charades.txt"
    with pytest.raises(DataError) as caught:
        sources_of(text.format(file=file), config_of(root))
    expected = message.format(file=file)
    shown = str(caught.value)
    assert shown.startswith(expected) or shown.startswith(expected.replace("charades:/", "/"))


def test_a_file_is_divided_by_videos(root):
    config, text = config_of(root), f"charades:{root}/charades.txt?holdout=0.4&part="
    train, held_out = (load_examples(text + part, config, None) for part in sources.PARTS)
    videos = [{example.video for example in part} for part in (train, held_out)]
    assert not videos[0] & videos[1] and len(train) + len(held_out) == 12
    assert all(
        count == 2
        for part in (train, held_out)
        for count in Counter(e.video for e in part).values()
    )
    check_leak(train, held_out, config)
    # Parts depend on names alone, so another file about the same videos is divided alike.
    places = [sources._draw(f"video{i}") for i in range(4000)]
    assert np.mean([place < 0.4 for place in places]) == pytest.approx(0.4, abs=0.03)


def test_sources_are_drawn_by_their_weights(root):
    text = f"charades:{root}/charades.txt?weight=1,timerft:{root}/timerft.json?weight=3"
    examples = load_examples(text, config_of(root), None)
    weights = [example.weight for example in examples]
    assert sum(weights) == pytest.approx(18) and len(set(weights)) == 2
    plan = schedule(18, 6, 8, 0, weights)
    for batch in plan:
        assert sum(index >= 12 for index in batch) == 6
    drawn = Counter(index for batch in plan for index in batch)
    assert set(drawn[i] for i in range(12)) == {1}, "an epoch of the first"
    assert set(drawn[i] for i in range(12, 18)) == {6}, "six of the second"
    assert plan == schedule(18, 6, 8, 0, weights) != schedule(18, 6, 8, 1, weights)


def test_without_weights_every_example_is_drawn_alike():
    plan = schedule(10, 4, 5, seed=3)
    assert plan == schedule(10, 4, 5, 3, [0.7] * 10)
    assert [i for batch in plan for i in batch] == shuffled(10, 3, 0) + shuffled(10, 3, 1)


def test_shares_hold_within_every_batch():
    weights = [0.2] * 50 + [1.0] * 7 + [3.1] * 3
    shares = [sum(weights[:50]), sum(weights[50:57]), sum(weights[57:])]
    for batch in schedule(60, 20, 16, 1, weights):
        counts = [sum(i < 50 for i in batch), sum(50 <= i < 57 for i in batch)]
        for count, share in zip(counts, shares, strict=False):
            assert abs(count - 16 * share / sum(shares)) <= 2


def example(name: str, duration_s: float | None = 10.0) -> Example:
    return Example(id=name, video=Path(name), query="q", spans=((1, 2),), duration_s=duration_s)


def test_leaks_are_named():
    data = DataConfig()
    train = [example("a/1.mp4"), example("a/2.mp4"), example("a/3.mp4", None)]
    check_leak(train, [example("b/9.mp4"), example("b/1.mp4", 12.0)], data)
    for leaked in (example("a/1.mp4", 99.0), example("b/2.mkv", 10.4), example("b/3.mp4")):
        with pytest.raises(DataError) as caught:
            check_leak(train, [example("b/9.mp4"), leaked, leaked], data)
        assert str(caught.value) == (
            f"data.eval: 1 of its videos are trained on: {leaked.video}; "
            "set data.allow_leak=true to evaluate on them anyway"
        )
        check_leak(train, [leaked], replace(data, allow_leak=True))


def test_a_link_to_a_trained_video_is_a_leak(tmp_path):
    (tmp_path / "real.mp4").touch()
    (tmp_path / "other.mp4").symlink_to(tmp_path / "real.mp4")
    with pytest.raises(DataError, match="1 of its videos are trained on"):
        train = [example(str(tmp_path / "real.mp4"))]
        check_leak(train, [example(str(tmp_path / "other.mp4"), 33)], DataConfig())


def test_clips_of_one_file_leak_where_they_overlap(tmp_path):
    def clip(name: str, *part: float) -> Example:
        return replace(example(str(tmp_path / name)), clip=part or None)

    train = [clip("a/1.mp4", 10, 20), clip("a/1.mp4", 50, 60), clip("a/2.mp4")]
    apart = [clip("a/1.mp4", 20, 50), clip("b/1.mp4", 60, 99), clip("a/3.mp4", 0, 9)]
    check_leak(train, apart, DataConfig())
    for leaked in (
        clip("a/1.mp4", 19, 25),
        clip("a/1.mp4"),
        clip("b/1.mp4", 0, 99),
        clip("a/2.mp4", 0, 1),
    ):
        with pytest.raises(DataError, match="1 of its videos are trained on"):
            check_leak(train, [*apart, leaked], DataConfig())


def test_a_clip_outside_of_its_file_is_left_out(tmp_path, capsys):
    write_coded(tmp_path / "x.mp4", 100)  # 4 s
    fields = {"path": "x", "question": "q", "duration": 3, "answer": "1.5-2.5"}
    parts = [(0.5, 3.5), (3, 4.5), (2, 5.5), (4, 7)]
    records = [fields | {"start": start_s, "end": end_s} for start_s, end_s in parts]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    left_out: list[str] = []
    config = DataConfig(video_root=str(tmp_path))
    (kept,) = load_examples(f"tvgbench:{path}", config, None, left_out=left_out)
    assert (kept.id, kept.clip, kept.duration_s) == ("tvgbench:0", (0.5, 3.5), 3)
    video = tmp_path / "x.mp4"
    expected = [
        f"{path}:1: a span starts at 1.5 s in a video of 1 s",
        f"{path}:2: {video}: clip 2 to 5.5 s lies outside its file of 4 s",
        f"{path}:3: {video}: clip 4 to 7 s lies outside its file of 4 s",
    ]
    assert left_out == expected
    # The check finds the same.
    check([f"tvgbench:{path}", f"data.video_root={tmp_path}"])
    out = capsys.readouterr().out
    assert "1 usable examples of 4 read, 1 usable videos of 1" in out
    assert "  2 clips that lie outside their file (left out):" in out
    assert f"    {path}:3: clip 4 to 7 s lies outside its file of 4 s" in out
    assert f"    {path}:1: 1.5 to 2.5 s in 1.0 s" in out
    # With nothing else to train on, the run ends with one line.
    path.write_text(json.dumps(records[3:]))
    Path(f"{path}.checked.jsonl").unlink()
    with pytest.raises(DataError, match=r"no usable example; first of 1 left out: .*lies outside"):
        load_examples(f"tvgbench:{path}", config, None)


def test_the_report_of_the_check_is_used(root, monkeypatch):
    text = f"charades:{root}/charades.txt"
    examples = load_examples(text, config_of(root), None)
    first, second, third = list(dict.fromkeys(example.video for example in examples))[:3]

    def row(video: Path, **more: object) -> dict[str, object]:
        stat = video.stat()
        fields = {"video": str(video), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        return fields | {"duration_s": 12.0, "reason": None} | more

    rows = [
        row(first, reason="it is rotated"),
        row(second, duration_s=2.0),
        row(third, size=1, reason="as it was before"),
        {"video": str(examples[-1].video), "reason": "by hand"},
    ]
    checked_path(f"{root}/charades.txt").write_text("\n".join(map(json.dumps, rows)))
    probed: list[Path] = []
    probe = sources.probe_duration
    monkeypatch.setattr(sources, "probe_duration", lambda v: (probed.append(v), probe(v))[1])
    left_out: list[str] = []
    kept = load_examples(text, config_of(root), None, left_out=left_out)
    assert sorted(probed) == sorted(
        {e.video for e in examples} - {first, second, examples[-1].video}
    )
    reasons = [line.partition(": ")[2] for line in left_out]
    assert reasons == [
        f"{first}: it is rotated",
        f"{first}: it is rotated",
        "a span starts at 3 s in a video of 2 s",
        f"{examples[-1].video}: by hand",
        f"{examples[-1].video}: by hand",
    ]
    assert len(kept) == 12 - 5

    checked_path(f"{root}/charades.txt").write_text('{"video": "x"}\n')
    with pytest.raises(DataError, match=r"checked.jsonl:1: not a row of opd.check: 'reason'"):
        load_examples(text, config_of(root), None)


def test_a_limit_probes_no_more_than_it_needs(root, monkeypatch):
    monkeypatch.setattr(sources, "PROBE_CHUNK", 2)
    probed: list[Path] = []
    probe = sources.probe_duration
    monkeypatch.setattr(sources, "probe_duration", lambda v: (probed.append(v), probe(v))[1])
    assert len(load_examples(f"charades:{root}/charades.txt", config_of(root), 3)) == 3
    assert len(probed) == 2


def test_every_format_can_be_configured():
    assert tuple(FORMATS) == data.FORMATS
    for name in FORMATS:
        assert DataConfig(format=name).format == name


VIDEOS = [video for video in range(12) for _ in range(1 + video % 5)]  # 1 to 5 queries each


@pytest.mark.parametrize("size", [2, 4])
def test_queries_about_one_video_are_scheduled_together(size: int) -> None:
    positions = [range(0, 16, 2)[:4], range(0, 16, 2)[4:], range(1, 16, 2)[:4], range(1, 16, 2)[4:]]
    options = {"videos": VIDEOS, "queries_per_video": size, "micro_batches": positions}
    plan = schedule(len(VIDEOS), 40, 16, 3, **options)
    assert plan == schedule(len(VIDEOS), 40, 16, 3, **options)
    assert plan != schedule(len(VIDEOS), 40, 16, 4, **options)
    number = len(VIDEOS)
    order = [index for batch in plan for own in positions for index in [batch[i] for i in own]]
    for epoch in range(len(order) // number):
        assert sorted(order[epoch * number : (epoch + 1) * number]) == list(range(number))
    groups = []
    for batch in plan:
        for own in positions:
            videos = [VIDEOS[batch[i]] for i in own]
            runs = [len(list(run)) for _, run in groupby(videos)]
            assert sum(runs) == 4
            groups += runs
    # 12 videos with 34 queries make 24 groups of at most 2, or 15 of at most 4; few are divided.
    assert sum(groups) / len(groups) > 0.85 * number / {2: 21, 4: 14}[size]


def test_scheduled_groups_keep_the_shares_of_weights() -> None:
    weights = [1.0 if video < 6 else 3.0 for video in VIDEOS]
    heavy = sum(w for w in weights if w == 3) / sum(weights)
    options = {"videos": VIDEOS, "queries_per_video": 4, "micro_batches": [range(8), range(8, 16)]}
    plan = schedule(len(VIDEOS), 60, 16, 0, weights, **options)
    drawn = 0
    for step, batch in enumerate(plan):
        drawn += sum(weights[i] == 3 for i in batch)
        assert abs(drawn - heavy * 16 * (step + 1)) <= 4  # a group


def test_a_micro_batch_of_one_takes_the_plain_order():
    """Four queries about each video: without the key they are not kept together."""
    config = Config(batch_size=8, micro_batch_size=1, data=DataConfig(prompt="{video}{query}"))
    examples = [
        Example(id=f"{k}", video=Path(f"{k // 4}.mp4"), query="q", spans=(), duration_s=None)
        for k in range(64)
    ]
    plan = plan_steps(config, examples, range(64), 8, 0)
    assert [i for step in plan for own in step for i in own] == shuffled(64, 0, 0)


@pytest.mark.parametrize("queries", [4, 2, None])
def test_groups_that_are_not_full_are_said(queries, capsys):
    """Twelve videos with two queries each, in steps of three videos."""
    chosen = DataConfig(prompt="{video}{query}", queries_per_video=queries)
    config = Config(batch_size=6, data=chosen)
    examples = [
        Example(id=f"{video}.{k}", video=Path(f"{video}.mp4"), query="q", spans=(), duration_s=None)
        for video in range(12)
        for k in range(2)
    ]
    plan = plan_steps(config, examples, range(24), 4, 0)
    assert sorted(i for ((*own,),) in plan for i in own) == list(range(24))
    assert all(own[::2] == [i ^ 1 for i in own[1::2]] for ((*own,),) in plan)
    said = capsys.readouterr().err
    expected = "data.queries_per_video=4: 2.0 queries on average" if queries == 4 else ""
    assert said.startswith(expected) and bool(said) == bool(expected)
    assert chosen.group_size == (queries or 4)

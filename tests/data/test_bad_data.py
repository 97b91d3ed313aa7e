"""Unusable data is reported with file and place and left out; all other data is unaffected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.config.data import DataConfig
from opd.data.examples import Example
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.data.video import frames
from opd.errors import DataError
from opd.models.load import prepare
from opd.models.tiny import build, processor
from tests.videos import one_query_each


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    one_query_each(root, 5)
    return root


def config_of(root: Path, format: str = "timerft") -> DataConfig:
    return DataConfig(video_root=str(root), format=format)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_video(path: Path) -> None:
    path.write_text("<html>404</html>")


def truncated(path: Path) -> None:
    # The index comes first in the file, as downloads are; then the end is missing.
    with av.open(str(path)) as source, av.open(str(path) + ".mp4", "w") as out:
        out.options["movflags"] = "faststart"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = Path(str(path) + ".mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def no_frames(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.width = stream.height = 64  # type: ignore[attr-defined]
        out.start_encoding()


def sound_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        for packet in stream.encode(None):
            out.mux(packet)
        out.start_encoding()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            Path.unlink,
            "no video 'eval/eval-00002.mp4' in {root}, nor with .mp4, .mkv, .webm, .avi, .mov",
        ),
        (empty, "{video}: the video file is empty"),
        (no_video, "{video}: not a readable video: Invalid data found when processing input"),
        (truncated, "{video}: truncated, "),
        (no_frames, "{video}: no"),
        (sound_only, "{video}: no"),
    ],
    ids=["missing", "empty", "no video", "truncated", "no frames", "sound only"],
)
def test_an_unusable_video_is_left_out(
    damage: Callable[[Path], Any], message: str, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    root = tmp_path / "copy"
    annotations, video = root / "eval-5.json", root / "eval" / "eval-00002.mp4"
    damage(video)
    left_out: list[str] = []
    examples = load_examples(str(annotations), config_of(root), None, ["spans"], left_out)
    assert [e.id for e in examples] == [f"eval-0000{k}" for k in (0, 1, 3, 4)]
    (line,) = left_out
    assert line.startswith(f"{annotations}:2: {message.format(video=video, root=root)}")
    assert "\n" not in line


def edited(root: Path, tmp_path: Path, **fields: Any) -> list[str]:
    records = json.loads((root / "eval-5.json").read_text())
    records[2] = {k: v for k, v in (records[2] | fields).items() if v is not None}
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(records))
    left_out: list[str] = []
    examples = load_examples(str(path), config_of(root), None, ["spans"], left_out)
    assert [e.id for e in examples] == [f"eval-0000{k}" for k in (0, 1, 3, 4)]
    return [line.removeprefix(f"{path}:2: ") for line in left_out]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timestamp": [5.0, 2.0]}, "span 5 to 2 is not 0 <= start < end"),
        ({"timestamp": [-1.0, 2.0]}, "span -1 to 2 is not 0 <= start < end"),
        ({"timestamp": [13.0, 14.0]}, "a span starts at 13 s in a video of 12 s"),
        ({"timestamp": [13.0, 14.0], "duration": 20}, "a span starts at 13 s in a video of 12 s"),
        ({"answer": "yes", "timestamp": None}, "has no spans"),
        ({"qid": "eval-00000"}, "duplicate id 'eval-00000', first used at {path}:0"),
        ({"sentence": "  "}, '"sentence" is empty'),
    ],
)
def test_an_unusable_record_is_left_out(
    fields: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    expected = message.format(path=tmp_path / "edited.json")
    assert edited(root, tmp_path, **fields) == [expected]


def test_nothing_usable_is_an_error(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.json"
    records = json.loads((root / "eval-5.json").read_text())
    path.write_text(json.dumps([record | {"video": "gone"} for record in records]))
    with pytest.raises(DataError) as caught:
        load_examples(str(path), config_of(root), None)
    assert str(caught.value).startswith(
        f"{path}: no usable example; first of 5 left out: {path}:0: no video 'gone' in {root}"
    )


@pytest.fixture
def prompts(root: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    """Clips 1 and 2 have a header like any other, but their frames do not decode."""
    sample_frames = frames.sample_frames

    def failing(video: Path, **options: Any) -> Any:
        if video.stem in ("eval-00001", "eval-00002"):
            raise DataError(f"{video}: decord cannot decode it: broken")
        return sample_frames(video, **options)

    monkeypatch.setattr(frames, "sample_frames", failing)
    examples = load_examples(str(root / "eval-5.json"), config_of(root), None)
    return Prompts(examples, config_of(root), processor(), prepare(build("student", seed=0)))


def test_refill_takes_the_next_usable_example(prompts: Prompts, root: Path) -> None:
    plan = [[0, 1], [2, 4], [3, 1]]
    prepared = batches(prompts, plan, refill=True)
    seen = [sorted(p.example.id for p in b.prompts) for b in prepared]
    assert seen == [["eval-00000", "eval-00003"], ["eval-00003", "eval-00004"], ["eval-00003"] * 2]
    assert sorted(prompts.broken) == [1, 2]
    video = root / "eval" / "eval-00001.mp4"
    assert (
        prompts.broken[1] == f"{root / 'eval-5.json'}:1: {video}: decord cannot decode it: broken"
    )


def test_without_refill_it_is_left_out(prompts: Prompts) -> None:
    prepared = batches(prompts, [[0, 1], [2], [3, 4]])
    seen = [sorted(p.example.id for p in b.prompts) for b in prepared]
    assert seen == [["eval-00000"], ["eval-00003", "eval-00004"]]


def test_no_video_that_decodes_is_an_error(prompts: Prompts) -> None:
    broken = Prompts(prompts.examples[1:3], prompts.config, prompts.processor, prompts.lm)
    with pytest.raises(DataError, match=r"none of 2 videos decodes; .*eval-00001\.mp4: decord"):
        list(batches(broken, [[0]], refill=True))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def timerft(e: Example) -> Any:
    span = list(e.spans[0])
    return {
        "video": f"eval/{e.video.name}",
        "duration": 12.0,
        "timestamp": span,
        "sentence": e.query,
        "qid": e.id,
    }


def qvhighlights(e: Example) -> Any:
    return {
        "vid": f"eval/{e.video.stem}",
        "duration": 12,
        "relevant_windows": [list(e.spans[0])],
        "query": e.query,
        "qid": e.id,
    }


def activitynet(e: Example) -> Any:
    return {"duration": 12.0, "timestamps": [list(e.spans[0])], "sentences": [e.query]}


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(), format=st.sampled_from(["timerft", "qvhighlights", "activitynet", "charades"])
)
@pytest.mark.slow
def test_an_edit_touches_its_own_example_only(data: st.DataObject, format: str, root: Path) -> None:
    originals = load_examples(str(root / "eval-5.json"), config_of(root), None)
    path = root / "fuzzed"
    position = data.draw(st.integers(0, 4))
    if format == "charades" or data.draw(st.booleans()):  # characters of one line
        lines = []
        for number, e in enumerate(originals):
            if format == "charades":
                line = "eval/{} {} {}##{}".format(e.video.stem, *e.spans[0], e.query)
            elif format == "activitynet":
                line = f"{json.dumps(f'eval/{e.video.stem}')}: {json.dumps(activitynet(e))}"
            else:
                line = json.dumps({"timerft": timerft, "qvhighlights": qvhighlights}[format](e))
            if number == position:
                at = data.draw(st.integers(0, len(line)))
                gone = data.draw(st.integers(0, 5))
                characters = st.characters(exclude_characters="\n", exclude_categories=["Cs"])
                line = line[:at] + data.draw(st.text(characters, max_size=4)) + line[at + gone :]
            lines.append(line)
        opening, joint, closing = {
            "timerft": ("[\n", ",\n", "\n]"),
            "activitynet": ("{\n", ",\n", "\n}"),
        }.get(format, ("", "\n", ""))
        path.write_text(opening + joint.join(lines) + closing, "utf-8")
    else:  # a value of one record
        write: Callable[[Example], Any] = {
            "timerft": timerft,
            "qvhighlights": qvhighlights,
            "activitynet": activitynet,
        }[format]
        records = [write(e) for e in originals]
        key = data.draw(st.sampled_from(sorted(records[0])))
        records[position][key] = data.draw(JSON)
        if format == "activitynet":
            path.write_text(
                json.dumps(
                    {f"eval/{e.video.stem}": r for e, r in zip(originals, records, strict=True)}
                )
            )
        elif format == "timerft":
            path.write_text(json.dumps(records))
        else:
            path.write_text("\n".join(map(json.dumps, records)))
    left_out: list[str] = []
    try:
        examples = load_examples(str(path), config_of(root, format), None, ["spans"], left_out)
    except DataError as error:  # the file as a whole, which only one JSON text can be
        assert format in ("timerft", "activitynet")
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert all(line.startswith(f"{path}:") and "\n" not in line for line in left_out)
    assert len(examples) + len(left_out) >= 5
    for number, original in enumerate(originals):
        same = [
            e
            for e in examples
            if (e.video, e.query, e.spans) == (original.video, original.query, original.spans)
        ]
        # Only an id that the edit gave away can cost another example its place.
        assert same or number == position or any("duplicate id" in line for line in left_out)


def test_the_limit_counts_usable_examples(root: Path, tmp_path: Path) -> None:
    records = json.loads((root / "eval-5.json").read_text())
    records[0]["video"] = "gone"
    path = tmp_path / "limited.json"
    path.write_text(json.dumps(records))
    examples = load_examples(str(path), config_of(root), 2)
    assert [e.id for e in examples] == ["eval-00001", "eval-00002"]

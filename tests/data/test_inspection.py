"""`python -m opd.check` reports what is wrong with a data set before training."""

import json
import shutil
import time
from pathlib import Path

import pytest

from opd.check import main
from opd.config.data import DataConfig
from opd.data.checked import checked_path
from opd.data.inspection import inspect_video
from opd.data.sources import load_examples
from tests.videos import one_query_each, write_coded


def clip(path: Path, times_ms: list[int]) -> Path:
    """Write a video of 64 x 48 pixels with frames at these times."""
    return write_coded(path, len(times_ms), pts_ms=times_ms, size=(48, 64))


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Path:
    """Charades annotations of six clips, some of them damaged."""
    one_query_each(videos, 6)
    shutil.copytree(videos / "eval", tmp_path / "clips")
    names = sorted(path.stem for path in (tmp_path / "clips").glob("*.mp4"))[:6]
    (tmp_path / "clips" / f"{names[1]}.mp4").write_bytes(b"")
    whole = (tmp_path / "clips" / f"{names[2]}.mp4").read_bytes()
    (tmp_path / "clips" / f"{names[2]}.mp4").write_bytes(whole[: len(whole) // 2])
    spans = [(1, 2), (1, 2), (1, 2), (50, 60), (3, 40), (2, 5)]
    lines = [f"{n} {a} {b}##thing." for n, (a, b) in zip(names, spans, strict=True)]
    (tmp_path / "a.txt").write_text("\n".join([*lines, "gone 1 2##x", "nonsense"]))
    return tmp_path / "a.txt"


def test_a_data_set_is_inspected(data, capsys):
    keys = [f"data.video_root={data.parent / 'clips'}"]
    main([f"charades:{data}", *keys])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{data}: 3 usable examples of 6 read, 4 usable videos of 6"
    for part in (
        "  2 records left out:",
        f"    {data}:7: no video 'gone'",
        "  2 videos that cannot be used:",
        "the video file is empty",
        "  1 spans that start after the video's end (left out):",
        f"    {data}:4: 50 to 60 s in 12.0 s",
        "  1 spans that end after the video's end (cut there):",
        "  vision tokens of a video: 96 to 96, median 96",
    ):
        assert any(part in line for line in lines), part
    assert "6/6" in err
    assert Path(f"{data}.checked.png").stat().st_size > 1000
    rows = [json.loads(line) for line in checked_path(data).read_text().splitlines()]
    assert [bool(row["reason"]) for row in rows] == [False, True, True, False, False, False]
    # Training leaves out the same examples, without probing again.
    left_out: list[str] = []
    config = DataConfig(video_root=str(data.parent / "clips"))
    examples = load_examples(f"charades:{data}", config, None, left_out=left_out)
    assert len(examples) == 3 and len(left_out) == 5
    # A file that has changed since is probed again.
    good, bad = Path(rows[0]["video"]), Path(rows[1]["video"])
    shutil.copy(good, bad)
    assert len(load_examples(f"charades:{data}", config, None)) == 4


@pytest.mark.slow
def test_a_configuration_is_inspected_and_leaks_are_reported(data, capsys):
    source = f"charades:{data}?root={data.parent / 'clips'}"
    arguments = [f"data.train={source}", f"data.eval={source}", "data.video_tokens=96"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.splitlines()[-1].startswith("error: data.eval: 3 of its videos are trained on: ")
    main([*arguments, "data.allow_leak=true"])
    out = capsys.readouterr().out
    assert out.count("usable examples of") == 2 and "1 devices of" in out
    main([f"data.train={data}.gone", *arguments[1:]])
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"data not inspected: data.train: {data}.gone: no such annotation file"


def test_a_variable_frame_rate_is_reported(tmp_path):
    even = clip(tmp_path / "even.mkv", list(range(0, 4000, 40)))
    uneven = clip(tmp_path / "uneven.mkv", [*range(0, 2000, 40), *range(2000, 6000, 200)])
    assert not inspect_video(even, "decord")["variable_rate"]
    row = inspect_video(uneven, "decord")
    assert row["variable_rate"] and row["reason"] is None
    assert (row["width"], row["height"], row["frames"]) == (64, 48, 70)


@pytest.mark.parametrize("backend", ["decord", "pyav", "torchcodec", "auto"])
def test_a_rotated_video_is_reported(tmp_path, backend):
    path, turned = clip(tmp_path / "a.mp4", list(range(0, 2000, 40))), tmp_path / "b.mp4"
    # The track header's matrix turns the picture by 90 degrees.
    data = path.read_bytes()
    unit = (0x10000).to_bytes(4)
    plain = unit + bytes(12) + unit + bytes(12) + (0x40000000).to_bytes(4)
    at = data.rindex(plain, 0, data.rindex(b"mdia"))
    quarter = bytes(4) + unit + bytes(4) + (-0x10000 % 2**32).to_bytes(4) + bytes(16)
    turned.write_bytes(data[:at] + quarter + (0x40000000).to_bytes(4) + data[at + 36 :])
    row = inspect_video(turned, backend)
    assert abs(row["rotation"]) == 90
    assert (row["reason"] is not None) == (backend == "decord")


def test_a_source_without_usable_examples_is_an_error(tmp_path, capsys):
    (tmp_path / "x.mp4").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("x 1 2##q.")
    with pytest.raises(SystemExit) as caught:
        main([f"charades:{tmp_path}/a.txt", f"data.video_root={tmp_path}"])
    assert caught.value.code == 2
    assert f"{tmp_path}/a.txt: no example can be used" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([f"{tmp_path}/b.txt"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == f"error: {tmp_path}/b.txt: no such annotation file\n"


@pytest.mark.slow
def test_a_thousand_small_files_within_a_minute(tmp_path, capsys):
    first = clip(tmp_path / "0.mp4", list(range(0, 4000, 40)))
    for number in range(1, 1000):
        shutil.copy(first, tmp_path / f"{number}.mp4")
    (tmp_path / "a.txt").write_text("\n".join(f"{n} 1 2##q." for n in range(1000)))
    begun = time.perf_counter()
    main([f"charades:{tmp_path}/a.txt", f"data.video_root={tmp_path}"])
    assert time.perf_counter() - begun < 60
    assert "1000 usable examples of 1000 read" in capsys.readouterr().out

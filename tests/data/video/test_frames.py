"""Frames for the loader are the same from workers, from the disk cache and from this process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.config.data import DataConfig
from opd.config.run import load_config
from opd.data.batch import group_prompts
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.schedule import plan_steps
from opd.data.sources import load_examples
from opd.data.video import frames as source
from opd.data.video.budget import target_size
from opd.data.video.frames import Frames
from opd.data.video.sampling import sample_frames
from opd.errors import ConfigError, DataError
from opd.models.load import prepare
from opd.models.tiny import processor
from tests.helpers import build
from tests.videos import decoded_numbers, real_video_folder, write_coded, write_turned


def prompts_of(videos: Path, family: str = "qwen3_vl", **more: Any) -> Prompts:
    config = DataConfig(video_root=str(videos), cache_mb=0, fps=2, **more)
    examples = load_examples("synthetic:eval", config, 6)
    return Prompts(examples, config, processor(family), prepare(build("student", family=family)))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "limits",
    [{}, {"video_tokens": 24}, {"video_tokens": 60, "min_frame_tokens": 1, "max_frame_tokens": 2}],
    ids=["own", "video", "frame"],
)
def test_workers_change_nothing(videos, family, limits):
    plan = [[0, 1], [2, 1], [5, 4], [3, 3]]
    expected = list(batches(prompts_of(videos, family, **limits), plan))
    mine = prompts_of(videos, family, **limits, workers=2)
    for batch, stock in zip(batches(mine, plan), expected, strict=True):
        assert torch.equal(batch.input_ids, stock.input_ids)
        assert torch.equal(batch.pixel_values, stock.pixel_values)
        assert torch.equal(batch.position_ids, stock.position_ids)
        assert [p.timestamps_s for p in batch.prompts] == [p.timestamps_s for p in stock.prompts]
    assert mine._source.decoders is not None
    mine._source.decoders.close()


def test_large_frames_come_scaled_as_the_processor_would(tmp_path):
    video = real_video_folder() / "bikes.mp4"
    record = {"video": "bikes.mp4", "duration": 10, "timestamp": [1, 2], "sentence": "x", "qid": 1}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    shutil.copy(video, tmp_path)
    stock_processor, lm = processor("qwen3_vl"), prepare(build("student"))
    results = []
    for workers in (0, 1):
        config = DataConfig(
            video_root=str(tmp_path), workers=workers, video_tokens=64, max_frames=8, cache_mb=0
        )
        prompts = Prompts(
            load_examples(f"{tmp_path}/a.json", config, None), config, stock_processor, lm
        )
        results.append((prompts.frames(0).frames.shape[2:], prompts[0]))
    (whole, stock), (scaled, mine) = results
    assert whole.numel() > 4 * scaled.numel()
    assert torch.equal(stock.pixel_values, mine.pixel_values)
    assert torch.equal(stock.input_ids, mine.input_ids)


def test_a_recipe_replaces_defaults_alone():
    keys = ["data.recipe=timelens_8b", "data.max_frames=100"]
    data = load_config(keys).data
    values = (data.fps, data.max_frames, data.video_tokens, data.min_frame_tokens)
    assert values == (2.0, 100, 14_336, 64) and data.max_frame_tokens == 768
    # By hand: 100 frames of 2,000 x 1,000. 14,336 tokens of two frames are 286 a frame, and 11 x 23
    # is the largest grid of the frame's shape in it.
    prompts = prompts_of_recipe(data, "qwen3_vl")
    height, width = target_size(100, 1000, 2000, prompts._budget(100))
    assert (height // 32, width // 32) == (11, 23)
    # The least of a frame wins over the video's limit, which leaves 1,000 frames 28 tokens each:
    # 67 (1.05 x 64, as qwen-vl-utils has it) hold 5 x 11.
    height, width = target_size(1000, 1000, 2000, prompts._budget(1000))
    assert (height // 32, width // 32) == (5, 11)
    # A key that is set wins, even with the value of the plain default.
    keys = ["data.recipe=timelens_7b", "data.max_frames=768", "data.timestamps=processor"]
    data_7b = load_config(keys).data
    assert (data_7b.max_frames, data_7b.timestamps, data_7b.fps) == (768, "processor", 2.0)
    assert load_config(keys[:1]).data == DataConfig.of_recipe("timelens_7b")
    with pytest.raises(ConfigError) as caught:
        prompts_of_recipe(data, "qwen2_5_vl")
    message = "data.recipe=timelens_8b: is for qwen3_vl, the student is qwen2_5_vl"
    assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"data\.max_frame_tokens=5: needs data\.video_tokens"):
        load_config(["data.max_frame_tokens=5"])


def prompts_of_recipe(data: DataConfig, family: str) -> Prompts:
    return Prompts([], data, processor(family), prepare(build("student", family, seed=0)))


def test_expected_videos_are_decoded_ahead_up_to_the_limit(videos, monkeypatch):
    config = DataConfig(video_root=str(videos), workers=2, fps=2, prefetch_mb=1)
    examples = load_examples("synthetic:eval", config, 6)
    footage = [example.footage for example in examples]
    frames = Frames(config)
    frames.expect(footage)
    assert list(frames._pending) == footage[:2], "as many as there are workers, of unknown size"
    first = frames.get(footage[0])
    assert torch.equal(first.frames, sample_frames(footage[0][0], **frames.sampling).frames)
    room = 2**20 // first.frames.nbytes
    assert 2 < room < 5
    frames.expect(footage[1:])
    assert len(frames._pending) == room
    frames.expect(footage[5:])
    assert list(frames._pending) == footage[5:], "what is no longer expected is forgotten"
    assert frames.decoders is not None
    frames.decoders.close()


def test_frames_are_kept_between_runs(videos, tmp_path, monkeypatch):
    plan = [[0, 1], [2, 0]]
    stock = list(batches(prompts_of(videos), plan))
    for attempt in range(2):
        prompts = prompts_of(videos, frame_cache=str(tmp_path / "cache"))
        if attempt:
            monkeypatch.setattr(source, "sample_frames", None)  # not called again
        for batch, expected in zip(batches(prompts, plan), stock, strict=True):
            assert torch.equal(batch.pixel_values, expected.pixel_values)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_pyav_decodes_for_decord_is_counted_and_said(tmp_path, capsys, workers):
    turned = write_turned(tmp_path / "turned.mp4")
    names = [write_coded(tmp_path / "plain.mp4", 30).name, turned.name]
    fields = {"duration": 1, "timestamp": [0, 0.1], "sentence": "x"}
    records = [fields | {"video": name, "qid": k} for k, name in enumerate([*names, *names])]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = DataConfig(
        video_root=str(tmp_path), workers=workers, backend="auto", cache_mb=0, fps=25
    )
    examples = load_examples(f"{tmp_path}/a.json", config, None)
    prompts = Prompts(examples, config, processor("qwen3_vl"), prepare(build("student")))
    assert prompts.usable(0, []) is not None and prompts.left_out() == []
    assert "data.backend" not in capsys.readouterr().err
    assert all(prompts.usable(index, []) is not None for index in range(4))
    assert prompts.left_out() == []
    assert capsys.readouterr().err == (
        f"data.backend=auto: pyav decoded 1 of the videos, which decord cannot, first {turned}\n"
    )
    if prompts._source.decoders is not None:
        prompts._source.decoders.close()


def test_a_video_that_does_not_decode_is_named(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    write_coded(tmp_path / "y.mp4", 30)
    frames = Frames(DataConfig(workers=1))
    frames.expect([(tmp_path / "x.mp4", None), (tmp_path / "y.mp4", None)])
    with pytest.raises(DataError, match=r"x\.mp4: not a readable video"):
        frames.get((tmp_path / "x.mp4", None))
    assert frames.get((tmp_path / "y.mp4", None)).source_frames == 30
    assert frames.decoders is not None
    frames.decoders.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_of_one_file_are_different_videos(tmp_path, monkeypatch, workers):
    write_coded(tmp_path / "long.mp4", 100)
    fields = {"video": "long", "duration": 1.5, "timestamp": [0, 1], "sentence": "x"}
    clips = [(0.5, 2), (2.3, 3.8), (0.5, 2)]
    records = [
        fields | {"qid": k, "video_start": start_s, "video_end": end_s}
        for k, (start_s, end_s) in enumerate(clips)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = DataConfig(
        video_root=str(tmp_path), workers=workers, fps=5, frame_cache=str(tmp_path / "cache")
    )
    examples = load_examples(f"{tmp_path}/a.json", config, None)
    assert [e.duration_s for e in examples] == [1.5] * 3
    lm = prepare(build("student").requires_grad_(False))  # frozen: vision tokens are kept
    for attempt in range(2):
        prompts = Prompts(examples, config, processor("qwen3_vl"), lm)
        if attempt:  # from the cache
            monkeypatch.setattr(source, "sample_frames", None)
        for index, (start_s, _) in enumerate(clips):
            # Frame k is on screen from k / 25 s on.
            numbers = decoded_numbers(prompts.frames(index).frames)
            times_s = prompts.frames(index).times_s
            assert numbers == [int((start_s + t) * 25 + 1e-6) for t in times_s]
            assert times_s[0] == pytest.approx(0, abs=1 / 25)
            assert times_s[-1] == pytest.approx(1.5, abs=1 / 25)
            prompt = prompts.prompt_for(index, [lm])
            text = prompts.tokenizer.decode(prompt.input_ids)
            assert all(f"<{t:.1f} seconds>" in text for t in prompt.timestamps_s)
            assert prompt.timestamps_s[-1] < 1.5
        first, second, third = (prompts.prompt_for(k, [lm]) for k in range(3))
        assert first.features is third.features and first.features is not second.features
        groups = group_prompts([first, third, second], None, lm.model.config.video_token_id)
        assert [len(group.prompts) for group in groups] == [2, 1]
        if prompts._source.decoders is not None:
            prompts._source.decoders.close()
    assert len(list((tmp_path / "cache").glob("*.frames"))) == 2
    # Every step draws all three queries, those of one video one after the other.
    config = load_config(["batch_size=3", "data.queries_per_video=2", "data.prompt=video_first"])
    plan = plan_steps(config, examples, range(3), 8, 0)
    assert all(sorted(batch) == [0, 1, 2] and batch[1] != 1 for (batch,) in plan)


def prompts_of_a_clip(folder: Path, data: DataConfig | None = None, **more: Any) -> Prompts:
    """Prompts for Qwen2.5-VL about 4 s of 25 frames a second."""
    write_coded(folder / "x.mp4", 100)
    (folder / "a.txt").write_text("x 1.0 2.5##a cat runs.")
    config = replace(data or DataConfig(), video_root=str(folder), **more)
    examples = load_examples(f"charades:{folder}/a.txt", config, None)
    lm = prepare(build("student", family="qwen2_5_vl"))
    return Prompts(examples, config, processor("qwen2_5_vl"), lm)


def test_times_as_text_before_the_frames_of_qwen2_5_vl(tmp_path):
    recipe = DataConfig.of_recipe("timelens_7b")
    prompts = prompts_of_a_clip(tmp_path, recipe, prompt="timelens_7b")
    assert prompts.config.timestamps == "text"
    prompt = prompts[0]
    # 8 of 100 frames, 99 / 7 apart: 0, 14, 28, 42, 57, 71, 85, 99; the first of each pair has the
    # time. A frame has at least 64 tokens: 48 x 64 pixels, times 4.04, are 7 x 10 of them.
    assert prompts.frames(0).indices == [0, 14, 28, 42, 57, 71, 85, 99]
    pair = "<|vision_start|>" + "<|video_pad|>" * 70 + "<|vision_end|>"
    expected = (
        f"<|im_start|>user\n0.0{pair}1.1{pair}2.3{pair}3.4{pair}Before every frame stands its time "
        "in seconds. Which part of the video shows this: 'a cat runs'? Tell its start and end time "
        "in this form: 'The event happens in <start time> - <end time> seconds'.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.grid_thw == (4, 14, 20)
    assert prompt.input_ids.tolist() == prompts.tokenizer(expected).input_ids
    positions, _ = prompts.lm.positions(prompt.input_ids, prompt.grid_thw, None)
    assert torch.equal(prompt.position_ids, positions)
    # Without the setting, the frames are one segment.
    sizes = {"video_tokens": 14_336, "min_frame_tokens": 64, "max_frame_tokens": 768}
    plain = prompts_of_a_clip(tmp_path, fps=2, prompt="timelens_7b", **sizes)[0]
    text = prompts.tokenizer.decode(plain.input_ids)
    assert text.count("<|vision_start|>" + "<|video_pad|>" * 280 + "<|vision_end|>") == 1
    assert torch.equal(plain.pixel_values, prompt.pixel_values)
    with pytest.raises(ConfigError, match=r"data\.timestamps=text: is for qwen2_5_vl, the student"):
        prompts_of_recipe(DataConfig(timestamps="text"), "qwen3_vl")


def test_seconds_per_patch_of_qwen2_5_vl(tmp_path):
    prompts = prompts_of_a_clip(tmp_path, fps=2)
    frames, tokens = prompts.frames(0), prompts.lm.model.config.video_token_id
    # 8 frames of 4 s are 2 a second, so that a patch covers 1 s: 2 positions. By their times, they
    # are 99 / 7 / 25 s apart.
    assert frames.patch_seconds("processor") == 1
    assert frames.patch_seconds("times") == pytest.approx(2 * 99 / 7 / 25)
    stock = prompts.processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[frames.frames],
        video_metadata=[frames.metadata()],
        do_sample_frames=False,
    )
    assert [float(s) for s in stock["second_per_grid_ts"]] == [1.0]
    # Frames 25 to 75, both included, are a little more than the two seconds between them.
    clip = sample_frames(tmp_path / "x.mp4", fps=2, max_frames=768, clip=(1, 3))
    assert clip.patch_seconds("processor") == pytest.approx(2 * 51 / 25 / 4)
    assert 2 / clip.metadata().sampled_fps == pytest.approx(clip.patch_seconds("processor"))
    steps = {}
    for rule in ("processor", "times"):
        prompt = prompts_of_a_clip(tmp_path, fps=0.5, patch_seconds=rule)[0]
        is_video = prompt.input_ids == tokens
        rows = prompt.position_ids[0][is_video]
        steps[rule] = [int(r - rows[0]) for r in rows[:: len(rows) // prompt.grid_thw[0]]]
    # 4 frames of 4 s: 2 s or 2 x 33 / 25 = 2.64 s a patch; 4 or floor(5.28) positions.
    assert steps == {"processor": [0, 4], "times": [0, 5]}

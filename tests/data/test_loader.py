"""Prompts and batches: models see the decoded frames, in a reproducible order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.config.data import DataConfig
from opd.data.annotations.write import write_timerft
from opd.data.batch import collate
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.schedule import schedule
from opd.data.sources import load_examples
from opd.errors import DataError
from opd.generation.prefix import encode
from opd.models.load import prepare
from opd.models.tiny import build, processor
from opd.models.video_lm import VideoLM


@pytest.fixture(scope="module")
def lm() -> VideoLM:
    return prepare(build("student", 0))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, lm: VideoLM) -> Prompts:
    config = DataConfig(video_root=str(tmp_path_factory.mktemp("videos")))
    return Prompts(load_examples("synthetic:eval", config, 6), config, processor(), lm)


def test_the_prompt_reads_as_the_chat_template_writes_it(prompts: Prompts) -> None:
    prompt = prompts[0]
    text = prompts.tokenizer.decode(prompt.input_ids)
    example = prompt.example
    assert text.startswith(f"<|im_start|>user\n{example.query}. When?<|vision_start|><0.1 seconds>")
    assert text.endswith("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    for time in prompt.timestamps_s:
        assert f"<{time:.1f} seconds><|vision_start|>" in text
    assert text.count("<|video_pad|>") == 24 * 4 == len(prompt.pixel_values) // 4
    answer = prompts.tokenizer.decode(prompt.completion_ids)
    start, end = example.spans[0]
    assert answer == f"From {start:.1f} to {end:.1f} seconds.<|im_end|>"


def test_a_question_is_answered_in_words(prompts: Prompts, lm: VideoLM) -> None:
    example = replace(
        prompts.examples[0], question="is a {query} {video} visible", answer="no.", spans=()
    )
    prompt = Prompts([example], prompts.config, processor(), lm)[0]
    text = prompts.tokenizer.decode(prompt.input_ids)
    assert text.startswith("<|im_start|>user\nis a {query} {video} visible?<|vision_start|>")
    assert prompts.tokenizer.decode(prompt.completion_ids) == "no.<|im_end|>"


def test_digits_are_single_tokens(prompts: Prompts) -> None:
    tokens = prompts.tokenizer.tokenize("From 13.4 to 107.1 seconds.")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("1341071")


def test_frames_are_the_decoded_ones(prompts: Prompts) -> None:
    decoded = prompts.frames(1)
    pixels = prompts[1].pixel_values
    # Flattened from [time, block row, block column, row, column, channel, frame of pair, 16, 16].
    first = pixels.view(24, 2, 2, 2, 2, 3, 2, 16, 16).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    rebuilt = first.reshape(48, 3, 64, 64) * 127.5 + 127.5
    assert (rebuilt - decoded.frames.float()).abs().max() < 1e-3


def test_a_frame_cache_changes_nothing(prompts: Prompts, lm: VideoLM) -> None:
    config = DataConfig(video_root=prompts.config.video_root, cache_mb=0)
    uncached = Prompts(prompts.examples, config, processor(), lm)
    again = prompts[2]
    assert not uncached._frames and torch.equal(uncached[2].pixel_values, again.pixel_values)
    assert uncached[2].frame_indices == again.frame_indices


@torch.no_grad()
def test_vision_tokens_are_made_once_and_kept_up_to_the_limit(
    prompts: Prompts, lm: VideoLM
) -> None:
    frozen = VideoLM(lm.model.requires_grad_(False))
    plan = [[0, 1, 2], [3, 4], [2, 0], [1, 5], [5, 5]]
    room_for_four = 5 * frozen.video_bytes(prompts[0].grid_thw) - 1
    results: dict[int, list[torch.Tensor]] = {}
    for room in (0, room_for_four):
        mine = Prompts(prompts.examples, prompts.config, processor(), frozen)
        mine._free = room
        results[room] = []
        without_frames = []
        for batch in batches(mine, plan, models=[frozen], ahead=1):
            embeds, levels = encode(frozen, batch)
            results[room] += [embeds, *levels]
            by_id = sorted(batch.prompts, key=lambda p: p.example.id)
            without_frames += [p.pixel_values is None for p in by_id]
        expected = [False] * 5 + ([True] * 3 if room else [False] * 3) + [False] * 2 + [True]
        assert without_frames == expected, (
            "videos 0 to 3 fit, 4 and 5 do not; the same one twice in a batch"
        )
        assert not mine._frames
    assert all(map(torch.equal, results[0], results[room_for_four]))
    first = sorted((prompts[i] for i in plan[0]), key=lambda p: len(p.input_ids))
    together, _ = frozen.encode_video(
        torch.cat([p.pixel_values for p in first]), torch.tensor([p.grid_thw for p in first])
    )
    torch.testing.assert_close(results[0][0], together, atol=1e-5, rtol=1e-5)


def test_collation_pads_on_the_left(prompts: Prompts) -> None:
    items = [prompts[i] for i in range(6)]
    batch = collate(items, prompts.tokenizer.pad_token_id)
    lengths = [len(item.input_ids) for item in items]
    assert len(set(lengths)) > 1, "the case needs unequal prompts"
    for row, item in enumerate(items):
        assert batch.mask[row].sum() == len(item.input_ids)
        assert torch.equal(batch.input_ids[row, batch.mask[row]], item.input_ids)
        assert torch.equal(batch.position_ids[:, row, batch.mask[row]], item.position_ids)
        assert batch.mask[row, -1]
    ids, lengths = batch.references(prompts.tokenizer.pad_token_id)
    assert torch.equal(ids[3, 0, : lengths[3, 0]], items[3].completion_ids)


def test_every_example_once_per_epoch_in_a_reproducible_order() -> None:
    plan = schedule(10, 4, 5, seed=3)
    assert plan == schedule(10, 4, 5, seed=3) != schedule(10, 4, 5, seed=4)
    assert sorted(plan[0] + plan[1]) == sorted(plan[2] + plan[3]) == list(range(10))
    assert plan[0] + plan[1] != plan[2] + plan[3]


def test_prefetching_keeps_the_order(prompts: Prompts) -> None:
    plan = [[0, 1], [5], [2, 3], [4, 0]]
    seen = [[p.example.id for p in batch.prompts] for batch in batches(prompts, plan)]
    assert seen == [[prompts.examples[i].id for i in indices] for indices in plan]


def test_a_broken_video_names_itself(prompts: Prompts, lm: VideoLM, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    examples = [replace(prompts.examples[0], video=broken)]
    with pytest.raises(DataError, match=r"broken\.mp4"):
        list(batches(Prompts(examples, prompts.config, processor(), lm), [[0]]))


def test_sources_are_joined_and_an_id_used_twice_is_left_out(
    prompts: Prompts, tmp_path: Path
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for number, path in enumerate(files):
        write_timerft(path, [prompts.examples[number]], Path(prompts.config.video_root))
    joined = load_examples(",".join(map(str, files)), prompts.config, None)
    assert [e.id for e in joined] == [e.id for e in prompts.examples[:2]]
    left_out: list[str] = []
    twice = load_examples(f"{files[0]},{files[0]}", prompts.config, None, left_out=left_out)
    assert twice == joined[:1]
    assert left_out == [f"{files[0]}:0: duplicate id {joined[0].id!r}, first used at {files[0]}:0"]


def test_an_empty_annotation_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(DataError, match=r"none\.json"):
        load_examples(str(tmp_path / "none.json"), DataConfig(video_root=str(tmp_path)), None)


def test_prompts_of_one_length_come_side_by_side(prompts: Prompts) -> None:
    (batch,) = batches(prompts, [list(range(6))])
    lengths = [len(p.input_ids) for p in batch.prompts]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    parts = batch.parts()
    assert len(parts) == len(set(lengths))
    assert sum((part.prompts for part in parts), ()) == batch.prompts
    for part in parts:
        assert part.mask.all() and part.num_tokens == part.input_ids.numel()
    assert [len(part.prompts) for part in batch.parts(alone=True)] == [1] * 6


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("budget", "side"), [(16 * 8, 4), (9 * 8, 3), (8 * 8, 2), (32, 2)])
def test_frames_are_scaled_down_to_a_budget_of_vision_tokens(
    family: str, budget: int, side: int, tmp_path: Path
) -> None:
    # 16 square frames of 8 x 8 tokens each: by hand, the largest square that keeps the budget.
    stock, factor = processor(family), 32 if family == "qwen3_vl" else 28
    config = DataConfig(video_root=str(tmp_path), video_tokens=budget)
    prompts = Prompts([], config, stock, prepare(build("student", 0, family)))
    size = prompts._budget(16).options["size"]
    assert size["longest_edge"] * (1 if family == "qwen3_vl" else 16) == budget * 2 * factor**2
    video = np.zeros((16, 8 * factor, 8 * factor, 3), np.uint8)
    inputs = stock.video_processor(
        videos=[video], do_sample_frames=False, return_tensors="pt", size=size
    )
    frames, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert (frames, rows // 2, columns // 2) == (8, side, side)


def test_pixels_wait_in_pinned_memory_in_the_towers_dtype(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU the loader's thread rounds and pins them; nothing of them is on the device before a
    vision tower sends for them."""
    lm = prompts.lm
    monkeypatch.setattr(lm.model, "lm_head", torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr("opd.data.loader.pin", lambda x: pinned.append(x) or x)
    monkeypatch.setattr("opd.data.loader.to_device", lambda batch, _: batch)
    (batch,) = batches(prompts, [[0, 1]], "cuda", [lm])
    assert batch.pixel_values.dtype == torch.bfloat16
    assert [x.data_ptr() for x in pinned] == [batch.pixel_values.data_ptr()]
    exact = torch.cat([prompts[prompt_id].pixel_values for prompt_id in (0, 1)])
    assert len(exact) == len(batch.pixel_values)
    parts = batch.parts(alone=True)
    start = batch.pixel_values.data_ptr()
    assert parts[0].pixel_values.data_ptr() == start, "a part's pixels are copied, out of the pin"
    assert sum(len(part.pixel_values) for part in parts) == len(exact)

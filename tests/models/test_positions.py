"""Position ids: by hand for both families, and against the stock rule where that is right."""

import pytest
import torch

from opd.models.positions import qwen2_5_vl_positions, separate_positions
from tests.helpers import make_prompt, ours, stock

VIDEO = 9


def ids(*runs: int) -> torch.Tensor:
    """Token ids of alternating runs: that many words, that many video tokens, words, ..."""
    tokens = [VIDEO if index % 2 else 1 for index, run in enumerate(runs) for _ in range(run)]
    return torch.tensor(tokens)


def test_qwen3_vl_by_hand():
    # 2 words, a pair of 2 rows by 3 columns, 1 word, the second pair, 2 words.
    positions, following = separate_positions(ids(2, 6, 1, 6, 2), VIDEO, (2, 2, 3))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 6, 6, 6, 6, 9, 10],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 6, 7, 7, 7, 9, 10],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 10],
    ]
    assert following == 11


def test_qwen3_vl_more_rows_than_columns_by_hand():
    positions, following = separate_positions(ids(1, 3, 1), VIDEO, (1, 3, 1))
    assert positions.tolist() == [[0, 1, 1, 1, 4], [0, 1, 2, 3, 4], [0, 1, 1, 1, 4]]
    assert following == 5


def test_qwen2_5_vl_by_hand():
    # 2 positions a second and 1.5 s a pair: pairs at 0, 3 and 6; one row, two columns.
    positions, following = qwen2_5_vl_positions(ids(2, 6, 3), VIDEO, (3, 1, 2), 3.0)
    assert positions.tolist() == [
        [0, 1, 2, 2, 5, 5, 8, 8, 9, 10, 11],
        [0, 1, 2, 2, 2, 2, 2, 2, 9, 10, 11],
        [0, 1, 2, 3, 2, 3, 2, 3, 9, 10, 11],
    ]
    # The largest position is 8, a time; text resumes one past it, at 9.
    assert following == 12


def test_qwen2_5_vl_fractions_of_a_position_are_kept_until_the_floor():
    # 1.4 positions a pair: 0, 1.4, 2.8, 4.2, 5.6 -> 0, 1, 2, 4, 5: no multiple of a rounded step.
    positions, following = qwen2_5_vl_positions(ids(1, 5, 1), VIDEO, (5, 1, 1), 1.4)
    assert positions.tolist() == [
        [0, 1, 2, 3, 5, 6, 7],
        [0, 1, 1, 1, 1, 1, 7],
        [0, 1, 1, 1, 1, 1, 7],
    ]
    assert following == 8


def test_qwen2_5_vl_less_than_a_position_a_pair():
    # 0.4 positions a pair: 0, 0.4, 0.8, 1.2 -> 0, 0, 0, 1; a step cut to an integer would be 0.
    positions, following = qwen2_5_vl_positions(ids(1, 4, 1), VIDEO, (4, 1, 1), 0.4)
    assert positions[0].tolist() == [0, 1, 1, 1, 2, 3]
    assert following == 4


def test_qwen2_5_vl_a_frame_wider_than_the_video_is_long():
    # The largest position is then a column: 1 + 3; text resumes at 5.
    positions, following = qwen2_5_vl_positions(ids(1, 4, 1), VIDEO, (1, 1, 4), 1.4)
    assert positions.tolist() == [[0, 1, 1, 1, 1, 5], [0, 1, 1, 1, 1, 5], [0, 1, 2, 3, 4, 5]]
    assert following == 6


@pytest.mark.parametrize("function", [separate_positions, lambda *a: qwen2_5_vl_positions(*a, 1.0)])
def test_a_broken_run_of_video_tokens_is_an_error(function):
    with pytest.raises(ValueError, match="shorter than the grid"):
        function(ids(1, 3, 2), VIDEO, (1, 2, 2))


def test_the_model_tells_grid_and_time_scale():
    # Patches are merged two by two, and 2 positions a second x 0.7 s a pair = 1.4 positions a pair.
    lm = ours("student", "qwen2_5_vl", layers=1)
    video = lm.model.config.video_token_id
    positions, following = lm.positions(torch.tensor([1, *[video] * 6, 1]), (6, 2, 2), 0.7)
    assert positions[0].tolist() == [0, 1, 2, 3, 5, 6, 8, 9]
    assert following == 10


@pytest.mark.parametrize("rows, columns", [(2, 2), (1, 3), (4, 2)])
def test_qwen3_vl_equals_the_stock_rule(rows, columns):
    model = stock("student", layers=1)
    prompt = make_prompt(
        ours("student", layers=1), "p", pairs=3, rows=rows, columns=columns, text=4
    )
    expected, delta = model.model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=2 * (prompt.input_ids == model.config.video_token_id)[None].int(),
        video_grid_thw=torch.tensor([prompt.grid_thw]),
    )
    assert torch.equal(prompt.position_ids, expected[:, 0])
    assert prompt.next_position == len(prompt.input_ids) + int(delta)


def test_qwen2_5_vl_equals_the_stock_rule_up_to_the_end_of_the_video():
    # Past the video the stock rule of transformers 5 forgets its length; ours does not.
    model = stock("student", "qwen2_5_vl", layers=1)
    prompt = make_prompt(ours("student", "qwen2_5_vl", layers=1), "p", pairs=6, text=4)
    is_video = prompt.input_ids == model.config.video_token_id
    expected, _ = model.model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=2 * is_video[None].int(),
        video_grid_thw=torch.tensor([prompt.grid_thw]),
        second_per_grid_ts=torch.tensor([0.7]),
    )
    end = int(is_video.nonzero().max()) + 1
    assert torch.equal(prompt.position_ids[:, :end], expected[:, 0, :end])
    last = prompt.position_ids[:, :end].max()
    assert prompt.position_ids[:, end].tolist() == [last + 1] * 3


def test_qwen2_5_vl_with_times_between_the_pairs_equals_the_stock_rule_of_images():
    # As TimeLens-7B: every frame pair is an image to the language model, with text before it.
    model, lm = stock("student", "qwen2_5_vl", layers=1), ours("student", "qwen2_5_vl", layers=1)
    image, video = model.config.image_token_id, model.config.video_token_id
    pair = [7, 8, 9, model.config.vision_start_token_id, *[video] * 6]
    tokens = torch.tensor([1, 2, *pair * 3, 3, 4])
    positions, following = lm.positions(tokens, (3, 4, 6), None)
    as_images = torch.where(tokens == video, image, tokens)
    expected, delta = model.model.get_rope_index(
        as_images[None],
        mm_token_type_ids=(as_images == image)[None].int(),
        image_grid_thw=torch.tensor([[1, 4, 6]] * 3),
    )
    assert torch.equal(positions, expected[:, 0])
    assert following == len(tokens) + int(delta)


def test_the_tower_of_qwen2_5_vl_sees_a_video_as_images_of_its_pairs():
    model = stock("student", "qwen2_5_vl", layers=1)
    config = model.config.vision_config
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(3 * 4 * 6, patch, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.dtype)
    with torch.no_grad():
        video = model.model.visual(pixels, torch.tensor([[3, 4, 6]])).pooler_output
        images = model.model.visual(pixels, torch.tensor([[1, 4, 6]] * 3)).pooler_output
    assert torch.allclose(video, images, atol=1e-6)
    assert not torch.allclose(video[:6], video[6:12], atol=1e-3)

"""One forward of a video for all its queries: the same answers at the expected cost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd.config.data import DataConfig
from opd.data.batch import Prompt, PromptBatch, collate
from opd.data.examples import Example
from opd.data.loader import batches, rows_of
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import encode, forward, prefill
from opd.generation.sampling import sample
from opd.generation.shared_video import forward_by_video, groups_of, shared_tokens
from opd.models.load import prepare
from opd.models.tiny import processor
from opd.models.video_lm import VideoLM
from tests.helpers import FAMILIES, PAD, build, policy_of

VIDEO_FIRST = "{video}{query}. When?"
QUERIES = (
    "the red circle",
    "when does it < run > away",
    "the red cross",
    " a blue square, then\n green",
    "der grüne Kreis",
)


def pool(videos: Path, lm: VideoLM, template: str, cache_mb: int = 0) -> Prompts:
    """Two videos with the five queries each, in turn, and a third with one."""
    config = DataConfig(video_root=str(videos), prompt=template, cache_mb=cache_mb, fps=2)
    first, second, third = load_examples("synthetic:eval", config, 3)
    examples = [
        replace(example, id=f"{example.id}/{k}", query=query)
        for k, query in enumerate(QUERIES)
        for example in (first, second)
    ]
    return Prompts([*examples, third], config, processor(lm.family), lm)


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> VideoLM:
    return prepare(build("student", request.param).double().requires_grad_(False))


def batch_of(prompts: Prompts, lm: VideoLM) -> PromptBatch:
    plan = [list(range(len(prompts)))]
    (batch,) = batches(prompts, plan, models=[lm])
    return batch


def test_a_processed_video_serves_the_next_query(videos: Path, lm: VideoLM) -> None:
    # No token spans the end of the video, so the rest can be tokenized by itself.
    for template in (VIDEO_FIRST, "Look: {query}. When?{video}", "{query} {video} {query}"):
        prompts = pool(videos, lm, template)
        for index in [*range(0, 10, 2), *range(1, 10, 2)]:
            prompt, text = prompts[index], prompts.text(prompts.examples[index])
            decoded = prompts.frames(index)
            inputs = prompts.processor(
                text=[text],
                videos=[decoded.frames],
                video_metadata=[decoded.metadata()],
                do_sample_frames=False,
                return_tensors="pt",
            )
            assert prompt.input_ids.tolist() == inputs["input_ids"][0].tolist()
            assert prompt.pixel_values is not None
            assert torch.equal(prompt.pixel_values, inputs["pixel_values_videos"])


def test_answers_are_those_of_one_forward_a_query(videos: Path, lm: VideoLM) -> None:
    prompts = pool(videos, lm, VIDEO_FIRST)
    batch, counter = batch_of(prompts, lm), LayerCounter().attach(lm)
    shared = [(n, len(group)) for n, group in groups_of(batch, lm.model.config.video_token_id)]
    assert sorted(count for _, count in shared) == [1, 5, 5]
    with counter.label("shared"):
        actual = forward_by_video(lm, batch)
    expected = forward(lm, batch)
    assert torch.equal(actual.mask, expected.mask)
    assert torch.equal(actual.next_position, expected.next_position)
    torch.testing.assert_close(actual.last_hidden, expected.last_hidden, rtol=1e-12, atol=1e-12)
    kept = expected.mask[:, None, :, None]
    for name in ("keys", "values"):
        for mine, one in zip(getattr(actual, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine * kept, one * kept, rtol=1e-12, atol=1e-12)
    policy = policy_of(lm)
    greedy = [sample(lm, prefix, policy, 8, None).completion_ids for prefix in (actual, expected)]
    assert torch.equal(*greedy)
    # Tokens before the query once per video, and the query's own once per query.
    own = sum(len(p.input_ids) for p in batch.prompts)
    own -= sum((count - 1) * length for length, count in shared)
    assert counter.passes("shared", 1) == own


def test_frames_come_once_a_video(videos: Path, lm: VideoLM) -> None:
    for room in (0, 64):
        prompts = pool(videos, lm, VIDEO_FIRST, room)
        batch = batch_of(prompts, lm)
        assert sum(p.pixel_values is not None for p in batch.prompts) == 3
        whole = pool(videos, lm, VIDEO_FIRST)
        frames = [whole[i] for i in range(len(whole))]
        by_id = {p.example.id: p for p in frames}
        stock = collate([by_id[e.id] for e in batch.examples], PAD)
        alone = lm.encode_video(stock.pixel_values, stock.video_grid_thw)
        torch.testing.assert_close(encode(lm, batch)[0], alone[0], rtol=1e-12, atol=1e-12)


def test_a_template_with_the_query_first_shares_nothing(videos: Path, lm: VideoLM) -> None:
    prompts = pool(videos, lm, "{query}. When?{video}")
    batch = batch_of(prompts, lm)
    assert not any(n for n, _ in groups_of(batch, lm.model.config.video_token_id))
    actual, expected = forward_by_video(lm, batch), forward(lm, batch)
    assert all(map(torch.equal, actual.keys, expected.keys))


def test_only_what_is_the_same_is_shared(videos: Path, lm: VideoLM) -> None:
    prompts, token = pool(videos, lm, VIDEO_FIRST), lm.model.config.video_token_id
    one, two = prompts[0], prompts[4]
    same = shared_tokens([one, two], token)
    after = int((one.input_ids == token).nonzero()[-1])
    assert after < same < min(len(one.input_ids), len(two.input_ids))
    assert one.input_ids[:same].equal(two.input_ids[:same])
    assert one.input_ids[same] != two.input_ids[same]
    # The same prompt twice keeps its last token for itself.
    assert shared_tokens([one, one], token) == len(one.input_ids) - 1
    other = replace(two, frame_indices=(*two.frame_indices[:-1], two.frame_indices[-1] + 1))
    assert shared_tokens([one, other], token) == 0
    cut: Prompt = replace(two, input_ids=two.input_ids.clone())
    cut.input_ids[after - 1] = 0
    assert shared_tokens([one, cut], token) == 0


def test_rows_keep_the_order_of_the_pool(videos: Path, lm: VideoLM) -> None:
    prompts = pool(videos, lm, VIDEO_FIRST)
    seen: list[list[str]] = []

    def make(batch: PromptBatch) -> list[Example]:
        seen.append([example.id for example in batch.examples])
        return [*batch.examples]

    rows = rows_of(prompts, 5, lm, make)
    assert rows == prompts.examples
    assert [len({id.split("/")[0] for id in ids}) for ids in seen] == [1, 1, 1]


def test_a_prefix_of_one_is_as_before(videos: Path, lm: VideoLM) -> None:
    prompts = pool(videos, lm, VIDEO_FIRST)
    batch = collate([prompts[10]], PAD)
    actual = forward_by_video(lm, batch)
    expected = prefill(lm, batch, encode(lm, batch))
    assert all(map(torch.equal, actual.keys, expected.keys))

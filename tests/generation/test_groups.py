"""One forward of a video for all its queries: the same answers, losses and gradients, at the
expected cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from opd.config.data import DataConfig
from opd.config.run import load_config
from opd.data.batch import Prompt, PromptBatch, collate, shared_tokens
from opd.data.examples import Example
from opd.data.loader import batches, rows_of
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.generation.extend import extend
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import uniforms
from opd.generation.prefix import encode, forward, prefill
from opd.generation.sampling import Rollouts, sample
from opd.method.objectives import OBJECTIVES, Targets
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models.load import prepare
from opd.models.tiny import processor
from opd.models.video_lm import VideoLM
from opd.record.flops import Cost
from tests.helpers import (
    FAMILIES,
    PAD,
    backward,
    build,
    gap,
    gradients,
    grouped,
    kept_bytes,
    ours,
    policy_of,
    prefill_of,
    queries_about,
    relative,
    stock,
    stock_loss,
)
from tests.record.test_health import counted

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


def batch_of(prompts: Prompts, lm: VideoLM, queries_per_video: int | None = None) -> PromptBatch:
    plan = [list(range(len(prompts)))]
    (batch,) = batches(prompts, plan, models=[lm], queries_per_video=queries_per_video)
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
    alone = batch_of(prompts, lm, 1)
    assert sorted(len(group.prompts) for group in batch.groups) == [1, 5, 5]
    assert [e.id for e in batch.examples] == [e.id for e in alone.examples]
    with counter.label("shared"):
        actual = forward(lm, batch)
    expected = forward(lm, alone)
    assert torch.equal(actual.next_position, expected.next_position)
    torch.testing.assert_close(actual.last_hidden, expected.last_hidden, rtol=1e-12, atol=1e-12)
    rows = [row for row, count in enumerate(actual.counts) for _ in range(count)]
    for name in ("keys", "values"):
        for mine, one in zip(getattr(actual, name), getattr(expected, name), strict=True):
            for prompt, row in enumerate(rows):
                seen = mine[row, :, actual.mask[prompt]]
                truth = one[prompt, :, expected.mask[prompt]]
                torch.testing.assert_close(seen, truth, rtol=1e-12, atol=1e-12)
    policy = policy_of(lm)
    greedy = [sample(lm, prefix, policy, 8, None).completion_ids for prefix in (actual, expected)]
    assert torch.equal(*greedy)
    # Tokens before the query once per video, and the query's own once per query.
    own = sum(len(p.input_ids) for p in batch.prompts)
    own -= sum((len(group.prompts) - 1) * group.shared for group in batch.groups)
    assert counter.passes("shared", 1) == own == batch.num_tokens


def test_frames_come_once_a_video(videos: Path, lm: VideoLM) -> None:
    for room in (0, 64):
        prompts = pool(videos, lm, VIDEO_FIRST, room)
        batch = batch_of(prompts, lm)
        assert sum(p.pixel_values is not None for p in batch.prompts) == 3
        whole = pool(videos, lm, VIDEO_FIRST)
        frames = [whole[i] for i in range(len(whole))]
        by_id = {p.example.id: p for p in frames}
        stock = collate([by_id[group.prompts[0].example.id] for group in batch.groups], PAD)
        alone = lm.encode_video(stock.pixel_values, stock.video_grid_thw)
        torch.testing.assert_close(encode(lm, batch)[0], alone[0], rtol=1e-12, atol=1e-12)


def test_a_template_with_the_query_first_shares_nothing(videos: Path, lm: VideoLM) -> None:
    prompts = pool(videos, lm, "{query}. When?{video}")
    batch = batch_of(prompts, lm)
    assert all(len(group.prompts) == 1 for group in batch.groups)


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


# Training.

LENGTHS = {"a": (5, 3, 7), "b": (4,), "c": (2, 6)}  # own tokens of the queries about each video


def unequal_groups(lm: VideoLM) -> list[Prompt]:
    shapes = {"a": {"pairs": 3}, "b": {"rows": 3, "columns": 1}, "c": {}}
    return [
        prompt
        for name, lengths in LENGTHS.items()
        for prompt in queries_about(lm, name, lengths, **shapes[name])
    ]


def training_step(lm: VideoLM, batch: PromptBatch, rollouts: int, recompute: str, seen: list):
    """The loss of a step, with its rollouts added to `seen`."""
    teacher = Teacher(ours("teacher", lm.family, seed=5))
    policy = replace(policy_of(lm), eos_token_ids=tuple(range(0, 350, 6)))
    draws = uniforms(0, 2, [e.id for e in batch.examples], rollouts, 6)

    def step() -> Tensor:
        prefix = prefill_of(lm, batch, recompute)
        sampled = sample(lm, prefix.detach(), policy, 6, draws)
        seen.append(sampled)
        ids, mask = sampled.completion_ids, sampled.completion_mask
        teacher_hidden = teacher.extend(teacher.prefill(batch), ids)[mask]
        targets = Targets(ids[mask], policy, teacher_hidden, teacher.lm.head.weight)
        hidden = extend(lm, prefix, ids, recompute=recompute)[mask]
        return lm.head(hidden, loss=partial(OBJECTIVES["reverse_kl"], targets)).loss

    return step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rollouts", [1, 3])
@pytest.mark.parametrize("recompute", ["none", "1", "all"])
@pytest.mark.usefixtures("exact_modules", "poisoned_memory", "in_two_parts")
def test_a_grouped_step_is_the_stock_models_of_separate_prompts(family, rollouts, recompute):
    lm, model = ours("student", family), stock("student", family)
    prompts, seen = unequal_groups(lm), []
    batch = grouped(lm, prompts)
    assert [len(group.prompts) for group in batch.groups] == [3, 1, 2]
    actual = backward(lm.model, training_step(lm, batch, rollouts, recompute, seen))
    completions = seen[0].completion_ids, seen[0].completion_mask
    policy = replace(policy_of(lm), eos_token_ids=tuple(range(0, 350, 6)))
    teacher = stock("teacher", family, seed=5).requires_grad_(False)
    loss = partial(stock_loss, model, teacher, prompts, completions, policy, "reverse_kl")
    result = gap(actual, backward(model, loss))
    assert result.loss < 1e-12 and result.gradient < 1e-12, result
    backward(lm.model, training_step(lm, grouped(lm, prompts, 1), rollouts, recompute, seen))
    assert torch.equal(seen[0].completion_ids, seen[1].completion_ids)
    assert torch.equal(seen[0].lengths, seen[1].lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_norms_and_a_trained_tower(family: str) -> None:
    lm, seen = ours("student", family, trainable="all"), []
    prompts = unequal_groups(lm)
    actual, expected = (
        backward(lm.model, training_step(lm, grouped(lm, prompts, size), 2, "1", seen))
        for size in (None, 1)
    )
    result = gap(actual, expected)
    assert result.loss < 1e-7 and result.gradient < 1e-6, result
    assert any("visual" in name for name in actual[1])


METHODS = {
    "reverse_kl": (),
    "sampled": ("objective=sampled", "num_rollouts=2"),
    "jsd": ("objective=jsd", "opd.beta=0.5"),
    "topk": ("objective=topk",),
    "off_policy": ("opd.completions=reference",),
    "grpo": ("method=grpo", "num_rollouts=4"),
    "sft": ("method=sft",),
    "routed": ("curriculum.routing=on", "num_rollouts=3"),
    "by_token": ("normalize=token", "prefix.recompute=all"),
}


def some_grades(rollouts: Rollouts, examples: Sequence[Example], *_: Any) -> Rollouts:
    """Rewards that differ within most groups; with routing, some of a's and c's count."""
    numbers = [sum(map(ord, example.id)) + 3 * i for example in examples for i in range(4)]
    rewards = torch.tensor([n % 7 / 6 for n in numbers]).view(len(examples), 4)
    return replace(rollouts, rewards=rewards[:, : rollouts.lengths.shape[1]].double())


def first_step(
    method: str, keys: Sequence[str], batches: Callable[[VideoLM], list[PromptBatch]]
) -> tuple[dict[str, Any], dict[str, Tensor], Trainer]:
    """The row of metrics and the gradients of a trainer's first step on these micro-batches."""
    common = ("batch_size=6", "sample.max_completion_length=5", "optim.max_grad_norm=1e9")
    config = load_config(["steps=20", *common, *METHODS[method], *keys])
    lm, seen = ours("student"), {}
    policy = replace(policy_of(lm), eos_token_ids=tuple(range(0, 350, 6)))
    teacher = Teacher(ours("teacher", seed=5)) if config.method == "opd" else None
    if config.method == "grpo":
        teacher = Teacher(ours("student"))
    processor = type("Processor", (), {"tokenizer": None})
    trainer = Trainer(config, processor, lm, teacher, policy)
    trainer.engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(lm.model)))
    with mock.patch("opd.method.advantages.grade", some_grades):
        return trainer.step(batches(lm), 0), seen, trainer


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_step_of_separate_prompts(method: str) -> None:
    (row, seen, trainer), (expected, truth, alone) = (
        first_step(method, (), lambda lm, size=size: [grouped(lm, unequal_groups(lm), size)])
        for size in (None, 1)
    )
    result = gap((row["loss"] or 1.0, seen), (expected["loss"] or 1.0, truth))
    assert result.loss < 1e-12 and result.gradient < 1e-10, result
    assert row["completion_length"] == expected["completion_length"]
    assert row["trained_share"] == expected["trained_share"]
    assert (row["trained_share"] or 1.0) < 1 or method != "routed"
    assert row["prompt_tokens_per_query"] < 0.7 * expected["prompt_tokens_per_query"]
    for tested in (trainer, alone):
        assert tested.counter.passes("prompt", tested.progress.prompt_tokens) == 1.0
    assert (trainer.progress.prompts, trainer.progress.groups) == (6, 3)


def test_flops_follow_the_shapes() -> None:
    """Prompts of 1,500 tokens: the counted FLOPs of prefill and extend are those of the ledger."""
    lm = ours("student", layers=2)
    cost = Cost.of(lm)
    for queries in (1, 2, 4):
        prompts = queries_about(lm, "a", (30,) * queries, pairs=60, rows=4, columns=5)
        batch = grouped(lm, prompts)
        (group,) = batch.groups
        assert abs(len(prompts[0].input_ids) / 1500 - 1) < 0.05
        ids = torch.full((queries, 2, 6), 9)
        with torch.no_grad():
            video = encode(lm, batch)
            prefill_flops = counted(lambda b=batch, v=video: prefill(lm, b, v))
            prefix = prefill(lm, batch, video)
            extend_flops = counted(lambda p=prefix, i=ids: extend(lm, p, i))
        # torch counts every pair that a kernel computes: of causal attention both halves, of the
        # branches those that the mask hides, too.
        own = sum(group.own_lengths)
        hidden = group.shared**2 / 2 + own * group.num_tokens
        hidden -= sum(n * group.shared + n**2 / 2 for n in group.own_lengths)
        planned = cost.prompt(1, group.shared, group.own_lengths) + cost.per_pair * hidden
        assert prefill_flops == pytest.approx(planned, rel=0.02)
        tokens = queries * 2 * 5
        packed = cost.per_token * tokens + cost.per_pair * tokens * (group.num_tokens + tokens)
        assert extend_flops == pytest.approx(packed, rel=0.02)


def test_memory_does_not_grow_with_the_queries() -> None:
    """Bytes that autograd keeps: those of one prompt, and of the further queries' own tokens."""
    lm = ours("student", layers=2)
    lengths = (30,) * 8
    prompts = queries_about(lm, "a", lengths, pairs=60, rows=4, columns=5)
    one, eight = (kept_bytes(lm, grouped(lm, prompts[:n]), "none") for n in (1, 8))
    length, own, layers, heads = len(prompts[0].input_ids), 7 * 30, 2, 3
    masks = 8 * layers * heads * 8 * 30 * (length + own)  # fp64, the query heads folded
    assert one < eight <= one + 1.5 * own * one / length + masks


def test_groups_are_divided_to_a_number() -> None:
    lm = ours("student")
    batch = grouped(lm, unequal_groups(lm))
    assert batch.divided(3) is batch
    for number in (4, 5, 6):
        divided = batch.divided(number)
        assert len(divided.groups) == number
        assert [e.id for e in divided.examples] == [e.id for e in batch.examples]
        actual, expected = forward(lm, divided), forward(lm, batch)
        assert relative(actual.last_hidden, expected.last_hidden) < 1e-6

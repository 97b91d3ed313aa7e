"""The single pass: loss and every gradient equal the full forward's, with one prompt forward."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from opd.generation.decoder import GROWTH, Decoder
from opd.generation.extend import extend
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import Policy, uniforms
from opd.generation.prefix import Prefix, encode, prefill
from opd.generation.sampling import Rollouts, sample
from opd.method.objectives import OBJECTIVES, Targets
from opd.method.teacher import Teacher
from opd.models.video_lm import VideoLM
from tests.helpers import (
    FAMILIES,
    Completions,
    Gap,
    backward,
    batch_of,
    gap,
    make_prompt,
    ours,
    policy_of,
    prefill_of,
    random_completions,
    relative,
    single_pass,
    stock,
    stock_loss,
    unequal_prompts,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXACT = 1e-12


def many_ends(policy: Policy) -> Policy:
    """The same policy with one token in six as an end token, so that lengths differ."""
    return replace(policy, eos_token_ids=tuple(range(0, 350, 6)))


def compare(
    family: str,
    num_rollouts: int,
    *,
    recompute: str = "none",
    objective: str = "reverse_kl",
    trainable: str = "language",
    temperature: float = 1.0,
) -> Gap:
    """Compare a step (prefill, sample, extend, loss, backward) with stock models on its samples."""
    lm, model = (make("student", family, trainable=trainable) for make in (ours, stock))
    teacher = Teacher(ours("teacher", family, seed=5))
    stock_teacher = stock("teacher", family, seed=5).requires_grad_(False)
    prompts = unequal_prompts(lm)
    batch = batch_of(prompts)
    policy = many_ends(policy_of(lm, temperature))
    draws = uniforms(0, 2, [p.example.id for p in prompts], num_rollouts, 6)
    sampled: list[Rollouts] = []

    def step() -> Tensor:
        prefix = prefill_of(lm, batch, recompute)
        sampled.append(sample(lm, prefix.detach(), policy, 6, draws))
        ids, mask = sampled[0].completion_ids, sampled[0].completion_mask
        targets = Targets(
            ids[mask],
            policy,
            teacher.extend(teacher.prefill(batch), ids)[mask],
            teacher.lm.head.weight,
        )
        hidden = extend(lm, prefix, ids, recompute=recompute)[mask]
        return lm.head(hidden, loss=partial(OBJECTIVES[objective], targets)).loss

    actual = backward(lm.model, step)
    mask = sampled[0].completion_mask
    lengths = mask.sum(-1)
    assert not batch.mask.all() and lengths.min() < lengths.max()
    completions = sampled[0].completion_ids, mask
    expected = backward(
        model, lambda: stock_loss(model, stock_teacher, prompts, completions, policy, objective)
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert actual[1].keys() == trained
    assert any("visual" in name for name in trained) == (trainable == "all")
    return gap(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 3])
@pytest.mark.parametrize("recompute", ["none", "all", "1"])
@pytest.mark.usefixtures("exact_modules", "in_two_parts")
def test_loss_and_every_gradient_equal_the_full_forward(family, num_rollouts, recompute):
    result = compare(family, num_rollouts, recompute=recompute)
    assert result.loss < EXACT and result.gradient < EXACT, result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["sampled", "sft"])
@pytest.mark.usefixtures("exact_modules")
def test_other_objectives_and_temperatures(family, objective):
    result = compare(family, 2, objective=objective, temperature=1.6)
    assert result.loss < EXACT and result.gradient < EXACT, result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.usefixtures("exact_modules")
def test_trained_vision_tower(family, recompute):
    result = compare(family, 2, recompute=recompute, trainable="all")
    assert result.loss < EXACT and result.gradient < EXACT, result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", ["language", "all"])
def test_stock_norms_and_rotary_in_fp32(family, trainable):
    result = compare(family, 3, trainable=trainable)
    assert result.loss < 1e-6 and result.gradient < 1e-6, result


# Invariance to padding, order and batching.


def difference(actual: tuple, expected: tuple) -> float:
    result = gap(actual, expected)
    return max(result.loss, result.gradient)


@pytest.fixture
def case() -> tuple[VideoLM, Teacher, Policy]:
    lm = ours("student")
    return lm, Teacher(ours("teacher", seed=5)), policy_of(lm)


@pytest.mark.usefixtures("exact_modules")
def test_more_padding_changes_nothing(case):
    lm, teacher, policy = case
    prompts = unequal_prompts(lm)
    ids, mask = random_completions(3, 2)
    expected = backward(
        lm.model, lambda: single_pass(lm, teacher, batch_of(prompts), (ids, mask), policy).loss
    )
    longer = torch.nn.functional.pad(ids, (0, 3), value=7), torch.nn.functional.pad(mask, (0, 3))
    batch = batch_of(prompts, extra_padding=4)
    assert batch.input_ids.shape[1] == batch_of(prompts).input_ids.shape[1] + 4
    actual = backward(lm.model, lambda: single_pass(lm, teacher, batch, longer, policy).loss)
    assert difference(actual, expected) < EXACT


@pytest.mark.usefixtures("exact_modules")
def test_order_of_rollouts_and_prompts_changes_nothing(case):
    lm, teacher, policy = case
    prompts = unequal_prompts(lm)
    ids, mask = random_completions(3, 3)

    def loss(order: list[int], rollouts: list[int]) -> Tensor:
        batch = batch_of([prompts[i] for i in order])
        chosen = ids[order][:, rollouts], mask[order][:, rollouts]
        return single_pass(lm, teacher, batch, chosen, policy).loss

    expected = backward(lm.model, lambda: loss([0, 1, 2], [0, 1, 2]))
    assert difference(backward(lm.model, lambda: loss([0, 1, 2], [2, 0, 1])), expected) < EXACT
    assert difference(backward(lm.model, lambda: loss([2, 0, 1], [0, 1, 2])), expected) < EXACT


@pytest.mark.usefixtures("exact_modules")
def test_a_batch_is_the_sum_of_its_prompts(case):
    lm, teacher, policy = case
    prompts = unequal_prompts(lm)
    ids, mask = random_completions(3, 2)

    def loss(rows: list[int]) -> Tensor:
        batch = batch_of([prompts[i] for i in rows])
        return single_pass(lm, teacher, batch, (ids[rows], mask[rows]), policy).loss

    together = backward(lm.model, lambda: loss([0, 1, 2]))
    apart = backward(lm.model, lambda: torch.stack([loss([i]) for i in range(3)]).sum())
    assert difference(apart, together) < EXACT


# Cost.


@pytest.mark.parametrize("recompute", ["none", "1", "all"])
def test_a_prompt_is_forwarded_once(recompute):
    lm = ours("student")
    batch = batch_of(unequal_prompts(lm))
    counter = LayerCounter().attach(lm)
    layers = counter.num_layers
    parts = batch.parts()
    prefixes = [prefill(lm, part, encode(lm, part), recompute, counter) for part in parts]
    prefix = Prefix.join(prefixes)
    policy = replace(policy_of(lm), eos_token_ids=())
    rollouts = sample(
        lm, prefix.detach(), policy, 4, uniforms(0, 0, ["a", "b", "c"], 2, 4), counter
    )
    extend(lm, prefix, rollouts.completion_ids, counter, recompute).sum().backward()
    again = {"none": 0, "1": 1, "all": layers}[recompute]
    expected = {
        "prompt": layers * batch.num_tokens,
        "decode": layers * 3 * 2 * 3,
        "completion": layers * 3 * 2 * 3,
    }
    if again:
        expected["recompute"] = again * batch.num_tokens
        expected["completion recompute"] = again * 3 * 2 * 3
    assert counter.tokens == expected
    assert counter.passes("prompt", batch.num_tokens) == 1.0
    assert counter.passes("recompute", batch.num_tokens) == again / layers


def kept_by_graph(lm: VideoLM, forward) -> tuple[int, Tensor]:
    """Bytes of distinct storages saved for backward, without weights; and the result."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), out


def test_recompute_drops_the_completions_activations():
    lm = ours("student")
    prefix = prefill_of(lm, batch_of(unequal_prompts(lm)))
    ids = torch.ones(3, 4, 50, dtype=torch.long)
    none, every = (
        kept_by_graph(lm, lambda mode=mode: extend(lm, prefix, ids, recompute=mode))[0]
        for mode in ("none", "all")
    )
    assert every < none / 3


def test_recompute_drops_the_prompts_activations():
    lm = ours("student")
    batch = batch_of(unequal_prompts(lm))
    none, some, every = (
        kept_by_graph(lm, lambda mode=mode: prefill_of(lm, batch, mode).last_hidden)[0]
        for mode in ("none", "1", "all")
    )
    assert every < some < none
    assert every < none / 5


class Allocations(TorchDispatchMode):
    """Records the largest storage that any operation returns, without weights."""

    def __init__(self, lm: VideoLM) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
        self.largest, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights and storage.nbytes() > self.largest:
                    self.largest, self.what = storage.nbytes(), f"{func} {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_cache_is_never_expanded(family):
    # Long prompts, short completions: whatever grows with prompt x rollouts would stand out.
    lm = ours("student", family)
    pairs = 40 if family == "qwen3_vl" else 90
    batch = batch_of([make_prompt(lm, "a", pairs=pairs), make_prompt(lm, "b", pairs=pairs - 1)])
    with torch.no_grad():
        prefix = prefill_of(lm, batch)
    config = lm.model.config.text_config
    one_cache = prefix.keys[0].numel() * 8  # keys of one layer: B * kv_heads * P * D
    repeated = one_cache * config.num_attention_heads // config.num_key_value_heads
    assert repeated > one_cache
    leaves = [x.requires_grad_() for x in (*prefix.keys, *prefix.values)]
    kept = {}
    for num_rollouts in (1, 8):
        ids = torch.ones(2, num_rollouts, 2, dtype=torch.long)
        with Allocations(lm) as seen:
            draws = uniforms(0, 0, ["a", "b"], num_rollouts, 2)
            sample(lm, prefix.detach(), replace(policy_of(lm), eos_token_ids=()), 2, draws)
            kept[num_rollouts], hidden = kept_by_graph(lm, lambda ids=ids: extend(lm, prefix, ids))
            torch.autograd.grad(hidden.square().sum(), leaves)
        # Neither once per rollout (8 x one_cache) nor once per query head (3 x).
        assert seen.largest < 1.5 * one_cache < repeated, seen.what
    cache = 2 * one_cache * len(prefix.keys)
    assert kept[1] > cache
    assert kept[8] - kept[1] < cache  # 7 more rollouts, less than one more prompt


# Prefix, decoder and extend by themselves.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 3])
@pytest.mark.parametrize("growth", [1, 2, 256])
@pytest.mark.usefixtures("exact_modules")
def test_decoder_equals_extend(family, num_rollouts, growth, in_two_parts, monkeypatch):
    monkeypatch.setitem(GROWTH, "cpu", growth)
    lm = ours("student", family)
    batch = batch_of(unequal_prompts(lm))
    prefix = prefill_of(lm, batch)
    ids, _ = random_completions(3, num_rollouts, 6)
    expected = extend(lm, prefix, ids)
    assert expected.shape == (3, num_rollouts, 6, prefix.last_hidden.shape[-1])
    decoder = Decoder(lm, prefix.detach(), num_rollouts, 5)
    assert decoder.apart == in_two_parts
    for step in range(5):
        window = decoder.window(step + 1)
        assert window == {1: step + 1, 2: (2, 2, 4, 4, 5)[step], 256: 5}[growth]
        actual = decoder.step(ids[:, :, step], window)  # one prompt a group
        assert not actual.requires_grad
        assert relative(actual, expected[:, :, step + 1]) < 1e-12


@pytest.mark.usefixtures("exact_modules", "in_two_parts")
def test_rollouts_do_not_see_each_other(case):
    lm, _, _ = case
    prefix = prefill_of(lm, batch_of(unequal_prompts(lm)))
    ids, _ = random_completions(3, 3, 5)
    other = ids.clone()
    other[:, 1] = (other[:, 1] + 1) % 300
    before, after = extend(lm, prefix, ids), extend(lm, prefix, other)
    assert relative(after[:, [0, 2]], before[:, [0, 2]]) < EXACT
    assert relative(after[:, 1, 1:], before[:, 1, 1:]) > 0.1
    # Nor the future: the last input token moves the last hidden state only.
    other = ids.clone()
    other[:, :, 3] = (other[:, :, 3] + 1) % 300
    after = extend(lm, prefix, other)
    assert relative(after[:, :, :4], before[:, :, :4]) < EXACT
    assert relative(after[:, :, 4], before[:, :, 4]) > 0.1


@pytest.mark.parametrize("lengths", [[[3, 1], [6, 0], [2, 5]], [[1, 0], [1, 1], [0, 1]]])
@pytest.mark.usefixtures("exact_modules")
def test_tokens_that_do_not_matter_are_left_out(case, lengths, in_two_parts):
    lm, _, _ = case
    prefix = prefill_of(lm, batch_of(unequal_prompts(lm)))
    ids, _ = random_completions(3, 2, 6)
    counter = LayerCounter().attach(lm)
    with torch.no_grad():
        expected = extend(lm, prefix, ids)
        counter.tokens.clear()
        wanted = torch.tensor(lengths)
        actual = extend(lm, prefix, ids, counter, lengths=wanted)
    mask = torch.arange(6) < wanted[..., None]
    assert relative(actual[mask], expected[mask]) < EXACT
    forwarded = int((wanted - 1).clamp_min(0).sum()) if in_two_parts else 3 * 2 * 5
    assert counter.tokens["completion"] == counter.num_layers * max(1, forwarded)


def test_a_completion_of_one_token_costs_no_layer(case):
    lm, _, _ = case
    prefix = prefill_of(lm, batch_of(unequal_prompts(lm)))
    counter = LayerCounter().attach(lm)
    hidden = extend(lm, prefix, torch.ones(3, 2, 1, dtype=torch.long), counter)
    assert counter.tokens == {}
    assert torch.equal(hidden, prefix.last_hidden[:, None, None].expand(-1, 2, 1, -1))
    assert hidden.requires_grad


def test_detach_shares_memory_and_leaves_the_graph(case):
    lm, _, _ = case
    prefix = prefill_of(lm, batch_of(unequal_prompts(lm)))
    other = prefix.detach()
    for mine, its in zip(tensors(prefix), tensors(other), strict=True):
        assert mine.requires_grad and not its.requires_grad
        assert mine.data_ptr() == its.data_ptr()


def tensors(prefix: Prefix) -> list[Tensor]:
    return [*prefix.keys, *prefix.values, prefix.last_hidden]


def test_the_teacher_has_no_graph_and_no_gradient(case):
    lm, teacher, policy = case
    batch = batch_of(unequal_prompts(lm))
    prefix = teacher.prefill(batch)
    assert not any(x.requires_grad for x in tensors(prefix))
    completions: Completions = random_completions(3, 2)
    assert not teacher.extend(prefix, completions[0]).requires_grad
    single_pass(lm, teacher, batch, completions, policy).loss.backward()
    assert all(p.grad is None for p in teacher.lm.model.parameters())


def test_a_frozen_vision_tower_has_no_graph():
    lm = ours("student")
    batch = batch_of(unequal_prompts(lm))
    embeds, deepstack = lm.encode_video(batch.pixel_values, batch.video_grid_thw)
    assert not any(x.requires_grad for x in (embeds, *deepstack))
    lm.train_only("all")
    embeds, deepstack = lm.encode_video(batch.pixel_values, batch.video_grid_thw)
    assert deepstack and all(x.requires_grad for x in (embeds, *deepstack))


def test_joining_layer_by_layer_is_joining_at_once(case):
    lm, _, _ = case
    batch = batch_of(unequal_prompts(lm))
    parts = [prefill_of(lm, part).detach() for part in batch.parts()]
    assert len(parts) > 1
    once, later = Prefix.join(parts), Prefix.join(parts, by_layer=True)
    for name in ("keys", "values"):
        pairs = list(zip(getattr(once, name), getattr(later, name), strict=True))
        assert len(pairs) == len(lm.language_model.layers)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert later.keys[0] is not later.keys[0]  # nothing is kept

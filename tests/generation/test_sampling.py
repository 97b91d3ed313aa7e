"""Sampling: the policy, the random numbers, and that a rollout depends only on its own prompt."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from opd.config.method import SampleConfig
from opd.data.batch import Prompt
from opd.generation.decoder import GROWTH, MOST_MASKED, Decoder
from opd.generation.extend import extend
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import VISION_TOKENS, Policy, choose, uniforms
from opd.generation.sampling import CHECK_EVERY, Rollouts, sample
from opd.models import tiny
from opd.models.video_lm import VideoLM
from tests.helpers import (
    END,
    FAMILIES,
    PAD,
    batch_of,
    dense_log_probs,
    make_prompt,
    ours,
    policy_of,
    prefill_of,
    relative,
    stock,
    stock_hidden,
    unequal_prompts,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
F64 = torch.float64


def rollouts_of(
    lm: VideoLM,
    prompts: list[Prompt],
    policy: Policy,
    *,
    num_rollouts: int = 2,
    length: int = 6,
    step: int = 0,
    extra_padding: int = 0,
) -> Rollouts:
    batch = batch_of(prompts, extra_padding)
    draws = uniforms(3, step, [p.example.id for p in prompts], num_rollouts, length)
    return sample(lm, prefill_of(lm, batch).detach(), policy, length, draws)


def with_ends(policy: Policy, *ends: int) -> Policy:
    return replace(policy, eos_token_ids=ends)


# The policy.


def test_the_policy_of_a_checkpoint():
    lm = ours("student", layers=1)
    tokenizer = tiny.tokenizer()
    policy = Policy.of(lm, tokenizer, SampleConfig(temperature=0.7))
    rows = lm.head.weight.shape[0]
    vision = [tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS]
    config = lm.model.config
    assert {config.video_token_id, config.vision_start_token_id} < set(vision)
    assert len(set(vision)) == 5 and len(tokenizer) < rows
    banned = {*vision, *range(len(tokenizer), rows)}
    assert set((~policy.allowed_columns).nonzero().flatten().tolist()) == banned
    assert sorted(policy.eos_token_ids) == sorted({END, PAD})
    assert (policy.pad_token_id, policy.temperature) == (PAD, 0.7)


def test_policy_log_probs_by_definition():
    policy = replace(policy_of(ours("student", layers=1)), temperature=1.7)
    logits = torch.randn(5, len(policy.allowed_columns), dtype=F64) * 4
    actual = policy.log_probs(logits)
    expected = dense_log_probs(logits, torch.eye(logits.shape[1]).double(), policy)
    assert relative(actual[:, policy.allowed_columns].double(), expected) < 1e-6
    assert (actual[:, ~policy.allowed_columns] == -torch.inf).all()


def favour(lm: VideoLM, prompts: list[Prompt], columns: Tensor, logit: float) -> None:
    """Make the last prompt position give these columns about this logit, whatever the prompt."""
    hidden = prefill_of(lm, batch_of(prompts)).last_hidden.detach().mean(0)
    with torch.no_grad():
        lm.head.weight[columns] += logit * hidden / hidden.square().sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_not_allowed_is_never_drawn(family, greedy):
    # Without the mask these columns would hold nearly all of the mass.
    lm = ours("student", family, layers=2)
    prompts = [make_prompt(lm, "a", pairs=1), make_prompt(lm, "b", pairs=1)]
    policy = with_ends(policy_of(lm))
    favour(lm, prompts, ~policy.allowed_columns, 15.0)
    last = prefill_of(lm, batch_of(prompts)).last_hidden
    assert (lm.head(last).softmax(-1)[:, ~policy.allowed_columns].sum(-1) > 0.9).all()
    if greedy:
        rollouts = sample(lm, prefill_of(lm, batch_of(prompts)).detach(), policy, 12, None)
    else:
        rollouts = rollouts_of(lm, prompts, policy, num_rollouts=32, length=12)
    assert rollouts.completion_mask.all()
    assert policy.allowed_columns[rollouts.completion_ids].all()
    assert rollouts.rollout_logprobs.isfinite().all()


# Inverting the cumulative distribution.


def test_choose_inverts_the_cumulative_distribution():
    log_probs = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()
    draws = torch.tensor([0.0, 0.1, 0.199, 0.201, 0.5, 0.699, 0.701, 1 - 2**-53], dtype=F64)
    assert choose(log_probs.expand(8, -1), draws).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert choose(log_probs, None) == 1


def test_choose_never_takes_a_column_without_mass():
    # Banned columns first, in the middle and last: 0 and the largest number below 1 must miss them.
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0, 0.0]).log()
    ends = torch.tensor([0.0, 0.24, 0.26, np.nextafter(1.0, 0.0)], dtype=F64)
    assert choose(log_probs.expand(4, -1), ends).tolist() == [1, 1, 3, 3]


def test_choose_at_the_ends_of_many_rounded_distributions():
    # The cumulative sum of fp32 probabilities does not end at exactly 1.
    logits = 4 * torch.randn(300, 384, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(300, 384, generator=torch.Generator().manual_seed(1)) > 0.3
    log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    for number in (0.0, np.nextafter(1.0, 0.0)):
        ids = choose(log_probs, torch.full((300,), number, dtype=F64))
        assert allowed.gather(1, ids[:, None]).all()


def test_choose_draws_the_distribution():
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    draws = torch.rand(20_000, generator=generator, dtype=F64)
    counts = choose(probs.log().expand(20_000, -1), draws).bincount(minlength=5) / 20_000
    assert (counts - probs).abs().max() < 4 * 0.5 / 20_000**0.5
    assert (counts[probs == 0] == 0).all()


# Random numbers.


def test_uniforms_are_a_function_of_seed_step_prompt_rollout_and_position():
    full = uniforms(1, 2, ["a", "b", "c"], 3, 8)
    assert full.shape == (3, 3, 8) and full.dtype == torch.float64
    assert ((full >= 0) & (full < 1)).all()
    assert torch.equal(uniforms(1, 2, ["c", "a"], 3, 8), full[[2, 0]])
    assert torch.equal(uniforms(1, 2, ["a", "b", "c"], 2, 8), full[:, :2])
    assert torch.equal(uniforms(1, 2, ["a", "b", "c"], 3, 5), full[:, :, :5])
    assert full.unique().numel() == full.numel()
    for other in (uniforms(0, 2, ["a"], 1, 8), uniforms(1, 3, ["a"], 1, 8)):
        assert not torch.isin(other, full).any()


def test_uniforms_do_not_change_between_versions():
    # A resumed run must draw what the interrupted one would have.
    expected = [0.30888462307559184, 0.7935491073274854, 0.5157617778021769]
    assert uniforms(0, 0, ["a"], 1, 3).flatten().tolist() == expected


def test_uniforms_are_uniform():
    numbers = uniforms(0, 0, [str(i) for i in range(500)], 2, 20).flatten().sort().values
    steps = torch.arange(1, len(numbers) + 1) / len(numbers)
    assert (numbers - steps).abs().max() < 1.63 / len(numbers) ** 0.5  # Kolmogorov-Smirnov, 1%


# Batching.


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_padding_and_order_do_not_change_a_rollout(family):
    lm = ours("student", family)
    prompts = unequal_prompts(lm)
    policy = with_ends(policy_of(lm), *range(0, 350, 6))
    together = rollouts_of(lm, prompts, policy)
    padded = rollouts_of(lm, prompts, policy, extra_padding=5)
    turned = rollouts_of(lm, [prompts[2], prompts[0]], policy)
    more = rollouts_of(lm, prompts, policy, num_rollouts=5)
    assert together.truncated.any() and not together.truncated.all()
    assert together.completion_ids[:, 0].ne(together.completion_ids[:, 1]).any()

    def assert_same(actual: Rollouts, row: int, rollout: int, expected_row: int) -> None:
        valid = together.completion_mask[expected_row, rollout]
        steps = int(valid.sum())
        ids = together.completion_ids[expected_row, rollout, :steps]
        assert int(actual.completion_mask[row, rollout].sum()) == steps
        assert torch.equal(actual.completion_ids[row, rollout, :steps], ids)
        truth = together.rollout_logprobs[expected_row, rollout, :steps]
        assert (actual.rollout_logprobs[row, rollout, :steps] - truth).abs().max() < 1e-5

    for index, prompt in enumerate(prompts):
        alone = rollouts_of(lm, [prompt], policy)
        for rollout in range(2):
            assert_same(alone, 0, rollout, index)
            assert_same(padded, index, rollout, index)
            assert_same(more, index, rollout, index)
    for row, index in enumerate((2, 0)):
        for rollout in range(2):
            assert_same(turned, row, rollout, index)
    other = rollouts_of(lm, prompts, policy, step=1).completion_ids
    assert other.shape != together.completion_ids.shape or not other.equal(together.completion_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_equals_sampling_from_the_full_forward(family):
    lm, model = ours("student", family), stock("student", family)
    prompts = unequal_prompts(lm)[:2]
    policy = replace(with_ends(policy_of(lm)), temperature=1.3)
    draws = uniforms(3, 0, ["a", "b"], 2, 5)
    rollouts = rollouts_of(lm, prompts, policy, length=5)
    allowed = policy.allowed_columns.nonzero().flatten()
    for row, prompt in enumerate(prompts):
        for rollout in range(2):
            completion = rollouts.completion_ids[row, rollout]
            with torch.no_grad():
                hidden = stock_hidden(model, prompt, completion)
            probs = dense_log_probs(hidden, model.lm_head.weight.detach(), policy).exp()
            above = probs.cumsum(-1) > draws[row, rollout][:, None]
            assert torch.equal(allowed[above.int().argmax(-1)], completion)
            chosen = probs.gather(-1, torch.searchsorted(allowed, completion)[:, None])[:, 0].log()
            assert (rollouts.rollout_logprobs[row, rollout] - chosen).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_full_forward(family):
    lm, model = ours("student", family), stock("student", family)
    prompts = unequal_prompts(lm)
    policy = with_ends(policy_of(lm))
    rollouts = sample(lm, prefill_of(lm, batch_of(prompts)).detach(), policy, 5, None)
    assert rollouts.completion_ids.shape == (3, 1, 5)
    for row, prompt in enumerate(prompts):
        completion = torch.empty(0, dtype=torch.long)
        for _ in range(5):
            with torch.no_grad():
                # The last token is not an input; any stands for the one to be chosen.
                hidden = stock_hidden(model, prompt, torch.cat([completion, torch.tensor([0])]))
            logits = (hidden[-1] @ model.lm_head.weight.T).masked_fill(
                ~policy.allowed_columns, -torch.inf
            )
            completion = torch.cat([completion, logits.argmax(-1, keepdim=True)])
        assert torch.equal(rollouts.completion_ids[row, 0], completion)


# End of a completion.


@pytest.mark.parametrize("ends", [(), (PAD, END), tuple(range(0, 350, 6)), (PAD, *range(200))])
def test_the_first_end_token_counts_and_nothing_after(ends):
    lm = ours("student", layers=2)
    prompts = [make_prompt(lm, name, pairs=1) for name in "abc"]
    favour(lm, prompts, torch.tensor([PAD]), 10.0)
    policy = with_ends(policy_of(lm), *ends)
    rollouts = rollouts_of(lm, prompts, policy, num_rollouts=6, length=5)
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    for row in range(3):
        for rollout in range(6):
            tokens = ids[row, rollout].tolist()
            first = next((i for i, token in enumerate(tokens) if token in ends), None)
            length = len(tokens) if first is None else first + 1
            assert mask[row, rollout].tolist() == [i < length for i in range(len(tokens))]
            assert tokens[length:] == [PAD] * (len(tokens) - length)
            assert (rollouts.rollout_logprobs[row, rollout, :length] < 0).all()
            assert (rollouts.rollout_logprobs[row, rollout, length:] == 0).all()
            assert bool(rollouts.truncated[row, rollout]) == (first is None)
    assert ids.shape[2] == 5 or not rollouts.truncated.any()
    if PAD in ends:
        assert ((ids == PAD) & mask).any(), "an end token that is also the padding is still counted"
    assert rollouts.truncated.all() == (ends == ())


def test_sampling_stops_when_every_rollout_has_ended():
    lm = ours("student", layers=2)
    prompts = [make_prompt(lm, "a", pairs=1)]
    rollouts = rollouts_of(lm, prompts, with_ends(policy_of(lm), *range(384)), length=9)
    assert rollouts.completion_ids.shape == (1, 2, 1)
    assert rollouts.completion_mask.all() and not rollouts.truncated.any()


@pytest.mark.parametrize("every", [2, 3, 5, 100])
@pytest.mark.usefixtures("in_two_parts")
def test_how_often_is_asked_changes_nothing(every, monkeypatch):
    lm = ours("student", layers=1)
    for ends in (tuple(range(0, 384, 3)), tuple(range(0, 384, 40)), ()):
        policy = with_ends(policy_of(lm), *ends)
        truth = rollouts_of(lm, unequal_prompts(lm), policy, length=9)
        monkeypatch.setitem(CHECK_EVERY, "cpu", every)
        actual = rollouts_of(lm, unequal_prompts(lm), policy, length=9)
        monkeypatch.undo()
        for name in ("completion_ids", "completion_mask", "rollout_logprobs", "truncated"):
            assert torch.equal(getattr(actual, name), getattr(truth, name)), (name, ends)


@pytest.mark.parametrize("rollouts", [1, 4])
@pytest.mark.parametrize("most_masked", [0, 300, 10**9], ids=["apart", "apart first", "one mask"])
@pytest.mark.parametrize("growth", [1, 8])
def test_finished_completions_leave_the_batch(
    growth: int, most_masked: int, rollouts: int, monkeypatch
) -> None:
    """The rows that decoding forwards; the rollouts stay what they are."""
    layouts = []
    keep = Decoder.keep

    def kept(decoder: Decoder, *chosen) -> None:
        before = decoder.apart
        keep(decoder, *chosen)
        layouts.append((before, decoder.apart))

    monkeypatch.setattr(Decoder, "keep", kept)
    monkeypatch.setitem(GROWTH, "cpu", growth)
    monkeypatch.setitem(MOST_MASKED, "cpu", most_masked)
    monkeypatch.setattr("opd.models.branches.FEWEST_TOKENS", {})
    lm = ours("student", layers=2)
    prompts, policy = unequal_prompts(lm), with_ends(policy_of(lm), *range(0, 384, 9))

    def forwarded(keep_below: float) -> tuple[int, Rollouts]:
        monkeypatch.setattr("opd.generation.sampling.KEEP_BELOW", keep_below)
        batch, counter = batch_of(prompts), LayerCounter().attach(lm)
        draws = uniforms(0, 0, [prompt.example.id for prompt in prompts], rollouts, 30)
        answers = sample(lm, prefill_of(lm, batch).detach(), policy, 30, draws, counter)
        return counter.tokens["decode"] // 2, answers

    every, truth = forwarded(0.0)
    fewer, answers = forwarded(1.0)
    lengths = truth.lengths
    assert lengths.max() > 2 * lengths.float().mean() or rollouts == 1
    assert every == len(prompts) * rollouts * (lengths.max() - 1)
    width, needed = lengths.max(), 0
    for position in range(1, int(width)):  # a group is as wide as the one with the most
        going_on = lengths > position
        needed += int(going_on.any(1).sum() * going_on.sum(1).max())
    assert fewer == needed < every
    expected = {
        0: {(True, True)},
        300: {(True, True), (True, False), (False, False)},
        10**9: {(False, False)},
    }
    assert rollouts == 1 or set(layouts) == expected[most_masked]
    for name in ("completion_ids", "lengths", "truncated"):
        assert torch.equal(getattr(answers, name), getattr(truth, name))
    assert relative(answers.rollout_logprobs, truth.rollout_logprobs) < 1e-12


def test_an_end_token_in_the_last_place_is_not_truncated():
    lm = ours("student", layers=2)
    prompts = [make_prompt(lm, "a", pairs=1)]
    free = rollouts_of(lm, prompts, with_ends(policy_of(lm)), num_rollouts=1, length=4)
    last = int(free.completion_ids[0, 0, -1])
    assert last not in free.completion_ids[0, 0, :-1]
    ended = rollouts_of(lm, prompts, with_ends(policy_of(lm), last), num_rollouts=1, length=4)
    assert torch.equal(ended.completion_ids, free.completion_ids)
    assert free.truncated.item() and not ended.truncated.item()
    assert ended.completion_mask.all()


def test_rollout_logprobs_are_the_policys():
    # The sampler's log-probabilities (a diagnostic) equal those of the training pass.
    lm = ours("student")
    prompts = unequal_prompts(lm)
    policy = replace(policy_of(lm), temperature=0.8)
    rollouts = rollouts_of(lm, prompts, policy)
    with torch.no_grad():
        hidden = extend(lm, prefill_of(lm, batch_of(prompts)), rollouts.completion_ids)
    log_probs = policy.log_probs(lm.head(hidden))
    expected = log_probs.gather(-1, rollouts.completion_ids[..., None])[..., 0]
    mask = rollouts.completion_mask
    assert (rollouts.rollout_logprobs - expected)[mask].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (None, 0.9), (50, 0.9), (1, 0.5), (900, 0.3)]
)
def test_unlikely_tokens_are_left_out_as_transformers_does(top_k: int | None, top_p: float) -> None:
    policy = replace(policy_of(ours("student")), top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(64, 384, generator=generator, dtype=F64)
    log_probs = policy.log_probs(logits)
    likely = policy.likely(log_probs)
    expected = log_probs
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    assert torch.equal(likely, expected)
    draws = torch.rand(64, 200, generator=generator, dtype=F64)
    ids = choose(likely[:, None].expand(-1, 200, -1), draws)
    assert bool(likely.gather(1, ids).isfinite().all())


def test_hand_computed_limits() -> None:
    policy = replace(policy_of(ours("student")), top_k=3, top_p=0.7)
    log_probs = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]], dtype=F64).log()
    # Of 0.4, 0.25 and 0.2, renormalised 0.47, 0.29 and 0.24, two are needed for 0.7.
    assert policy.likely(log_probs).isfinite().tolist() == [[False, True, False, True, False]]


def test_the_sampler_alone_leaves_out_tokens() -> None:
    lm = ours("student")
    batch = batch_of(unequal_prompts(lm))
    draws = uniforms(0, 0, [p.example.id for p in batch.prompts], 4, 6)
    policy = replace(policy_of(lm), top_k=1)
    rollouts = sample(lm, prefill_of(lm, batch).detach(), policy, 6, draws)
    greedy = sample(lm, prefill_of(lm, batch).detach(), policy, 6, None)
    width = rollouts.completion_ids.shape[2]
    assert torch.equal(
        rollouts.completion_ids, greedy.completion_ids[..., :width].expand(-1, 4, -1)
    )
    # Log-probabilities stay those of the whole distribution.
    assert bool((rollouts.rollout_logprobs[rollouts.completion_mask] < -1e-3).any())

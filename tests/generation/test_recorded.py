"""Decoding in steps of one shape, recorded and replayed: the tokens of a growing cache.

On a CPU a stand-in takes the place of CUDA graphs (`tests.fake.record`): it replays the recorded
operations on the recorded memory.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from opd.data.batch import to_device
from opd.generation.decoder import GROWTH
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import Policy, uniforms
from opd.generation.recorded import RECORDERS, Repeated, cuda_graph
from opd.generation.sampling import CHECK_EVERY, Rollouts, sample
from opd.models.load import prepare
from opd.models.video_lm import VideoLM
from tests.fake import record
from tests.helpers import FAMILIES, grouped, ours, policy_of, prefill_of, queries_about, relative

LENGTH = 30
POLICIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
}
SETTINGS = [(4, 1), (8, 8), (256, 8)]  # tokens by which a step's window grows, and between checks


def rollouts_of(
    lm: VideoLM, policy: Policy, drawn: bool, counter: LayerCounter | None = None
) -> Rollouts:
    """Three rollouts of each of three prompts in two groups."""
    prompts = [*queries_about(lm, "a", (4, 7), pairs=3), *queries_about(lm, "b", (5,), rows=3)]
    prefix = prefill_of(lm, to_device(grouped(lm, prompts), lm.device)).detach()
    draws = uniforms(1, 0, [prompt.example.id for prompt in prompts], 3, LENGTH)
    return sample(lm, prefix, policy, LENGTH, draws if drawn else None, counter)


def assert_equal(actual: Rollouts, expected: Rollouts, limit: float) -> None:
    for name in ("completion_ids", "lengths", "truncated"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert relative(actual.rollout_logprobs, expected.rollout_logprobs) <= limit


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are recorded; yields the number of times."""
    times: list[int] = []

    def counted(function: Any) -> Any:
        times.append(1)
        return record(function)

    monkeypatch.setitem(RECORDERS, "cpu", counted)
    return times


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("poisoned_memory")
def test_recorded_steps_draw_the_same_tokens(
    family: str,
    name: str,
    settings: tuple[int, int],
    in_two_parts: bool,
    recorded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = ours("student", family, layers=2)
    policy = replace(policy_of(lm), eos_token_ids=tuple(range(0, 384, 13)), **POLICIES[name])
    growing = rollouts_of(lm, policy, name != "greedy")
    assert not recorded  # every step has another shape
    monkeypatch.setitem(GROWTH, "cpu", settings[0])
    monkeypatch.setitem(CHECK_EVERY, "cpu", settings[1])
    replayed = rollouts_of(lm, policy, name != "greedy")
    assert recorded and growing.lengths.unique().numel() > 1
    monkeypatch.delitem(RECORDERS, "cpu")
    plain = rollouts_of(lm, policy, name != "greedy")
    assert_equal(plain, growing, 1e-6)
    assert_equal(replayed, plain, 0.0)


def test_a_replay_counts_as_many_layers_as_a_call(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ours("student", layers=2)
    policy = replace(policy_of(lm), eos_token_ids=(-1,))
    counter = LayerCounter().attach(lm)
    monkeypatch.setitem(GROWTH, "cpu", 8)
    rollouts_of(lm, policy, True, counter)
    # Two groups, of which one repeats a prompt: 2 x 2 x 3 rows, and a recording for each window.
    assert counter.tokens["decode"] == 2 * 12 * (LENGTH - 1)
    assert len(recorded) == 4


@pytest.mark.parametrize("how", ["in place", "moved", "loaded"])
def test_weights_may_change_between_two_calls(
    how: str, recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ours("student", layers=2)
    policy = replace(policy_of(lm), eos_token_ids=(-1,))
    monkeypatch.setitem(GROWTH, "cpu", 256)
    before = rollouts_of(lm, policy, True)
    state = {name: 1.5 * weight for name, weight in lm.model.state_dict().items()}
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if how == "in place":
                weight.mul_(1.5)
            elif how == "moved":  # as gathered, or brought back from the host
                weight.data = state[name].clone()
    if how == "loaded":
        lm.model.load_state_dict(state)
    after = rollouts_of(lm, policy, True)
    monkeypatch.delitem(RECORDERS, "cpu")
    assert_equal(after, rollouts_of(lm, policy, True), 0.0)
    assert not torch.equal(after.completion_ids, before.completion_ids)
    assert len(recorded) == 2


def test_sharded_weights_are_not_recorded(
    recorded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GROWTH, "cpu", 256)
    lm = ours("student", layers=2)
    policy = policy_of(lm)
    expected = rollouts_of(lm, policy, True)
    assert recorded.pop() and not recorded
    lm.model.is_sharded = True  # type: ignore[assignment]
    assert_equal(rollouts_of(lm, policy, True), expected, 1e-6)
    assert not recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_its_steps_bit_by_bit(
    family: str, name: str, in_two_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ours("student", family, layers=2)
    lm = prepare(lm.model.to("cuda", torch.bfloat16))
    ends = tuple(range(0, 384, 13))
    policy = replace(policy_of(lm), eos_token_ids=ends, **POLICIES[name])
    graph = mock.Mock(wraps=cuda_graph)
    monkeypatch.setitem(RECORDERS, "cuda", graph)
    monkeypatch.setattr("opd.generation.recorded.announce", pytest.fail)  # where recording fails
    replayed = rollouts_of(lm, policy, name != "greedy").cpu()
    assert graph.called
    monkeypatch.delitem(RECORDERS, "cuda")
    assert_equal(replayed, rollouts_of(lm, policy, name != "greedy").cpu(), 0.0)


def test_what_cannot_be_recorded_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    lm = ours("student", layers=2)
    policy = replace(policy_of(lm), eos_token_ids=(-1,))
    monkeypatch.setitem(GROWTH, "cpu", 8)
    counters = [LayerCounter().attach(lm) for _ in range(2)]
    expected = rollouts_of(lm, policy, True, counters[0])
    monkeypatch.setitem(RECORDERS, "cpu", fails)
    assert_equal(rollouts_of(lm, policy, True, counters[1]), expected, 0.0)
    assert counters[1].tokens["decode"] == counters[0].tokens["decode"]
    error = capsys.readouterr().err
    assert error.count("without a CUDA graph: operation not permitted\n") == 1


def test_sampling_leaves_the_prefix_as_it_was() -> None:
    lm = ours("student", layers=2)
    prompts = queries_about(lm, "a", (4,), pairs=3)
    prefix = prefill_of(lm, grouped(lm, prompts)).detach()
    draws = uniforms(0, 0, ["a"], 1, LENGTH)
    first, second = (sample(lm, prefix, policy_of(lm), LENGTH, draws) for _ in range(2))
    assert_equal(first, second, 0.0)


def test_the_stand_in_replays_what_was_recorded() -> None:
    """The tests above could not fail otherwise."""
    number, total, wrong = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    on_host = 0

    def step() -> None:
        nonlocal on_host
        on_host += 1
        number.add_(1)
        total.add_(number * 2)
        wrong.add_(on_host)  # frozen when it is recorded

    repeated = Repeated(step, record)
    for _ in range(5):
        repeated()
    assert (int(number), int(total), int(wrong)) == (5, 30, 1 + 2 * 4)

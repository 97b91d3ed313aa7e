"""Routing: rollouts that are good enough cost neither teacher nor backward, and change nothing
else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.config.method import CurriculumConfig, SampleConfig
from opd.config.optimisation import OptimConfig
from opd.config.run import Config, load_config
from opd.errors import ConfigError
from opd.generation.extend import extend
from opd.generation.policy import uniforms
from opd.generation.prefilled import Prefilled
from opd.generation.prefix import Prefix, encode, prefill
from opd.generation.sampling import Rollouts, sample
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.record.flops import step_flops
from tests.helpers import (
    backward,
    batch_of,
    gap,
    gradients,
    ours,
    policy_of,
    prefill_of,
    random_completions,
    relative,
    stock,
    stock_loss,
    unequal_prompts,
)

MANY_ENDS = tuple(range(0, 350, 6))
SOME = torch.tensor([[0.9, 0.4, 0.5, 0.1], [0.8, 0.5, 1.0, 0.7], [0.6, 0.6, 0.2, 0.9]])


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch):
    """A trainer of three prompts with four rollouts each, whose rewards are given by prompt id."""

    def make(rewards: Tensor = SOME, layers: int = 2, **options: Any) -> Trainer:
        table = dict(zip("abc", rewards, strict=True))

        def grade(rollouts: Rollouts, examples: Any, *_: Any) -> Rollouts:
            return replace(rollouts, rewards=torch.stack([table[e.id] for e in examples]))

        monkeypatch.setattr("opd.method.advantages.grade", grade)
        lm = ours("student", layers=layers)
        config = Config(
            **dict(
                steps=20,
                batch_size=3,
                num_rollouts=4,
                curriculum=CurriculumConfig(routing="on"),
                optim=OptimConfig(lr=1e-3, schedule="constant", warmup=0.0, max_grad_norm=1e9),
                sample=SampleConfig(max_completion_length=5),
            )
            | options
        )
        policy = replace(policy_of(lm), eos_token_ids=MANY_ENDS)
        processor = type("Processor", (), {"tokenizer": None})
        teacher = Teacher(ours("teacher", seed=5, layers=layers))
        return Trainer(config, processor, lm, teacher, policy)

    return make


def drawn(tested: Trainer, batch: Any) -> Rollouts:
    draws = uniforms(0, 0, [e.id for e in batch.examples], 4, 5)
    return sample(
        tested.student, prefill_of(tested.student, batch).detach(), tested.policy, 5, draws
    )


@pytest.mark.usefixtures("exact_modules")
def test_prompts_forwarded_alone_and_joined_are_the_batch():
    lm = ours("student", layers=2)
    batch = batch_of(unequal_prompts(lm), extra_padding=3)
    ids, mask = random_completions(3, 2)
    alone = batch.parts(alone=True)
    assert [part.mask.all() and part.num_tokens for part in alone] == [
        len(prompt.input_ids) for prompt in batch.prompts
    ]
    joined = Prefix.join([prefill(lm, part, encode(lm, part)) for part in alone])
    actual = extend(lm, joined, ids)[mask]
    truth = extend(lm, prefill_of(lm, batch), ids)[mask]
    assert relative(actual, truth) < 1e-12


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("size", [None, 1])
def test_a_routed_step_is_the_stock_models_loss_of_what_is_routed(trainer, size):
    tested = trainer(micro_batch_size=size)
    prompts = unequal_prompts(tested.student)
    batch = batch_of(prompts)
    rollouts = drawn(tested, batch)
    kept = SOME < 0.5
    places = [i for i in range(3) if kept[i].any()]
    parts = [(prompts[i], rollouts.completion_ids[i][kept[i]]) for i in places]
    masks = [rollouts.completion_mask[i][kept[i]] for i in places]
    model, teacher = stock("student", layers=2), stock("teacher", seed=5, layers=2)
    teacher.requires_grad_(False)
    expected = backward(
        model,
        lambda: (
            stock_loss(
                model,
                teacher,
                [p for p, _ in parts],
                ([ids for _, ids in parts], masks),
                tested.policy,
            )
            / 12
        ),  # three prompts of four rollouts, however many are routed
    )
    seen: dict[str, Tensor] = {}
    tested.engine.optimizer.register_step_pre_hook(
        lambda *_: seen.update(gradients(tested.student.model))
    )
    row = tested.step([batch] if size is None else [batch_of([p]) for p in prompts], 0)
    worst = gap((row["loss"], seen), expected)
    assert worst.loss < 1e-12 and worst.gradient < 1e-11, worst
    assert row["trained_share"] == 3 / 12 and row["reward"] == pytest.approx(float(SOME.mean()))
    lengths = rollouts.completion_mask.sum()
    assert row["completion_length"] == int(lengths) / 12
    counts = tested.progress
    assert (counts.rollouts, counts.trained_rollouts) == (12, 3)
    assert tested.counter.passes("prompt", counts.prompt_tokens) == 1.0


def test_what_is_suspended_reaches_neither_teacher_nor_backward(trainer):
    tested = trainer()
    teacher, seen = tested.teacher.lm, []
    layer = teacher.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    batch = batch_of(unequal_prompts(tested.student))
    [whole] = tested.rollouts([batch], prefill_of(tested.student, batch).detach(), 0)
    walked: list[str] = []

    def watched(lm: Any, part: Any, *more: Any) -> Prefix:
        prefix = prefill(lm, part, *more)
        if prefix.last_hidden.requires_grad:
            name = part.prompts[0].example.id
            prefix.keys[0].register_hook(lambda _: walked.append(name))
        return prefix

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd.method.trainer.prefill", watched)
        tested.step([batch], 0)
    a, _, c = (len(prompt.input_ids) for prompt in batch.prompts)
    # Two routed rollouts of a and one of c, beside each other: 2 x (T - 1) tokens each.
    assert [tuple(shape) for shape in seen[:2]] == [(1, a), (1, c)]
    assert len(seen) == 3 and seen[2][0] == 2
    assert sorted(walked) == ["a", "c"]
    rows, answers = whole.routed([1] * 3)
    assert rows == [0, 2]
    alone = batch.parts(alone=True)
    every = Prefilled.of(alone, [prefill_of(tested.student, part) for part in alone])
    trained = every.take(rows)
    wanted = step_flops(tested.costs, alone, whole.lengths, trained, answers.loss_lengths, "none")
    assert tested.ledger.flops == wanted
    everything = step_flops(tested.costs, alone, whole.lengths, every, whole.lengths, "none")
    assert wanted["teacher"] < 0.7 * everything["teacher"]


def test_a_step_without_any_touches_nothing(trainer):
    tested = trainer(torch.ones(3, 4))
    batch = batch_of(unequal_prompts(tested.student))
    before = {n: p.detach().clone() for n, p in tested.student.model.named_parameters()}
    row = tested.step([batch], 0)
    tested.ledger.close_step(row)
    (closed,) = tested.ledger.closed()
    assert {"teacher", "extend", "loss", "backward"}.isdisjoint(closed["seconds"])
    assert tested.ledger.flops["teacher"] == 0
    assert row["loss"] == row["grad_norm"] == row["trained_share"] == 0
    assert row["skipped"] is None and row["kl"] is None and row["reward"] == 1
    assert not tested.engine.optimizer.state
    for name, parameter in tested.student.model.named_parameters():
        assert torch.equal(before[name], parameter), name
    assert tested.engine.steps_done == 1


def test_routed_keeps_the_order_of_the_tokens():
    ids = torch.arange(3 * 3 * 4).view(3, 3, 4)
    lengths = torch.tensor([[4, 1, 3], [2, 2, 2], [1, 2, 4]])
    trained = torch.tensor([[False, True, True], [False] * 3, [True, True, False]])
    truncated = torch.zeros(3, 3, dtype=torch.bool)
    whole = Rollouts(ids, lengths, ids.float(), truncated, trained=trained)
    rows, actual = whole.routed([1] * 3)
    assert rows == [0, 2]
    assert actual.completion_ids.shape == (2, 2, 3)  # the longest routed has 3 tokens
    assert actual.completion_ids[0, 0, 0] == 4 and actual.completion_ids[0, 1].tolist() == [
        8,
        9,
        10,
    ]
    assert torch.equal(actual.completion_ids[actual.loss_mask], ids[whole.loss_mask])
    ragged = replace(whole, trained=torch.tensor([[True] * 3, [False] * 3, [False, False, True]]))
    rows, actual = ragged.routed([1] * 3)
    assert rows == [0, 2] and actual.trained.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(actual.completion_ids[actual.loss_mask], ids[ragged.loss_mask])
    nothing = replace(whole, trained=torch.zeros_like(trained))
    rows, actual = nothing.routed([1] * 3)
    assert rows == [] and actual.completion_ids.shape == (0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method=sft"], "curriculum.routing=on: needs method=opd with sampled completions"),
        (
            ["normalize=token"],
            "normalize=token: curriculum.routing needs normalize=sequence, whose denominator is "
            "known before routing",
        ),
        (
            ["opd.reward_coef=1", "num_rollouts=2"],
            "opd.reward_coef=1.0: compares whole groups of rollouts, which curriculum.routing "
            "breaks up; use opd.reward_coef=0",
        ),
    ],
)
def test_mistakes_in_the_configuration(keys, message):
    with pytest.raises(ConfigError) as error:
        load_config([*keys, "curriculum.routing=on"])
    assert str(error.value) == message


def test_scc_routes_unless_told_not_to():
    assert load_config(["curriculum.kind=scc"]).routes
    assert not load_config(["curriculum.kind=scc", "curriculum.routing=off"]).routes
    assert load_config(["curriculum.kind=random", "curriculum.routing=on"]).routes
    assert not load_config(["curriculum.kind=tvdf"]).routes

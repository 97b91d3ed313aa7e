"""GRPO: its loss against plain autograd, its groups, its epochs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.config.method import GRPOConfig, OPDConfig, SampleConfig
from opd.config.optimisation import OptimConfig
from opd.config.run import Config
from opd.generation.extend import extend
from opd.generation.policy import Policy, uniforms
from opd.generation.sampling import Rollouts, sample
from opd.method.advantages import advantages, all_equal
from opd.method.objectives import Loss, Targets, grpo
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models.video_lm import VideoLM
from tests.helpers import (
    backward,
    batch_of,
    gap,
    gradients,
    metric_rows,
    ours,
    policy_of,
    prefill_of,
    run,
    unequal_prompts,
)

MANY_ENDS = tuple(range(0, 350, 6))
GROUP = 4


def rewards_of(rollouts: Rollouts) -> Tensor:
    """A reward that tokens alone decide; the second of three prompts has none to compare."""
    sums = (rollouts.completion_ids * rollouts.completion_mask).sum(-1)
    return (sums % 7).double() / 7


def graded(rollouts: Rollouts, examples: Any, *_: Any) -> Rollouts:
    rewards = rewards_of(rollouts)
    rewards[[example.id == "b" for example in examples]] = 0.5
    return replace(rollouts, rewards=rewards)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.method.advantages.grade", graded)

    def make(lm: VideoLM, teacher: Teacher | None = None, **options: Any) -> Trainer:
        policy = replace(policy_of(lm), eos_token_ids=MANY_ENDS)
        common: dict[str, Any] = dict(
            method="grpo",
            steps=20,
            batch_size=3,
            num_rollouts=GROUP,
            optim=OptimConfig(lr=1e-3, schedule="constant", warmup=0.0, max_grad_norm=1e9),
            sample=SampleConfig(max_completion_length=5),
        )
        config = Config(**(common | options))
        processor = type("Processor", (), {"tokenizer": None})
        return Trainer(config, processor, lm, teacher, policy)

    return make


def drawn(lm: VideoLM, policy: Policy, batch: Any) -> Rollouts:
    draws = uniforms(0, 0, [e.id for e in batch.examples], GROUP, 5)
    rollouts = graded(sample(lm, prefill_of(lm, batch).detach(), policy, 5, draws), batch.examples)
    assert rollouts.rewards is not None
    told_apart = ~all_equal(rollouts.rewards)
    return replace(rollouts, trained=told_apart[:, None].expand_as(rollouts.rewards))


def dense(
    lm: VideoLM, batch: Any, policy: Policy, rollouts: Rollouts, old: Tensor | None, clip: float
) -> Tensor:
    """-sum min(rho A, clip(rho) A) over trained tokens, by autograd alone."""
    hidden = extend(lm, prefill_of(lm, batch), rollouts.completion_ids)
    logits = lm.model.lm_head.weight @ hidden.reshape(-1, hidden.shape[-1]).T
    log_p = (logits.T / policy.temperature).masked_fill(~policy.allowed_columns, -1e30)
    log_p = log_p.log_softmax(-1).gather(1, rollouts.completion_ids.reshape(-1, 1))[:, 0]
    log_p = log_p.view(rollouts.completion_ids.shape)
    ratio = (log_p - (log_p.detach() if old is None else old)).exp()
    assert rollouts.rewards is not None
    relative = advantages(rollouts.rewards, "std")[..., None]
    value = torch.minimum(ratio * relative, ratio.clamp(1 - clip, 1 + clip) * relative)
    return -(value * rollouts.loss_mask).sum()


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_a_step_is_plain_autograd(trainer, size, normalize):
    lm = ours("student", layers=2)
    tested = trainer(lm, normalize=normalize, micro_batch_size=size)
    prompts = unequal_prompts(lm)
    whole = batch_of(prompts)
    rollouts = drawn(lm, tested.policy, whole)
    trained = rollouts.loss_mask
    assert trained.any(2).sum(1).tolist() == [GROUP, 0, GROUP]
    by = int(trained.sum()) if normalize == "token" else 2 * GROUP
    expected = backward(lm.model, lambda: dense(lm, whole, tested.policy, rollouts, None, 0.2) / by)
    lm.model.zero_grad()
    seen: dict[str, Tensor] = {}
    tested.engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(lm.model)))
    micro = [whole] if size is None else [batch_of([prompt]) for prompt in prompts]
    row = tested.step(micro, 0)
    worst = gap((row["loss"], seen), expected)
    assert worst.loss < 1e-12 and worst.gradient < 1e-12, worst
    assert row["equal_groups"] == 1 and row["grad_norm"] > 0
    assert row["reward"] == pytest.approx(float(rollouts.rewards.mean()))
    assert row["completion_length"] == int(rollouts.completion_mask.sum()) / 12
    assert tested.counter.passes("prompt", sum(b.num_tokens for b in micro)) == 1.0


@pytest.mark.usefixtures("exact_modules")
def test_a_second_epoch_has_the_first_ones_logprobs(trainer):
    lm = ours("student", layers=2)
    tested = trainer(lm, grpo=GRPOConfig(epochs=3, clip=0.01))
    batch = batch_of(unequal_prompts(lm))
    rollouts = drawn(lm, tested.policy, batch)
    with torch.no_grad():
        hidden = extend(lm, prefill_of(lm, batch), rollouts.completion_ids)
        log_p = tested.policy.log_probs(lm.head(hidden).double())
        old = log_p.gather(-1, rollouts.completion_ids[..., None])[..., 0]
    seen: list[tuple[Any, dict[str, Tensor]]] = []

    def before_step(*_: Any) -> None:
        actual = {name: grad.clone() for name, grad in gradients(lm.model).items()}
        lm.model.zero_grad()
        truth = backward(
            lm.model,
            lambda: dense(lm, batch, tested.policy, rollouts, old if seen else None, 0.01) / 8,
        )
        seen.append((truth, actual))
        for name, parameter in lm.model.named_parameters():
            if name in actual:
                parameter.grad = actual[name]

    tested.engine.optimizer.register_step_pre_hook(before_step)
    tested.step([batch], 0)
    assert len(seen) == 3
    for truth, actual in seen:
        # policy.log_probs is fp32, so old log-probabilities agree to 1e-7.
        assert gap((truth[0], actual), truth).gradient < 1e-4
    first, second = (torch.cat([g.flatten() for g in seen[i][1].values()]) for i in (0, 1))
    assert second.norm() < 0.9 * first.norm(), "the clip stopped nothing"
    assert tested.engine.steps_done == 3


def test_prompt_forwards_are_the_epochs(trainer):
    lm = ours("student", layers=1)
    tested = trainer(lm, grpo=GRPOConfig(epochs=2))
    batch = batch_of(unequal_prompts(lm))
    tested.step([batch], 0)
    assert tested.counter.passes("prompt", batch.num_tokens) == 2.0


def test_nothing_to_prefer_changes_nothing(trainer, monkeypatch):
    lm = ours("student", layers=1)
    tested = trainer(lm)
    batch = batch_of(unequal_prompts(lm))
    tested.step([batch], 0)
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    state = {k: v.clone() for p in tested.engine.optimizer.state.values() for k, v in p.items()}

    def equal(rollouts: Rollouts, *_: Any) -> Rollouts:
        return replace(rollouts, rewards=torch.full_like(rewards_of(rollouts), 0.25))

    monkeypatch.setattr("opd.method.advantages.grade", equal)
    row = tested.step([batch], 1)
    assert row["loss"] == 0 and row["grad_norm"] == 0 and row["skipped"] is None
    assert row["equal_groups"] == 3 and row["reward"] == 0.25 and row["reward_std"] == 0
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    again = {k: v for p in tested.engine.optimizer.state.values() for k, v in p.items()}
    assert all(torch.equal(state[k], v) for k, v in again.items())
    assert tested.engine.steps_done == 2


def small() -> tuple[Tensor, Tensor, Tensor, Tensor, Policy]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    allowed = torch.tensor([True, False, True, True, True, False, True])
    student = randn(3, 5).requires_grad_(), randn(7, 5).requires_grad_()
    return *student, randn(3, 5), randn(7, 5), Policy(allowed, 1.7, (), 0)


def test_the_penalty_is_the_kl_to_the_reference():
    hidden, head, reference_hidden, reference_head, policy = small()
    ids, relative = torch.tensor([0, 3, 6]), torch.tensor([1.0, -0.5, 0.0])
    config = Config(method="grpo", num_rollouts=2, grpo=GRPOConfig(kl_coef=0.3))
    targets = Targets(ids, policy, reference_hidden, reference_head, relative, None, config)
    keep = policy.allowed_columns

    def chosen(hidden: Tensor, head: Tensor) -> Tensor:
        log_p = (hidden @ head[keep].T / 1.7).log_softmax(-1)
        return log_p[torch.arange(3), torch.tensor([0, 2, 4])]

    now, reference = chosen(hidden, head), chosen(reference_hidden, reference_head)
    distance = reference - now
    ratio = (now - now.detach()).exp()
    truth = -(ratio * relative).sum() + 0.3 * (distance.exp() - distance - 1).sum()
    actual: Loss = grpo(targets, hidden, head)
    assert_close(actual.loss, truth)
    wanted = torch.autograd.grad(truth, (hidden, head))
    for a, b in zip(torch.autograd.grad(actual.loss, (hidden, head)), wanted, strict=True):
        assert_close(a, b)
    # At the reference itself the penalty is 0, and pulls nowhere.
    same = Targets(ids, policy, hidden.detach(), head.detach(), 0 * relative, None, config)
    twin = grpo(same, hidden, head)
    assert abs(float(twin.loss.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(twin.loss, (hidden, head)))


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_bonus_is_the_entropy_of_the_policy(weight):
    hidden, head, *_, policy = small()
    ids, relative = torch.tensor([0, 3, 6]), torch.tensor([1.0, -0.5, 0.0])
    rules = GRPOConfig(entropy_coef=0.7)
    config = Config(method="grpo", num_rollouts=2, grpo=rules)
    targets = Targets(ids, policy, advantages=relative, config=config, token_weight=weight)
    log_p = (hidden @ head[policy.allowed_columns].T / 1.7).log_softmax(-1)
    now = log_p[torch.arange(3), torch.tensor([0, 2, 4])]
    entropy = -(log_p.exp() * log_p).sum(-1)
    truth = weight * (-((now - now.detach()).exp() * relative) - 0.7 * entropy).sum()
    actual: Loss = grpo(targets, hidden, head)
    assert_close(actual.loss, truth, rtol=1e-12, atol=1e-12)
    assert_close(actual.student_entropy, entropy.detach())
    wanted = torch.autograd.grad(truth, (hidden, head))
    for a, b in zip(torch.autograd.grad(actual.loss, (hidden, head)), wanted, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_groups_of_equal_rewards_keep_penalty_and_bonus(trainer, size, kl_coef, entropy_coef):
    """All twelve rollouts are in loss and denominator, the second prompt's with advantage 0."""
    lm, reference = ours("student", layers=2), ours("student", seed=5, layers=2)
    rules = GRPOConfig(kl_coef=kl_coef, entropy_coef=entropy_coef)
    tested = trainer(lm, Teacher(reference), grpo=rules, micro_batch_size=size)
    prompts = unequal_prompts(lm)
    batch = batch_of(prompts)
    rollouts = replace(drawn(lm, tested.policy, batch), trained=None)

    def log_probs(model: VideoLM) -> Tensor:
        hidden = extend(model, prefill_of(model, batch), rollouts.completion_ids)
        logits = hidden @ model.model.lm_head.weight.T / tested.policy.temperature
        return logits.masked_fill(~tested.policy.allowed_columns, -1e30).log_softmax(-1)

    def chosen(log_p: Tensor) -> Tensor:
        return log_p.gather(-1, rollouts.completion_ids[..., None])[..., 0]

    def whole() -> Tensor:
        log_p = log_probs(lm)
        distance = chosen(log_probs(reference)).detach() - chosen(log_p)
        penalty = (distance.exp() - distance - 1) * rollouts.loss_mask
        entropy = -(log_p.exp() * log_p).sum(-1) * rollouts.loss_mask
        assert penalty[1].sum() > 0 and entropy[1].sum() > 0
        rewarded = dense(lm, batch, tested.policy, rollouts, None, 0.2)
        more = kl_coef * penalty.sum() - entropy_coef * entropy.sum()
        return (rewarded + more) / (3 * GROUP)

    expected = backward(lm.model, whole)
    lm.model.zero_grad()
    seen: dict[str, Tensor] = {}
    tested.engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(lm.model)))
    row = tested.step([batch] if size is None else [batch_of([prompt]) for prompt in prompts], 0)
    worst = gap((row["loss"], seen), expected)
    assert worst.loss < 1e-6 and worst.gradient < 1e-6, worst
    assert row["equal_groups"] == 1 and row["trained_share"] == 1


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("objective", ["reverse_kl", "sampled"])
def test_a_mix_with_the_reward_is_the_sum(objective, trainer, monkeypatch):
    lm, teacher = ours("student", layers=1), Teacher(ours("teacher", seed=5, layers=1))
    batch = batch_of(unequal_prompts(lm))
    actual: dict[str, dict[str, Tensor]] = {}
    for name, coef in (("plain", 0.0), ("mixed", 0.5), ("more", 1.5)):
        tested = trainer(
            lm, teacher, method="opd", objective=objective, opd=OPDConfig(reward_coef=coef)
        )
        [(_, rollouts)] = tested.micro_steps([batch], 0)
        assert rollouts.trained is None
        actual[name] = {n: g.clone() for n, g in gradients(lm.model).items()}
        lm.model.zero_grad()
    # The policy gradient alone, by plain autograd, over all 12 rollouts.
    rollouts = replace(drawn(lm, tested.policy, batch), trained=None)
    _, rewarded = backward(
        lm.model, lambda: dense(lm, batch, tested.policy, rollouts, None, 0.2) / 12
    )
    for name, gradient in rewarded.items():
        for mix, coef in (("mixed", 0.5), ("more", 1.5)):
            assert_close(
                actual[mix][name], actual["plain"][name] + coef * gradient, rtol=1e-6, atol=1e-9
            )


MORE = ["grpo.kl_coef=0.05", "grpo.entropy_coef=0.01", "grpo.epochs=2", "normalize=token"]


@pytest.mark.parametrize("more", [[], MORE])
def test_a_run(more, videos, tmp_path):
    arguments = ["method=grpo", "num_rollouts=3", "steps=3", "batch_size=2", "optim.lr=1e-4"]
    arguments += ["data.limit_train=8", "data.limit_eval=4", "eval.draws=1", *more]
    summary = run(videos, tmp_path / "run", *arguments)
    rows = metric_rows(tmp_path / "run")
    assert len(rows) == 3 and summary["after"]["queries"] == 4
    assert summary["student_prompt_forwards_per_step"] == (2.0 if more else 1.0)
    for row in rows:
        assert 0 <= row["reward"] <= 1 and row["equal_groups"] in (0, 1, 2)
        assert row["parse_failures"] is not None and row["kl"] is None
        assert row["logprob_gap"] < 1e-4
    assert summary["teacher"] is None

"""The step benchmarks compare like with like: the same loss and gradient, and the FLOPs that
arithmetic says."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.bench_step import LOOPS
from bench.steps import loops
from bench.steps import measure as steps
from bench.steps.loops import loop_step, published_style, trl_style
from bench.steps.measure import (
    Measured,
    flops,
    make_trainer,
    measure,
    prove_equal,
    single_pass_step,
)
from bench.steps.random_models import Scale, make_prompt, random_trainer
from opd.config.run import Config, load_config
from opd.data.batch import collate
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.planning.auto import resolve_auto
from opd.planning.memory import Shapes

FORWARDS = {trl_style: 1, published_style: 3}  # of the student, besides generating


@pytest.fixture(scope="module")
def config(videos: Path) -> Config:
    return load_config([f"data.video_root={videos}", "batch_size=3"])


@pytest.mark.parametrize("name", LOOPS)
def test_loops_make_the_single_passs_update(config: Config, name: str) -> None:
    loop, objective, _ = LOOPS[name]
    config = replace(config, objective=objective)
    (ours, batch), (theirs, _) = make_trainer(config), make_trainer(config)
    single_pass_step(ours, batch, 0)
    loop_step(loop, theirs, batch, 0)
    for a, b in zip(ours.engine.parameters, theirs.engine.parameters, strict=True):
        # Adam's first update is the sign of the gradient times the rate: compare its moments.
        x, y = (e.optimizer.state[p]["exp_avg"] for e, p in ((ours.engine, a), (theirs.engine, b)))
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("name", LOOPS)
def test_flops_are_what_shapes_say(config: Config, name: str) -> None:
    loop, objective, _ = LOOPS[name]
    trainer, batch = make_trainer(replace(config, objective=objective))
    measured = flops(lambda: single_pass_step(trainer, batch, 0)) / flops(
        lambda: loop_step(loop, trainer, batch, 0)
    )
    # Of layers, before decoding: the shipped teacher has twice the weights of the student, and the
    # backward is two forwards. A loop of n forwards, and one to generate, makes n + 1 + 2 + 2.
    assert abs(measured / (5 / (FORWARDS[loop] + 5)) - 1) < 0.05


@pytest.mark.parametrize("name", LOOPS)
def test_forwards_of_a_loop(config: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, objective, _ = LOOPS[name]
    trainer, batch = make_trainer(replace(config, objective=objective))
    seen: list[tuple[bool, int]] = []
    stock = loops.full_logits

    def counted(lm: Any, *rest: Any) -> torch.Tensor:
        logits = stock(lm, *rest)
        seen.append((lm is trainer.student, logits.shape[-1]))
        return logits

    monkeypatch.setattr(loops, "full_logits", counted)
    loop(trainer, batch, 0)
    vocabulary = trainer.student.head.weight.shape[0]
    expected = [(True, vocabulary)] * FORWARDS[loop] + [(False, vocabulary)]
    assert sorted(seen) == sorted(expected), "full logits of each forward, one of the teacher"


METHODS: dict[str, dict[str, Any]] = {
    "rollouts": {"num_rollouts": 3},
    "grpo": {"method": "grpo", "num_rollouts": 4},
    "sft": {"method": "sft"},
    "by token": {"normalize": "token"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_definition_on_full_logits(config: Config, name: str) -> None:
    errors = prove_equal(*make_trainer(replace(config, **METHODS[name])))
    assert 0 < errors["gradient_error"] < 1e-4 and errors["loss_error"] < 1e-4


def test_recomputed_and_routed_steps_are_proved_too(config: Config) -> None:
    recomputed = replace(config, prefix=replace(config.prefix, recompute="all"))
    routing = replace(config.curriculum, routing="on", route_below=0.3)
    for changed in (recomputed, replace(config, batch_size=8, curriculum=routing)):
        assert prove_equal(*make_trainer(changed))["gradient_error"] < 1e-4


def test_another_update_is_caught(config: Config) -> None:
    trainer, batch = make_trainer(config)

    def shorter(trainer: Trainer, batch: Any, step: int) -> Any:
        rollouts = replace(loops.generate(trainer, batch, step), horizon=5)
        return loops.train_on(trainer, batch, rollouts), rollouts

    with pytest.raises(AssertionError):
        prove_equal(trainer, batch, shorter)

    def others(trainer: Trainer, batch: Any, step: int) -> Any:
        return trl_style(trainer, batch, step + 1)

    with pytest.raises(AssertionError, match="rollouts"):
        prove_equal(trainer, batch, others)
    with pytest.raises(ValueError, match="no definition of jsd"):
        prove_equal(*make_trainer(replace(config, objective="jsd")))


def test_a_slower_call_and_a_hungrier_one_are_seen(pedantic: Any) -> None:
    def slow(_: int) -> None:
        torch.ones(100, 100) @ torch.ones(100, 100)
        held = torch.ones(50_000_000)
        time.sleep(0.03 + 0 * float(held[0]))

    def fast(_: int) -> None:
        torch.ones(100, 50) @ torch.ones(50, 100)
        held = torch.ones(25_000_000)
        time.sleep(0.01 + 0 * float(held[0]))

    def seen() -> bool:
        result = measure(pedantic, {"slow": slow, "fast": fast}, 5).against("slow", "fast")
        assert result["ratio"] > 1.3 and result["flops"]["ratio"] == 2
        peak = result["peak"]
        return abs(peak["ratio"] - 2) < 0.3 and abs(peak["first_mb"] - 200) < 20

    # Resident memory is also what the system takes back meanwhile, such as pages of libraries.
    assert any(seen() for _ in range(3))


def test_ratios_of_what_was_measured_by_hand() -> None:
    times = {"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 4.0]}
    measured = Measured(times=times, flops={"a": 5, "b": 8}, peaks={"a": 3_000_000, "b": 6_000_000})
    result = measured.against("a", "b")
    assert result["ratio"] == 2.0 and result["flops"]["ratio"] == 0.625
    assert result["peak"] == {"ratio": 0.5, "first_mb": 3, "second_mb": 6}


def test_phases_are_medians_of_the_last_steps() -> None:
    rows = [{"seconds": {"loss": s, "extend": 9.0}} for s in (7.0, 1.0, 3.0)]
    rows.append({"seconds": {"loss": 2.0}})  # nothing was trained on
    trainer: Any = SimpleNamespace(ledger=SimpleNamespace(closed=lambda wait: rows))
    assert steps.phases(trainer, 3) == {"loss": 2000, "extend": 9000}


class TestFullSize:
    """Steps of random models, here of the embedded task's shapes."""

    @pytest.fixture(scope="class")
    def scale(self, tmp_path_factory: pytest.TempPathFactory) -> Scale:
        folder = tmp_path_factory.mktemp("models")
        for name in ("student", "teacher"):
            tiny.build(name, 0).config.save_pretrained(folder / name)
        sizes: dict[str, int] = dict(pairs=8, rows=1, columns=2, prompts=2, length=5, rollouts=3)
        return Scale(student=str(folder / "student"), teacher=str(folder / "teacher"), **sizes)

    @pytest.mark.parametrize("method", ["opd", "grpo"])
    def test_a_step_is_what_is_planned_for(self, scale: Scale, tmp_path: Path, method: str) -> None:
        """Its prompts, of unequal length, and its completions, all of them with a gradient."""
        device = torch.device("cpu")
        requested = scale.config(method, tmp_path)
        trainer = random_trainer(resolve_auto(requested, device), device)
        prompts = [make_prompt(trainer.student, scale, number) for number in range(2)]
        longest = 16 + 8 * 10 + 64
        assert [len(prompt.input_ids) for prompt in prompts] == [longest, longest - 12 + 3]
        shapes = Shapes.of(requested, torch.float32)
        assert (shapes.tokens, shapes.video_tokens) == (longest, 16)
        row = trainer.step([collate([prompt], 0, device) for prompt in prompts], 0)
        assert row["grad_norm"] > 0 and not row["skipped"]
        rollouts = {"opd": 1, "grpo": 3}[method]
        counts = trainer.progress
        assert counts.generated_tokens == 2 * rollouts * 5 and counts.equal_groups == 0


class TestTRL:
    """TRL's trainer on the same models."""

    @pytest.fixture(scope="class")
    def sides(self, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
        pytest.importorskip("trl", minversion="1.16")
        from bench.steps import trl_trainer

        trainer, batch = make_trainer(replace(config, normalize="token"))
        batch = trl_trainer.text_only(trainer, batch)
        peer = trl_trainer.peer(trainer, batch, tmp_path_factory.mktemp("trl"))
        return trl_trainer, trainer, batch, peer

    def test_the_loss_is_the_same(self, sides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        trl_trainer, trainer, batch, theirs = sides
        errors = trl_trainer.prove_equal(trainer, batch, theirs)
        assert errors["loss_error"] < 1e-5 and 0 < errors["gradient_error"] < 1e-3
        monkeypatch.setattr(theirs, "temperature", 1.1)
        with pytest.raises(AssertionError):
            trl_trainer.prove_equal(trainer, batch, theirs)

    def test_a_step_generates_and_updates(self, sides: Any) -> None:
        trl_trainer, trainer, batch, theirs = sides
        length = trainer.config.sample.max_completion_length
        before = [p.detach().clone() for p in theirs.model.parameters()]
        for _ in range(2):
            trl_trainer.step(theirs, batch)
        assert theirs.state.global_step == 0, "by hand, outside of its loop"
        after = theirs.model.parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert theirs._metrics["train"]["completions/min_length"][-2:] == [length, length]
        [(_, rollouts)] = trainer.micro_steps([batch], 0)
        assert rollouts.completion_mask.all() and rollouts.completion_ids.shape[2] == length

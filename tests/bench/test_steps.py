"""The step benchmarks compare like with like: the same loss and gradient, the FLOPs that arithmetic
says, and what fails for want of memory is told."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.bench_step import LOOPS, ROUTED, analytic_ratio
from bench.steps import loops
from bench.steps import measure as steps
from bench.steps.loops import FORWARDS, loop_step, published_style, trl_style
from bench.steps.measure import (
    Measured,
    flops,
    make_trainer,
    measure,
    prove_equal,
    single_pass_step,
)
from opd.config.run import Config, load_config
from opd.method.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config([f"data.video_root={tmp_path_factory.mktemp('videos')}", "batch_size=3"])


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
    assert abs(measured / analytic_ratio(trainer, batch, loop) - 1) < 0.05
    # The shipped teacher has twice the weights, so 5/8 and 5/6 before decoding.
    limit = {trl_style: 5 / 6, published_style: 5 / 8}[loop]
    assert abs(steps.analytic_share(trainer, loop) / limit - 1) < 0.01
    assert abs(measured / limit - 1) < 0.05


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
    found = prove_equal(*make_trainer(replace(config, **METHODS[name])))
    assert 0 < found["gradient_error"] < 1e-4 and found["loss_error"] < 1e-4


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


def test_who_runs_out_of_memory_is_told_and_the_rest_goes_on() -> None:
    calls = {
        "fits": lambda _: time.sleep(0.001),
        "huge": lambda _: torch.empty(2**50, dtype=torch.uint8),
    }
    found = measure(calls, 3, "2 prompts of 5 tokens")
    assert found.failed == {"huge": "out of memory at 2 prompts of 5 tokens"}
    told = found.against("fits", "huge")
    assert told["failed"] == found.failed and told["ms"]["fits"] >= 1 and "ratio" not in told

    def broken(_: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        measure({"broken": broken}, 1, "")


def test_a_slower_call_and_a_hungrier_one_are_seen() -> None:
    def slow(_: int) -> None:
        torch.ones(100, 100) @ torch.ones(100, 100)
        held = torch.ones(50_000_000)
        time.sleep(0.03 + 0 * float(held[0]))

    def fast(_: int) -> None:
        torch.ones(100, 50) @ torch.ones(50, 100)
        held = torch.ones(25_000_000)
        time.sleep(0.01 + 0 * float(held[0]))

    def seen() -> bool:
        found = measure({"slow": slow, "fast": fast}, 5, "", costs=True).against("slow", "fast")
        assert found["ratio"] > 1.3 and found["flops"]["ratio"] == 2
        peak = found["peak"]
        return abs(peak["ratio"] - 2) < 0.3 and abs(peak["first_mb"] - 200) < 20

    # Resident memory is also what the system takes back meanwhile, such as pages of libraries.
    assert any(seen() for _ in range(3))


def test_ratios_of_what_was_measured_by_hand() -> None:
    times = {"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 4.0]}
    peaks = {"a": [4e6, 3e6], "b": [6e6, 6e6]}
    found = Measured(times=times, flops={"a": 5, "b": 8}, peaks=peaks).against("a", "b")
    assert found["ratio"] == 2.0 and found["flops"]["ratio"] == 0.625
    low, high = found["peak"]["ratio_interval"]
    assert found["peak"]["ratio"] == 0.5 and 0.4 < low < 0.5 < high < 0.6


def test_phases_are_medians_of_the_last_steps() -> None:
    rows = [{"seconds": {"loss": s, "extend": 9.0}} for s in (7.0, 1.0, 3.0)]
    rows.append({"seconds": {"loss": 2.0}})  # nothing was trained on
    ledger: Any = SimpleNamespace(closed=lambda wait: rows)
    found = steps.phases(SimpleNamespace(ledger=ledger), 3)  # type: ignore[arg-type]
    assert found == {"loss": 2000, "extend": 9000}


def test_prompts_are_as_long_as_the_routing_benchmark_says(config: Config) -> None:
    for tokens, (data, _, _) in ROUTED.items():
        asked = replace(config, batch_size=1, data=replace(config.data, **data))
        _, batch = make_trainer(asked)
        assert abs(batch.num_tokens / tokens - 1) < 0.05


class TestTRL:
    """TRL's trainer on the same models."""

    @pytest.fixture
    def sides(self, config: Config, tmp_path: Path) -> Any:
        pytest.importorskip("trl", minversion="1.16")
        from bench.steps import trl_trainer

        trainer, batch = make_trainer(replace(config, normalize="token"))
        batch = trl_trainer.text_only(trainer, batch)
        turns = trl_trainer.InTurn(lambda n: single_pass_step(trainer, batch, n), warmup=1)
        return trl_trainer, trainer, batch, trl_trainer.peer(trainer, batch, tmp_path, 3, [turns])

    def test_the_loss_is_the_same(self, sides: Any) -> None:
        trl_trainer, trainer, batch, theirs = sides
        found = trl_trainer.prove_equal(trainer, batch, theirs)
        assert found["loss_error"] < 1e-5 and 0 < found["gradient_error"] < 1e-3
        theirs.temperature = 1.1
        with pytest.raises(AssertionError):
            trl_trainer.prove_equal(trainer, batch, theirs)

    def test_steps_take_turns(self, sides: Any) -> None:
        trl_trainer, trainer, batch, theirs = sides
        (turns,) = (c for c in theirs.callback_handler.callbacks if hasattr(c, "times"))
        theirs.train()
        assert {name: len(seconds) for name, seconds in turns.times.items()} == dict(ours=2, trl=2)
        assert min(min(seconds) for seconds in turns.times.values()) > 0
        length = trainer.config.sample.max_completion_length
        before = [p.detach().clone() for p in theirs.model.parameters()]
        trl_trainer.step(theirs, batch)
        after = theirs.model.parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert theirs._metrics["train"]["completions/min_length"][-1] == length
        made = trainer.micro_step(batch, 0)[1]
        assert made.completion_mask.all() and made.completion_ids.shape[2] == length

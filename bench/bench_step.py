"""One optimizer step on the embedded task, with a teacher of twice the student's size: this
project's single pass against conventional loops and TRL's trainer, its phases, its rollouts, its
recompute modes, and what watching and routing cost.

Before anything is timed, each side must give the same loss and gradient as the stock model's full
forward and the definition of the loss. Calls are timed in turn; what is quoted is the median of the
paired ratios.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.steps.loops import Loop, loop_flops, loop_step, published_style, trl_style
from bench.steps.measure import (
    Measured,
    analytic_share,
    flops,
    ledger_flops,
    make_trainer,
    measure,
    phases,
    prove_equal,
    stepper,
)
from bench.timing import peak_bytes
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch
from opd.method import trainer as trainer_module
from opd.method.trainer import Trainer
from opd.record.folder import RunFolder
from opd.record.ledger import Ledger

ROUNDS, FEW = 5, 4
PROMPTS, SOME = 16, 5  # against other loops, and of this project's steps against each other
TRL = "pip install trl==1.16.0"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    root: Path = tmp_path_factory.mktemp("step")
    # A rate near zero: the rollouts of both loops stay those of the shipped student.
    yield load_config([f"data.video_root={root}", "optim.lr=1e-7", f"batch_size={SOME}"])


def shape(batch: PromptBatch, rollouts: int = 1) -> str:
    """Of a step, in words."""
    rows, length = batch.input_ids.shape
    return f"{rows} prompts of {length} tokens, {rollouts} rollouts each"


def keep(benchmark, label: str, **told: Any) -> None:
    """Store and print what came out."""
    benchmark.extra_info.update(told)
    print(f"\n{label}")
    for key, value in told.items():
        print(f"    {key}: {value}")


LOOPS = {  # the loop, the objective that it is for, and the ratios of seconds to reach
    "published-style": (published_style, "sampled", 0.7),
    "trl-style": (trl_style, "reverse_kl", 0.9),
}


@pytest.mark.parametrize("name", LOOPS)
def test_single_pass_against(benchmark, config: Config, name: str) -> None:
    """FLOPs as torch counts them, beside what shapes say (`analytic_ratio`) and what they say of
    layers alone, before decoding (`limit_ratio`)."""
    loop, objective, target = LOOPS[name]
    config = dataclasses.replace(config, objective=objective, batch_size=PROMPTS)
    trainer, batch = make_trainer(config)
    proof = prove_equal(trainer, batch, loop)
    analytic = analytic_ratio(trainer, batch, loop)
    calls = {"single pass": stepper(trainer, batch), name: partial(loop_step, loop, trainer, batch)}
    options = {"costs": True}
    found = benchmark.pedantic(measure, (calls, ROUNDS, shape(batch)), options, rounds=1)
    result = found.against("single pass", name)
    told = {"target": target, "analytic_ratio": analytic, "proof": proof}
    limit = analytic_share(trainer, loop)
    if "single pass" in found.times:
        told["phases_ms"] = phases(trainer, ROUNDS)
    keep(benchmark, f"single pass / {name}", **result, limit_ratio=limit, **told)


def analytic_ratio(trainer: Trainer, batch: PromptBatch, loop: Loop) -> float:
    """FLOPs of the single pass by those of a loop, both from shapes, of the same rollouts."""
    made = []
    ours = ledger_flops(trainer, lambda: made.append(trainer.micro_step(batch, 0)))
    trainer.engine.optimizer.zero_grad()
    return ours / loop_flops(trainer, batch, made[0][1], loop)


def test_step_by_rollouts_and_method(benchmark, config: Config) -> None:
    """Phases of OPD with 1, 4 and 8 rollouts, of GRPO with 8 (packed behind one prefix) and of SFT
    with its reference answer."""
    settings: dict[str, dict[str, Any]] = {
        "opd 1": {},
        "opd 4": {"num_rollouts": 4},
        "opd 8": {"num_rollouts": 8},
        "grpo 8": {"method": "grpo", "num_rollouts": 8},
        "sft": {"method": "sft"},
    }
    made = {n: make_trainer(dataclasses.replace(config, **s)) for n, s in settings.items()}
    proof = {name: prove_equal(*trainer) for name, trainer in made.items()}
    calls = {name: stepper(*trainer) for name, trainer in made.items()}
    told = shape(made["opd 1"][1], 8)
    found = benchmark.pedantic(measure, (calls, FEW, told), rounds=1)
    pairs = {("opd 4", "opd 1"): 1.5, ("opd 8", "opd 1"): None, ("grpo 8", "sft"): 2.0}
    results = {
        f"{first} / {second}": found.against(first, second) | {"target": target}
        for (first, second), target in pairs.items()
    }
    spent = {name: phases(made[name][0], FEW) for name in found.times}
    keep(benchmark, "rollouts and methods", **results, phases_ms=spent, proof=proof)


def test_recomputation(benchmark, config: Config) -> None:
    """Every layer run again in backward, against none."""
    made = {
        mode: make_trainer(
            dataclasses.replace(config, prefix=dataclasses.replace(config.prefix, recompute=mode))
        )
        for mode in ("all", "none")
    }
    proof = {mode: prove_equal(*trainer) for mode, trainer in made.items()}
    calls = {mode: stepper(*trainer) for mode, trainer in made.items()}
    told = shape(made["all"][1])
    found = benchmark.pedantic(measure, (calls, FEW, told), {"costs": True}, rounds=1)
    keep(benchmark, "recompute all / none", **found.against("all", "none"), proof=proof)


def test_against_trl_trainer(benchmark, config: Config, tmp_path: Path) -> None:
    """The same language models, text prompts of the same length and completions of the same
    length; TRL in its own loop, generating with transformers."""
    pytest.importorskip("trl", minversion="1.16", reason=f"not installed: {TRL}")
    from bench.steps import trl_trainer

    model = dataclasses.replace(config.model, dtype="float32")
    changed = {"normalize": "token", "model": model, "batch_size": PROMPTS}
    trainer, batch = make_trainer(dataclasses.replace(config, **changed))
    batch = trl_trainer.text_only(trainer, batch)
    turns = trl_trainer.InTurn(stepper(trainer, batch), warmup=2)
    theirs = trl_trainer.peer(trainer, batch, tmp_path, ROUNDS + 2, [turns])
    proof = trl_trainer.prove_equal(trainer, batch, theirs)
    benchmark.pedantic(theirs.train, rounds=1)
    steps = {
        "ours": partial(stepper(trainer, batch), 0),
        "trl": partial(trl_trainer.step, theirs, batch),
    }
    found = Measured(
        times=turns.times,
        flops={name: flops(step) for name, step in steps.items()},
        peaks={name: [float(peak_bytes(step)) for _ in range(2)] for name, step in steps.items()},
    )
    spent = phases(trainer, ROUNDS)
    result = found.against("ours", "trl")
    keep(benchmark, "ours / TRL's DistillationTrainer", **result, phases_ms=spent, proof=proof)


def test_what_watching_costs(benchmark, config: Config, tmp_path: Path) -> None:
    """The same steps with ledger, signals and run folder, and without."""
    watched, batch = make_trainer(config)
    bare, _ = make_trainer(config)
    folder = RunFolder(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
    folder.open(0)

    def with_all(step: int) -> None:
        row = watched.step([batch], step)
        row["step_s"] = 0.0
        watched.ledger.close_step(row)
        watched.ledger.shares()
        folder.write(watched.ledger.closed())

    class Silent(Ledger):
        def phase(self, name: str) -> AbstractContextManager[None]:
            return nullcontext()

    bare.ledger = Silent(bare.student.device)

    def without(step: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module, "signals", lambda *_: {})
            patch.setattr(trainer_module, "step_flops", lambda *_: {})
            bare.step([batch], step)

    proof = {"watched": prove_equal(watched, batch), "bare": prove_equal(bare, batch)}
    calls = {"watched": with_all, "bare": without}
    found = benchmark.pedantic(measure, (calls, FEW, shape(batch)), rounds=1)
    keep(benchmark, "watched / bare", **found.against("watched", "bare"), proof=proof)
    folder.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A prompt by itself does not fill two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROUTED = {  # by about how many tokens a prompt has: settings of data, prompts and rounds
    315: ({}, 12, 4),
    1450: ({"fps": 10.0, "video_tokens": 4096, "min_frame_tokens": 16}, 3, 4),
}


def suspending_half(config: Config, batch: PromptBatch) -> Trainer:
    """A trainer that routes, and suspends about half of a batch's rollouts: those whose reward
    reaches the median."""

    def routing(below: float) -> Config:
        curriculum = dataclasses.replace(config.curriculum, routing="on", route_below=below)
        return dataclasses.replace(config, curriculum=curriculum)

    trainer, _ = make_trainer(routing(1.0))
    _, rollouts = trainer.micro_step(batch, 0)
    trainer.engine.optimizer.zero_grad()
    trainer.ledger.close_step()
    assert rollouts.rewards is not None
    trainer.config = routing(max(float(rollouts.rewards.median()), 0.01))
    return trainer


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tokens", ROUTED)
def test_what_suspending_rollouts_saves(benchmark, config: Config, tokens: int) -> None:
    """SCC's routing against the same step without it. What it can save is what teacher, extension,
    loss and backward of the suspended ones would have cost: their share of the rollouts, of those
    phases' share of the plain step."""
    data, prompts, rounds = ROUTED[tokens]
    changed = dataclasses.replace(config.data, **data)
    config = dataclasses.replace(config, data=changed, batch_size=prompts)
    plain, batch = make_trainer(config)
    routed = suspending_half(config, batch)
    shares: list[float] = []

    def with_routing(step: int) -> None:
        shares.append(routed.step([batch], step)["trained_share"])

    proof = {"plain": prove_equal(plain, batch), "routed": prove_equal(routed, batch)}
    calls = {"routed": with_routing, "plain": stepper(plain, batch)}
    found = benchmark.pedantic(measure, (calls, rounds, shape(batch)), rounds=1)
    told: dict[str, Any] = {"threads": 1, "prompt_tokens": batch.num_tokens / len(batch.prompts)}
    if not found.failed:
        spent = phases(plain, rounds)
        spared = sum(spent[name] for name in ("teacher", "extend", "loss", "backward"))
        suspended = 1 - sum(shares[-rounds:]) / rounds
        analytic = 1 - suspended * spared / sum(spent.values())
        told |= {"suspended_share": suspended, "analytic_ratio": analytic}
    label = f"routed / plain, about {tokens} tokens a prompt"
    keep(benchmark, label, **found.against("routed", "plain"), **told, proof=proof)

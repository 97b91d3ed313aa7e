"""What the step benchmarks share: a trainer on the embedded task, the proof that two ways of making
a step give the same gradient, and seconds, FLOPs and memory of calls side by side."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.failures import attempt
from bench.steps.loops import FORWARDS, Loop, trl_style
from bench.timing import Times, interleaved, peak_bytes, ratio
from opd import train
from opd.config.run import Config
from opd.data.batch import PromptBatch, collate
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.distributed import set_up
from opd.method.trainer import Trainer
from opd.planning.auto import resolve_auto

Calls = Mapping[str, Callable[[int], object]]
RESIDENT = 0.1  # what a heap's fragments make of resident memory, from one run to another


def make_trainer(config: Config) -> tuple[Trainer, PromptBatch]:
    """A trainer of the configured models, and one batch of held-out clips."""
    device = set_up(config.threads, config.seed)
    trainer = train.make_trainer(resolve_auto(config, device), device)
    held_out = load_examples(config.data.eval, config.data, config.batch_size)
    pool = Prompts(held_out, config.data, trainer.processor, trainer.student)
    prompts = sorted((pool[i] for i in range(len(pool))), key=lambda p: len(p.input_ids))
    return trainer, collate(prompts, trainer.policy.pad_token_id, device)  # as the loader does


def single_pass_step(trainer: Trainer, batch: PromptBatch, step: int) -> None:
    """What `opd.train` does in a step, its ledger included."""
    trainer.ledger.close_step(trainer.step([batch], step))


def stepper(trainer: Trainer, batch: PromptBatch) -> Callable[[int], None]:
    """`single_pass_step` of a step's number."""
    return partial(single_pass_step, trainer, batch)


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ledger_flops(trainer: Trainer, run: Callable[[], object]) -> float:
    """FLOPs that the ledger counts, from shapes, in a call."""
    before = sum(trainer.ledger.flops.values())
    run()
    return sum(trainer.ledger.flops.values()) - before


def analytic_share(trainer: Trainer, loop: Loop) -> float:
    """(3 s + t) / ((n + 3) s + t), before decoding: s and t are the student's and the teacher's
    forward of a prompt by the weights of their layers, n the loop's forwards besides generating;
    the backward is two more on both sides."""
    assert trainer.teacher is not None
    s, t = (
        sum(p.numel() for p in lm.language_model.layers.parameters())
        for lm in (trainer.student, trainer.teacher.lm)
    )
    return (3 * s + t) / ((FORWARDS[loop] + 3) * s + t)


def gradient(trainer: Trainer, run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What a call returns, and the gradient that it adds, one tensor a parameter."""
    trainer.engine.optimizer.zero_grad()
    result = run()
    weights = (p for group in trainer.engine.optimizer.param_groups for p in group["params"])
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
    trainer.engine.optimizer.zero_grad()
    return result, found


def errors(
    ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]
) -> dict[str, float]:
    """Relative errors of a loss, and of its gradient over all parameters. Raises AssertionError
    where they are more than rounding makes."""

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(sum((t.double() ** 2).sum() for t in tensors)) ** 0.5

    gap = norm([a - b for a, b in zip(ours[1], theirs[1], strict=True)])
    found = {
        # GRPO's advantages add up to nothing in a group, and so may its loss.
        "loss_error": abs(ours[0] - theirs[0]) / max(abs(theirs[0]), 0.01),
        "gradient_error": gap / norm(theirs[1]),
    }
    # bf16 rounds activations; another loss or another rollout is off by far more.
    limit = 0.2 if torch.cuda.is_available() and ours[1][0].device.type == "cuda" else 1e-3
    assert max(found.values()) < limit, found
    return found


def prove_equal(trainer: Trainer, batch: PromptBatch, loop: Loop = trl_style) -> dict[str, float]:
    """Errors of the single pass's loss and gradient against a conventional loop's on the same
    rollouts of four of the prompts, short and long. Raises AssertionError where they differ."""
    some = batch.prompts[:: max(1, len(batch.prompts) // 4)]
    batch = collate(some, trainer.policy.pad_token_id, batch.input_ids.device)
    (ours, first), mine = gradient(trainer, lambda: trainer.micro_step(batch, 0))
    (theirs, second), other = gradient(trainer, lambda: loop(trainer, batch, 0))
    assert torch.equal(first.completion_ids, second.completion_ids), "not the same rollouts"
    return errors((float(ours.loss.detach()), mine), (float(theirs.loss), other))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of calls by name: seconds of each round, and where asked for FLOPs and peak bytes of each
    round; `failed` says of those without any what they lacked."""

    times: Times
    flops: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def against(self, first: str, second: str) -> dict[str, Any]:
        """Ratios first / second: of seconds, paired, and of FLOPs and the least peak memory where
        known; where one of the two failed, why, and the other's milliseconds."""
        told = {name: self.failed[name] for name in (first, second) if name in self.failed}
        if told:
            known = {
                n: 1000 * statistics.median(self.times[n]) for n in {first, second} - told.keys()
            }
            return {"failed": told, "ms": known}
        result: dict[str, Any] = ratio(self.times[first], self.times[second])
        if self.flops:
            share = self.flops[first] / self.flops[second]
            counts = {"first": self.flops[first], "second": self.flops[second]}
            result["flops"] = {**counts, "ratio": share, "ratio_interval": [share, share]}
        if self.peaks:
            mb = [min(self.peaks[name]) / 1e6 for name in (first, second)]  # fragments only add
            share = mb[0] / mb[1]
            interval = [share * (1 - RESIDENT), share * (1 + RESIDENT)]
            result["peak"] = {"first_mb": mb[0], "second_mb": mb[1]}
            result["peak"] |= {"ratio": share, "ratio_interval": interval}
        return result


def measure(calls: Calls, rounds: int, shape: str, costs: bool = False) -> Measured:
    """Run each call once, with `costs` keep its FLOPs and take its peak memory twice, and then time
    those that fit, in turn. One that runs out of memory is left out, with the shape it failed at.
    """
    failed: dict[str, str] = {}
    counted: dict[str, int] = {}
    found: dict[str, list[float]] = {}

    def first(name: str, call: Callable[[int], object]) -> None:
        number = flops(partial(call, 0))  # optimizer state and caches are there from now on
        if costs:
            counted[name] = number
            found[name] = [peak_bytes(partial(call, n)) for n in range(2)]

    for name, call in calls.items():
        attempt(failed, name, shape, partial(first, name, call))
    fitting = {name: call for name, call in calls.items() if name not in failed}
    times = interleaved(fitting, rounds, warmup=1)
    return Measured(times=times, flops=counted, peaks=found, failed=failed)


def phases(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Median milliseconds of each phase of the last so many steps."""
    rows = [row["seconds"] for row in trainer.ledger.closed(wait=True)][-rounds:]
    names = dict.fromkeys(name for row in rows for name in row)
    return {n: 1000 * statistics.median(row.get(n, 0.0) for row in rows) for n in names}

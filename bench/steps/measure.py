"""What the step benchmarks share: a trainer on the embedded task, the proof that two ways of making
a step give the same gradient, and seconds, FLOPs and memory of calls side by side."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.loops import Loop, trl_style
from bench.timing import Calls, Times, interleaved, peak_bytes, ratio
from opd import train
from opd.config.run import Config
from opd.data.batch import PromptBatch, collate
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.distributed import set_up
from opd.method.trainer import Trainer
from opd.planning.auto import resolve_auto


def make_trainer(config: Config) -> tuple[Trainer, PromptBatch]:
    """A trainer of the configured models, and one batch of held-out clips."""
    device = set_up(config.cpu_threads, config.seed)
    trainer = train.make_trainer(resolve_auto(config, device), device)
    held_out = load_examples(config.data.eval, config.data, config.batch_size)
    pool = Prompts(held_out, config.data, trainer.processor, trainer.student)
    prompts = sorted((pool[i] for i in range(len(pool))), key=lambda p: len(p.input_ids))
    return trainer, collate(prompts, trainer.policy.pad_token_id, device)  # as the loader does


def single_pass_step(trainer: Trainer, batch: PromptBatch, step: int) -> None:
    """What `opd.train` does in a step, its ledger included."""
    trainer.ledger.close_step(trainer.step([batch], step))


def gradient(trainer: Trainer, run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What a call returns, and the gradient that it adds, one tensor a parameter."""
    trainer.engine.optimizer.zero_grad()
    result = run()
    weights = (p for group in trainer.engine.optimizer.param_groups for p in group["params"])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
    trainer.engine.optimizer.zero_grad()
    return result, grads


def errors(
    ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]
) -> dict[str, float]:
    """Relative errors of a loss, and of its gradient over all parameters. Raises AssertionError
    where they are more than rounding makes."""

    def norm(tensors: list[torch.Tensor]) -> float:
        return float(sum((t.double() ** 2).sum() for t in tensors)) ** 0.5

    difference = norm([a - b for a, b in zip(ours[1], theirs[1], strict=True)])
    relative = {
        # GRPO's advantages add up to nothing in a group, and so may its loss.
        "loss_error": abs(ours[0] - theirs[0]) / max(abs(theirs[0]), 0.01),
        "gradient_error": difference / norm(theirs[1]),
    }
    # bf16 rounds activations; another loss or another rollout is off by far more.
    limit = 0.2 if ours[1][0].device.type == "cuda" else 1e-3
    assert max(relative.values()) < limit, relative
    return relative


def prove_equal(trainer: Trainer, batch: PromptBatch, loop: Loop = trl_style) -> dict[str, float]:
    """Errors of the single pass's loss and gradient against a conventional loop's on the same
    rollouts of four of the prompts, short and long. Raises AssertionError where they differ."""
    some = batch.prompts[:: max(1, len(batch.prompts) // 4)]
    batch = collate(some, trainer.policy.pad_token_id, batch.input_ids.device)
    ((ours, first),), own_grads = gradient(trainer, lambda: trainer.micro_steps([batch], 0))
    (theirs, second), other_grads = gradient(trainer, lambda: loop(trainer, batch, 0))
    assert torch.equal(first.completion_ids, second.completion_ids), "not the same rollouts"
    return errors((float(ours.loss.detach()), own_grads), (float(theirs.loss), other_grads))


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Measured:
    """Of calls by name: seconds of each round, FLOPs, and peak bytes."""

    times: Times
    flops: Mapping[str, int]
    peaks: Mapping[str, int]

    def against(self, first: str, second: str) -> dict[str, Any]:
        """Ratios first / second of seconds, paired, of FLOPs and of peak memory."""
        flops, other_flops = self.flops[first], self.flops[second]
        mb, other_mb = (self.peaks[name] / 1e6 for name in (first, second))
        return {
            **ratio(self.times[first], self.times[second]),
            "flops": {"ratio": flops / other_flops, "first": flops, "second": other_flops},
            "peak": {"ratio": mb / other_mb, "first_mb": mb, "second_mb": other_mb},
        }


def measure(benchmark: Any, calls: Calls, rounds: int) -> Measured:
    """FLOPs and peak memory of each call, and then their seconds, in turn."""
    counts = {name: flops(partial(call, 0)) for name, call in calls.items()}  # and warms up
    # Of two: fragments of the heap only add to it.
    peaks = {n: min(peak_bytes(partial(c, i)) for i in range(2)) for n, c in calls.items()}
    return Measured(interleaved(benchmark, calls, rounds, warmup=1), counts, peaks)


def phases(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Median milliseconds of each phase of the last so many steps."""
    rows = [row["seconds"] for row in trainer.ledger.closed(wait=True)][-rounds:]
    names = dict.fromkeys(name for row in rows for name in row)
    return {n: 1000 * statistics.median(row.get(n, 0.0) for row in rows) for n in names}

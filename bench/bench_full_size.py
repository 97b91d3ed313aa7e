"""Steps of full-size models, without their weights: Qwen3-VL-2B from 8B with random weights, and
prompts of about 8,192 synthetic video tokens, no two of one length. For a GPU; a smoke run takes
tiny models."""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import SMOKE
from bench.steps import published_sizes
from bench.steps.measure import phases
from bench.steps.random_models import Scale, make_prompt, random_trainer
from bench.timing import Failures, attempt
from opd.data.batch import PromptBatch, collate
from opd.distributed import set_up
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.models.load import load_options
from opd.planning.auto import resolve_auto
from opd.planning.memory import Shapes
from opd.planning.plan import capacity_of
from opd.record.flops import mfu

GPU = torch.cuda.is_available()
GIB = 2**30
STEPS, FEW, WARM_UP = (2, 1, 1) if SMOKE else (10, 3, 2)

pytestmark = pytest.mark.skipif(not (GPU or SMOKE), reason="models for a GPU")


def scale_in(folder: Path) -> Scale:
    """Full-size models, or in a smoke run tiny ones; their configurations go into a folder."""
    if not SMOKE:
        folders = published_sizes.write(folder)
        student, teacher = (folders[f"Qwen/Qwen3-VL-{size}-Instruct"] for size in ("2B", "8B"))
        return Scale(student=student, teacher=teacher)
    student, teacher = (str(folder / name) for name in ("student", "teacher"))
    for path in (student, teacher):
        tiny.build(Path(path).name, 0).config.save_pretrained(path)
    sizes: dict[str, int] = dict(pairs=8, rows=1, columns=2, prompts=2, length=4, rollouts=2)
    return Scale(student=student, teacher=teacher, **sizes)


@dataclass
class FullSize:
    """A trainer, the micro-batches of its steps, and the plan of its memory."""

    trainer: Trainer
    batches: list[PromptBatch]
    shapes: Shapes
    auto: str  # what prefix.recompute=auto chooses
    numbers: Iterator[int] = field(default_factory=count)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def step(self) -> None:
        """One step, which ends with numbers on the host; its row of metrics is kept."""
        row = self.trainer.step(self.batches, next(self.numbers))
        self.trainer.ledger.close_step(row)
        self.rows.append(row)

    def abandon(self) -> None:
        """Forget half a step: its gradients, its rows and what it held on the device."""
        self.trainer.engine.skip()
        self.trainer.ledger.close_step()
        self.trainer.ledger.closed(wait=True)


@pytest.fixture(scope="module", params=["opd", "grpo"])
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FullSize:
    gc.collect()  # the models of the method before
    device = set_up(None, 0)
    folder = tmp_path_factory.mktemp("models")
    scale = scale_in(folder)
    requested = scale.config(request.param, folder / "run")
    config = resolve_auto(requested, device)
    shapes = Shapes.of(requested, load_options(requested.model, device)["dtype"])
    trainer = random_trainer(config, device)
    prompts = [make_prompt(trainer.student, scale, number) for number in range(scale.prompts)]
    batches = [collate([prompt], 0, device) for prompt in prompts]
    return FullSize(trainer, batches, shapes, config.prefix.recompute)


@pytest.mark.parametrize("recompute", ["auto", "none", "half", "all"])
def test_step(benchmark: Any, full_size: FullSize, recompute: str) -> None:
    """Seconds by phase, share of the device's peak without recomputation, and peak memory against
    its plan."""
    trainer, shapes = full_size.trainer, full_size.shapes
    half = str(len(shapes.student.language_model.layers) // 2)
    mode = {"auto": full_size.auto, "half": half}.get(recompute, recompute)
    if recompute != "auto" and mode == full_size.auto:
        pytest.skip("what auto chooses")
    plan = shapes.plan(1, mode, "replica")
    if plan.total > capacity_of(trainer.student.device):
        pytest.skip(f"needs {plan.total / GIB:.0f} GiB by the memory plan")
    trainer.config = replace(trainer.config, prefix=replace(trainer.config.prefix, recompute=mode))
    steps, failures = STEPS if recompute == "auto" else FEW, Failures()
    attempt(failures, mode, lambda: [full_size.step() for _ in range(WARM_UP)])
    if failures:
        full_size.abandon()
        pytest.fail(failures[mode], pytrace=False)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    before = dict(trainer.ledger.flops)
    benchmark.pedantic(full_size.step, rounds=steps)
    flops = {name: (n - before[name]) / steps for name, n in trainer.ledger.flops.items()}
    seconds = benchmark.stats["median"]
    rows = full_size.rows[-steps:]
    benchmark.extra_info.update(
        method=trainer.config.method,
        recompute=mode,
        prompt_tokens=[batch.num_tokens for batch in full_size.batches],
        completion_tokens=trainer.config.sample.max_completion_length,
        rollouts=trainer.config.num_rollouts,
        model={name: str(value) for name, value in asdict(trainer.config.model).items()},
        step_s=seconds,
        phases_ms=phases(trainer, steps),
        flops=flops,
        mfu=mfu(flops, seconds),
        peak_gib=torch.cuda.max_memory_allocated() / GIB if GPU else None,
        planned_gib=plan.total / GIB,
        planned_parts_gib={name: size / GIB for name, size in plan.parts.items() if size},
        losses=[row["loss"] for row in rows],
        grad_norms=[row["grad_norm"] for row in rows],
    )
    print(f"\n{benchmark.name}", benchmark.extra_info)
    assert not any(row["skipped"] for row in rows)

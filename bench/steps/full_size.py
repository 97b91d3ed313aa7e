"""Steps of full-size models, without their weights: random models of the published shapes, prompts
of about 8,192 synthetic video tokens, no two of one length, and the trainer itself.

Completions have a fixed length (nothing ends them), and answers to one prompt differ in reward by
chance, so that GRPO trains on all of them. Seconds are by phase; the share of the device's peak
leaves recomputation out.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from bench.failures import DeviceLost, attempt
from bench.gpu.part_result import PartResult
from bench.steps.random_models import AnyTokens, Scale, make_prompt, policy_of, random_model
from bench.timing import held_bytes, peak_bytes
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch, collate
from opd.distributed import set_up
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.models.load import load_options
from opd.planning.auto import resolve_auto
from opd.planning.memory import Plan, Shapes, capacity_of
from opd.record.flops import mfu

GIB = 2**30
WARM_UP = 2  # steps: allocators, kernels


def configured(method: str, scale: Scale, folder: str) -> Config:
    """The run that these steps are of."""
    keys = [
        f"method={method}",
        f"model.student={scale.student}",
        f"data.video_tokens={scale.video_tokens}",
        f"data.max_frames={2 * scale.pairs}",
        f"batch_size={scale.prompts}",
        "micro_batch_size=1",
        f"sample.max_completion_length={scale.length}",
        "prefix.recompute=auto",
        "optim.lr=1e-6",
        f"run_dir={folder}",
    ]
    more = {
        "opd": [f"model.teacher={scale.teacher}"],
        "grpo": [f"num_rollouts={scale.rollouts}"],
    }
    return load_config(keys + more[method])


def make_trainer(config: Config, scale: Scale, device: torch.device) -> Trainer:
    """The trainer of random models; `config` has no `auto` left."""
    torch.manual_seed(config.seed)
    student = random_model(scale.student, config, device)
    teacher = None
    if config.method == "opd":
        teacher = Teacher(random_model(scale.teacher, config, device))
    processor = SimpleNamespace(tokenizer=AnyTokens())
    return Trainer(config, processor, student, teacher, policy_of(student))


def run_steps(
    trainer: Trainer, batches: list[PromptBatch], first: int, steps: int
) -> list[dict[str, Any]]:
    """Rows of metrics with `step_s` on the clock, `seconds` by phase and `flops_by` who spent
    them."""
    rows = []
    for step in range(first, first + steps):
        before = dict(trainer.ledger.flops)
        begun = time.perf_counter()
        row = trainer.step(batches, step)  # ends with numbers on the host, so all is done
        row["step_s"] = time.perf_counter() - begun
        row["flops_by"] = {k: v - before[k] for k, v in trainer.ledger.flops.items()}
        trainer.ledger.close_step(row)
        rows += trainer.ledger.closed(wait=True)
    return rows


def summary(rows: list[dict[str, Any]], peak: int, plan: Plan) -> dict[str, Any]:
    """Medians of the steps after the warm-up, and memory against its plan."""
    seconds = [row["step_s"] for row in rows]
    flops = rows[-1]["flops_by"]
    share = mfu(flops, statistics.median(seconds))
    return {
        "steps": len(rows),
        "step_s": statistics.median(seconds),
        "step_s_range": [min(seconds), max(seconds)],
        "seconds": {
            phase: statistics.median(row["seconds"][phase] for row in rows)
            for phase in rows[-1]["seconds"]
        },
        "flops": flops,
        "mfu": share,
        "peak_gib": peak / GIB,
        "planned_gib": plan.total / GIB,
        "planned_parts_gib": {name: size / GIB for name, size in plan.parts.items() if size},
        "peak_over_plan": peak / plan.total,
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "skipped": [row["step"] for row in rows if row["skipped"]],
    }


def measure(method: str, scale: Scale, result: PartResult, name: str) -> None:
    """Steps in each recompute mode, the one that `auto` chooses first and longest. The entry `name`
    of the result is saved after each mode; modes that an earlier call measured are left out."""
    device = set_up(None, 0)
    with TemporaryDirectory() as folder:
        asked = configured(method, scale, folder)
        config = resolve_auto(asked, device)
        shapes = Shapes.of(asked, load_options(asked.model, device)["dtype"])
    auto = config.prefix.recompute
    layers = len(shapes.student.language_model.layers)
    modes: dict[str, Any] = dict(result.earlier(name).get("recompute", {}))
    missing = [m for m in dict.fromkeys((auto, "none", str(layers // 2), "all")) if m not in modes]
    if not missing:
        print(f"{name}: measured before", flush=True)
        return
    trainer = make_trainer(config, scale, device)
    prompts = [make_prompt(trainer.student, scale, number) for number in range(scale.prompts)]
    batches = [collate([prompt], 0, device) for prompt in prompts]
    entry = {
        "method": method,
        "student": Path(scale.student).name,
        "teacher": Path(scale.teacher).name if method == "opd" else None,
        "prompt_tokens": [len(prompt.input_ids) for prompt in prompts],
        "video_tokens": scale.video_tokens,
        "prompts": scale.prompts,
        "prompts_at_once": 1,
        "rollouts": config.num_rollouts,
        "completion_tokens": scale.length,
        "dtype": config.model.dtype,
        "attention": [config.model.attention, config.model.vision_attention],
        "liger": config.model.liger,
        "auto": auto,
        "recompute": modes,
    }
    first = 0
    for mode in missing:
        plan = shapes.plan(1, mode, "replica")
        task = f"{name}, recompute {mode}"

        def measured(
            mode: str = mode, plan: Plan = plan, first: int = first, task: str = task
        ) -> None:
            if broken := result.broken(task):
                row = {"failed": broken["step"]}
            elif plan.total > capacity_of(device):
                row = {"failed": f"needs {plan.total / GIB:.0f} GiB by the memory plan"}
            else:
                kept = replace(config, prefix=replace(config.prefix, recompute=mode))
                trainer.config = kept
                try:
                    row = attempt_mode(trainer, batches, first, scale, mode == auto, plan)
                except DeviceLost as lost:
                    result.note_broken(task, lost)
                    raise
            modes[mode] = row
            print(f"{method}, recompute {mode}: {told(row)}", flush=True)
            result.save(name, entry)

        result.measure(task, measured)
        first += WARM_UP + scale.steps


def attempt_mode(
    trainer: Trainer,
    batches: list[PromptBatch],
    first: int,
    scale: Scale,
    whole: bool,
    plan: Plan,
) -> dict[str, Any]:
    """One recompute mode; where memory runs out, that."""
    rows: list[dict[str, Any]] = []
    steps = scale.steps if whole else scale.short
    failures: dict[str, str] = {}

    def run() -> tuple[int, int]:
        run_steps(trainer, batches, first, WARM_UP)
        held = held_bytes()
        beyond = peak_bytes(
            lambda: rows.extend(run_steps(trainer, batches, first + WARM_UP, steps))
        )
        return held, beyond

    shape = f"{len(batches)} prompts of up to {max(b.num_tokens for b in batches)} tokens"
    try:
        memory = attempt(failures, "step", shape, run)
    except DeviceLost:
        raise
    except Exception:
        abandon_step(trainer)
        raise
    if memory is None:
        abandon_step(trainer)
        return {"failed": failures["step"]}
    return summary(rows, sum(memory), plan)


def abandon_step(trainer: Trainer) -> None:
    """Forget half a step: its gradients, its rows and what it held on the device."""
    trainer.engine.skip()
    trainer.ledger.close_step()
    trainer.ledger.closed(wait=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def told(row: dict[str, Any]) -> str:
    """A mode in one line."""
    if "failed" in row:
        return row["failed"]
    share = "" if row["mfu"] is None else f", {row['mfu']:.1%} of the peak"
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["seconds"].items())
    return (
        f"{row['step_s']:.2f} s a step ({phases}){share}, peak {row['peak_gib']:.1f} GiB "
        f"of {row['planned_gib']:.1f} planned"
    )


def tiny_models(folder: Path) -> tuple[str, str]:
    """Folders with the configurations of the embedded task's models."""
    for name in ("student", "teacher"):
        tiny.build(name, 0).config.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")

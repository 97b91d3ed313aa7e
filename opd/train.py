"""Video-OPD, top to bottom: the student answers, a frozen teacher scores every token, the student
follows.

    p = student, q = teacher, y ~ p( . | video, query).  Minimise KL(p || q) over the tokens of y:
    the gradient pulls the student towards what the teacher would have said after the student's own
    words.

One step forwards the student's prompt once, with its graph kept: completions are sampled from a
detached view of its keys and values, and the training pass continues from the same ones, completion
tokens only. Left out on purpose: a reward, a value model, importance clipping, a reference model.
They are not part of the method.

    python -m opd.train [CONFIG.yaml] [dotted.key=value ...]
"""

import json
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from opd import report
from opd.config import Config, ConfigError, command_line, fail, load_config, to_yaml
from opd.data.examples import DataError
from opd.data.loader import PromptBatch, Prompts, batches, load_examples, schedule
from opd.engine import TorchEngine, reuse_freed_memory
from opd.evaluate import Evaluation, evaluate
from opd.ledger import Ledger
from opd.models.load import ModelError, VideoLM, load_model, load_processor
from opd.objectives import Loss, Targets
from opd.prefix import LayerCounter, encode, extend, prefill
from opd.rollout import Policy, Rollouts, sample, uniforms
from opd.teacher import Teacher


@dataclass
class Trainer:
    """What a step needs; `micro_step` is the method. Freezes what `model.trainable` leaves out."""

    config: Config
    processor: Any
    student: VideoLM
    teacher: Teacher | None
    policy: Policy

    def __post_init__(self) -> None:
        self.student.train_only(self.config.model.trainable)
        self.engine = TorchEngine(self.student.model, self.config.optim, self.config.steps)
        self.ledger = Ledger(self.student.device)
        self.counter = LayerCounter().attach(self.student)

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Trainer":
        """The trainer of the models that the configuration names."""
        reuse_freed_memory()
        dtype = config.model.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        place: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
        processor = load_processor(config.model.student)
        student = load_model(config.model.student, seed=config.seed, **place)
        teacher = None
        if config.method == "opd":
            teacher = Teacher(load_model(config.model.teacher, **place))
        policy = Policy.of(student, processor.tokenizer, config.sample.temperature)
        return cls(config, processor, student, teacher, policy)

    def micro_step(self, batch: PromptBatch, step: int) -> tuple[Loss, Rollouts]:
        """Prompt once, sample, score, train: adds the gradient of one micro-batch."""
        config, student, phase = self.config, self.student, self.ledger.phase
        with phase("vision"):
            video = encode(student, batch)
        with phase("prefill"):
            prefix = prefill(student, batch, video, config.prefix.recompute, self.counter)
        with phase("sample"):
            rollouts = self.rollouts(batch, prefix.detach(), step)
        mask = rollouts.completion_mask
        teacher_hidden = None
        if self.teacher is not None:
            with phase("teacher"):
                teacher_prefix = self.teacher.prefill(batch)
                teacher_hidden = self.teacher.extend(teacher_prefix, rollouts.completion_ids)[mask]
        with phase("extend"):
            student_hidden = extend(student, prefix, rollouts.completion_ids, self.counter)[mask]
        with phase("loss"):
            result = self.loss(student_hidden, rollouts.completion_ids[mask], teacher_hidden)
            # Known now, it goes into the loss; the token count is known after the last micro-batch.
            known = config.batch_size * config.num_rollouts if config.normalize == "sequence" else 1
        with phase("backward"):
            self.engine.backward(result.loss / known)
        return result, rollouts

    def loss(
        self,
        student_hidden: torch.Tensor,
        token_ids: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
    ) -> Loss:
        """The objective on N valid completion tokens, inside the forward of the student's head."""
        teacher_lm_head = self.teacher.lm.head.weight if self.teacher is not None else None
        targets = Targets(token_ids, self.policy, teacher_hidden, teacher_lm_head)
        name = "sft" if self.config.method == "sft" else self.config.objective
        return self.student.head(student_hidden, loss=getattr(targets, name))

    def rollouts(self, batch: PromptBatch, prefix: Any, step: int) -> Rollouts:
        """Completions to train on: sampled from the student, or for sft the reference answers."""
        config = self.config
        if config.method == "sft":
            ids, mask = batch.references(self.policy.pad_token_id)
            return Rollouts(
                ids,
                mask,
                torch.zeros_like(ids, dtype=torch.float32),
                torch.zeros_like(mask[..., 0]),
            )
        length = config.sample.max_completion_length
        numbers = uniforms(
            config.seed, step, [e.id for e in batch.examples], config.num_rollouts, length
        )
        return sample(self.student, prefix, self.policy, length, numbers, self.counter)

    def step(self, micro_batches: list[PromptBatch], step: int) -> dict[str, float | None]:
        """One optimizer step; returns its row of metrics."""
        losses, rollouts = zip(
            *(self.micro_step(batch, step) for batch in micro_batches), strict=True
        )
        lr = self.engine.lr
        num_tokens = sum(int(r.completion_mask.sum()) for r in rollouts)
        sequences = self.config.batch_size * self.config.num_rollouts
        by_token = self.config.normalize == "token"
        with self.ledger.phase("optimizer"):
            grad_norm = self.engine.step(1 / num_tokens if by_token else 1.0)

        def mean(name: str) -> float | None:
            values = [getattr(result, name) for result in losses]
            return None if values[0] is None else float(torch.cat(values).mean())

        total = sum(float(result.loss.detach()) for result in losses)
        return {
            "step": step,
            "loss": total / (num_tokens if by_token else sequences),
            "kl": mean("token_kl"),
            "grad_norm": grad_norm,
            "lr": lr,
            "student_entropy": mean("student_entropy"),
            "teacher_entropy": mean("teacher_entropy"),
            "completion_length": num_tokens / sequences,
            "truncated": sum(int(r.truncated.sum()) for r in rollouts) / sequences,
        }


def split(batch: list[int], size: int | None) -> list[list[int]]:
    """The micro-batches of a step's examples."""
    size = size or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def prepare_run_dir(config: Config) -> Path:
    """Make the run folder; a non-empty one is a mistake unless `overwrite=true`."""
    run_dir = Path(config.run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        if not config.overwrite:
            raise ConfigError(f"run_dir={run_dir}: not empty; choose another or say overwrite=true")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir


def train(config: Config) -> dict[str, Any]:
    """A whole run: evaluate, train, evaluate, write the run folder; returns the summary."""
    started = time.perf_counter()
    run_dir = prepare_run_dir(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left_out: dict[str, list[str]] = {"train": [], "eval": []}
    data, needs = config.data, ("spans", "answer") if config.method == "sft" else ()
    train_examples = load_examples(data.train, data, data.limit_train, needs, left_out["train"])
    eval_examples = load_examples(data.eval, data, data.limit_eval, ["spans"], left_out["eval"])
    trainer = Trainer.of(config, device)
    ledger, student, teacher = trainer.ledger, trainer.student, trainer.teacher
    pool = Prompts(train_examples, config.data, trainer.processor, student)
    held_out = Prompts(eval_examples, config.data, trainer.processor, student)

    def score(lm: VideoLM, name: str) -> Evaluation:
        bar = tqdm(total=len(held_out), desc=f"evaluate {name}", unit="query", file=sys.stderr)
        with ledger.phase("evaluate"), bar, trainer.counter.label("evaluation"):
            return evaluate(
                lm, held_out, trainer.policy, config, run_dir / f"eval_{name}.jsonl", bar.update
            )

    before = score(student, "before") if config.eval.before else None
    plan = schedule(len(pool), config.steps, config.batch_size, config.seed)
    micro_plan = [micro for indices in plan for micro in split(indices, config.micro_batch_size)]
    per_step = len(micro_plan) // config.steps
    models = [student] if teacher is None else [student, teacher.lm]
    loader = batches(pool, micro_plan, device, models)
    prompt_tokens = 0
    first_step_s = 0.0
    with (
        (run_dir / "metrics.jsonl").open("w", buffering=1) as metrics_file,
        SummaryWriter(str(run_dir / "tensorboard")) as board,
        tqdm(total=config.steps, desc=config.method, unit="step", file=sys.stderr) as bar,
    ):
        for step in range(config.steps):
            with ledger.phase("decode-wait"):
                micro_batches = [next(loader) for _ in range(per_step)]
            prompt_tokens += sum(b.num_tokens for b in micro_batches)
            begun = time.perf_counter()
            row = trainer.step(micro_batches, step)
            row["step_s"] = time.perf_counter() - begun
            metrics_file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if key != "step" and value is not None:
                    board.add_scalar(key, value, step)
            shown = {k: f"{row[k]:.3f}" for k in ("loss", "kl") if row[k] is not None}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            first_step_s = first_step_s or time.perf_counter() - started
    after = score(student, "after")
    scored_teacher = (
        score(teacher.lm, "teacher") if teacher is not None and config.eval.teacher else None
    )

    with ledger.phase("checkpoint"):
        if config.model.save_dtype != "auto":
            student.model.to(getattr(torch, config.model.save_dtype))
        student.model.save_pretrained(run_dir / "student")
        trainer.processor.save_pretrained(run_dir / "student")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        "method": config.method,
        "objective": config.objective if config.method == "opd" else None,
        "seed": config.seed,
        "steps": config.steps,
        "before": before.summary if before else None,
        "after": after.summary,
        "teacher": scored_teacher.summary if scored_teacher else None,
        **report.comparison(before, after, scored_teacher),
        "ceiling": after.ceiling,
        "best_constant": after.constant,
        "device_hours": ledger.device_hours(),
        "student_prompt_forwards_per_step": trainer.counter.passes("prompt", prompt_tokens),
        "student_prompt_recomputes_per_step": trainer.counter.passes("recompute", prompt_tokens),
        "first_step_s": first_step_s,
        "wall_s": time.perf_counter() - started,
        "peak_memory_mib": (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak)
        / 2**20,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.plot_curve(run_dir)
    return summary


def main(arguments: list[str] | None = None) -> None:
    """The command; a user's mistake ends with one line and exit code 2."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        usage = "opd.train [CONFIG.yaml] [dotted.key=value ...]"
        config = load_config(command_line(usage, arguments))
        summary = train(config)
    except (ConfigError, DataError, ModelError) as error:
        fail(error)
    else:
        print(report.table(summary))
        print(f"run folder: {config.run_dir}")


if __name__ == "__main__":
    main()

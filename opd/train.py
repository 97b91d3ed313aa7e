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
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from opd import report
from opd.checkpoint import Progress, RunFolder, Signals, Stopped, load_state, save_state
from opd.config import Config, ConfigError, command_line, fail, load_config
from opd.data.examples import DataError
from opd.data.loader import PromptBatch, Prompts, batches, schedule, split
from opd.data.sources import check_sources, load_split
from opd.engine import TorchEngine, set_up
from opd.evaluate import Evaluation, evaluate
from opd.ledger import Cost, Ledger, step_flops
from opd.models.load import ModelError, VideoLM, load_model, load_processor, place, resolve
from opd.objectives import Loss, Targets
from opd.prefix import LayerCounter, encode, extend, prefill, recomputed_layers
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
        self.progress = Progress()
        models = [self.student] if self.teacher is None else [self.student, self.teacher.lm]
        self.costs = {lm: Cost.of(lm) for lm in models}

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Trainer":
        """The trainer of the models that the configuration names."""
        where = place(config.model.dtype, device)
        processor = load_processor(config.model.student)
        student = load_model(config.model.student, seed=config.seed, **where)
        teacher = None
        if config.method == "opd":
            teacher = Teacher(load_model(config.model.teacher, **where))
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
        again = recomputed_layers(config.prefix.recompute, self.counter.num_layers)
        flops = step_flops(self.costs, batch, mask, config.method == "opd", again)
        self.ledger.count(batch.num_tokens + int(mask.sum()), flops)
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

    def step(self, micro_batches: list[PromptBatch], step: int) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics. A loss or gradient that is not finite
        changes no weight, and the row names the examples."""
        losses, rollouts = zip(
            *(self.micro_step(batch, step) for batch in micro_batches), strict=True
        )
        lr = self.engine.lr
        num_tokens = sum(int(r.completion_mask.sum()) for r in rollouts)
        sequences = self.config.batch_size * self.config.num_rollouts
        by_token = self.config.normalize == "token"
        denominator = num_tokens if by_token else sequences
        loss = sum(float(result.loss.detach()) for result in losses) / denominator
        scale = 1 / num_tokens if by_token else 1.0
        with self.ledger.phase("optimizer"):
            grad_norm = self.engine.step(scale if math.isfinite(loss) else math.nan)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        examples = [example for batch in micro_batches for example in batch.examples]
        tokenizer = self.processor.tokenizer if self.processor is not None else None
        self.progress.count(finite, sum(batch.num_tokens for batch in micro_batches))
        return {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": lr,
            **report.signals(losses, rollouts, examples, tokenizer),
            "skipped": None if finite else [example.id for example in examples],
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from; everything else follows from seed and step."""
        return {
            "engine": self.engine.state(),
            "ledger": self.ledger.state(),
            "counter": dict(self.counter.tokens),
            "progress": asdict(self.progress),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.engine.load_state(state["engine"])
        self.ledger.load_state(state["ledger"])
        self.counter.tokens = dict(state["counter"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])


def train(config: Config) -> dict[str, Any]:
    """A whole run: evaluate, train, evaluate, write the run folder; returns the summary.

    Raises Stopped on SIGINT, on SIGTERM and where losses stay no numbers, with the state saved.
    """
    started = time.perf_counter()
    folder = RunFolder(config)
    resolve(config.model.student, "model.student")
    if config.method == "opd":
        resolve(config.model.teacher, "model.teacher")
    check_sources(config.data)
    device = set_up(config.threads, config.seed)
    left_out: dict[str, list[str]] = {"train": [], "eval": []}
    data, needs = config.data, ("spans", "answer") if config.method == "sft" else ()
    train_examples = load_split(data, "train", needs, left_out["train"])
    eval_examples = load_split(data, "eval", ["spans"], left_out["eval"])
    trainer = Trainer.of(config, device)
    pool = Prompts(train_examples, data, trainer.processor, trainer.student)
    held_out = Prompts(eval_examples, data, trainer.processor, trainer.student)
    if folder.resumed:
        trainer.load_state(load_state(folder.state))
    folder.open(trainer.progress.step)
    progress, started = trainer.progress, started - trainer.progress.wall_s
    signalled = Signals()
    try:
        with signalled.watch():
            evaluations = run(trainer, folder, pool, held_out, signalled, started)
    except Stopped as stopped:
        progress.wall_s = time.perf_counter() - started
        folder.write(trainer.ledger.closed(wait=True))
        save_state(folder.state, trainer.state())
        told = f"after step {progress.step} of {config.steps}; resume=auto goes on from there"
        raise Stopped(f"{stopped} {told}", stopped.exit_code) from None
    finally:
        left_out["train"] += pool.broken.values()
        left_out["eval"] += held_out.broken.values()
        folder.write_left_out(left_out)
        folder.close()
    progress.wall_s = time.perf_counter() - started
    summary = report.summary(trainer, evaluations, {k: len(v) for k, v in left_out.items()})
    (folder.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.plot_curves(folder.path, summary)
    folder.state.unlink(missing_ok=True)
    return summary


def run(
    trainer: Trainer,
    folder: RunFolder,
    pool: Prompts,
    held_out: Prompts,
    signalled: Signals,
    started: float,
) -> dict[str, Evaluation | None]:
    """Evaluate, train from the step that the trainer has reached, evaluate, save the student."""
    config, ledger, progress = trainer.config, trainer.ledger, trainer.progress
    student, teacher = trainer.student, trainer.teacher

    def score(lm: VideoLM, name: str) -> Evaluation:
        path = folder.path / f"eval_{name}.jsonl"
        if path.is_file():  # made before the run was stopped
            return Evaluation.read(path)
        bar = tqdm(total=len(held_out), desc=f"evaluate {name}", unit="query", file=sys.stderr)

        def answered(queries: int) -> None:
            bar.update(queries)
            signalled.obey()

        with ledger.phase("evaluate"), bar, trainer.counter.label("evaluation"):
            return evaluate(lm, held_out, trainer.policy, config, path, answered)

    before = score(student, "before") if config.eval.before else None
    ledger.close_step()
    plan = schedule(len(pool), config.steps, config.batch_size, config.seed)[progress.step :]
    micro_plan = [micro for indices in plan for micro in split(indices, config.micro_batch_size)]
    per_step = config.batch_size // (config.micro_batch_size or config.batch_size)
    loader = batches(pool, micro_plan, trainer.student.device, list(trainer.costs), refill=True)
    with tqdm(
        total=config.steps, initial=progress.step, desc=config.method, unit="step", file=sys.stderr
    ) as bar:
        for step in range(progress.step, config.steps):
            begun = time.perf_counter()
            with ledger.phase("decode-wait"):
                micro_batches = [next(loader) for _ in range(per_step)]
            row = trainer.step(micro_batches, step)
            row["step_s"] = time.perf_counter() - begun
            progress.train_s += row["step_s"]
            ledger.close_step(row)
            folder.write(ledger.closed())
            numbers = [f"{k}={row[k]:.3f}" for k in ("loss", "kl") if row[k] is not None]
            bar.set_postfix_str(", ".join([*numbers, ledger.shares()]))
            bar.update()
            progress.first_step_s = progress.first_step_s or time.perf_counter() - started
            if progress.skipped_in_a_row >= config.max_skipped:
                raise Stopped(f"{config.max_skipped} losses in a row that are no numbers", 1)
            signalled.obey()
            if config.save_every and progress.step % config.save_every == 0:
                progress.wall_s = time.perf_counter() - started
                folder.write(ledger.closed(wait=True))
                with ledger.phase("checkpoint"):
                    save_state(folder.state, trainer.state())
    folder.write(ledger.closed(wait=True))
    after = score(student, "after")
    judge = teacher.lm if teacher is not None and config.eval.teacher else None
    scored_teacher = score(judge, "teacher") if judge is not None else None
    with ledger.phase("checkpoint"):
        if config.model.save_dtype != "auto":
            student.model.to(getattr(torch, config.model.save_dtype))
        student.model.save_pretrained(folder.path / "student")
        trainer.processor.save_pretrained(folder.path / "student")
    return {"before": before, "after": after, "teacher": scored_teacher}


def main(arguments: list[str] | None = None) -> None:
    """The command; a user's mistake ends with one line and exit code 2."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        usage = "opd.train [CONFIG.yaml] [dotted.key=value ...]"
        config = load_config(command_line(usage, arguments))
        summary = train(config)
    except (ConfigError, DataError, ModelError) as error:
        fail(error)
    except Stopped as stopped:
        fail(stopped, stopped.exit_code)
    else:
        print(report.table(summary))
        print(f"run folder: {config.run_dir}")


if __name__ == "__main__":
    main()

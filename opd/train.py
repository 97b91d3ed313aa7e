"""A whole training run, in reading order:

    python -m opd.train [CONFIG.yaml] [dotted.key=value ...]

    train          set up devices, data and models, run, summarise
    Run.go         evaluate the student, train it, evaluate it again, save it
    Run.steps      the micro-batches of every step; each round chooses its examples first
    Run.evaluate   answer the held-out queries

The step itself, and with it the method, is in `opd.method.trainer`.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from opd import distributed
from opd.config.command_line import command_line, ends_in_one_line
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch
from opd.data.examples import Example
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.schedule import micro_batches, plan_steps
from opd.data.sources import check_leak, check_sources, load_split
from opd.distributed import announce, progress_bar, set_up
from opd.errors import Stopped
from opd.files import read_rows
from opd.generation.policy import Policy
from opd.method import curriculum, health
from opd.method.answering import evaluate
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models.compatibility import check_pair
from opd.models.load import load_model, load_options, load_processor, resolve
from opd.models.lora import save_adapter, save_student
from opd.models.sharded import load_frozen
from opd.models.video_lm import VideoLM
from opd.planning.auto import resolve_auto
from opd.record.folder import RunFolder
from opd.record.interrupts import Interrupts
from opd.record.summary import plot_curves, summarise, table
from opd.scoring.evaluation import Evaluation


def train(config: Config) -> dict[str, Any]:
    """Evaluate, train, evaluate again, and write the run folder; returns the summary. With
    resume=auto, a stopped run continues and a finished one is left as it is.

    Raises Stopped, with the state saved, on SIGINT, on SIGTERM and after `max_skipped` steps in a
    row without a finite loss.
    """
    started = time.perf_counter()
    micro_batches(config)  # raises ConfigError for a batch that the ranks cannot divide
    device = set_up(config.cpu_threads, config.seed)
    distributed.start()
    resolve(config.model.student, "model.student")
    if config.method == "opd":
        resolve(config.model.teacher, "model.teacher")
        check_pair(config.model.student, config.model.teacher)
    config = resolve_auto(config, device)
    folder = RunFolder(config)
    if folder.finished:
        return folder.summary()
    check_sources(config.data)
    train_examples, eval_examples, unusable = distributed.from_first(lambda: load_splits(config))
    trainer = make_trainer(config, device)
    pool = Prompts(train_examples, config.data, trainer.processor, trainer.student)
    held_out = Prompts(eval_examples, config.data, trainer.processor, trainer.student)
    if folder.resumed:
        folder.states.load(trainer.load)
    folder.open(trainer.progress.step)
    started -= trainer.progress.wall_s  # of a resumed run, the time before it was stopped
    run = Run(trainer, folder, pool, held_out, unusable, started, Interrupts())
    try:
        with run.interrupts.watch():
            evaluations = run.go()
    except Stopped as stopped:
        run.save_state()
        run.write_left_out()
        where = f"{stopped} after step {trainer.progress.step} of {config.steps}"
        raise Stopped(f"{where}; resume=auto continues from there", stopped.exit_code) from None
    finally:
        folder.close()
    run.read_clock()
    summary = summarise(trainer, evaluations, run.write_left_out())
    if distributed.is_first():
        plot_curves(folder.path, summary)
    folder.finish(summary)
    return summary


def load_splits(config: Config) -> tuple[list[Example], list[Example], dict[str, list[str]]]:
    """Training and held-out examples, and by split one line about each that cannot be used."""
    unusable: dict[str, list[str]] = {"train": [], "eval": []}
    train_examples = load_split(config.data, "train", config.needs, unusable["train"])
    eval_examples = load_split(config.data, "eval", ["spans", "options"], unusable["eval"])
    check_leak(train_examples, eval_examples, config.data)
    return train_examples, eval_examples, unusable


def make_trainer(config: Config, device: torch.device) -> Trainer:
    """Load student, teacher and processor; `config` is resolved, without `auto`."""
    options = load_options(config.model, device)
    processor = load_processor(config.model.student)
    student = load_model(config.model.student, seed=config.seed, **options)
    teacher = None
    if config.method == "opd":
        teacher = Teacher(load_frozen(config.model.teacher, config, **options))
    elif config.method == "grpo" and config.grpo.kl_coef:
        teacher = Teacher(load_frozen(config.model.student, config, **options))
    policy = Policy.of(student, processor.tokenizer, config.sample)
    if config.sample.truncated and not config.on_references:
        announce("sample.top_k, sample.top_p: the loss is not that of what is sampled from")
    return Trainer(config, processor, student, teacher, policy)


@dataclass
class Run:
    """A run in progress: its trainer, its folder, and the prompts to train and to evaluate on."""

    trainer: Trainer
    folder: RunFolder
    pool: Prompts
    held_out: Prompts
    unusable: dict[str, list[str]]  # lines about examples that could not be read, by split
    started: float  # on time.perf_counter
    interrupts: Interrupts

    def __post_init__(self) -> None:
        self.config, self.ledger = self.trainer.config, self.trainer.ledger
        self.progress, self.watch = self.trainer.progress, health.Watch(self.config)

    def go(self) -> dict[str, Evaluation | None]:
        """Evaluate, train the remaining steps, evaluate again, save the student."""
        config, progress, before = self.config, self.progress, None
        if config.eval.before:
            before = self.evaluate("before") if progress.step else self.add_to_curve("before")
        self.ledger.close_step()  # evaluating belongs to no step
        self.evaluate_on_the_way()  # where the run was stopped during such an evaluation
        with progress_bar(
            total=config.steps, initial=progress.step, desc=config.method, unit="step"
        ) as bar:
            for step, step_batches, begun in self.steps():
                row = self.trainer.step(step_batches, step)
                row["step_s"] = time.perf_counter() - begun
                progress.train_s += row["step_s"]
                self.ledger.close_step(row)
                self.folder.write(self.ledger.closed())
                numbers = [f"{k}={row[k]:.3f}" for k in ("loss", "kl") if row[k] is not None]
                bar.set_postfix_str(", ".join([*numbers, self.ledger.shares()]))
                bar.update()
                for warning in self.watch.note(row) if distributed.is_first() else ():
                    bar.write(warning, file=sys.stderr)
                progress.first_step_s = progress.first_step_s or time.perf_counter() - self.started
                if progress.skipped_in_a_row >= config.max_skipped:
                    raise Stopped(f"no finite loss in {config.max_skipped} steps: stopped", 1)
                self.interrupts.check()
                self.evaluate_on_the_way()
                if config.save_every and progress.step % config.save_every == 0:
                    self.save_state()
        after, of_teacher, teacher = self.add_to_curve("after"), None, self.trainer.teacher
        if teacher is not None and config.method == "opd" and config.eval.teacher:
            of_teacher = self.evaluate("teacher", teacher.lm)
        with self.ledger.phase("checkpoint"):
            self.save_student()
        return {"before": before, "after": after, "teacher": of_teacher}

    def steps(self) -> Iterator[tuple[int, list[PromptBatch], float]]:
        """Remaining steps: number, micro-batches, start. A round chooses its examples first."""
        config, trainer, pool = self.config, self.trainer, self.pool
        for number, steps in enumerate(curriculum.rounds(config.steps, config.curriculum.rounds)):
            remaining = range(max(steps.start, self.progress.step), steps.stop)
            if not remaining:
                continue
            phase, label = self.ledger.phase("curriculum"), trainer.counter.label("curriculum")
            with phase, label, trainer.engine.gathered_weights():
                chosen = curriculum.choose(
                    trainer.student,
                    trainer.teacher,
                    pool,
                    trainer.policy,
                    config,
                    self.folder.path,
                    number,
                    progress=lambda _: self.interrupts.check(),
                )
            self.ledger.close_step()  # choosing belongs to no step
            plan = plan_steps(config, pool.examples, chosen, len(steps), config.seed + number)
            plan = plan[remaining.start - steps.start :]
            micro_plan, models = [own for step in plan for own in step], list(trainer.costs)
            options = {"refill": True, "queries_per_video": config.data.group_size}
            loader = batches(pool, micro_plan, trainer.student.device, models, **options)
            for step in remaining:
                begun = time.perf_counter()
                with self.ledger.phase("decode-wait"):
                    step_batches = [next(loader) for _ in plan[0]]
                yield step, step_batches, begun

    def evaluate(self, name: str, lm: VideoLM | None = None) -> Evaluation:
        """Evaluate the student or `lm`; read the result where a stopped run has written it."""
        trainer, path = self.trainer, self.folder.path / f"eval_{name}.jsonl"
        if distributed.from_first(path.is_file):
            return Evaluation.read(path)
        bar = progress_bar(total=len(self.held_out), desc=f"evaluate {name}", unit="query")

        def answered(num_queries: int) -> None:
            bar.update(num_queries)
            self.interrupts.check()

        phase, label = self.ledger.phase("evaluate"), trainer.counter.label("evaluation")
        with phase, label, bar, trainer.engine.gathered_weights():
            lm = lm or trainer.student
            return evaluate(lm, self.held_out, trainer.policy, self.config, path, answered)

    def add_to_curve(self, name: str) -> Evaluation:
        """Evaluate the student, and add the scores and the cost until now to `curve.jsonl`."""
        self.folder.write(self.ledger.closed(wait=True))
        cost = {
            "step": self.progress.step,
            "rollouts": self.progress.rollouts,
            "generated_tokens": self.progress.generated_tokens,
            "device_s": self.ledger.everywhere(),
        }
        evaluation = self.evaluate(name)
        self.folder.add_to_curve(cost | evaluation.summary)
        if self.config.keep_best is not None and name != "before":
            self.keep_if_best(self.config.keep_best)
        return evaluation

    def evaluate_on_the_way(self) -> None:
        """Evaluate the student if the current step is one of `eval.every`."""
        step, every = self.progress.step, self.config.eval.every
        if every and step % every == 0 and 0 < step < self.config.steps:
            self.add_to_curve(f"step_{step}")
            self.ledger.close_step()  # evaluating belongs to no step

    def keep_if_best(self, score: str) -> None:
        """Save the student in `best`, atomically, unless an earlier evaluation scored as high."""

        def is_best() -> bool:
            rows = read_rows(self.folder.path / "curve.jsonl")
            rows = [row for row in rows if row[score] is not None and row["step"]]
            best = max(rows, key=lambda row: row[score], default=None)
            return best is not None and best["step"] == self.progress.step

        if distributed.from_first(is_best):
            part, best = self.folder.path / "best.part", self.folder.path / "best"
            with self.ledger.phase("checkpoint"):
                student, weights = self.trainer.student, self.trainer.engine.weights()
                if distributed.is_first():
                    shutil.rmtree(part, ignore_errors=True)
                    save_student(student, weights, self.trainer.processor, part, self.config.model)
                    shutil.rmtree(best, ignore_errors=True)
                    part.rename(best)

    def save_student(self) -> None:
        """Save the trained student as a checkpoint, and with LoRA its adapter, too."""
        trainer, path, model = self.trainer, self.folder.path, self.config.model
        weights = trainer.engine.weights()
        if distributed.is_first():
            save_student(trainer.student, weights, trainer.processor, path / "student", model)
            if model.lora_rank is not None:
                settings = model.lora_rank, model.lora_alpha, model.student
                save_adapter(weights, path / "adapter", *settings)

    def save_state(self) -> None:
        """Save what a resumed run continues from."""
        self.read_clock()
        self.folder.write(self.ledger.closed(wait=True))
        with self.ledger.phase("checkpoint"):
            self.folder.states.save(self.progress.step, self.trainer.save)

    def read_clock(self) -> None:
        """Set the wall time of the run so far."""
        self.progress.wall_s = time.perf_counter() - self.started

    def write_left_out(self) -> dict[str, int]:
        """Write which examples could not be used; returns their number by split."""
        pools = {"train": self.pool, "eval": self.held_out}
        lines = {split: self.unusable[split] + pools[split].left_out() for split in pools}
        self.folder.write_left_out(lines)
        return {split: len(of_split) for split, of_split in lines.items()}


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake ends with one line on stderr and exit code 2."""
    usage = "opd.train [CONFIG.yaml] [dotted.key=value ...]"
    config = load_config(command_line(usage, sys.argv[1:] if arguments is None else arguments))
    summary = train(config)
    distributed.leave_at_exit()
    if distributed.is_first():
        print(table(summary))
        print(f"run folder: {config.run_dir}")


if __name__ == "__main__":
    main()

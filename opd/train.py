"""A whole run: evaluate the student, train it in rounds, evaluate it again, write the run folder.

    python -m opd.train [CONFIG.yaml] [dotted.key=value ...]

The step itself, and with it the method, is `opd.method.trainer`.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from opd import distributed
from opd.config.command_line import command_line, fail
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.schedule import micro_batches, schedule
from opd.data.sources import check_leak, check_sources, load_split
from opd.distributed import progress_bar, set_up
from opd.errors import Stopped, UserError
from opd.files import read_rows
from opd.generation.sampling import Policy
from opd.method import curriculum
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
from opd.record.interrupts import Signals
from opd.record.summary import plot_curves, summarise, table
from opd.scoring.evaluation import Evaluation


def train(config: Config) -> dict[str, Any]:
    """A whole run: evaluate, train, evaluate, write the run folder; returns the summary. With
    resume=auto, a run that was stopped goes on, and one that is finished stays as it is.

    Raises Stopped on SIGINT, on SIGTERM and where losses stay no numbers, with the state saved.
    """
    started = time.perf_counter()
    micro_batches(config)  # refuses a batch that cannot be divided, before anything is loaded
    device = set_up(config.threads, config.seed)
    distributed.start()
    resolve(config.model.student, "model.student")
    if config.method == "opd":
        resolve(config.model.teacher, "model.teacher")
        check_pair(config.model.student, config.model.teacher)
    config = resolve_auto(config, device)
    folder = RunFolder(config)
    if folder.finished:  # resume=auto, started once more
        return folder.summary()
    check_sources(config.data)
    data = config.data

    def splits() -> Any:
        found: tuple[list[str], list[str]] = [], []
        train_examples = load_split(data, "train", config.needs, found[0])
        eval_examples = load_split(data, "eval", ["spans", "options"], found[1])
        check_leak(train_examples, eval_examples, data)
        return train_examples, eval_examples, found

    train_examples, eval_examples, unread = distributed.from_first(splits)
    trainer = make_trainer(config, device)
    pool = Prompts(train_examples, data, trainer.processor, trainer.student)
    held_out = Prompts(eval_examples, data, trainer.processor, trainer.student)
    if folder.resumed:
        folder.states.load(trainer.load)
    folder.open(trainer.progress.step)
    progress, started = trainer.progress, started - trainer.progress.wall_s

    def left_out() -> dict[str, int]:
        found: dict[str, list[str]] = {}
        for name, told, prompts in zip(("train", "eval"), unread, (pool, held_out), strict=True):
            found[name] = [*told, *distributed.gather_dict(prompts.broken).values()]
        folder.write_left_out(found)
        return {name: len(lines) for name, lines in found.items()}

    signalled = Signals()
    try:
        with signalled.watch():
            evaluations = run(trainer, folder, pool, held_out, signalled, started)
    except Stopped as stopped:
        progress.wall_s = time.perf_counter() - started
        folder.write(trainer.ledger.closed(wait=True))
        folder.states.save(progress.step, trainer.save)
        left_out()
        told = f"after step {progress.step} of {config.steps}; resume=auto goes on from there"
        raise Stopped(f"{stopped} {told}", stopped.exit_code) from None
    finally:
        folder.close()
    progress.wall_s = time.perf_counter() - started
    summary = summarise(trainer, evaluations, left_out())
    if distributed.is_first():
        plot_curves(folder.path, summary)
    folder.finish(summary)
    return summary


def make_trainer(config: Config, device: torch.device) -> Trainer:
    """The trainer of the models that a configuration without `auto` names."""
    where = load_options(config.model, device)
    processor = load_processor(config.model.student)
    student = load_model(config.model.student, seed=config.seed, **where)
    teacher = None
    if config.method == "opd":
        teacher = Teacher(load_frozen(config.model.teacher, config, **where))
    elif config.method == "grpo" and config.grpo.kl_coef:
        teacher = Teacher(load_frozen(config.model.student, config, **where))
    policy = Policy.of(student, processor.tokenizer, config.sample.temperature)
    return Trainer(config, processor, student, teacher, policy)


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

    def score(name: str, lm: VideoLM = student) -> Evaluation:
        path = folder.path / f"eval_{name}.jsonl"
        if distributed.from_first(path.is_file):  # made before the run was stopped
            return Evaluation.read(path)
        bar = progress_bar(total=len(held_out), desc=f"evaluate {name}", unit="query")

        def answered(queries: int) -> None:
            bar.update(queries)
            signalled.obey()

        phases = ledger.phase("evaluate"), trainer.counter.label("evaluation")
        with phases[0], phases[1], bar, trainer.engine.gathered_weights():
            return evaluate(lm, held_out, trainer.policy, config, path, answered)

    def mark(name: str) -> Evaluation:
        """Evaluate the student, and note what it had cost until then."""
        folder.write(ledger.closed(wait=True))
        point = {
            "step": progress.step,
            "rollouts": progress.rollouts,
            "generated_tokens": progress.generated_tokens,
            "device_s": ledger.everywhere(),
        }
        found = score(name)
        folder.add_to_curve(point | found.summary)
        if config.keep_best is not None and name != "before":
            keep_if_best(trainer, folder, config.keep_best)
        return found

    def on_the_way() -> None:
        step, every = progress.step, config.eval.every
        if every and step % every == 0 and 0 < step < config.steps:
            mark(f"step_{step}")
            ledger.close_step()  # evaluating belongs to no step

    before = None
    if config.eval.before:
        before = score("before") if progress.step else mark("before")
    ledger.close_step()
    on_the_way()  # where a stop fell into it
    with progress_bar(
        total=config.steps, initial=progress.step, desc=config.method, unit="step"
    ) as bar:
        for step, micro_batches, begun in steps_left(trainer, folder, pool, signalled):
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
            on_the_way()
            if config.save_every and progress.step % config.save_every == 0:
                progress.wall_s = time.perf_counter() - started
                folder.write(ledger.closed(wait=True))
                with ledger.phase("checkpoint"):
                    folder.states.save(progress.step, trainer.save)
    after = mark("after")
    scored_teacher = None
    if teacher is not None and config.method == "opd" and config.eval.teacher:
        scored_teacher = score("teacher", teacher.lm)
    with ledger.phase("checkpoint"):
        weights, model = trainer.engine.weights(), config.model
        if distributed.is_first():
            save_student(student, weights, trainer.processor, folder.path / "student", model)
            if model.lora_rank is not None:
                settings = model.lora_rank, model.lora_alpha, model.student
                save_adapter(weights, folder.path / "adapter", *settings)
    return {"before": before, "after": after, "teacher": scored_teacher}


def keep_if_best(trainer: Trainer, folder: RunFolder, name: str) -> None:
    """Leave the student in `best`, whole or not at all, if no evaluation had a higher score."""

    def is_best() -> bool:
        rows = read_rows(folder.path / "curve.jsonl")
        rows = [row for row in rows if row[name] is not None and row["step"]]
        best = max(rows, key=lambda row: row[name], default=None)
        return best is not None and best["step"] == trainer.progress.step

    if distributed.from_first(is_best):
        part, best = folder.path / "best.part", folder.path / "best"
        with trainer.ledger.phase("checkpoint"):
            weights, model = trainer.engine.weights(), trainer.config.model
            if distributed.is_first():
                shutil.rmtree(part, ignore_errors=True)
                save_student(trainer.student, weights, trainer.processor, part, model)
                shutil.rmtree(best, ignore_errors=True)
                part.rename(best)


def steps_left(
    trainer: Trainer, folder: RunFolder, pool: Prompts, signalled: Signals
) -> Iterator[tuple[int, list[PromptBatch], float]]:
    """Each step from the one that the trainer has reached, its batches, and when it began. A round
    chooses its examples before its first step."""
    config, ledger, counter = trainer.config, trainer.ledger, trainer.counter
    for number, steps in enumerate(curriculum.rounds(config.steps, config.curriculum.rounds)):
        left = range(max(steps.start, trainer.progress.step), steps.stop)
        if not left:
            continue
        phases = ledger.phase("curriculum"), counter.label("curriculum")
        with phases[0], phases[1], trainer.engine.gathered_weights():
            chosen = curriculum.choose(
                trainer.student,
                trainer.teacher,
                pool,
                trainer.policy,
                config,
                folder.path,
                number,
                lambda _: signalled.obey(),
            )
        ledger.close_step()  # choosing belongs to no step
        weights = [pool.examples[i].weight for i in chosen]
        seed = config.seed + number
        plan = schedule(len(chosen), len(steps), config.batch_size, seed, weights)
        plan = [[chosen[i] for i in indices] for indices in plan[left.start - steps.start :]]
        shares = micro_batches(config)
        micro_plan = [[step[i] for i in positions] for step in plan for positions in shares]
        loader = batches(pool, micro_plan, trainer.student.device, list(trainer.costs), refill=True)
        for step in left:
            begun = time.perf_counter()
            with ledger.phase("decode-wait"):
                made = [next(loader) for _ in shares]
            yield step, made, begun


def main(arguments: list[str] | None = None) -> None:
    """The command; a user's mistake ends with one line and exit code 2."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        usage = "opd.train [CONFIG.yaml] [dotted.key=value ...]"
        config = load_config(command_line(usage, arguments))
        summary = train(config)
    except UserError as error:
        fail(error)
    except Stopped as stopped:
        fail(stopped, stopped.exit_code)
    else:
        if distributed.is_first():
            print(table(summary))
            print(f"run folder: {config.run_dir}")


if __name__ == "__main__":
    main()

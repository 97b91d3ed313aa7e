"""A run around the steps of `opd.train`: evaluate, train in rounds, evaluate; write the run folder,
stop and go on."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from opd import curriculum
from opd.checkpoint import RunFolder, Signals, Stopped, load_state, save_state
from opd.config import Config
from opd.data.batch import PromptBatch
from opd.data.loader import Prompts, batches, schedule, split
from opd.data.sources import check_sources, load_split
from opd.engine import set_up
from opd.evaluate import Evaluation, evaluate
from opd.models.load import VideoLM, resolve
from opd.models.lora import merge_lora, save_adapter
from opd.models.pair import check_pair
from opd.summary import plot_curves, summarise
from opd.train import Trainer


def train(config: Config) -> dict[str, Any]:
    """A whole run: evaluate, train, evaluate, write the run folder; returns the summary.

    Raises Stopped on SIGINT, on SIGTERM and where losses stay no numbers, with the state saved.
    """
    started = time.perf_counter()
    folder = RunFolder(config)
    resolve(config.model.student, "model.student")
    if config.method == "opd":
        resolve(config.model.teacher, "model.teacher")
        check_pair(config.model.student, config.model.teacher)
    check_sources(config.data)
    device = set_up(config.threads, config.seed)
    left_out: dict[str, list[str]] = {"train": [], "eval": []}
    data = config.data
    train_examples = load_split(data, "train", config.needs, left_out["train"])
    eval_examples = load_split(data, "eval", ["spans", "options"], left_out["eval"])
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
    summary = summarise(trainer, evaluations, {k: len(v) for k, v in left_out.items()})
    (folder.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_curves(folder.path, summary)
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

    def score(name: str, lm: VideoLM = student) -> Evaluation:
        path = folder.path / f"eval_{name}.jsonl"
        if path.is_file():  # made before the run was stopped
            return Evaluation.read(path)
        bar = tqdm(total=len(held_out), desc=f"evaluate {name}", unit="query", file=sys.stderr)

        def answered(queries: int) -> None:
            bar.update(queries)
            signalled.obey()

        with ledger.phase("evaluate"), bar, trainer.counter.label("evaluation"):
            return evaluate(lm, held_out, trainer.policy, config, path, answered)

    def mark(name: str) -> Evaluation:
        """Evaluate the student, and note what it had cost until then."""
        folder.write(ledger.closed(wait=True))
        point = {
            "step": progress.step,
            "rollouts": progress.rollouts,
            "generated_tokens": progress.generated_tokens,
            "device_s": ledger.totals(),
        }
        found = score(name)
        folder.add_to_curve(point | found.summary)
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
    with tqdm(
        total=config.steps, initial=progress.step, desc=config.method, unit="step", file=sys.stderr
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
                    save_state(folder.state, trainer.state())
    after = mark("after")
    scored_teacher = None
    if teacher is not None and config.method == "opd" and config.eval.teacher:
        scored_teacher = score("teacher", teacher.lm)
    with ledger.phase("checkpoint"):
        model = config.model
        if model.lora_rank is not None:
            settings = model.lora_rank, model.lora_alpha, model.student
            save_adapter(student, folder.path / "adapter", *settings)
            merge_lora(student)
        if config.model.save_dtype != "auto":
            student.model.to(getattr(torch, config.model.save_dtype))
        student.model.save_pretrained(folder.path / "student")
        trainer.processor.save_pretrained(folder.path / "student")
    return {"before": before, "after": after, "teacher": scored_teacher}


def steps_left(
    trainer: Trainer, folder: RunFolder, pool: Prompts, signalled: Signals
) -> Iterator[tuple[int, list[PromptBatch], float]]:
    """Each step from the one that the trainer has reached, its batches, and when it began. A round
    chooses its examples before its first step."""
    config, ledger, counter = trainer.config, trainer.ledger, trainer.counter
    micro = config.micro_batch_size or config.batch_size
    for number, steps in enumerate(curriculum.rounds(config.steps, config.curriculum.rounds)):
        left = range(max(steps.start, trainer.progress.step), steps.stop)
        if not left:
            continue
        with ledger.phase("curriculum"), counter.label("curriculum"):
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
        plan = schedule(len(chosen), len(steps), config.batch_size, config.seed + number)
        plan = [[chosen[i] for i in indices] for indices in plan[left.start - steps.start :]]
        micro_plan = [part for indices in plan for part in split(indices, micro)]
        loader = batches(pool, micro_plan, trainer.student.device, list(trainer.costs), refill=True)
        for step in left:
            begun = time.perf_counter()
            with ledger.phase("decode-wait"):
                made = [next(loader) for _ in range(config.batch_size // micro)]
            yield step, made, begun

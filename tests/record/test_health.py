"""What a run reports: health of its steps, losses that are not finite, the ledger, the commands."""

import dataclasses
import json
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

import opd.train
from opd import evaluate
from opd.config.method import OPDConfig
from opd.config.run import Config
from opd.data.batch import Prompt
from opd.data.prompts import Prompts
from opd.errors import Stopped
from opd.generation.extend import extend
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import uniforms
from opd.generation.prefilled import Prefilled
from opd.generation.prefix import encode
from opd.generation.sampling import Rollouts, sample
from opd.method.health import Watch, signals
from opd.method.objectives import Loss
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.record.flops import Cost, mfu, step_flops
from opd.record.folder import WRITTEN
from opd.record.ledger import Ledger
from opd.record.summary import table
from opd.scoring.evaluation import Evaluation
from opd.train import main
from tests.helpers import (
    FAMILIES,
    batch_of,
    make_prompt,
    ours,
    policy_of,
    prefill_of,
    run,
    slow_after,
)

SHORT = (
    "batch_size=2",
    "data.limit_train=8",
    "data.limit_eval=2",
    "eval.draws=1",
    "eval.before=false",
    "eval.teacher=false",
)


def brief(videos: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    return run(videos, run_dir, *SHORT, *more)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Health by hand.


class Characters:
    """A tokenizer of single characters."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return ["".join(map(chr, row)) for row in ids]


def test_signals_by_hand() -> None:
    from opd.data.examples import Example

    answers = ["1 to 2 s", "nothing!", "3 to 4 s", "9 to 8 s"]
    ids = torch.tensor([[ord(c) for c in answer] for answer in answers]).view(2, 2, 8)
    lengths = torch.tensor([[8, 8], [8, 5]])  # the last is "9 to "
    count = int(lengths.sum())
    kl = torch.arange(count, dtype=torch.float32)
    truncated = torch.tensor([[False, True], [False, False]])
    rollouts = Rollouts(ids, lengths, torch.zeros(2, 2, 8), truncated)
    chosen = torch.full((count,), -0.25)
    loss = Loss(torch.zeros(()), kl, kl / 10, kl / 100, chosen)
    examples = [
        Example(id=i, video=Path("v"), query="q", spans=((1.0, 2.0),), duration_s=12.0)
        for i in ("a", "b")
    ]
    row = signals([loss], [rollouts], examples, Characters(), Config())
    text = "".join(answers)[:count]
    digits = [float(k) for k, c in enumerate(text) if c.isdigit()]
    others = [float(k) for k, c in enumerate(text) if not c.isdigit()]
    assert row["kl"] == pytest.approx((count - 1) / 2)
    assert row["kl_number"] == pytest.approx(sum(digits) / len(digits))
    assert row["kl_template"] == pytest.approx(sum(others) / len(others))
    assert row["student_entropy"] == pytest.approx((count - 1) / 20)
    assert row["teacher_entropy"] == pytest.approx((count - 1) / 200)
    assert row["completion_length"] == count / 4 and row["truncated"] == 0.25
    assert row["generated_tokens"] == row["trained_tokens"] == count
    assert row["parse_failures"] == 0.5  # "nothing!" and the one cut short
    assert row["logprob_gap"] == pytest.approx(0.25)
    assert row["sample"] == {
        "id": "a",
        "query": "q",
        "answer": "1 to 2 s",
        "predicted": (1.0, 2.0),
        "annotated": "From 1.0 to 2.0 seconds.",
    }
    config = Config(opd=OPDConfig(horizon=8))  # nothing says how an answer would have ended
    row = signals([loss], [rollouts], examples, Characters(), config)
    assert row["truncated"] is None and row["parse_failures"] is None
    some = dataclasses.replace(rollouts, trained=torch.tensor([[True, False], [False, True]]))
    few = Loss(torch.zeros(()), *(values[:13] for values in (kl, kl / 10, kl / 100, chosen)))
    row = signals([few], [some], examples, None, Config())
    assert (row["generated_tokens"], row["trained_tokens"]) == (count, 8 + 5)


def noted(
    lengths: list[float], truncated: float | None = 0.0, config: Config | None = None
) -> list[tuple[int, str]]:
    """Warnings by step for these mean lengths of completions."""
    watch, found = Watch(config or Config()), []
    for step, length in enumerate(lengths):
        row = {"step": step, "completion_length": length, "truncated": truncated}
        found += [(step, line) for line in watch.note(row)]
    return found


def test_a_collapse_is_said_once() -> None:
    steady = [8.0] * 20
    assert noted(steady * 5) == [] == noted([8.0, 2.0] * 30)
    assert noted([8.0] * 19, 1.0) == []
    [(step, line)] = noted(steady * 3, 0.5)
    assert step == 19 and line.startswith("step 19: 50% of the completions reach sample.max_com")
    [(step, line)] = noted([*steady, *[1.0] * 60])
    assert step == 20 + 17 and "shrunk from 8.0 to 1.7" in line  # (2 * 8 + 18) / 20
    assert [line.split()[4] for _, line in noted([*steady, *[64.0] * 60, *steady * 2])] == ["grown"]
    sft = dataclasses.replace(Config(), method="sft")
    assert noted([*steady, *[1.0] * 60], None, sft) == []


@pytest.mark.slow
def test_a_run_says_that_answers_are_cut_short(
    videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = "steps=25", "batch_size=2", "sample.max_completion_length=2", "eval.before=false"
    run(videos, tmp_path / "run", *keys)
    assert capfd.readouterr().err.count("reach sample.max_completion_length=2: raise it") == 1
    of_steps = rows(tmp_path / "run")
    assert {row["generated_tokens"] for row in of_steps} == {4}


# Losses that are not finite.


@pytest.mark.slow
def test_weights_that_are_not_finite_stop_the_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer = opd.train.make_trainer

    def broken(*arguments: Any) -> Trainer:
        trainer = make_trainer(*arguments)
        with torch.no_grad():
            trainer.student.language_model.norm.weight[3] = math.nan
        return trainer

    monkeypatch.setattr(opd.train, "make_trainer", broken)
    with pytest.raises(Stopped) as caught:
        brief(videos, tmp_path / "run", "steps=9", "max_skipped=3")
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "no finite loss in 3 steps: stopped after step 3 of 9; resume=auto continues from there"
    )
    assert [row["loss"] for row in rows(tmp_path / "run")] == [None] * 3
    assert all(len(row["skipped"]) == 2 for row in rows(tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.student.model.named_parameters()}


@pytest.mark.parametrize("where", slow_after(1, ["teacher", "frame"]))
def test_a_step_without_a_finite_loss_changes_nothing(
    where: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Any], bool]] = []
    step, extend_teacher, make = Trainer.step, Teacher.extend, Prompts._make
    calls = [0]

    def watched(self: Trainer, *arguments: Any) -> dict[str, Any]:
        before = weights(self)
        row = step(self, *arguments)
        after = weights(self)
        seen.append((dict(row), all(torch.equal(before[n], after[n]) for n in before)))
        return row

    def teacher(self: Teacher, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        hidden = extend_teacher(self, *arguments)
        if calls[0] == 2:
            hidden[0, 0, 0, 0] = math.nan
        return hidden

    def frame(self: Prompts, *arguments: Any, **options: Any) -> Prompt:
        prompt = make(self, *arguments, **options)
        if prompt.example.id == bad:
            assert prompt.pixel_values is not None
            prompt.pixel_values[7] = math.nan
        return prompt

    monkeypatch.setattr(Trainer, "step", watched)
    bad = "train-00003"
    if where == "teacher":
        monkeypatch.setattr(Teacher, "extend", teacher)
    else:
        monkeypatch.setattr(Prompts, "_make", frame)
    summary = brief(videos, tmp_path / "run", "steps=4")
    skipped = [bool(row["skipped"]) for row, _ in seen]
    assert [same for _, same in seen] == skipped
    if where == "teacher":
        assert skipped == [False, True, False, False]
    else:
        assert sum(skipped) == 1
        assert bad in next(row["skipped"] for row, _ in seen if row["skipped"])
    assert summary["skipped_steps"] == 1
    assert all(math.isfinite(row["loss"]) == (not row["skipped"]) for row, _ in seen if row["loss"])


# The ledger.


def cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of torch's attention on CPUs, from shapes; torch 2.14 does not count them."""
    return sdpa_flop_count(query, key, value)


def counted(run: Any) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {} if kernel in flop_registry else {kernel: cpu_attention_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_from_shapes_are_what_torch_counts(family: str) -> None:
    # torch counts every pair that a kernel computes; the ledger half of the causal ones.
    lm = ours("student", family)
    cost, counter = Cost.of(lm), LayerCounter()
    batch = batch_of([make_prompt(lm, name, pairs=4, text=5) for name in "abc"])
    size, length = batch.input_ids.shape
    frozen = encode(lm, batch)
    with torch.no_grad():
        prefill = counted(lambda: prefill_of(lm, batch))
        vision = counted(lambda: encode(lm, batch))
        prefix = prefill_of(lm, batch)
        completions = torch.full((size, 2, 6), 9)
        extension = counted(lambda: extend(lm, prefix, completions, counter))
    del frozen
    full = cost.prompt(size, length) + size * cost.per_pair * length**2 / 2
    video = sum(cost.vision(prompt.grid_thw) for prompt in batch.prompts)
    assert vision == pytest.approx(video, rel=0.02)
    assert prefill == pytest.approx(full + video, rel=0.02)
    tokens, keys = 2 * 5, length + 2 * 5  # packed rollouts: each query meets every key
    packed = size * (cost.per_token * tokens + cost.per_pair * tokens * keys)
    assert extension == pytest.approx(packed, rel=0.02)
    causal = size * 2 * (cost.per_token * 5 + cost.per_pair * (5 * length + 5**2 / 2))
    assert cost.completions(size, length, 2, 5) == pytest.approx(causal)


def test_a_step_is_charged_what_it_did() -> None:
    student, teacher = ours("student"), ours("teacher")
    student.train_only("all")
    teacher.model.requires_grad_(False)
    costs = {student: Cost.of(student), teacher: Cost.of(teacher)}
    batch = batch_of([make_prompt(student, name, pairs=2, text=3) for name in "ab"])
    draws = uniforms(0, 0, ["a", "b"], 2, 7)
    with torch.no_grad():
        rollouts = sample(student, prefill_of(student, batch), policy_of(student), 7, draws)
    lengths = rollouts.lengths - torch.tensor([[0, 2], [1, 6]])
    size, length = batch.input_ids.shape
    valid = int(lengths.sum())
    assert lengths.min() < lengths.max()

    def parts(lm: Any) -> tuple[float, float, float, float]:
        cost = costs[lm]
        vision = sum(cost.vision(p.grid_thw) for p in batch.prompts)
        tokens = [cost.completions(1, length, 1, n - 1) for n in lengths.flatten().tolist()]
        extension = sum(tokens)
        return vision, cost.prompt(size, length), extension, cost.per_head

    vision, prompt, extension, head = parts(student)
    every = Prefilled.of([batch], [prefill_of(student, batch)])
    actual = step_flops(costs, [batch], lengths, every, lengths, "all")
    student.train_only("language")
    frozen = step_flops(costs, [batch], lengths, every, lengths, "none")
    trained = 3 * (prompt + extension + head * valid) + extension + head * valid
    assert frozen["student"] == pytest.approx(trained + vision)
    assert actual["student"] == pytest.approx(trained + 3 * vision)
    assert (frozen["recompute"], actual["recompute"]) == (0, pytest.approx(prompt + extension))
    vision, prompt, extension, head = parts(teacher)
    assert frozen["teacher"] == pytest.approx(vision + prompt + extension + head * valid)
    references = step_flops({student: costs[student]}, [batch], None, every, lengths, "none")
    assert references["teacher"] == 0 and references["student"] < frozen["student"]


def test_phases_add_up_to_the_step(videos: Path, tmp_path: Path) -> None:
    options = ("steps=4", "batch_size=8", "data.limit_train=16")
    summary = brief(videos, tmp_path / "run", *options)
    actual = rows(tmp_path / "run")
    phases = {"decode-wait", "vision", "prefill", "sample", "teacher", "extend", "loss", "backward"}
    assert all(set(row["seconds"]) == phases | {"optimizer"} for row in actual)
    spent = sum(sum(row["seconds"].values()) for row in actual)
    assert spent == pytest.approx(sum(row["step_s"] for row in actual), rel=0.03)
    hours = summary["device_hours"]
    assert hours["total"] == pytest.approx(sum(v for k, v in hours.items() if k != "total"))
    flops = summary["flops"]
    assert flops["total"] == flops["student"] + flops["teacher"] + flops["recompute"]
    assert flops["total"] == pytest.approx(sum(row["flops"] for row in actual))
    assert summary["tokens_per_s"] == pytest.approx(
        sum(row["tokens"] for row in actual) / sum(row["step_s"] for row in actual)
    )
    assert summary["mfu"] is None or torch.cuda.is_available()


class LateEvent:
    """A CUDA event of a device that is two steps behind the host."""

    created: ClassVar[list["LateEvent"]] = []
    happened: ClassVar[int] = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.number = len(LateEvent.created)
        LateEvent.created.append(self)

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.number < LateEvent.happened

    def elapsed_time(self, end: "LateEvent") -> float:
        assert end.query(), "reading an event that has not happened would wait for it"
        return 1000.0 * (end.number - self.number)


def test_on_a_gpu_timing_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    LateEvent.created, LateEvent.happened = [], 0
    book, written = Ledger(torch.device("cuda")), []
    for step in range(4):
        for name in ("prefill", "backward"):
            with book.phase(name):
                pass
        book.close_step({"step": step})
        LateEvent.happened = max(0, len(LateEvent.created) - 8)
        written.append([row["step"] for row in book.closed()])
    assert written == [[], [], [0], [1]]

    def synchronize() -> None:
        LateEvent.happened = len(LateEvent.created)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert [row["step"] for row in book.closed(wait=True)] == [2, 3]
    totals = book.totals()
    assert (totals["prefill"], totals["backward"]) == (4.0, 4.0)


def test_mfu_needs_a_device_whose_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"student": 6e14, "teacher": 3.89e14, "recompute": 5e14}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, share in (("NVIDIA H200", 0.5), ("NVIDIA GeForce GT 710", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert mfu(spent, 2.0) == (None if share is None else pytest.approx(share))


# The run folder and the commands.


def test_left_out_examples_are_reported(videos: Path, tmp_path: Path) -> None:
    brief(videos, tmp_path / "first", "steps=1")
    records = json.loads((videos / "train-1024.json").read_text())
    records[1]["timestamp"] = [5.0, 1.0]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records[:6]))
    summary = brief(videos, tmp_path / "run", f"data.train={path}", "steps=1")
    assert summary["left_out"] == {"train": 1, "eval": 0}
    line = f"train: {path}:1: span 5 to 1 is not 0 <= start < end\n"
    assert (tmp_path / "run" / "left_out.txt").read_text() == line
    assert "left out of train: 1 examples, named in left_out.txt" in table(summary)
    assert not (tmp_path / "first" / "left_out.txt").exists()
    started = json.loads((tmp_path / "run" / "environment.jsonl").read_text())
    assert started["versions"]["torch"] == torch.__version__
    assert {"command", "commit", "gpus", "cores", "threads"} <= set(started)


def test_a_run_folder_is_replaced_only_when_told_and_nothing_else_in_it(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "precious").write_text("kept")
    for options in ((), ("resume=auto",)):
        with pytest.raises(SystemExit) as caught:
            main([f"run_dir={run_dir}", *options])
        assert caught.value.code == 2
        message = (
            f"error: run_dir={run_dir}: not empty; choose another folder or set overwrite=true\n"
        )
        assert capsys.readouterr().err == message
    (run_dir / "eval_before.jsonl").write_text("of another run")
    brief(videos, run_dir, "steps=1", "overwrite=true")
    assert (run_dir / "precious").read_text() == "kept"
    written = {path.name for path in run_dir.iterdir()} - {"precious", "config.yaml"}
    assert {"summary.json", "student", "metrics.jsonl"} <= written
    assert "steps: 1" in (run_dir / "config.yaml").read_text().splitlines()
    assert not (run_dir / "eval_before.jsonl").exists()
    assert all(any(fnmatch(name, pattern) for pattern in WRITTEN) for name in written)


def test_an_evaluation_can_be_repeated(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    summary = brief(videos, run_dir, "steps=2")
    evaluate.main([str(run_dir)])
    actual = json.loads(capsys.readouterr().out)
    assert {k: actual[k] for k in summary["after"]} == summary["after"]
    assert (run_dir / "evaluation.jsonl").read_bytes() == (
        run_dir / "eval_after.jsonl"
    ).read_bytes()
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(run_dir)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {run_dir}/evaluation.jsonl: exists already; "
        "choose another run_dir or set overwrite=true\n"
    )
    keys = [f"data.video_root={videos}", "data.limit_eval=2", "eval.draws=0", "threads=1"]
    evaluate.main(["embedded:teacher", f"run_dir={tmp_path / 'teacher'}", *keys])
    assert json.loads(capsys.readouterr().out)["sampled_miou"] is None
    read = Evaluation.read(run_dir / "eval_after.jsonl")
    assert dataclasses.asdict(read)["summary"] == summary["after"]


USAGE = (
    "usage: python -m opd.evaluate TARGET [TARGET ...] [dotted.key=value ...] "
    "[--explain [key=value ...]]"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], USAGE),
        (["steps=3"], USAGE),
        (["./nowhere"], "./nowhere: not a checkpoint folder (config.json is missing)"),
    ],
)
def test_evaluate_names_a_mistake(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"

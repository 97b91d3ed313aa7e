"""Micro-batches that are sampled together: the same rollouts and the same step, in fewer decode
steps."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from opd.config.run import load_config
from opd.data.batch import PromptBatch
from opd.errors import ConfigError
from opd.generation.decoder import Decoder
from opd.generation.sampling import Rollouts
from opd.method.trainer import Trainer
from opd.models.video_lm import VideoLM
from opd.planning.auto import check_completions, resolve_auto
from opd.planning.memory import Shapes
from opd.record.folder import RunFolder
from tests.generation.test_groups import METHODS, first_step, unequal_groups
from tests.helpers import gap, grouped
from tests.planning.memory_worker import write

CPU = torch.device("cpu")


def micro_batches(lm: VideoLM, size: int = 2, queries: int | None = 1) -> list[PromptBatch]:
    prompts = unequal_groups(lm)
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return [grouped(lm, part, queries) for part in parts]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """What every micro-batch learned from."""
    seen: list[Rollouts] = []
    learn = Trainer.learn

    def learned(self: Trainer, prompts: Any, answers: Rollouts, *rest: Any) -> Any:
        seen.append(answers)
        return learn(self, prompts, answers, *rest)

    monkeypatch.setattr(Trainer, "learn", learned)
    return seen


@pytest.mark.usefixtures("exact_modules")
@pytest.mark.parametrize("together", ["2", "3", "5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_step_of_micro_batches_apart(
    method: str, together: str, recorded: list[Rollouts]
) -> None:
    (row, seen, trainer), (expected, truth, apart) = (
        first_step(method, ("micro_batch_size=2", f"sample.together={n}"), micro_batches)
        for n in (together, "off")
    )
    ours, theirs = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
    assert len(ours) == len(theirs) >= 3
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.lengths, other.lengths)
        assert torch.equal(one.truncated, other.truncated)
    lengths = {int(n) for rollouts in ours for n in rollouts.lengths.flatten()}
    assert len(lengths) > 1 or method in ("sft", "off_policy"), "all of the same length"
    result = gap((row["loss"] or 1.0, seen), (expected["loss"] or 1.0, truth))
    assert result.loss < 1e-12 and result.gradient < 1e-10, result
    for name in ("completion_length", "truncated", "trained_share", "prompt_tokens_per_query"):
        assert row[name] == expected[name]
    assert trainer.ledger.flops == apart.ledger.flops
    assert trainer.progress == apart.progress
    assert trainer.counter.passes("prompt", trainer.progress.prompt_tokens) == 1.0


@pytest.mark.usefixtures("exact_modules", "in_two_parts")
def test_groups_in_two_parts_too() -> None:
    def batches(lm: VideoLM) -> list[PromptBatch]:
        return micro_batches(lm, 3, None)

    results = [
        first_step("sampled", ("micro_batch_size=3", f"sample.together={n}"), batches)
        for n in ("2", "off")
    ]
    (row, seen, _), (expected, truth, _) = results
    result = gap((row["loss"], seen), (expected["loss"], truth))
    assert result.loss < 1e-12 and result.gradient < 1e-10, result


@pytest.mark.parametrize(("together", "samplings"), [("off", 3), ("2", 2), ("3", 1), ("9", 1)])
def test_the_prompts_of_a_window_are_decoded_at_once(together: str, samplings: int) -> None:
    with mock.patch("opd.generation.sampling.Decoder", wraps=Decoder) as decoder:
        keys = ("micro_batch_size=2", f"sample.together={together}")
        _, _, trainer = first_step("reverse_kl", keys, micro_batches)
    prompts = [len(call.args[1].last_hidden) for call in decoder.call_args_list]
    assert len(prompts) == samplings and sum(prompts) == 6
    assert trainer.counter.totals()["decode"] > 0


def test_a_micro_batch_is_freed_before_the_next_one_is_learned_from() -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    prefilled, learn = Trainer.prefill, Trainer.learn

    def prefill(self: Trainer, batch: PromptBatch) -> Any:
        prompts = prefilled(self, batch)
        alive.append(weakref.ref(prompts.prefixes[0].keys[0]))
        return prompts

    def learned(self: Trainer, *rest: Any) -> Any:
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        return learn(self, *rest)

    with mock.patch.multiple(Trainer, prefill=prefill, learn=learned):
        first_step("reverse_kl", ("micro_batch_size=2", "sample.together=3"), micro_batches)
    assert counts == [3, 2, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write(path)
    return path


def configured(folder: Path, *keys: str) -> list[str]:
    models = [f"model.{name}={folder / name}" for name in ("student", "teacher")]
    data = ["data.video_tokens=400", "data.max_frames=16", "model.dtype=float32"]
    return [*models, *data, "batch_size=8", "micro_batch_size=1", *keys]


def test_auto_takes_as_many_as_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(configured(folder))
    shapes = Shapes.of(config, torch.float32, "cpu")
    totals = {n: shapes.plan(1, "none", "replica", n).total for n in range(1, 9)}
    assert sorted(totals.values()) == [*totals.values()] and len({*totals.values()}) == 8
    expected = {8: 8, 7: 4, 4: 4, 3: 3, 2: 2, 1: 1}  # windows as equal as possible
    for room, together in expected.items():
        capacity = int(totals[room] / 0.9) + 1
        monkeypatch.setattr("opd.planning.auto.capacity_of", lambda _, c=capacity: c)
        assert resolve_auto(config, CPU).sample.together == str(together), room
    # Too little even for one: nothing else is automatic, and the plan is only an estimate.
    monkeypatch.setattr("opd.planning.auto.capacity_of", lambda _: totals[1] // 2)
    assert resolve_auto(config, CPU).sample.together == "1"
    with pytest.raises(ConfigError, match=r"GiB needed, \d+\.\d on each device"):
        resolve_auto(load_config(configured(folder, "prefix.recompute=auto")), CPU)


@pytest.mark.parametrize(
    ("keys", "resolved"),
    [
        (("micro_batch_size=8",), "off"),
        (("method=sft",), "off"),
        (("sample.together=3",), "3"),
        (("sample.together=off",), "off"),
    ],
)
def test_what_is_not_open_stays(folder: Path, keys: Sequence[str], resolved: str) -> None:
    arguments = [a for a in configured(folder) if "method=sft" not in keys or "teacher" not in a]
    assert resolve_auto(load_config([*arguments, *keys]), CPU).sample.together == resolved


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5", "²"])
def test_other_values_are_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^sample\.together=.*: not off, auto or a number"):
        load_config([f"sample.together={value}"])


def test_a_resumed_run_may_sample_otherwise(tmp_path: Path) -> None:
    config = load_config([f"run_dir={tmp_path / 'run'}", "sample.together=2"])
    folder = RunFolder(config)
    folder.open(0)
    folder.close()
    (tmp_path / "run" / "summary.json").write_text("{}")
    other = replace(config, resume="auto", sample=replace(config.sample, together="off"))
    assert RunFolder(other).finished
    hotter = replace(other, sample=replace(other.sample, temperature=2.0))
    with pytest.raises(ConfigError, match=r"temperature: 2\.0"):
        RunFolder(hotter)


def test_completions_that_cannot_be_that_long(folder: Path) -> None:
    length = "sample.max_completion_length"
    positions = load_config(configured(folder, f"{length}=4096"))
    with pytest.raises(ConfigError, match=rf"^{length}=4096: the student has 4096 positions$"):
        check_completions(positions, torch.float32, 2**60)
    keys = "num_rollouts=4", "eval.batch_size=3", "eval.draws=1"
    config = load_config(configured(folder, f"{length}=1000", *keys))
    # 6 layers, keys and values, 2 heads of 64 numbers in 2 bytes; 4 completions, 3 in evaluation.
    need = 6 * 2 * 2 * 64 * 2 * 4 * 1000
    check_completions(config, torch.bfloat16, need)
    with pytest.raises(ConfigError, match=r"values of 4 completions need 0\.0 GiB, 0\.0 on each"):
        check_completions(config, torch.bfloat16, need - 1)
    two = replace(config, sample=replace(config.sample, together="2"))
    with pytest.raises(ConfigError, match="of 8 completions"):
        check_completions(two, torch.bfloat16, need)
    with pytest.raises(ConfigError, match="of 12 completions"):  # 3 queries, 4 draws
        drawn = replace(config, eval=replace(config.eval, draws=4))
        check_completions(drawn, torch.bfloat16, need)

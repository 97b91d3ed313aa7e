"""The main job, end to end and short: a real run on the embedded task, its folder, its numbers, its
repeatability."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from opd.models.load import EMBEDDED
from opd.scoring.metrics import best_tiou
from tests.helpers import metric_rows, run

SHORT = [
    "steps=3",
    "batch_size=4",
    "data.limit_train=24",
    "data.limit_eval=8",
    "eval.draws=2",
]


@pytest.fixture(scope="module")
def default(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("run") / "default"
    return run_dir, run(videos, run_dir, *SHORT)


def test_the_run_folder_holds_what_scripts_read(default: tuple[Path, dict[str, Any]]) -> None:
    run_dir, summary = default
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "curve.png",
        "summary.json",
        "student/config.json",
    ):
        assert (run_dir / name).stat().st_size > 0
    assert list((run_dir / "tensorboard").glob("events*"))
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"method", "seed", "steps", "before", "after", "teacher", "device_hours"} <= set(summary)
    fields = {"miou", "sampled_miou", "recall@0.3", "recall@0.5", "recall@0.7"}
    for name in ("before", "after", "teacher"):
        assert set(summary[name]) == fields | {"parse_failures", "queries", "another_form"}
        assert summary[name]["queries"] == 8
        rows = [json.loads(x) for x in (run_dir / f"eval_{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 8 and {"id", "answer", "predicted", "truth"} <= set(rows[0])
        scores = [best_tiou(row["predicted"], row["truth"]) for row in rows]
        assert sum(scores) / 8 == pytest.approx(summary[name]["miou"])
    for row in metric_rows(run_dir):
        assert {"step", "loss", "kl", "grad_norm", "lr"} <= set(row)
        assert all(math.isfinite(row[k]) for k in ("loss", "kl", "grad_norm", "lr"))
    hours = summary["device_hours"]
    assert hours["total"] == pytest.approx(sum(v for k, v in hours.items() if k != "total"))


def test_the_prompt_is_forwarded_once(default: tuple[Path, dict[str, Any]]) -> None:
    _, summary = default
    assert summary["student_prompt_forwards_per_step"] == 1.0
    assert summary["student_prompt_recomputes_per_step"] == 0.0


def test_recomputation_and_micro_batches_change_cost_only(
    default: tuple[Path, dict[str, Any]], videos: Path, tmp_path: Path
) -> None:
    run_dir, _ = default
    summary = run(videos, tmp_path / "r", *SHORT, "prefix.recompute=all", "micro_batch_size=2")
    assert summary["student_prompt_forwards_per_step"] == 1.0
    assert summary["student_prompt_recomputes_per_step"] == 1.0
    for a, b in zip(metric_rows(run_dir), metric_rows(tmp_path / "r"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_the_same_seed_gives_the_same_bytes(
    default: tuple[Path, dict[str, Any]], videos: Path, tmp_path: Path
) -> None:
    run_dir, _ = default
    run(videos, tmp_path / "again", *SHORT)
    assert metric_rows(run_dir) == metric_rows(tmp_path / "again")
    for name in ("eval_before.jsonl", "eval_after.jsonl", "student/model.safetensors"):
        assert (run_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    run(videos, tmp_path / "other", *SHORT, "seed=1")
    assert metric_rows(run_dir) != metric_rows(tmp_path / "other")


def test_only_the_language_model_was_trained(default: tuple[Path, dict[str, Any]]) -> None:
    run_dir, _ = default
    before = load_file(EMBEDDED / "student" / "model.safetensors")
    after = load_file(run_dir / "student" / "model.safetensors")
    assert set(before) == set(after)
    for name, weight in before.items():
        same = torch.equal(weight.float(), after[name].float())
        assert same == (".visual." in name), name


def test_the_student_loads_with_plain_from_pretrained(
    default: tuple[Path, dict[str, Any]], videos: Path
) -> None:
    folder = default[0] / "student"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red circle appears."}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3 or out[0, -1] in (
        processor.tokenizer.eos_token_id,
        processor.tokenizer.pad_token_id,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("objective=sampled", "num_rollouts=2"),
        ("method=sft",),
        ("normalize=token", "micro_batch_size=2"),
    ],
    ids=["sampled", "sft", "token"],
)
def test_the_other_objectives_run(arguments: tuple[str, ...], videos: Path, tmp_path: Path) -> None:
    summary = run(videos, tmp_path / "run", *SHORT, "eval.before=false", "steps=2", *arguments)
    assert summary["before"] is None
    assert all(math.isfinite(row["loss"]) for row in metric_rows(tmp_path / "run"))
    assert summary["student_prompt_forwards_per_step"] == 1.0


def test_sft_lowers_the_loss(videos: Path, tmp_path: Path) -> None:
    arguments = (
        "method=sft",
        "steps=8",
        "data.limit_train=4",
        "optim.lr=3e-3",
        "eval.before=false",
    )
    run(videos, tmp_path / "run", *SHORT, *arguments)
    losses = [row["loss"] for row in metric_rows(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]

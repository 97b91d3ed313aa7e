"""A teacher that cannot score the student's tokens, or an incomplete checkpoint, is reported in one
line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.errors import ModelError
from opd.models.compatibility import check_pair
from opd.models.load import EMBEDDED, load_model
from opd.train import main

PLACE = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / "teacher", tmp_path / "teacher"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def swap(record: Any) -> None:
    words = record["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]


CASES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "tokenizer": ("tokenizer.json", swap, "its token id of 'a' is "),
    "vision token": (
        "config.json",
        lambda r: r.update(video_token_id=7),
        "its video_token_id is 7, the student's is 365",
    ),
    "end tokens": (
        "generation_config.json",
        lambda r: r.update(eos_token_id=[358]),
        "its set of end tokens is [358], the student's is [358, 359]",
    ),
    "vocabulary": (
        "config.json",
        lambda r: r["text_config"].update(vocab_size=100),
        "its vocabulary has 100 rows, too few for the tokenizer's 366 tokens",
    ),
    "frames": (
        "processor_config.json",
        lambda r: r["video_processor"].update(temporal_patch_size=4),
        "its video processor's temporal_patch_size is 4, the student's is 2",
    ),
    "family": (
        "config.json",
        lambda r: r.update(model_type="gpt2"),
        "family gpt2 is not supported",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(case: str, teacher: Path) -> None:
    check_pair("embedded:student", str(teacher))
    name, change, message = CASES[case]
    edit(teacher / name, change)
    with pytest.raises(ModelError) as error:
        check_pair("embedded:student", str(teacher))
    assert str(teacher) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_chat_template(teacher: Path) -> None:
    with (teacher / "chat_template.jinja").open("a") as file:
        file.write("Think first.")
    with pytest.raises(ModelError, match="its chat template differs from that of embedded:student"):
        check_pair("embedded:student", str(teacher))


def test_padded_sizes_may_differ(teacher: Path) -> None:
    edit(teacher / "config.json", lambda r: r["text_config"].update(vocab_size=400))
    check_pair("embedded:student", str(teacher))
    check_pair(str(teacher), "embedded:teacher")


def test_the_command_reports_it_before_loading(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(teacher / "generation_config.json", lambda r: r.update(eos_token_id=[358]))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as error:
        main([f"model.teacher={teacher}", f"run_dir={tmp_path / 'run'}"])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and "set of end tokens" in message
    assert not (tmp_path / "run").exists()


def lose(weights: dict[str, torch.Tensor]) -> None:
    del weights["lm_head.weight"], weights["model.language_model.norm.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.language_model.extra.weight"] = torch.zeros(1)


def widen(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = torch.zeros(384, 7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (widen, "mismatched weights: lm_head.weight"),
        (lose, "missing weights: lm_head.weight and 1 more"),
        (add, "unexpected weights: model.language_model.extra.weight"),
    ],
)
def test_weights_that_do_not_fit(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, teacher: Path
) -> None:
    path = teacher / "model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_model(str(teacher), **PLACE)
    assert str(error.value) == f"{teacher}: {message}"


@pytest.mark.parametrize("kept", [0, 100, 100_000])
def test_a_half_written_checkpoint(kept: int, teacher: Path) -> None:
    path = teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=str(teacher)):
        load_model(str(teacher), **PLACE)

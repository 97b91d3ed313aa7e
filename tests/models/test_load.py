"""Loading: model specs, the shipped models, frozen weights, and error messages."""

from pathlib import Path

import pytest
import torch

from opd.config.models import ModelConfig
from opd.errors import ModelError
from opd.models import tiny
from opd.models.load import EMBEDDED, load_model, load_processor, prepare
from opd.models.lora import save_student

PLACE = {"dtype": torch.float32, "device": torch.device("cpu")}


def test_the_shipped_models_are_what_the_readme_says() -> None:
    sizes = {}
    for name in ("teacher", "student"):
        lm = load_model(f"embedded:{name}", **PLACE)
        assert lm.family == "qwen3_vl"
        sizes[name] = sum(p.numel() for p in lm.model.parameters())
        tokenizer = load_processor(f"embedded:{name}").tokenizer
        assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert 1e6 < sizes["teacher"] < 2e6
    assert 0.4 < sizes["student"] / sizes["teacher"] < 0.6
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors")) < 10e6


def test_a_fresh_model_follows_from_its_seed() -> None:
    one, same, other = (tiny.build("student", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_only_the_language_model_is_trainable_by_default(family: str) -> None:
    lm = prepare(tiny.build("student", 0, family))
    lm.train_only("language")
    for name, parameter in lm.model.named_parameters():
        assert parameter.requires_grad == (".visual." not in name), name
    lm.train_only("all")
    assert all(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("embedded:giant", "embedded:giant: no such shipped model"),
        ("./nowhere", "./nowhere: not a checkpoint folder"),
    ],
)
def test_a_missing_checkpoint_is_named(spec: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(spec, **PLACE)


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="family gpt2 is not supported"):
        load_model(str(tmp_path), **PLACE)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "header"])
def test_a_damaged_checkpoint_is_reported_in_one_line(
    checked: bool, damage: str, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    lm = load_model("embedded:student", **PLACE)
    processor = load_processor("embedded:student")
    save_student(lm, lm.model.state_dict(), processor, folder, ModelConfig())
    again = load_model(str(folder), **PLACE)
    state = again.model.state_dict()
    assert all(torch.equal(state[n], w) for n, w in lm.model.state_dict().items())
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1000])
    elif damage == "missing":
        path.unlink()
    else:
        content[5 if damage == "header" else -1001] ^= 64
        path.write_bytes(content)
    if not checked:
        (folder / "checksums.json").unlink()
        if damage == "flipped":  # nothing to compare with
            load_model(str(folder), **PLACE)
            return
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), **PLACE)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message
    if checked:
        what = "missing, but listed in checksums.json"
        if damage != "missing":
            what = "damaged (its checksum is not that of checksums.json)"
        assert message == f"{path}: {what}"

"""Loading: what a spec names, what ships, what is frozen, and how a mistake is told."""

from pathlib import Path

import pytest
import torch

from opd.models import tiny
from opd.models.load import EMBEDDED, ModelError, load_model, load_processor, prepare

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
        ("./nowhere", "./nowhere: no checkpoint folder there"),
    ],
)
def test_a_missing_checkpoint_is_named(spec: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(spec, **PLACE)


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="family gpt2 is not supported"):
        load_model(str(tmp_path), **PLACE)

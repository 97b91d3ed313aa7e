"""LoRA: only adapters are trained, and the saved checkpoint equals the evaluated model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from opd.config.run import load_config
from opd.errors import ConfigError
from opd.evaluate import main
from opd.files import read_rows
from opd.generation.extend import extend
from opd.models.load import EMBEDDED
from opd.models.lora import add_lora, merged
from tests.helpers import (
    FAMILIES,
    batch_of,
    ours,
    prefill_of,
    random_completions,
    relative,
    run,
    unequal_prompts,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_its_product_added_to_the_weight(family: str) -> None:
    lm, plain = ours("student", family, layers=2), ours("student", family, layers=2)
    batch = batch_of(unequal_prompts(lm))
    ids, mask = random_completions(3, 2)
    before = extend(lm, prefill_of(lm, batch), ids)[mask]
    add_lora(lm, 4, 8.0)
    trained = {n for n, p in lm.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert torch.equal(extend(lm, prefill_of(lm, batch), ids)[mask], before), "it begins as nothing"
    generator = torch.Generator().manual_seed(0)
    parameters = dict(lm.model.named_parameters())
    for name in trained:
        with torch.no_grad():
            parameters[name].normal_(0, 0.1, generator=generator)
    weights = dict(plain.model.named_parameters())
    for name in trained:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            place = name.partition(".lora_A")[0] + ".weight"
            with torch.no_grad():
                weights[place] += 2.0 * parameters[other] @ parameters[name]
    truth = extend(plain, prefill_of(plain, batch), ids)[mask]
    actual = extend(lm, prefill_of(lm, batch), ids)[mask]
    assert relative(actual, truth) < 1e-12 and relative(before, truth) > 1e-2
    actual = merged(lm.model.state_dict(), 2.0)
    assert actual.keys() == plain.model.state_dict().keys()
    assert all(relative(actual[name], weight) < 1e-12 for name, weight in weights.items())


def test_a_run_with_adapters(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = ["steps=3", "batch_size=4", "data.limit_train=8", "data.limit_eval=6", "eval.draws=1"]
    more = ["model.lora_rank=4", "optim.lr=1e-2", "eval.teacher=false"]
    run(videos, folder, *keys, *more)
    start = load_file(EMBEDDED / "student" / "model.safetensors")
    end = load_file(folder / "student" / "model.safetensors")
    assert start.keys() == end.keys()
    changed = {n for n in start if not torch.equal(start[n].float(), end[n].float())}
    assert len(changed) == 6 * 7 and all(".layers." in n and "_proj" in n for n in changed)
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED / "student", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, end[name], atol=1e-6, rtol=1e-5)
    main([str(folder), "model.lora_rank=null"])
    again = read_rows(folder / "evaluation.jsonl")
    after = read_rows(folder / "eval_after.jsonl")
    assert [row["answer"] for row in again] == [row["answer"] for row in after]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_adapters(videos: Path, tmp_path: Path) -> None:
    keys = ["steps=4", "batch_size=2", "data.limit_train=8", "data.limit_eval=2", "eval.draws=0"]
    more = ["model.lora_rank=2", "eval.teacher=false", "save_every=2"]
    run(videos, tmp_path / "whole", *keys, *more)

    from opd.errors import Stopped
    from opd.record.interrupts import Interrupts

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        calls = [0]

        def check(_: Interrupts) -> None:
            calls[0] += 1
            if calls[0] == 4:
                raise Stopped("stopped", 130)

        patch.setattr(Interrupts, "check", check)
        run(videos, tmp_path / "run", *keys, *more)
    run(videos, tmp_path / "run", *keys, *more, "resume=auto")
    name = "student/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_adapters_exclude_the_vision_tower() -> None:
    with pytest.raises(ConfigError, match=r"^model.trainable=all: model.lora_rank trains adapters"):
        load_config(["model.lora_rank=4", "model.trainable=all"])

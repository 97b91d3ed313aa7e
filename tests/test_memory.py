"""The memory plan: what autograd keeps, counted on shapes and on real tensors; peaks of real runs;
full-size models on the meta device."""

import re
from pathlib import Path

import pytest
import torch

from bench import model_sizes as sizes
from opd.check import main
from opd.config import ConfigError, load_config
from opd.ledger import Cost
from opd.memory import Shapes, settled
from opd.models.load import prepare
from opd.models.tiny import build
from opd.prefix import Prefix, extend
from opd.shapes import ATTENTION, Kept, graph_bytes, on_meta, size_of
from tests.helpers import batch_of, make_prompt, prefill_of
from tests.memory_worker import write
from tests.test_zero import torchrun

GIB = 2**30
ROOT = Path(__file__).parents[1]
WORKER = str(Path(__file__).with_name("memory_worker.py"))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("recompute", ["none", "2", "all"])
def test_kept_bytes_are_those_of_real_tensors(family: str, recompute: str) -> None:
    lm = prepare(build("student", 0, family))
    lm.train_only("language")
    prompt = make_prompt(lm, "a", pairs=20, rows=2, columns=4, text=20)
    object.__setattr__(prompt, "pixel_values", prompt.pixel_values.float())
    batch = batch_of([prompt])
    with Kept(lm) as kept:
        prefix = prefill_of(lm, batch, recompute)
    real = kept.nbytes(prefix)

    on_meta("tiny:student", torch.float32)  # registers the attention
    with torch.device("meta"):
        shapes = prepare(build("student", 0, family))
    shapes.model.set_attn_implementation(ATTENTION)
    shapes.train_only("language")
    planned = graph_bytes(shapes, len(prompt.input_ids), 20 * 2 * 4, recompute)
    assert planned == pytest.approx(real, rel=0.02)


CASES = {  # ranks and keys
    "none": (1, []),
    "all": (1, ["prefix.recompute=all"]),
    "zero3": (2, ["engine.kind=deepspeed", "engine.zero_stage=3"]),
}
COMMON = (
    "model.dtype=float32",
    "data.video_tokens=1600",
    "data.max_frames=50",
    "batch_size=2",
    "sample.max_completion_length=8",
    "optim.lr=1e-6",
    "steps=2",
)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_a_quarter_of_the_measured_peak(case: str, tmp_path: Path) -> None:
    ranks, keys = CASES[case]
    write(tmp_path)
    told = torchrun(ranks, WORKER, str(tmp_path), *COMMON, *keys)
    assert told.returncode == 0, told.stderr[-2000:]
    _, measured = next(ln for ln in told.stdout.splitlines() if ln[:1].isdigit()).split()
    names = [f"model.{name}={tmp_path / name}" for name in ("student", "teacher")]
    config = load_config([*names, *COMMON, *keys])
    plan = Shapes.of(config, torch.float32).plan(ranks, config.prefix.recompute, "replica")
    assert plan.total == pytest.approx(int(measured), rel=0.25)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sizes.write(tmp_path_factory.mktemp("sizes"))


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen3-VL-8B", 8.77), ("Qwen3-VL-2B", 2.13), ("Qwen2.5-VL-7B", 8.29)]
)
def test_a_full_size_step_on_the_meta_device(
    name: str, billions: float, published: dict[str, str]
) -> None:
    lm = on_meta(published[f"Qwen/{name}-Instruct"], torch.bfloat16)
    lm.train_only("language")
    size, config = size_of(lm), lm.model.config.text_config
    assert size.total / 1e9 == pytest.approx(billions, abs=0.01)
    assert size.trained == size.total - size.vision
    prompts, rollouts, length, tokens = 2, 3, 7, 1000
    shape = (prompts, config.num_key_value_heads, tokens, 128)
    meta = torch.device("meta")
    keys = [
        torch.empty(shape, dtype=torch.bfloat16, device=meta)
        for _ in range(len(lm.language_model.layers))
    ]
    hidden = torch.empty(prompts, config.hidden_size, dtype=torch.bfloat16, device=meta)
    mask = torch.ones(prompts, tokens, dtype=torch.bool, device=meta)
    prefix = Prefix(keys, keys, mask, hidden, torch.zeros(prompts, dtype=torch.long, device=meta))
    ids = torch.zeros(prompts, rollouts, length, dtype=torch.long, device=meta)
    found = extend(lm, prefix, ids)
    assert found.shape == (prompts, rollouts, length, config.hidden_size)
    assert lm.head(found).shape == (prompts, rollouts, length, config.vocab_size)
    assert Cost.of(lm).per_token == pytest.approx(
        2 * (size.language - config.vocab_size * config.hidden_size), rel=0.001
    )


def test_the_command_says_what_fits(
    published: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [
        f"model.student={published['Qwen/Qwen3-VL-8B-Instruct']}",
        f"model.teacher={published['Qwen/Qwen3-VL-32B-Instruct']}",
    ]
    keys = ["data.video_tokens=8192", "batch_size=32", "micro_batch_size=1"]
    zero = ["engine.kind=deepspeed", "engine.zero_stage=3", "prefix.recompute=auto"]
    main([*models, *keys, *zero, "--ranks=8", "--memory-gib=80"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "8 devices of 80 GiB, engine deepspeed, ZeRO stage 3, bfloat16"
    assert told[2] == "student: 8.77B weights (0.58B vision, 8.19B trained)"
    assert told[-1].endswith("teacher.placement=shard: fits")
    with pytest.raises(SystemExit) as ended:
        main([*models, *keys, "prefix.recompute=auto", "--ranks=8", "--memory-gib=80"])
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out.splitlines()[-1].startswith("prefix.recompute=all teacher.placement=offload")
    assert "GiB planned of 80.0 on each device: try prefix.recompute=auto, more ranks" in out.err


def test_auto_says_what_it_chose_and_what_cannot_fit(
    published: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"model.student={published['Qwen/Qwen3-VL-2B-Instruct']}"
    keys = [model, "method=sft", "data.video_tokens=64", "data.max_frames=16", "batch_size=1"]
    config, cpu = load_config([*keys, "prefix.recompute=auto"]), torch.device("cpu")
    monkeypatch.setattr("opd.memory.capacity_of", lambda _: 80 * GIB)
    chosen = settled(config, cpu)
    assert (chosen.prefix.recompute, chosen.teacher.placement) == ("none", "replica")
    assert (chosen.model.attention, chosen.model.dtype) == ("sdpa", "float32")
    told = capsys.readouterr().err
    assert told.startswith("auto: ") and "recompute: none" in told
    assert told.endswith(" of 80.0 GiB planned for each device)\n")
    monkeypatch.setattr("opd.memory.capacity_of", lambda _: 20 * GIB)
    with pytest.raises(ConfigError, match=r"^3\d\.\d GiB planned of 20.0 on each device: try "):
        settled(config, cpu)


def test_fewer_layers_are_recomputed_where_there_is_more_room(published: dict[str, str]) -> None:
    names = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
    models = [
        f"model.{k}={published[n]}" for k, n in zip(("student", "teacher"), names, strict=True)
    ]
    keys = ["data.video_tokens=8192", "batch_size=1", "prefix.recompute=auto"]
    shapes = Shapes.of(load_config([*models, *keys]), torch.bfloat16)
    chosen = []
    for room in (72, 80, 96, 141):
        plan = shapes.best(1, room * GIB)
        assert plan.total <= 0.9 * room * GIB
        chosen.append(28 if plan.recompute == "all" else int(plan.recompute.replace("none", "0")))
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1] == 0


REAL = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if "# Devices:" in p.read_text()]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_shipped_recipes_fit_the_devices_that_they_name(
    path: Path, published: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, gib = re.search(r"# Devices: (\d+) x (\d+) GiB", path.read_text()).groups()  # type: ignore[union-attr]
    known = published | {"runs/grpo_32b/student": published["Qwen/Qwen3-VL-32B-Instruct"]}
    config = load_config([str(path)])
    keys = [f"model.student={known[config.model.student]}"]
    if config.method == "opd":
        keys.append(f"model.teacher={known[config.model.teacher]}")
    main([str(path), *keys, f"--ranks={ranks}", f"--memory-gib={gib}"])
    assert capsys.readouterr().out.endswith(": fits\n")
    assert config.batch_size % int(ranks) == 0
    assert config.sample.max_completion_length >= 32 and config.template.video_first


def test_there_is_a_recipe_for_each_run_that_the_papers_made() -> None:
    assert len(REAL) == 8

"""The memory plan against tensors that autograd keeps and against peaks of real runs; full-size
models on the meta device."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.steps import published_sizes as sizes
from fused_kl.tiles import FAST_BYTES, make_plan
from opd.check import main
from opd.config.run import load_config
from opd.errors import ConfigError
from opd.generation.extend import extend
from opd.generation.prefix import Prefix
from opd.models.branches import Paths
from opd.models.load import prepare
from opd.models.tiny import build
from opd.planning.auto import resolve_auto
from opd.planning.live import LOGIT_BYTES, Live, logit_rows
from opd.planning.memory import NCCL_BYTES, Shapes
from opd.planning.shapes import Work, on_meta, pixel_bytes, size_of, student_step
from opd.record.flops import Cost
from tests.engine.test_zero import torchrun
from tests.helpers import batch_of, kept_bytes, make_prompt
from tests.planning.memory_worker import VOCABULARY, write

GIB = 2**30
ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("memory_worker.py"))


def work_of(prompt_tokens: int, video_tokens: int, **changes: Any) -> Work:
    """Two rollouts of four tokens for each of three prompts, on a GPU."""
    usual: dict[str, Any] = {
        "device_type": "cuda",
        "prompts": 3,
        "rollouts": 2,
        "length": 5,
        "sampled": True,
        "losses": (2,),
        "several": True,
        "fp32_gradients": False,
        "kept_gradients": False,
        "queries_per_video": 1,
        "own_tokens": 0,
    }
    return Work(tokens=prompt_tokens, video_tokens=video_tokens, **(usual | changes))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("recompute", ["none", "2", "all"])
def test_kept_bytes_are_those_of_real_tensors(family: str, recompute: str, tmp_path: Path) -> None:
    lm = prepare(build("student", 0, family))
    lm.train_only("language")
    prompt = make_prompt(lm, "a", pairs=20, rows=2, columns=4, text=20)
    assert prompt.pixel_values is not None
    object.__setattr__(prompt, "pixel_values", prompt.pixel_values.float())
    real = kept_bytes(lm, batch_of([prompt]), recompute)

    lm.model.config.save_pretrained(tmp_path)
    shapes = on_meta(str(tmp_path), torch.float32)
    shapes.train_only("language")
    work = work_of(len(prompt.input_ids), 160, prompts=1, device_type="cpu", sampled=False)
    left = student_step(shapes, work, recompute)["teacher"]  # between prefill and extend
    planned = sum(left.values()) - left["vision tower's activations, tokens"]
    rotary = 2 * len(prompt.input_ids) * 32 * 4  # a closure keeps it, where layers run again
    assert 0.999 * real <= planned <= 1.001 * real + rotary


def test_tensors_count_while_they_are_alive() -> None:
    weight = torch.empty(100, 10, device="meta")
    with Live([weight], "cuda") as live:
        with live.moment("first", "a"):
            kept = torch.empty(1000, device="meta")
            passing = torch.empty(500, 2, device="meta")
            assert live.now["a"] == 8000
            del passing
            view = kept.view(10, 100)[:5]
            product = view @ weight
            assert live.now["a"] == 4000 + 4 * 5 * 10
        with live.moment("second", "b"), live.label("c"):
            mask = torch.empty(4, 1, dtype=torch.bool, device="meta")
            del product
            torch.empty(4, 8, device="meta").masked_fill(mask, 0)
            live.note(1000)  # scratch of a kernel
    assert live.peaks["first"] == {"a": 8000}
    # Both of the second moment's tensors, then the kernel beside what is left.
    assert live.peaks["second"] == {
        "a": 4000,
        "c": 0,
        "attention masks": 4,
        "kernels' scratch": 1000,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 30M parameters: 6 layers, 2 key/value heads for 6 query heads of 64 dimensions."""
    path = tmp_path_factory.mktemp("models")
    write(path)
    return path


@pytest.fixture(scope="module")
def moments(folder: Path) -> dict[str, dict[str, int]]:
    lm = on_meta(str(folder / "student"), torch.bfloat16)
    lm.train_only("language")
    return student_step(lm, work_of(300, 200), "all")


def test_pixels_are_those_of_one_video(
    folder: Path, moments: dict[str, dict[str, int]], published: dict[str, str]
) -> None:
    lm = on_meta(published["Qwen/Qwen3-VL-2B-Instruct"], torch.bfloat16)
    # A vision token is 2 x 2 patches, a patch 2 frames of 16 x 16 pixels in three colours.
    assert pixel_bytes(lm, 8192) == 8192 * 4 * (2 * 16 * 16 * 3) * 2 == 100_663_296
    assert moments["vision"]["pixels"] == 200 * 4 * 1536 * 2
    assert all(
        "pixels" not in parts or not parts["pixels"]
        for m, parts in moments.items()
        if m != "vision"
    )


def test_short_answers_join_keys_and_values_in_every_layer_on_a_cpu(
    folder: Path, moments: dict[str, dict[str, int]]
) -> None:
    lm = on_meta(str(folder / "student"), torch.bfloat16)
    lm.train_only("language")
    work = work_of(300, 200, device_type="cpu")
    lm.model.planned_device_type = "cpu"
    kept, again = (student_step(lm, work, recompute) for recompute in ("none", "all"))
    keys = 300 + 2 * 4  # tokens: a prompt, and two rollouts less their last token
    layers, sides, prompts, heads, dim, bfloat16 = 6, 2, 3, 2, 64, 2
    prefix = layers * sides * prompts * heads * 300 * dim * bfloat16  # of unequal prompts, padded
    joined = layers * sides * prompts * heads * keys * dim * bfloat16
    assert kept["loss"]["keys and values, joined"] == joined
    assert not again["loss"].get("keys and values, joined")  # made again in backward
    assert again["extend"]["prompts' activations"] > prefix
    # On a GPU attention is in parts, which read the keys where they are.
    assert not any(parts.get("keys and values, joined") for parts in moments.values())
    assert moments["extend"]["prompts' activations"] > prefix
    assert moments["extend"]["attention masks"] <= 3 * (300 + 3 * 300)  # of the prompts
    # A row for each query of a group of three, in bf16; all layers share it.
    bias = prompts * 3 * 8 * keys * bfloat16
    boolean = prompts * 8 * keys  # once, and the masks of prompts beside it
    assert bias <= kept["extend"]["attention masks"] <= bias + 6 * boolean


def test_the_decode_cache_holds_prompts_and_completions(
    moments: dict[str, dict[str, int]],
) -> None:
    # On a GPU the prompts' keys stay where they are, until completions end: then those of the two
    # groups that go on are copied.
    of_tokens = 6 * 2 * 2 * 64 * 2
    cache = of_tokens * 2 * (300 + 2 * 4)
    assert cache < moments["sample"]["decode cache"] <= cache + 100  # positions and columns
    # A row of the vocabulary in fp32 at least twice, and in fp64 with its sum, for each rollout.
    assert moments["sample"]["logits"] >= 3 * 2 * VOCABULARY * 2 * 8
    assert "decode cache" not in {k for k, v in moments["backward"].items() if v}


def test_weights_wait_for_the_prompts_gradient(
    folder: Path, moments: dict[str, dict[str, int]]
) -> None:
    # Each weight is used by completions and by prompts: the gradient of the first use stays in the
    # model's dtype until that of the second is complete.
    lm = on_meta(str(folder / "student"), torch.bfloat16)
    lm.train_only("language")
    waiting = 2 * (size_of(lm).trained - lm.head.weight.numel())
    assert moments["backward"]["gradients in the model's dtype"] >= 0.95 * waiting


@pytest.mark.parametrize("vocab", [1187, 32_000, 151_936])
@pytest.mark.parametrize("tokens", [1, 31, 640, 5000])
@pytest.mark.parametrize(("heads", "device"), [(1, "cpu"), (2, "cpu"), (1, "cuda"), (2, "cuda")])
def test_logits_have_the_rows_of_the_fused_losses(
    vocab: int, tokens: int, heads: int, device: str
) -> None:
    half = device == "cuda"
    plan = make_plan(
        "fast",
        tokens,
        vocab,
        bytes_per_logit=4 * heads + 2 * half,
        freed_bytes=4 * (heads - 1),
        gradient_rows=(1024 // 2 if half else 1024) * (heads - 1),
        device_type="cpu" if device == "cpu" else "meta",
        chunk_size=0,
    )
    assert logit_rows(tokens, vocab, 1024, heads, half, device) == plan.rows
    assert {"cpu": FAST_BYTES["cpu"], "cuda": FAST_BYTES["gpu"]} == LOGIT_BYTES


def shapes_of(folder: Path, *keys: str, dtype: torch.dtype = torch.bfloat16) -> Shapes:
    names = [f"model.{name}={folder / name}" for name in ("student", "teacher")]
    names = names[: 1 if "method=grpo" in keys else 2]
    config = load_config([*names, "data.video_tokens=400", "data.max_frames=16", *keys])
    return Shapes.of(config, dtype, "cuda")


ZERO = ("engine.kind=deepspeed", "batch_size=16", "micro_batch_size=1")


def test_flops_of_a_step(folder: Path) -> None:
    """Layers and head by hand; the rest, vision towers and attention, is a small part here."""
    keys = ["data.prompt={video}{query}", "batch_size=8", "sample.max_completion_length=12"]
    each, four = (shapes_of(folder, *keys, f"data.queries_per_video={k}") for k in (1, 4))
    expected = {}
    for k, shapes in ((1, each), (4, four)):
        own = 64  # tokens of the query and its template
        prompts = 8 * own + 8 // k * (shapes.tokens - own)
        for name, lm in (("student", shapes.student), ("teacher", shapes.teacher)):
            assert lm is not None
            layer = sum(p.numel() for p in lm.language_model.layers.parameters() if p.ndim > 1)
            head = lm.head.weight.numel()
            passes = 3 if name == "student" else 1
            extended = layer * 8 * 11 + head * 8 * 12
            sampled = extended if name == "student" else 0
            expected[name, k] = 2 * (passes * (layer * prompts + extended) + sampled)
    for k, shapes in ((1, each), (4, four)):
        flops = shapes.flops(1, "all")
        assert flops["recompute"] == pytest.approx(flops["student"] / 3, rel=0.15)
        for name in ("student", "teacher"):
            assert 1.0 < flops[name] / expected[name, k] < 1.5, (name, k)
        assert each.flops(2, "none") == each.flops(1, "none")  # all devices together


def test_the_optimizer_takes_temporaries_beside_its_states(folder: Path) -> None:
    shapes = shapes_of(folder, "batch_size=2", "micro_batch_size=1")
    trained = size_of(shapes.student).trained
    plan = shapes.plan(1, "all", "replica")
    assert plan.moments["optimizer"] == {"AdamW's temporaries": 4 * trained}
    assert plan.held["gradients (fp32)"] == 4 * trained
    assert plan.held["optimizer's states, fp32 weights"] == 12 * trained
    assert plan.held["NCCL's buffers"] == 0
    for stage in (2, 3):
        sharded = shapes_of(folder, *ZERO, f"engine.zero_stage={stage}").plan(4, "all", "replica")
        assert sharded.held["gradients (fp32)"] == trained
        assert sharded.held["optimizer's states, fp32 weights"] == 3 * trained
        assert sharded.held["NCCL's buffers"] == NCCL_BYTES
        # Stage 2: the root, and the last micro-batch's in bf16; stage 3: the root and a flat copy.
        share = {2: 1.5, 3: 2.0}[stage]
        assert sharded.moments["optimizer"] == {"AdamW's temporaries": int(share * trained)}


def test_stage_3_gathers_weights_when_they_are_used(folder: Path) -> None:
    keys = *ZERO, "engine.zero_stage=3"
    size = size_of(shapes_of(folder).student)
    plan = shapes_of(folder, *keys).plan(4, "all", "replica")
    few = 2 * (2 * size.layer + VOCABULARY * 384)
    assert plan.moments["sample"]["gathered weights"] == 2 * size.total
    assert plan.moments["backward"]["gathered weights"] == few
    assert "gathered weights" not in plan.moments["optimizer"]
    layers = shapes_of(folder, *keys, "engine.gather=false").plan(4, "all", "replica")
    assert layers.moments["sample"]["gathered weights"] == few


def test_what_never_coincides_is_not_added(folder: Path) -> None:
    plan = shapes_of(folder).plan(1, "none", "replica")
    assert plan.peak in ("loss", "backward")
    more = {name: dict(parts) for name, parts in plan.moments.items()}
    more["sample"]["decode cache"] *= 2
    assert replace(plan, moments=more).total == plan.total
    more[plan.peak]["prompts' activations"] *= 2
    assert replace(plan, moments=more).total > plan.total
    assert plan.total == plan.total_at(plan.peak) < sum(map(plan.total_at, plan.moments))


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_more_work_never_needs_less(folder: Path, recompute: str) -> None:
    for key, values in {
        "num_rollouts": (2, 8),
        "sample.max_completion_length": (2, 100),
        "data.video_tokens": (400, 401),
        "micro_batch_size": (1, 2),
    }.items():
        keys = "method=grpo", "num_rollouts=2", "batch_size=4"
        plans = [
            shapes_of(folder, *keys, f"{key}={v}").plan(1, recompute, "replica") for v in values
        ]
        totals = [plan.total for plan in plans]
        assert totals == sorted(totals), key


def test_stages_are_compared_with_each_other(folder: Path) -> None:
    keys = "prefix.recompute=auto", "batch_size=16", "micro_batch_size=1"
    plans = shapes_of(folder, *keys).stages(8, 8 * GIB)
    assert list(plans) == [0, 2, 3]
    weights = [least.held["student's weights"] for _, least in plans.values()]
    assert weights[0] == weights[1] == 8 * weights[2]
    assert {chosen.recompute for chosen, _ in plans.values()} == {"none"}
    for stage, (_, least) in plans.items():
        engine = ZERO[:1] if stage else ()
        alone = shapes_of(folder, *keys, *engine, f"engine.zero_stage={stage}")
        assert alone.plan(8, "all", "replica") == least


def test_auto_spends_least_of_what_fits(folder: Path) -> None:
    """Recomputed layers against micro-batches sampled together, by trying every choice."""
    keys = ["batch_size=4", "micro_batch_size=1", "sample.max_completion_length=200"]
    shapes = shapes_of(folder, *keys, "prefix.recompute=auto")
    layers, size = 6, size_of(shapes.student)
    recomputing = shapes.flops(1, "all")["recompute"] / layers
    reading = 2 * (size.language + size.head) * 199 * 330  # bytes in bf16, as FLOPs
    plans = {
        (number, together): shapes.plan(1, str(number), "replica", together)
        for number in range(layers + 1)
        for together in (1, 2, 4)
    }
    costs = {(n, k): n * recomputing + 4 / k * reading for n, k in plans}
    chosen = set()
    totals = sorted(plan.total for plan in plans.values())
    for total in (totals[0], totals[len(totals) // 3], totals[len(totals) // 2], totals[-1]):
        room = int(total / 0.9) + 2
        plan = shapes.best(1, room)
        number = int({"none": "0", "all": "6"}.get(plan.recompute, plan.recompute))
        least = min(costs[each] for each in plans if plans[each].total <= total)
        assert plan.total <= total and costs[number, plan.together] <= 1.02 * least
        chosen.add((number, plan.together))
    assert len(chosen) >= 3


CASES = {  # ranks and keys
    "none": (1, []),
    "all": (1, ["prefix.recompute=all"]),
    "rollouts": (1, ["num_rollouts=8", "prefix.recompute=all"]),
    "long": (1, ["num_rollouts=4", "sample.max_completion_length=200", "prefix.recompute=all"]),
    "bfloat16": (1, ["model.dtype=bfloat16", "prefix.recompute=all", "micro_batch_size=1"]),
    "together": (1, ["batch_size=3", "micro_batch_size=1", "sample.together=3"]),
    "zero2": (2, ["engine.kind=deepspeed", "engine.zero_stage=2"]),
    "zero3": (2, ["engine.kind=deepspeed", "engine.zero_stage=3"]),
}
COMMON = (
    "data.video_tokens=1600",
    "data.max_frames=50",
    "batch_size=2",
    "optim.lr=1e-6",
    "steps=2",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_near_the_measured_peak(case: str, folder: Path) -> None:
    ranks, keys = CASES[case]
    usual = ("model.dtype=float32", "sample.max_completion_length=8")
    keys = [*COMMON, *(k for k in usual if k.split("=")[0] not in " ".join(keys)), *keys]
    process = torchrun(ranks, WORKER, str(folder), *keys)
    assert process.returncode == 0, process.stderr[-2000:]
    tokens, measured = next(ln for ln in process.stdout.splitlines() if ln[:1].isdigit()).split()
    names = [f"model.{name}={folder / name}" for name in ("student", "teacher")]
    config = load_config([*names, *keys])
    shapes = Shapes.of(config, getattr(torch, config.model.dtype), "cpu")
    shapes = replace(shapes, tokens=int(tokens))
    plan = shapes.plan(ranks, config.prefix.recompute, "replica")
    assert 0.95 <= plan.total / int(measured) <= 1.15


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
    places = torch.zeros(prompts, dtype=torch.long, device=meta)
    path = Paths(tokens, tokens, ((tokens, tokens),))
    prefix = Prefix(keys, keys, mask, hidden, places, paths=(path,) * prompts)
    ids = torch.zeros(prompts, rollouts, length, dtype=torch.long, device=meta)
    with Live(lm.model.parameters(), "cuda"):
        hidden = extend(lm, prefix, ids)
    assert hidden.shape == (prompts, rollouts, length, config.hidden_size)
    assert lm.head(hidden).shape == (prompts, rollouts, length, config.vocab_size)
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 devices of 80 GiB, engine deepspeed, ZeRO stage 3, bfloat16"
    assert lines[2] == "student: 8.77B weights (0.58B vision, 8.19B trained)"
    assert lines[-1].endswith("teacher.placement=shard sample.together=2: fits")
    with pytest.raises(SystemExit) as ended:
        main([*models, *keys, "prefix.recompute=auto", "--ranks=8", "--memory-gib=80"])
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out.splitlines()[-1].startswith("prefix.recompute=all teacher.placement=offload")
    assert "GiB needed, 80.0 on each device: try prefix.recompute=auto, more ranks" in out.err


def test_auto_prints_its_choice_and_reports_what_cannot_fit(
    published: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"model.student={published['Qwen/Qwen3-VL-2B-Instruct']}"
    keys = [model, "method=sft", "data.video_tokens=64", "data.max_frames=16", "batch_size=1"]
    config, cpu = load_config([*keys, "prefix.recompute=auto"]), torch.device("cpu")
    monkeypatch.setattr("opd.planning.auto.capacity_of", lambda _: 80 * GIB)
    chosen = resolve_auto(config, cpu)
    assert (chosen.prefix.recompute, chosen.teacher.placement) == ("none", "replica")
    assert (chosen.model.attention, chosen.model.dtype) == ("sdpa", "float32")
    message = capsys.readouterr().err
    assert message.startswith("auto: ") and "recompute: none" in message
    assert message.endswith(" of 80.0 GiB planned for each device)\n")
    monkeypatch.setattr("opd.planning.auto.capacity_of", lambda _: 20 * GIB)
    with pytest.raises(ConfigError, match=r"^3\d\.\d GiB needed, 20.0 on each device: try "):
        resolve_auto(config, cpu)


@pytest.mark.slow
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


# Reasons by which a recipe does not fit; whoever removes the reason removes the entry.
TOO_LARGE = {
    "grpo_32b.yaml": "every weight's bf16 gradient waits for the prompts' backward: 60 GiB",
}


QUICK = ("video_opd_8b.yaml", "opd_qwen2_5_3b.yaml")  # not slow


def recipe(path: Path) -> Any:
    reason = TOO_LARGE.get(path.name)
    marks = [] if path.name in QUICK else [pytest.mark.slow]
    if reason:
        marks.append(pytest.mark.xfail(reason=reason, raises=SystemExit, strict=True))
    return pytest.param(path, id=path.name, marks=marks)


@pytest.mark.parametrize("path", [recipe(path) for path in REAL])
def test_shipped_recipes_fit_the_devices_that_they_name(
    path: Path, published: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, gib = re.search(r"# Devices: (\d+) x (\d+) GiB", path.read_text()).groups()  # type: ignore[union-attr]
    folders = published | {"runs/grpo_32b/student": published["Qwen/Qwen3-VL-32B-Instruct"]}
    config = load_config([str(path)])
    keys = [f"model.student={folders[config.model.student]}"]
    if config.method == "opd":
        keys.append(f"model.teacher={folders[config.model.teacher]}")
    main([str(path), *keys, f"--ranks={ranks}", f"--memory-gib={gib}"])
    assert capsys.readouterr().out.endswith(": fits\n")
    assert config.batch_size % int(ranks) == 0
    assert config.sample.max_completion_length >= 32 and config.template.video_first


def test_there_is_a_recipe_for_each_run_that_the_papers_made() -> None:
    assert len(REAL) == 8

"""What the tests of the step share: synthetic prompts, fp64 models, the stock forward as truth."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.config.method import SampleConfig
from opd.config.run import load_config
from opd.data.batch import Prompt, PromptBatch, collate
from opd.data.examples import Example
from opd.generation.extend import extend
from opd.generation.policy import Policy
from opd.generation.prefix import Prefix, prefill
from opd.method.objectives import OBJECTIVES, Loss, Targets
from opd.method.teacher import Teacher
from opd.models import tiny
from opd.models.load import prepare
from opd.models.video_lm import VideoLM
from opd.train import train

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
PAD = tiny.tokenizer().pad_token_id
END = tiny.tokenizer().eos_token_id
Completions = tuple[Tensor, Tensor]  # ids and mask, [B, R, T]


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Parameters of a test, all but the first `count` of which are marked slow."""
    slow = pytest.mark.slow
    return [
        value if number < count else pytest.param(*_arguments(value), marks=slow)
        for number, value in enumerate(values)
    ]


def _arguments(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def build(size: str, family: str = "qwen3_vl", *, seed: int = 0, layers: int | None = None) -> Any:
    """A random stock model in fp64, loud enough for a mistake to show.

    Attention is not flat, gains and biases are not all one or zero, and logits have a standard
    deviation of about 3.
    """
    model = tiny.build(size, seed, family).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
            else:
                std = 3 / parameter.shape[1] ** 0.5 if name == "lm_head.weight" else 0.08
                parameter.mul_(std / parameter.std())
    if layers is not None:
        model.model.language_model.layers = model.model.language_model.layers[:layers]
    return model


def ours(size: str, family: str = "qwen3_vl", *, trainable: str = "language", **options) -> VideoLM:
    """`build`, with this project's attention and head."""
    lm = prepare(build(size, family, **options))
    lm.train_only(trainable)
    return lm


def stock(size: str, family: str = "qwen3_vl", *, trainable: str = "language", **options) -> Any:
    """The same weights in an untouched transformers model with sdpa attention."""
    model = build(size, family, **options)
    model.set_attn_implementation("sdpa")
    VideoLM(model).train_only(trainable)
    return model


def policy_of(lm: VideoLM, temperature: float = 1.0) -> Policy:
    return Policy.of(lm, tiny.tokenizer(), SampleConfig(temperature=temperature))


def make_prompt(
    lm: VideoLM,
    name: str,
    *,
    pairs: int = 2,
    rows: int = 2,
    columns: int = 2,
    text: int = 5,
    seconds_per_pair: float = 0.7,
) -> Prompt:
    """A prompt laid out as its family's processor does; words and pixels follow from `name`.

    `rows` and `columns` count vision tokens; Qwen3-VL writes a time stamp before each frame pair.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config = lm.model.config

    def words(count: int) -> list[int]:
        return torch.randint(300, (count,), generator=generator).tolist()

    def segment(count: int) -> list[int]:
        start, end = config.vision_start_token_id, config.vision_end_token_id
        return [start, *[config.video_token_id] * count, end]

    ids = words(text)
    if lm.family == "qwen3_vl":
        for _ in range(pairs):
            ids += words(3) + segment(rows * columns)
    else:
        ids += segment(pairs * rows * columns)
    ids = torch.tensor(ids + words(text))
    vision = config.vision_config
    grid = (pairs, rows * vision.spatial_merge_size, columns * vision.spatial_merge_size)
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    positions, next_position = lm.positions(ids, grid, seconds_per_pair)
    return Prompt(
        example=Example(id=name, video=Path("none.mp4"), query="q", spans=(), duration_s=None),
        input_ids=ids,
        position_ids=positions,
        next_position=next_position,
        pixel_values=torch.randn(
            pairs * grid[1] * grid[2], patch, generator=generator, dtype=torch.float64
        ),
        grid_thw=grid,
        frame_indices=tuple(range(2 * pairs)),
        timestamps_s=tuple(seconds_per_pair * i for i in range(pairs)),
        completion_ids=torch.tensor([*words(4), END]),
    )


def queries_about(lm: VideoLM, name: str, lengths: Sequence[int], **shape: Any) -> list[Prompt]:
    """Prompts about one video that differ in what follows it: `lengths` tokens each. Further
    options are those of `make_prompt`."""
    first = make_prompt(lm, name, **shape)
    shared = int((first.input_ids == lm.model.config.vision_end_token_id).nonzero()[-1]) + 1
    seconds_per_pair = shape.get("seconds_per_pair", 0.7)
    prompts = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * ord(name[0]) + number)
        own = torch.randint(300, (length,), generator=generator)
        own[0] = number  # so that no further token is shared
        ids = torch.cat([first.input_ids[:shared], own])
        positions, next_position = lm.positions(ids, first.grid_thw, seconds_per_pair)
        example = replace(first.example, id=f"{name}{number}", video=Path(f"{name}.mp4"))
        changes = {"input_ids": ids, "position_ids": positions, "next_position": next_position}
        prompts.append(replace(first, example=example, **changes))
    return prompts


def unequal_prompts(lm: VideoLM) -> list[Prompt]:
    """Three prompts of different lengths, frame counts and frame sizes."""
    return [
        make_prompt(lm, "a", pairs=3, text=4),
        make_prompt(lm, "b", pairs=2, text=7, rows=3, columns=1),
        make_prompt(lm, "c", pairs=2, text=2),
    ]


def grouped(lm: VideoLM, prompts: Sequence[Prompt], size: int | None = None) -> PromptBatch:
    """Collate with at most `size` queries about a video in a group."""
    token = lm.model.config.video_token_id
    return collate(prompts, PAD, queries_per_video=size, video_token_id=token)


def batch_of(prompts: Sequence[Prompt], extra_padding: int = 0) -> PromptBatch:
    """Collate; `extra_padding` more columns on the left of every prompt."""
    if not extra_padding:
        return collate(prompts, PAD)
    longest = max(prompts, key=lambda p: len(p.input_ids))
    wide = torch.cat([longest.input_ids, torch.zeros(extra_padding, dtype=torch.long)])
    positions = torch.cat([longest.position_ids, longest.position_ids[:, :extra_padding]], 1)
    filler = Prompt(**(vars(longest) | {"input_ids": wide, "position_ids": positions}))
    batch = collate([*prompts, filler], PAD)
    videos = sum(len(p.pixel_values) for p in prompts)
    count = len(prompts)
    return PromptBatch(
        groups=batch.groups[:count],
        input_ids=batch.input_ids[:count],
        mask=batch.mask[:count],
        position_ids=batch.position_ids[:, :count],
        next_position=batch.next_position[:count],
        pixel_values=batch.pixel_values[:videos],
        video_grid_thw=batch.video_grid_thw[:count],
    )


def prefill_of(lm: VideoLM, batch: PromptBatch, recompute: str = "none") -> Prefix:
    return Prefix.join(
        [
            prefill(lm, part, lm.encode_video(part.pixel_values, part.video_grid_thw), recompute)
            for part in batch.parts()
        ]
    )


def kept_bytes(lm: VideoLM, batch: PromptBatch, recompute: str) -> int:
    """Bytes that autograd keeps of a real forward, with its keys and values, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        prefix = prefill_of(lm, batch, recompute)
    for tensor in (*prefix.keys, *prefix.values):
        keep(tensor)
    return sum(storage.nbytes() for storage in storages.values())


def random_completions(batch: int, rollouts: int, length: int = 5) -> Completions:
    """Completions of unequal lengths, right-padded."""
    generator = torch.Generator().manual_seed(batch * 100 + rollouts)
    ids = torch.randint(300, (batch, rollouts, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, rollouts), generator=generator)
    lengths[0, 0] = length
    mask = torch.arange(length) < lengths[..., None]
    return ids.masked_fill(~mask, PAD), mask


def single_pass(
    lm: VideoLM,
    teacher: Teacher | None,
    batch: PromptBatch,
    completions: Completions,
    policy: Policy,
    objective: str = "reverse_kl",
    recompute: str = "none",
) -> Loss:
    """The step's forward on given completions: each prompt once, then only the completions."""
    ids, mask = completions
    teacher_hidden = teacher_lm_head = None
    if teacher is not None:
        teacher_hidden = teacher.extend(teacher.prefill(batch), ids)[mask]
        teacher_lm_head = teacher.lm.head.weight
    student_hidden = extend(lm, prefill_of(lm, batch, recompute), ids)[mask]
    targets = Targets(ids[mask], policy, teacher_hidden, teacher_lm_head)
    return lm.head(student_hidden, loss=partial(OBJECTIVES[objective], targets))


def stock_hidden(model: Any, prompt: Prompt, completion: Tensor) -> Tensor:
    """`[T, H]`: the stock model's hidden states that predict each completion token, one unpadded
    sequence."""
    steps = len(completion) - 1
    ids = torch.cat([prompt.input_ids, completion[:-1]])
    after = prompt.next_position + torch.arange(steps)
    out = model.model(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        position_ids=torch.cat([prompt.position_ids, after.expand(3, -1)], 1)[:, None],
        pixel_values_videos=prompt.pixel_values,
        video_grid_thw=torch.tensor([prompt.grid_thw]),
        use_cache=False,
    )
    return out.last_hidden_state[0, len(prompt.input_ids) - 1 :]


def dense_log_probs(hidden: Tensor, lm_head: Tensor, policy: Policy) -> Tensor:
    """Log-probabilities of the allowed columns only, by definition."""
    return (hidden @ lm_head[policy.allowed_columns].t() / policy.temperature).log_softmax(-1)


def stock_loss(
    model: Any,
    teacher: Any,
    prompts: Sequence[Prompt],
    completions: Completions,
    policy: Policy,
    objective: str = "reverse_kl",
) -> Tensor:
    """The loss by definition: a plain full-sequence forward of every rollout by stock models."""
    columns = policy.allowed_columns.long().cumsum(0) - 1
    total = torch.zeros((), dtype=torch.float64)
    for prompt, rows, masks in zip(prompts, *completions, strict=True):
        for row, valid in zip(rows, masks, strict=True):
            completion = row[valid]
            log_p = dense_log_probs(
                stock_hidden(model, prompt, completion), model.lm_head.weight, policy
            )
            chosen = log_p.gather(-1, columns[completion][:, None])[:, 0]
            if objective == "sft":
                total = total - chosen.sum()
                continue
            with torch.no_grad():
                hidden = stock_hidden(teacher, prompt, completion)
                log_q = dense_log_probs(hidden, teacher.lm_head.weight, policy)
            if objective == "reverse_kl":
                total = total + (log_p.exp() * (log_p - log_q)).sum()
            else:
                advantage = log_q.gather(-1, columns[completion][:, None])[:, 0] - chosen.detach()
                total = total - ((chosen - chosen.detach()).exp() * advantage).sum()
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    """Copies of every gradient there is, by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Value and fresh gradients of a loss."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return float(value.detach()), gradients(model)


@dataclass(frozen=True)
class Gap:
    """Largest relative difference of two results: of the losses, and of any gradient."""

    loss: float
    gradient: float
    worst: str


def gap(actual: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> Gap:
    """Compare losses and every gradient; both have the same ones, and none is all zero."""
    assert actual[1].keys() == expected[1].keys()
    sizes = {
        n: (g - expected[1][n]).abs().max() / expected[1][n].abs().max()
        for n, g in actual[1].items()
    }
    assert all(size.isfinite() for size in sizes.values()), sizes
    worst = max(sizes, key=lambda name: float(sizes[name]))
    return Gap(abs(actual[0] - expected[0]) / abs(expected[0]), float(sizes[worst]), worst)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest entry."""
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def run(videos: Path, run_dir: Path, *arguments: str) -> dict[str, Any]:
    """A whole run on the embedded task, on one thread; its summary."""
    threads = torch.get_num_threads()
    places = [f"data.video_root={videos}", f"run_dir={run_dir}", "threads=1"]
    try:
        return train(load_config([*places, *arguments]))
    finally:
        torch.set_num_threads(threads)


def metric_rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a run's file, without what is a time."""
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_s", "seconds")} for row in rows]

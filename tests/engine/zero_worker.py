"""Worker of `tests/engine/test_zero.py`: `torchrun zero_worker.py OUT CASE ...` runs steps of many
configurations on all ranks and writes the results to the folder OUT."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd import distributed
from opd.config.run import Config, load_config
from opd.data.batch import Prompt, collate
from opd.data.examples import Example
from opd.data.schedule import micro_batches
from opd.distributed import set_up
from opd.generation.decoder import GROWTH
from opd.generation.recorded import RECORDERS
from opd.generation.sampling import Rollouts
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.models.load import prepare
from opd.models.sharded import load_frozen
from opd.models.video_lm import VideoLM
from tests.fake import record
from tests.helpers import PAD, build, grouped, make_prompt, policy_of, queries_about

PROMPTS = 6
COMMON = (
    f"batch_size={PROMPTS}",
    "num_rollouts=2",
    "steps=4",
    "model.dtype=float32",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "optim.warmup=0",
    "optim.weight_decay=0.1",
    "sample.max_completion_length=5",
    "engine.persistence_threshold=0",
)
VIDEO_FIRST = ("data.prompt={video}{query}",)
SEPARATE = ("data.queries_per_video=1",)
ROUTED = ("curriculum.routing=on", "curriculum.route_below=0.5")
CASES: dict[str, tuple[str, ...]] = {  # name: keys beside those of the engine
    "plain": (),
    "accumulated": ("micro_batch_size=1",),
    "together": ("micro_batch_size=1", "sample.together=2"),
    "together_routed": ("micro_batch_size=1", "sample.together=3", *ROUTED),
    "by_token": ("normalize=token", "micro_batch_size=1"),
    "tied": (),
    "sampled": ("objective=sampled",),
    "recomputed": ("prefix.recompute=all",),
    "routed": ROUTED,
    "nothing_routed": ROUTED,
    "grpo": ("method=grpo", "micro_batch_size=1"),
    "sft": ("method=sft", "num_rollouts=1"),
    "lora": ("model.lora_rank=2",),
    "layer_by_layer": ("engine.gather=false",),
    "frozen_head": (),
    "offloaded": ("engine.offload=true",),
    "no_number": (),
    "bf16": ("model.dtype=bfloat16", "normalize=token", "micro_batch_size=1", "optim.lr=1e-5"),
    "teacher_replica": ROUTED,
    "teacher_shard": (*ROUTED, "teacher.placement=shard"),
    "teacher_offload": (*ROUTED, "teacher.placement=offload"),
    "interrupted": (),
    "persistent": ("engine.persistence_threshold=1000",),  # norms and adapters stay whole
    "separate": (*VIDEO_FIRST, *SEPARATE),
    "grouped": (*VIDEO_FIRST, "data.queries_per_video=3"),
    "separate_routed": (*VIDEO_FIRST, *SEPARATE, *ROUTED),
    "grouped_routed": (*VIDEO_FIRST, *ROUTED, "data.queries_per_video=3"),
    "gathers": ("engine.gather=false", "teacher.placement=shard"),
    "gathers_recomputed": ("engine.gather=false", "prefix.recompute=all"),
}
WATCHED = ("prefill", "teacher", "extend", "backward")  # phases in which layers are gathered


def model(size: str, seed: int, tied: bool = False, layers: int = 2) -> VideoLM:
    built = build(size, seed=seed, layers=layers).to(torch.float32)
    if tied:
        built.lm_head.weight = built.model.language_model.embed_tokens.weight
        built.config.tie_word_embeddings = built.config.text_config.tie_word_embeddings = True
    return prepare(built)


class Watched(Trainer):
    """Trainer that records rollouts by step and prompt."""

    seen: dict[str, list[list[int]]]

    def rollouts(self, batches: Any, prefix: Any, step: int) -> list[Rollouts]:
        every = super().rollouts(batches, prefix, step)
        for batch, rollouts in zip(batches, every, strict=True):
            for row, example in enumerate(batch.examples):
                ids, masks = rollouts.completion_ids[row], rollouts.completion_mask[row]
                answers = [i[m].tolist() for i, m in zip(ids, masks, strict=True)]
                self.seen[f"{step}/{example.id}"] = answers
        return every


def grades(case: str) -> Any:
    """Replacement for `grade` with rewards 0 or 1: one answer to a and one to d is wrong.

    So some of two or three ranks have nothing to learn from; in case `nothing_routed`, all.
    """

    def grade(rollouts: Rollouts, examples: list[Example], *_: Any) -> Rollouts:
        rewards = torch.ones(rollouts.truncated.shape)
        for row, example in enumerate(examples):
            if case != "nothing_routed" and example.id in "ad":
                rewards[row, 0] = 0.0
        return replace(rollouts, rewards=rewards)

    return grade


def carry_out(
    case: str, config: Config, save: Path | None = None, load: Path | None = None
) -> dict[str, Any]:
    """Run two steps and return what the test compares; `save` the state after the first, or `load`
    it in place of the first."""
    torch.manual_seed(0)
    layers = 6 if case.startswith("gathers") else 2
    student, teacher = model("student", 1, case == "tied", layers), model("teacher", 2)
    if config.teacher.placement != "auto" or case == "teacher_replica":
        where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        teacher = load_frozen("embedded:teacher", config, **where)
    if case == "bf16":
        student.model.to(torch.bfloat16), teacher.model.to(torch.bfloat16)
    # A third of all tokens end an answer: lengths differ.
    policy = replace(policy_of(student), eos_token_ids=tuple(range(0, 384, 3)))
    train_only = VideoLM.train_only

    def frozen(self: VideoLM, trainable: str) -> None:
        train_only(self, trainable)
        self.head.requires_grad_(case != "frozen_head")

    with mock.patch.object(VideoLM, "train_only", frozen):
        trainer = Watched(
            config,
            SimpleNamespace(tokenizer=tiny.tokenizer()),
            student,
            Teacher(teacher) if config.method == "opd" else None,
            policy,
        )
    trainer.seen = {}
    incoming, whole_after_backward = watch_backward(trainer)
    prompts = [make_prompt(student, name, pairs=1 + i % 3) for i, name in enumerate("abcdef")]
    if case.startswith(("separate", "grouped")):
        prompts = prompts_of_videos(student)
    prompts = [replace(p, pixel_values=p.pixel_values.float()) for p in prompts]
    if case == "no_number":
        prompts[1].pixel_values[0] = torch.nan  # on one rank only
    if case == "interrupted":
        interrupt(trainer, [prompts[i] for i in micro_batches(config)[0]])
    before, rows, gathers = weights_of(trainer), [], Gathers(trainer)
    watched = gathers.watch() if case.startswith("gathers") else nullcontext()
    with mock.patch("opd.method.advantages.grade", grades(case)), watched:
        for step in range(2):
            if load is not None and step == 0:
                trainer.load(load)
                continue
            batches = [
                grouped(
                    student,
                    sorted([prompts[i] for i in places], key=lambda p: p.example.video),
                    config.data.group_size,
                )
                for places in micro_batches(config)
            ]
            rows.append(trainer.step(batches, step))
            if save is not None and step == 0:
                save.mkdir(exist_ok=True)
                trainer.save(save)
    kept = ("loss", "grad_norm", "lr", "kl", "completion_length", "trained_share", "skipped")
    return {
        "rows": [{name: row[name] for name in kept} for row in rows],
        "rollouts": distributed.gather_dict(trainer.seen),
        "before": before,
        "weights": weights_of(trainer),
        "moments": len(trainer.engine.optimizer.state),
        "flops": sum(trainer.ledger.flops.values()),
        "prompt_tokens": trainer.counter.totals()["prompt"],
        "device_s": sum(trainer.ledger.everywhere().values()),
        "tokens": trainer.ledger.tokens,
        "incoming": sorted(set(incoming)),
        "whole_after_backward": max(whole_after_backward, default=0),
        "gathers": gathers.of_layers,
        "overlapping": gathers.overlapping,
        "most_layers": gathers.most_layers,
    }


def prompts_of_videos(lm: VideoLM) -> list[Prompt]:
    """Prompts a to f about three videos. Of two ranks one has two groups, the other has one."""
    prompts = {}
    for video, names in {"u": "ac", "v": "e", "w": "bdf"}.items():
        about = queries_about(lm, video, (5, 3, 7)[: len(names)])
        for name, prompt in zip(names, about, strict=True):
            prompts[name] = replace(prompt, example=replace(prompt.example, id=name))
    return [prompts[name] for name in sorted(prompts)]


class Gathers:
    """Records the gathers of whole decoder layers by phase.

    A gather overlaps with computation if matrix products run between its start and its wait.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.of_layers = dict.fromkeys(WATCHED, 0)
        self.overlapping = dict.fromkeys(WATCHED, 0)
        self.most_layers = dict.fromkeys(WATCHED, 0.0)  # gathered or in flight at once
        self._trainer, self._phase, self._products = trainer, "", 0
        teacher = trainer.teacher
        self._models = {name: trainer.student for name in WATCHED}
        self._models["teacher"] = trainer.student if teacher is None else teacher.lm

    @contextmanager
    def watch(self) -> Iterator[None]:
        from deepspeed.runtime.zero import partition_parameters as deepspeed

        watch, gather, phase = self, deepspeed._dist_allgather_fn, self._trainer.ledger.phase

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                products = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm
                watch._products += func.overloadpacket in products
                return func(*args, **(kwargs or {}))

        class Handle:
            def __init__(self, handle: Any, elements: int) -> None:
                self.handle, self.start = handle, watch._products
                self.is_layer = elements == watch._layer_elements()
                watch._count_whole_layers()
                if watch._phase in WATCHED:
                    watch.of_layers[watch._phase] += self.is_layer

            def wait(self) -> None:
                if watch._phase in WATCHED and self.is_layer:
                    watch.overlapping[watch._phase] += watch._products > self.start
                self.handle.wait()
                watch._count_whole_layers()

        def watched_gather(source: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Handle:
            return Handle(gather(source, whole, group), whole.numel())

        @contextmanager
        def watched_phase(name: str) -> Iterator[None]:
            self._phase = name
            with phase(name):
                yield
            self._phase = ""

        ledger = self._trainer.ledger
        with (
            mock.patch.object(deepspeed, "_dist_allgather_fn", watched_gather),
            mock.patch.object(ledger, "phase", watched_phase),
            Products(),
        ):
            yield

    def _layer_elements(self) -> int:
        """Number of one decoder layer's gathered weights, padding included."""
        if self._phase not in WATCHED:
            return -1
        (layer, *_) = self._models[self._phase].language_model.layers
        return sum(p.ds_tensor.ds_numel for p in layer.parameters()) * distributed.world_size()

    def _count_whole_layers(self) -> None:
        if self._phase in WATCHED:
            layers = self._models[self._phase].language_model.layers
            weights = list(layers.parameters())
            here = sum(w.ds_numel for w in weights if w.ds_status.name != "NOT_AVAILABLE")
            share = here * len(layers) / sum(w.ds_numel for w in weights)
            self.most_layers[self._phase] = max(self.most_layers[self._phase], share)


def watch_backward(trainer: Trainer) -> tuple[list[float], list[int]]:
    """Two lists that each backward extends: the gradient that the micro-batch's loss receives, and
    the number of layer weights that are gathered or in flight afterwards."""
    gradients: list[float] = []
    whole: list[int] = []
    backward = trainer.engine.backward
    weights: list[Any] = list(trainer.student.language_model.layers.parameters())

    def watched(loss: torch.Tensor) -> None:
        loss.register_hook(lambda gradient: gradients.append(float(gradient)))
        backward(loss)
        if trainer.student.sharded:
            whole.append(sum(weight.ds_status.name != "NOT_AVAILABLE" for weight in weights))

    trainer.engine.backward = watched  # type: ignore[method-assign]
    return gradients, whole


def interrupt(trainer: Trainer, prompts: list[Prompt]) -> None:
    """Interrupt a step by an exception while one layer is gathered and another in flight."""

    def fail(*_: Any) -> None:
        raise InterruptedError

    hook = trainer.student.language_model.layers[0].mlp.register_forward_pre_hook(fail)
    with suppress(InterruptedError):
        trainer.micro_steps([collate(prompts, PAD)], 0)
    hook.remove()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights as in a checkpoint; on the first rank."""
    return {name: weight.clone() for name, weight in trainer.engine.weights().items()}


@contextmanager
def without_prefetching() -> Iterator[None]:
    """Leave every gather of student and sharded teacher to DeepSpeed."""
    with mock.patch("opd.engine.zero.LayersAhead"), mock.patch("opd.models.sharded.LayersAhead"):
        yield


@contextmanager
def recorded_steps() -> Iterator[None]:
    """Decode in steps of one shape, with the stand-in for CUDA graphs."""
    graphs = mock.Mock(wraps=record)
    with mock.patch.dict(RECORDERS, cpu=graphs), mock.patch.dict(GROWTH, cpu=256):
        yield
    assert graphs.called


def main(out: str, cases: list[str]) -> None:
    """Run cases, each written as name:stage, name:stage>STATE to save the state after the first
    step in a folder of this name, or name:stage<STATE to load it in place of the first step.

    Stage `blocking` is ZeRO-3 without prefetching; in stage `late` a layer's gather starts after
    the layer before, as for weights copied from CPU memory to a GPU. In stage `recorded` decode
    steps are recorded and replayed, as on a GPU.
    """
    variants = {
        "blocking": without_prefetching,
        "recorded": recorded_steps,
        "late": partial(mock.patch, "opd.models.prefetch._copied_from_cpu", return_value=True),
    }
    set_up(1, 0)
    distributed.start(alone_too=True)
    for case in cases:
        name, stage, save, load = re.fullmatch(r"(\w+):(\w+)(?:>(\w+))?(?:<(\w+))?", case).groups()
        number = 3 if stage in variants else int(stage)
        engine = ["engine.kind=deepspeed", f"engine.zero_stage={number}"] if number else []
        config = load_config([*COMMON, *CASES[name], *engine])
        with variants.get(stage, nullcontext)():
            folders = (None if state is None else Path(out) / state for state in (save, load))
            outcome = carry_out(name, config, *folders)
        if distributed.is_first():
            ranks = distributed.world_size()
            origin = "" if load is None else f"_{load}"
            torch.save(outcome, Path(out) / f"{ranks}_{name}_{stage}{origin}.pt")
            print(case, outcome["rows"][0], flush=True)
    distributed.leave_at_exit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

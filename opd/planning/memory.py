"""What a run will need in memory on each device, from shapes alone, and what `auto` chooses.

A plan has what is held throughout a step, and what is alive beside it in each moment of the step.
The moment with the most decides: the others' needs never coincide with it, and are not added.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from opd import distributed
from opd.config.run import Config
from opd.engine.zero import BUCKET
from opd.errors import ConfigError
from opd.models.lora import add_lora
from opd.models.video_lm import VideoLM
from opd.planning.shapes import (
    Size,
    Work,
    on_meta,
    pixel_bytes,
    size_of,
    student_step,
    teacher_step,
)

TEXT = 64  # tokens of template and query, about
STAMP = 10  # tokens around each frame pair of Qwen3-VL: its time and its marks
FRAME_TOKENS = 768  # of a frame pair at most, in the processors' own budget
UNKNOWN = 1.05  # allocator's rounding, the libraries' own buffers
USABLE = 0.9  # of a device: what a plan may be wrong by, and the driver's own
CONTEXT_BYTES = 2**29 + 2**25  # about: a CUDA context with its kernels, cuBLAS's workspace
# About: up to 32 channels of a ring and a tree, some 6 MiB for each neighbour in each of them.
NCCL_BYTES = 2**30
PLACEMENTS = ("replica", "shard", "offload")  # of the teacher, the fastest first
SUB_GROUP = 1_000_000_000  # weights that ZeRO-3 updates at once, DeepSpeed's default


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


@dataclass(frozen=True)
class Plan:
    """Bytes on each device by what holds them, and what was chosen.

    `held` is there throughout a step; `moments` has what is alive beside it, moment by moment.
    """

    held: dict[str, int]
    moments: dict[str, dict[str, int]]
    recompute: str
    placement: str
    cpu: int = 0  # in the machine's memory, for each device
    sizes: dict[str, Size] = field(default_factory=dict)

    def total_at(self, moment: str) -> int:
        """What a device holds then, with something for what nobody knows."""
        both = sum(self.held.values()) + sum(self.moments[moment].values())
        return int(UNKNOWN * both)

    @property
    def peak(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=self.total_at)

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the peak."""
        return self.held | self.moments[self.peak]

    @property
    def total(self) -> int:
        return self.total_at(self.peak)


@dataclass(frozen=True)
class Shapes:
    """A run's models on the meta device, and the prompts that the plan is for."""

    config: Config
    dtype: torch.dtype
    student: VideoLM
    teacher: VideoLM | None
    tokens: int
    video_tokens: int
    device_type: str
    # Steps that were gone through, by what was asked of them.
    _steps: dict[object, dict] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype, device_type: str | None = None) -> "Shapes":
        """For the longest prompt that the configuration allows. Without a `device_type` fp32 is
        planned for a CPU where there is no GPU, and everything else for a GPU."""
        student, model, teacher = on_meta(config.model.student, dtype), config.model, None
        student.train_only(model.trainable)
        if model.lora_rank is not None:
            add_lora(student, model.lora_rank, model.lora_alpha)
        if config.method == "opd":
            teacher = on_meta(model.teacher, dtype)
        elif config.method == "grpo" and config.grpo.kl_coef:
            teacher = on_meta(model.student, dtype)
        video = config.data.video_tokens or FRAME_TOKENS * config.data.max_frames // 2
        stamps = STAMP * config.data.max_frames // 2 if student.family == "qwen3_vl" else 0
        gpu = torch.cuda.is_available() or dtype != torch.float32
        device_type = device_type or ("cuda" if gpu else "cpu")
        return cls(config, dtype, student, teacher, video + stamps + TEXT, video, device_type)

    def prompts(self, ranks: int) -> int:
        """In a micro-batch."""
        return self.config.micro_batch_size or max(1, self.config.batch_size // ranks)

    def work(self, ranks: int) -> Work:
        """What a rank does in a micro-batch."""
        config, prompts = self.config, self.prompts(ranks)
        whole = prompts, self.tokens, self.video_tokens, config.batch_size // ranks > prompts
        return Work.of(config, self.device_type, _bytes(self.dtype) >= 4, *whole)

    def plan(self, ranks: int, recompute: str, placement: str) -> Plan:
        """Of one choice."""
        each, student = _bytes(self.dtype), self.student
        size, engine, work = size_of(student), self.config.engine, self.work(ranks)
        stage, cpu, gpu = engine.zero_stage, 0, self.device_type == "cuda"
        weights, gradients, states = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks)}.get(
            stage, (ranks,) * 3
        )
        own_masters = each >= 4 and stage == 0  # fp32 weights of plain torch
        optimizer = (12 - 4 * own_masters) * size.trained // states
        shard = 4 * size.trained // gradients  # fp32 gradients
        moments = {name: dict(parts) for name, parts in self._student_step(work, recompute).items()}
        moments["optimizer"] = {}
        held = {"student's weights": each * size.total // weights}
        if engine.offload:
            cpu += optimizer + 2 * shard  # gradients, and a flat copy of them
        else:
            held["optimizer's states, fp32 weights"] = optimizer
            moments["optimizer"]["AdamW's temporaries"] = self._temporaries(work, shard)
            if stage == 3 or work.several:
                held["gradients (fp32)"] = shard
            else:
                moments["optimizer"]["gradients (fp32)"] = shard
                if stage:
                    moments["backward"]["gradients (fp32)"] = shard
        if stage:
            bucket = each * (BUCKET if gpu else min(BUCKET, size.trained))
            moments["backward"]["reduction buffers"] = bucket
            if stage == 3:
                held["reduction buffer"] = bucket
        if stage == 3:
            few = each * (2 * size.layer + student.head.weight.numel())
            for name in moments.keys() - {"optimizer", "teacher"}:
                whole = name == "sample" and engine.gather
                moments[name]["gathered weights"] = each * size.total if whole else few
        if gpu:
            held["CUDA's context, cuBLAS's workspace"] = CONTEXT_BYTES
            held["NCCL's buffers"] = NCCL_BYTES if ranks > 1 else 0
        else:  # frames are where everything is: those of a step, and parts of a micro-batch
            frames = max(1, self.config.batch_size // ranks) + work.prompts
            held["pixels of a step"] = frames * pixel_bytes(student, self.video_tokens)
        sizes = {"student": size}
        if self.teacher is not None:
            cpu += self._add_teacher(ranks, placement, work, held, moments)
            sizes["teacher"] = size_of(self.teacher)
        else:
            del moments["teacher"]
        return Plan(held, moments, recompute, placement, cpu, sizes)

    def _student_step(self, work: Work, recompute: str) -> dict[str, dict[str, int]]:
        key = work, recompute
        if key not in self._steps:
            self._steps[key] = student_step(self.student, work, recompute)
        return self._steps[key]

    def _temporaries(self, work: Work, shard: int) -> int:
        """Of AdamW's update, which makes a root of every second moment at once; and of DeepSpeed's
        copies of the gradients, in what stage 3 updates at once."""
        stage = self.config.engine.zero_stage
        if stage == 3:  # a flat copy, and the roots
            return 2 * min(shard, 4 * SUB_GROUP)
        # Before the last micro-batch's gradients are added to those of the others they are there
        # once in the model's dtype and once in fp32.
        several = stage > 0 and work.several
        return shard + shard * _bytes(self.dtype) // 4 * several

    def _add_teacher(
        self,
        ranks: int,
        placement: str,
        work: Work,
        held: dict[str, int],
        moments: dict[str, dict[str, int]],
    ) -> int:
        """Put the teacher's parts into a plan; returns bytes in the machine's memory."""
        assert self.teacher is not None
        each, size, head = _bytes(self.dtype), size_of(self.teacher), self.teacher.head.weight
        if "teacher" not in self._steps:
            self._steps["teacher"] = {}
        if work not in self._steps["teacher"]:
            self._steps["teacher"][work] = teacher_step(self.teacher, work)
        for name, number in self._steps["teacher"][work].items():
            moments["teacher"][f"teacher: {name}"] = number
        hidden = each * work.completion_tokens * head.shape[1]
        for name in ("extend", "loss", "backward"):
            moments[name]["teacher's hidden states"] = hidden
        whole = {"replica": size.total, "shard": size.total // ranks, "offload": 0}[placement]
        held["teacher's weights"] = each * whole
        if placement == "replica":
            return 0
        held["teacher's head"] = each * head.numel()  # stays whole
        moments["teacher"]["teacher: gathered layers"] = each * 2 * size.layer  # a layer ahead
        return each * size.total // ranks if placement == "offload" else 0

    def stages(self, ranks: int, capacity: int) -> dict[int, tuple[Plan, Plan]]:
        """Of each engine (0 is plain torch) with this number of ranks: what `best` chooses, and a
        plan that can be compared with the others': all layers recomputed, and the teacher where the
        most demanding stage that fits needs it. The smallest of these needs least."""
        chosen: dict[int, tuple[Shapes, Plan]] = {}
        for stage in (0, 2, 3):
            kind = "deepspeed" if stage else "torch"
            offload = self.config.engine.offload and stage > 0
            engine = replace(self.config.engine, kind=kind, zero_stage=stage, offload=offload)
            shapes = replace(self, config=replace(self.config, engine=engine))
            chosen[stage] = shapes, shapes.best(ranks, capacity)
        plans = [plan for _, plan in chosen.values()]
        fitting = [plan for plan in plans if plan.total <= USABLE * capacity] or plans
        placement = max((plan.placement for plan in fitting), key=PLACEMENTS.index)
        return {
            stage: (plan, shapes.plan(ranks, "all", placement))
            for stage, (shapes, plan) in chosen.items()
        }

    def best(self, ranks: int, capacity: int) -> Plan:
        """What `auto` chooses: the first placement, and of it the fewest recomputed layers, that
        fits in `USABLE` of `capacity` bytes; else the one that needs least."""
        capacity = int(USABLE * capacity)
        config = self.config
        placements = PLACEMENTS if self.teacher else PLACEMENTS[:1]
        if config.teacher.placement != "auto":
            placements = (config.teacher.placement,)
        found: list[Plan] = []
        for placement in placements:
            modes: Sequence[str] = (config.prefix.recompute,)
            if config.prefix.recompute == "auto":
                modes = self._modes(ranks, placement, capacity)
            for mode in modes:
                plan = self.plan(ranks, mode, placement)
                if plan.total <= capacity:
                    return plan
                found.append(plan)
        return min(found, key=lambda plan: plan.total)

    def _modes(self, ranks: int, placement: str, capacity: int) -> list[str]:
        """What to try for `prefix.recompute`: in each moment a recomputed layer saves about as much
        as the next, so two plans tell how many it takes."""
        few, most = (self.plan(ranks, mode, placement) for mode in ("none", "all"))
        layers = len(self.student.language_model.layers)
        number = 0
        for moment in few.moments:
            missing = few.total_at(moment) - capacity
            saved = (few.total_at(moment) - most.total_at(moment)) / layers
            if missing > 0:
                number = max(number, -int(-missing // saved) if saved > 0 else layers)
        tried = [str(n) if n else "none" for n in (number, number + 1) if n < layers]
        return [*tried, "all"]


def capacity_of(device: torch.device) -> int:
    """Bytes that a rank may use: of its GPU, or its part of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // distributed.world_size()


def too_little(plan: Plan, capacity: int) -> ConfigError:
    """The line for a plan that does not fit."""
    need, room = plan.total / 2**30, capacity / 2**30
    ways = "prefix.recompute=auto, more ranks, a higher engine.zero_stage, engine.offload=true"
    return ConfigError(f"{need:.1f} GiB planned of {room:.1f} on each device: try {ways}")

"""Memory plan of a run: the bytes it needs on each device, from shapes alone, and what `auto`
chooses."""

from dataclasses import dataclass, field, replace

import torch

from opd.config.run import Config
from opd.data.synthetic.clips import SIZE
from opd.engine.zero import BUCKET
from opd.generation.prefilled import Prefilled
from opd.models.lora import add_lora
from opd.models.video_lm import VideoLM
from opd.planning.plan import USABLE, Plan
from opd.planning.shapes import (
    Work,
    on_meta,
    pixel_bytes,
    prompts_of,
    size_of,
    student_step,
    teacher_step,
)
from opd.record.flops import Cost, step_flops

TEXT = 64  # tokens of template and query, about
STAMP = 10  # tokens around a frame pair that has a time before it: that and vision markers
FRAME_TOKENS = 768  # maximum per frame pair in the processors' own budget
CONTEXT_BYTES = 2**29 + 2**25  # about: a CUDA context with its kernels, cuBLAS's workspace
# About: up to 32 channels of a ring and a tree, with some 6 MiB per neighbour in each.
NCCL_BYTES = 2**30
PLACEMENTS = ("replica", "shard", "offload")  # of the teacher, fastest first
# What a device computes while it reads a byte of memory, at the utilisation of a usual step: an
# H100 reads 3.35 TB/s at 40% and computes 989 TFLOP/s at 45%.
FLOPS_PER_BYTE = {"cuda": 330, "cpu": 10}
SUB_GROUP = 1_000_000_000  # weights that ZeRO-3 updates at once, DeepSpeed's default


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _frame_tokens(config: Config) -> int:
    """Maximum number of vision tokens of a frame pair; `data.video_tokens` is not set."""
    if not all(source.strip().startswith("synthetic:") for source in config.data.train.split(",")):
        return FRAME_TOKENS
    side = SIZE // 32  # of a vision token, which is 28 or 32 pixels wide
    return max(side**2, config.data.min_frame_tokens or 0)


@dataclass(frozen=True)
class Shapes:
    """A run's models on the meta device, and the prompt length to plan for."""

    config: Config
    dtype: torch.dtype
    student: VideoLM
    teacher: VideoLM | None
    tokens: int  # of a prompt
    video_tokens: int  # of them
    device_type: str
    # Results of `student_step` and `teacher_step`, by their arguments.
    _steps: dict[object, dict] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype, device_type: str | None = None) -> "Shapes":
        """Shapes of a configuration, with the longest prompt that it allows.

        Without a `device_type` the plan is for a GPU, except in fp32 on a machine without one.
        """
        student, model, teacher = on_meta(config.model.student, dtype), config.model, None
        student.train_only(model.trainable)
        if model.lora_rank is not None:
            add_lora(student, model.lora_rank, model.lora_alpha)
        if config.method == "opd":
            teacher = on_meta(model.teacher, dtype)
        elif config.method == "grpo" and config.grpo.kl_coef:
            teacher = on_meta(model.student, dtype)
        video = config.data.video_tokens or _frame_tokens(config) * config.data.max_frames // 2
        stamped = student.family == "qwen3_vl" or config.data.timestamps == "text"
        stamps = STAMP * config.data.max_frames // 2 if stamped else 0
        gpu = torch.cuda.is_available() or dtype != torch.float32
        device_type = device_type or ("cuda" if gpu else "cpu")
        for lm in (student, teacher):
            if lm is not None:
                lm.model.planned_device_type = device_type
        return cls(config, dtype, student, teacher, video + stamps + TEXT, video, device_type)

    def prompts(self, ranks: int) -> int:
        """Prompts in a rank's micro-batch."""
        return self.config.micro_batch_size or max(1, self.config.batch_size // ranks)

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of a rank in a step."""
        return max(1, self.config.batch_size // ranks // self.prompts(ranks))

    def work(self, ranks: int, together: int = 1) -> Work:
        """Work of a rank in a micro-batch."""
        return Work.of(
            self.config,
            _bytes(self.dtype) >= 4,
            self.micro_batches(ranks) > 1,
            device_type=self.device_type,
            prompts=self.prompts(ranks),
            tokens=self.tokens,
            video_tokens=self.video_tokens,
            own_tokens=TEXT,
            together=together,
        )

    def flops(self, ranks: int, recompute: str) -> dict[str, float]:
        """FLOPs of a step on all devices, with full groups and completions, by `FLOPS`."""
        work, pairs = self.work(ranks), max(1, self.config.data.max_frames // 2)
        grid = pairs, 2, 2 * -(-self.video_tokens // pairs)  # a vision token is 2 x 2 patches
        parts = prompts_of(self.student, work, grid)
        models = [lm for lm in (self.student, self.teacher) if lm is not None]
        lengths = torch.full((work.prompts, work.rollouts), work.length)
        costs = {lm: Cost.of(lm) for lm in models}
        kept, decoded = Prefilled.of(parts, []), lengths if work.sampled else None
        flops = step_flops(costs, parts, decoded, kept, lengths, recompute)
        return {name: n * self.config.batch_size / work.prompts for name, n in flops.items()}

    def plan(self, ranks: int, recompute: str, placement: str, together: int = 0) -> Plan:
        """Plan for one choice of `prefix.recompute`, `teacher.placement` and `sample.together`, by
        default the configured number of micro-batches."""
        together = min(together or self.config.together, self.micro_batches(ranks))
        each, student, work = _bytes(self.dtype), self.student, self.work(ranks, together)
        size, engine = size_of(student), self.config.engine
        stage, cpu, gpu = engine.zero_stage, 0, self.device_type == "cuda"
        weights, gradients, states = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks)}.get(
            stage, (ranks,) * 3
        )
        own_masters = each >= 4 and stage == 0  # in plain torch, fp32 weights are their own masters
        optimizer = (12 - 4 * own_masters) * size.trained // states
        shard = 4 * size.trained // gradients  # fp32 gradients
        moments = {name: dict(parts) for name, parts in self._student_step(work, recompute).items()}
        moments["optimizer"] = {}
        held = {"student's weights": each * size.total // weights}
        if engine.offload:
            cpu += optimizer + 2 * shard  # optimizer, gradients, and a flat copy of them
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
        else:  # in the same memory: frames of a step, and copies in the parts of a micro-batch
            frames = max(1, self.config.batch_size // ranks) + work.prompts
            frames = -(-frames // work.queries_per_video)
            held["pixels of a step"] = frames * pixel_bytes(student, self.video_tokens)
        sizes = {"student": size}
        if self.teacher is not None:
            cpu += self._add_teacher(ranks, placement, work, held, moments)
            sizes["teacher"] = size_of(self.teacher)
        else:
            del moments["teacher"]
        return Plan(held, moments, recompute, placement, together, cpu, sizes)

    def _student_step(self, work: Work, recompute: str) -> dict[str, dict[str, int]]:
        key = work, recompute
        if key not in self._steps:
            self._steps[key] = student_step(self.student, work, recompute)
        return self._steps[key]

    def _temporaries(self, work: Work, shard: int) -> int:
        """Bytes of temporaries in the optimizer's update: AdamW's square roots of all second
        moments, and DeepSpeed's copies of the gradients."""
        stage = self.config.engine.zero_stage
        if stage == 3:  # a flat copy and the square roots, of one sub-group at a time
            return 2 * min(shard, 4 * SUB_GROUP)
        # The last micro-batch's gradients exist in the model's dtype and in fp32 before they are
        # added to the others'.
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
        """Add the teacher's parts to `held` and `moments`; returns its bytes of CPU memory."""
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
        moments["teacher"]["teacher: gathered layers"] = each * 2 * size.layer  # prefetched
        return each * size.total // ranks if placement == "offload" else 0

    def stages(self, ranks: int, capacity: int) -> dict[int, tuple[Plan, Plan]]:
        """Two plans for plain torch (0) and for ZeRO stages 2 and 3.

        The first is what `best` chooses. The second makes the stages comparable: all layers are
        recomputed, and the teacher is placed as the most demanding stage that fits needs it.
        """
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
        """Plan that `auto` chooses: the fastest one that fits in `USABLE` of `capacity` bytes, the
        teacher's placement first; if none fits, the plan that needs least."""
        capacity = int(USABLE * capacity)
        placements = PLACEMENTS if self.teacher else PLACEMENTS[:1]
        if self.config.teacher.placement != "auto":
            placements = (self.config.teacher.placement,)
        rejected: list[Plan] = []
        for placement in placements:
            for recompute, together in self._choices(ranks, placement, capacity):
                plan = self.plan(ranks, recompute, placement, together)
                if plan.total <= capacity:
                    return plan
                rejected.append(plan)
        return min(rejected, key=lambda plan: plan.total)

    def _choices(self, ranks: int, placement: str, capacity: int) -> list[tuple[str, int]]:
        """Values of `prefix.recompute` and `sample.together` to try, fastest first.

        What a moment needs grows about linearly with the layers that are not recomputed and with
        the micro-batches: the plans for none and all, and for one and two, say how far. Of what
        should fit, the choice that spends least: FLOPs in recomputation, and those that a device
        could compute while decoding reads the weights for each group of micro-batches.
        """
        config, count = self.config, self.micro_batches(ranks)
        layers = len(self.student.language_model.layers)
        modes = [config.prefix.recompute]
        numbers = range(1)
        if modes == ["auto"]:
            modes, numbers = ["none", "all"], range(layers + 1)
        sizes = [min(config.together, count)]
        if config.sample.together == "auto" and not config.on_references:
            sizes = sorted({-(-count // groups) for groups in range(1, count + 1)})
        last = min(1, len(sizes) - 1)  # place of the second size, if there is one
        plans = {
            (mode, size): self.plan(ranks, mode, placement, size)
            for mode in modes
            for size in sizes[:2]
        }

        def expected(number: int, size: int, moment: str) -> float:
            """Bytes in a moment with so many recomputed layers and micro-batches."""

            def under(mode: str) -> float:
                first, second = (plans[mode, sizes[i]].total_at(moment) for i in (0, last))
                return first + (second - first) * (size - sizes[0])

            share = number / layers
            return (1 - share) * under(modes[0]) + share * under(modes[-1])

        weights = size_of(self.student)
        token = _bytes(self.dtype) * (weights.language + weights.head)  # bytes read for one
        reading = FLOPS_PER_BYTE[self.device_type] * (self.work(ranks).length - 1) * token
        layer = self.flops(ranks, "all")["recompute"] / ranks / layers

        def cost(number: int, size: int) -> float:
            return layer * number + reading * -(-count // size)

        moments = plans[modes[0], sizes[0]].moments
        fitting = [
            (cost(number, size), number, size)
            for number in numbers
            for size in sizes
            if max(expected(number, size, m) for m in moments) <= 1.01 * capacity
        ]
        names = {0: modes[0], layers: modes[-1]}
        tried = [(names.get(number, str(number)), size) for _, number, size in sorted(fitting)[:4]]
        return [*tried, (modes[-1], sizes[0])]

"""Resolving the `auto` settings of a configuration, once, before a run begins."""

import sys
from dataclasses import replace

import torch

from opd import distributed
from opd.config.run import Config, to_yaml
from opd.errors import ConfigError
from opd.models.load import load_options
from opd.planning.memory import Shapes, capacity_of, too_little


def resolve_auto(config: Config, device: torch.device) -> Config:
    """Replace every `auto` by what it chooses on this device: attention, Liger, dtype,
    `prefix.recompute` and `teacher.placement` (a replica without a GPU); prints them to stderr.

    Raises ConfigError where no choice fits the device's memory, ModelError for an unusable backend.
    """
    options = load_options(config.model, device)
    if config.engine.zero_stage == 1 and options["dtype"] == torch.bfloat16:
        # Measured on two ranks: a gradient norm of 1.9 times that of one process.
        raise ConfigError(
            "engine.zero_stage=1: DeepSpeed's gradients are wrong in bfloat16; use "
            "engine.zero_stage=2, which also needs less memory"
        )
    text, vision = options["backends"]
    dtype = str(options["dtype"]).removeprefix("torch.")
    model = replace(config.model, attention=text, vision_attention=vision, dtype=dtype)
    model = replace(model, liger="on" if options["fused"] else "off")
    recompute, placement = config.prefix.recompute, config.teacher.placement
    if device.type == "cpu" and placement == "auto":
        placement = "replica"
    memory = ""
    if "auto" in (recompute, placement):
        requested = replace(config, teacher=replace(config.teacher, placement=placement))
        capacity = capacity_of(device)
        shapes = Shapes.of(requested, options["dtype"], device.type)
        plan = shapes.best(distributed.world_size(), capacity)
        if plan.total > capacity:
            raise too_little(plan, capacity)
        recompute, placement = plan.recompute, plan.placement
        need, room = plan.total / 2**30, capacity / 2**30
        memory = f" ({need:.1f} of {room:.1f} GiB planned for each device)"
    resolved = replace(
        config,
        model=model,
        prefix=replace(config.prefix, recompute=recompute),
        teacher=replace(config.teacher, placement=placement),
    )
    if distributed.is_first() and (memory or device.type == "cuda"):
        before, after = to_yaml(config).splitlines(), to_yaml(resolved).splitlines()
        changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
        print(f"auto: {', '.join(changed)}{memory}", file=sys.stderr)
    return resolved

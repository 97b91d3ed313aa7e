"""What every `auto` of a configuration chooses, settled once, before a run begins."""

import sys
from dataclasses import replace

import torch

from opd import distributed
from opd.config.run import Config, to_yaml
from opd.errors import ConfigError
from opd.models.load import load_options
from opd.planning.memory import Shapes, capacity_of, too_little


def resolve_auto(config: Config, device: torch.device) -> Config:
    """With what every `auto` chooses in its place: attention, Liger, dtype, `prefix.recompute` and
    `teacher.placement`; says on stderr what that is. Without a GPU the teacher is a replica."""
    where = load_options(config.model, device)
    if config.engine.zero_stage == 1 and where["dtype"] == torch.bfloat16:
        # Measured on two ranks: a gradient norm of 1.9 times that of one process.
        raise ConfigError("engine.zero_stage=1: DeepSpeed's is wrong in bfloat16; 2 needs less")
    text, vision = where["backends"]
    dtype = str(where["dtype"]).removeprefix("torch.")
    model = replace(config.model, attention=text, vision_attention=vision, dtype=dtype)
    model = replace(model, liger="on" if where["fused"] else "off")
    recompute, placement = config.prefix.recompute, config.teacher.placement
    if device.type == "cpu" and placement == "auto":
        placement = "replica"
    told = ""
    if "auto" in (recompute, placement):
        asked = replace(config, teacher=replace(config.teacher, placement=placement))
        capacity = capacity_of(device)
        shapes = Shapes.of(asked, where["dtype"], device.type)
        plan = shapes.best(distributed.world_size(), capacity)
        if plan.total > capacity:
            raise too_little(plan, capacity)
        recompute, placement = plan.recompute, plan.placement
        told = f" ({plan.total / 2**30:.1f} of {capacity / 2**30:.1f} GiB planned for each device)"
    chosen = replace(
        config,
        model=model,
        prefix=replace(config.prefix, recompute=recompute),
        teacher=replace(config.teacher, placement=placement),
    )
    if distributed.is_first() and (told or device.type == "cuda"):
        before, after = to_yaml(config).splitlines(), to_yaml(chosen).splitlines()
        changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
        print(f"auto: {', '.join(changed)}{told}", file=sys.stderr)
    return chosen

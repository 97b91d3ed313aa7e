"""Resolving the `auto` settings of a configuration, once, before a run begins."""

import sys
from dataclasses import replace

import torch

from opd import distributed
from opd.config.run import Config, to_yaml
from opd.data.schedule import micro_batches
from opd.errors import ConfigError, require
from opd.models.load import load_options, text_config_of
from opd.planning.memory import Shapes
from opd.planning.plan import capacity_of, too_little


def resolve_auto(config: Config, device: torch.device) -> Config:
    """Replace every `auto` by what it chooses on this device: attention, Liger, dtype,
    `prefix.recompute`, `teacher.placement` (a replica without a GPU) and `sample.together`;
    prints them to stderr.

    Raises ConfigError where no choice fits the device's memory or where completions cannot be as
    long as configured, ModelError for an unusable backend.
    """
    options, capacity = load_options(config.model, device), capacity_of(device)
    check_completions(config, options["dtype"], capacity)
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
    together = config.sample.together
    if config.on_references or len(micro_batches(config)) == 1:
        together = "off"
    if device.type == "cpu" and placement == "auto":
        placement = "replica"
    memory = ""
    if "auto" in (recompute, placement, together):
        requested = replace(config, teacher=replace(config.teacher, placement=placement))
        shapes = Shapes.of(requested, options["dtype"], device.type)
        plan = shapes.best(distributed.world_size(), capacity)
        if plan.total > capacity and "auto" in (recompute, placement):
            raise too_little(plan, capacity)
        recompute, placement = plan.recompute, plan.placement
        together = str(plan.together)
        if plan.total <= capacity:  # else nothing that memory decides was left open
            need, room = plan.total / 2**30, capacity / 2**30
            memory = f" ({need:.1f} of {room:.1f} GiB planned for each device)"
    resolved = replace(
        config,
        model=model,
        prefix=replace(config.prefix, recompute=recompute),
        teacher=replace(config.teacher, placement=placement),
        sample=replace(config.sample, together=together),
    )
    if distributed.is_first() and (memory or device.type == "cuda"):
        before, after = to_yaml(config).splitlines(), to_yaml(resolved).splitlines()
        changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
        print(f"auto: {', '.join(changed)}{memory}", file=sys.stderr)
    return resolved


def check_completions(config: Config, dtype: torch.dtype, capacity: int) -> None:
    """Raise ConfigError where the longest completion has more tokens than the student has
    positions, or where the keys and values of a batch of completions alone are more than a device
    holds: they are allocated before sampling begins."""
    text, length = text_config_of(config.model.student), config.sample.max_completion_length
    setting = f"sample.max_completion_length={length}"
    positions = text.max_position_embeddings
    require(length < positions, f"{setting}: the student has {positions} positions")
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_token = 2 * text.num_hidden_layers * text.num_key_value_heads * size * dtype.itemsize
    prompts = len(micro_batches(config)[0]) * config.together
    count = max(
        0 if config.on_references else prompts * config.num_rollouts,
        config.eval.batch_size * max(1, config.eval.draws),
    )
    need = count * length * of_token
    require(
        need <= capacity,
        f"{setting}: the keys and values of {count} completions need {need / 2**30:.1f} GiB, "
        f"{capacity / 2**30:.1f} on each device",
    )

"""Frozen models whose weights are spread over the ranks by ZeRO-3."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from opd import distributed
from opd.config.optimisation import EngineConfig
from opd.config.run import Config
from opd.models.load import load_model
from opd.models.prefetch import LayersAhead
from opd.models.video_lm import VideoLM


def import_deepspeed() -> Any:
    """The library, in a group of all ranks; not at the top, because importing it takes seconds."""
    import deepspeed

    distributed.start(alone_too=True)
    # It warns of every optimizer that is not its own; ours is torch's.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def load_frozen(spec: str, config: Config, **where: Any) -> VideoLM:
    """The frozen model, placed as `teacher.placement` says; `where` as for `load_model`."""
    placement = config.teacher.placement
    if placement in ("auto", "replica"):
        return load_model(spec, seed=config.seed, **where)
    return load_sharded(spec, config.engine, placement == "offload", **where)


def load_sharded(
    spec: str,
    settings: EngineConfig,
    offload: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
    **more: Any,
) -> VideoLM:
    """A frozen model whose weights ZeRO-3 spreads over the ranks as they are read, or keeps in the
    CPU's memory, and gathers layer by layer."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed = import_deepspeed()  # before transformers partitions anything
    pinned = device.type == "cuda"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": settings.persistence_threshold,
            **({"offload_param": {"device": "cpu", "pin_memory": pinned}} if offload else {}),
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    _kept = HfDeepSpeedConfig(config)  # while it lives, transformers partitions what it loads
    try:
        lm = load_model(spec, dtype=dtype, device=device, **more)
    finally:
        unset_hf_deepspeed_config()
    lm.model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=lm.model, config=config, dist_init_required=False)
    lm.model.is_sharded = True
    LayersAhead(lm, engine.optimizer)
    return lm


def gathered(parameters: Sequence[torch.Tensor]) -> Any:
    """Context in which sharded parameters are whole on every rank."""
    return import_deepspeed().zero.GatheredParameters(list(parameters))

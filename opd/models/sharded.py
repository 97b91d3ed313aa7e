"""Frozen models, loaded as a replica per rank or with weights that ZeRO-3 shards or offloads."""

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


def load_frozen(spec: str, config: Config, **options: Any) -> VideoLM:
    """Load a frozen model, placed as `teacher.placement` says; `options` as for `load_model`."""
    placement = config.teacher.placement
    if placement in ("auto", "replica"):
        return load_model(spec, seed=config.seed, **options)
    return load_sharded(spec, config.engine, placement == "offload", **options)


def load_sharded(
    spec: str,
    settings: EngineConfig,
    offload: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
    **options: Any,
) -> VideoLM:
    """Load a frozen model under ZeRO-3, which gathers its weights layer by layer.

    The weights are sharded over the ranks as they are read, and with `offload` kept in CPU memory.
    """
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
        lm = load_model(spec, dtype=dtype, device=device, **options)
    finally:
        unset_hf_deepspeed_config()
    lm.model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=lm.model, config=config, dist_init_required=False)
    lm.model.is_sharded = True
    LayersAhead(lm, engine.optimizer)
    return lm


def gathered(parameters: Sequence[torch.Tensor]) -> Any:
    """Context in which sharded parameters are gathered on every rank."""
    return import_deepspeed().zero.GatheredParameters(list(parameters))


def import_deepspeed() -> Any:
    """Import DeepSpeed, which takes seconds, and start the process group that it needs."""
    import deepspeed

    distributed.start(alone_too=True)
    # It warns of every optimizer that is not its own; ours is torch's.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed

"""Settings of the optimizer, the engine and recomputation."""

from dataclasses import dataclass

from opd.config.options import option


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The rate rises linearly over `warmup`, then follows `schedule`."""

    lr: float = option(1e-3, "highest learning rate", above=0)
    schedule: str = option(
        "cosine",
        "the last two fall to min_lr_ratio of lr",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = option(0.03, "share of the steps", least=0, below=1)
    min_lr_ratio: float = option(0.1, "rate of the last step, as a share of lr", least=0, most=1)
    weight_decay: float = option(0.0, "of matrices; norms and biases have none", least=0)
    beta1: float = option(0.9, "decay of the gradient's mean, a step", least=0, below=1)
    beta2: float = option(0.95, "decay of its square's mean, a step", least=0, below=1)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to it", above=0)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """The prompt's forward."""

    recompute: str = option(
        "none",
        "layers whose activations are computed again in backward: none, all, a number, or auto: "
        "the fewest that fit",
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who shards: plain torch on every device, or DeepSpeed ZeRO under torchrun or its launcher."""

    kind: str = option(
        "torch",
        "who holds the weights and steps; torch is whole on every rank",
        choices=("torch", "deepspeed"),
    )
    zero_stage: int = option(
        0, "what DeepSpeed shards: 1 optimizer, 2 and gradients, 3 and weights", least=0, most=3
    )
    offload: bool = option(False, "the optimizer and fp32 weights to the CPU (DeepSpeed)")
    gather: bool = option(
        True, "all weights to each rank while it samples and evaluates; false is layer by layer"
    )
    persistence_threshold: int = option(
        100_000, "elements up to which ZeRO-3 leaves a weight whole on every rank", least=0
    )

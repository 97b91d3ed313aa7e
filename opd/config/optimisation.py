"""Settings of the optimizer, the engine and recomputation."""

from dataclasses import dataclass

from opd.config.options import check_values, is_whole_number, option
from opd.errors import printable, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer.

    AdamW with a learning rate that rises linearly during the warm-up and then follows a schedule.
    """

    lr: float = option(1e-3, "Peak learning rate.", above=0)
    schedule: str = option(
        "cosine",
        "Learning rate after the warm-up; linear and cosine decay to min_lr_ratio * lr.",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = option(
        0.03, "Length of the warm-up, as a share of all steps.", least=0, below=1
    )
    min_lr_ratio: float = option(
        0.1, "Learning rate at the end of the schedule, as a share of lr.", least=0, most=1
    )
    weight_decay: float = option(
        0.0, "Weight decay of matrices; norms and biases are not decayed.", least=0
    )
    beta1: float = option(
        0.9, "Decay rate per step of the gradient's running mean.", least=0, below=1
    )
    beta2: float = option(
        0.95, "Decay rate per step of the squared gradient's running mean.", least=0, below=1
    )
    max_grad_norm: float = option(
        1.0, "Maximum gradient norm; longer gradients are scaled down to it.", above=0
    )

    def __post_init__(self) -> None:
        check_values(self, "optim")


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Prompt prefix.

    The forward pass over the prompt, which serves both sampling and training, and that over the
    completions behind it.
    """

    recompute: str = option(
        "none",
        "Layers whose activations are recomputed in the backward pass: none, all, a number of "
        "layers, or auto (the fewest that fit into memory).",
    )

    def __post_init__(self) -> None:
        check_values(self, "prefix")
        value = self.recompute
        valid = value in ("none", "all", "auto") or is_whole_number(value)
        require(valid, f"prefix.recompute={printable(value)}: not none, all, auto or a number")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Engine.

    Plain PyTorch on any device, or DeepSpeed ZeRO under torchrun or the deepspeed launcher.
    """

    kind: str = option(
        "torch",
        "Training engine: torch holds all weights on every rank, deepspeed shards them by "
        "zero_stage.",
        choices=("torch", "deepspeed"),
    )
    zero_stage: int = option(
        0,
        "ZeRO stage of DeepSpeed: 1 shards the optimizer state, 2 also the gradients, 3 also the "
        "weights.",
        least=0,
        most=3,
    )
    offload: bool = option(
        False, "Keep the optimizer state and the fp32 weights in CPU memory (DeepSpeed only)."
    )
    gather: bool = option(
        True,
        "Gather all weights on each rank for sampling and evaluation (ZeRO-3 only); false gathers "
        "them layer by layer.",
    )
    persistence_threshold: int = option(
        100_000,
        "Largest weight that ZeRO-3 leaves unsharded on every rank, in elements.",
        least=0,
    )

    def __post_init__(self) -> None:
        check_values(self, "engine")
        sharded = self.kind == "deepspeed"
        require(
            (self.zero_stage > 0) == sharded,
            f"engine.zero_stage={self.zero_stage}: engine.kind={self.kind} has "
            + ("stages 1, 2 and 3" if sharded else "stage 0 only"),
        )
        require(
            not self.offload or sharded,
            f"engine.offload=true: engine.kind={self.kind} cannot offload; use deepspeed",
        )

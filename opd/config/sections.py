"""Settings of models, data, methods, evaluation and machinery."""

from dataclasses import dataclass

from opd.config.options import option

BACKENDS = (
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "varlen",
    "sdpa",
    "eager",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Checkpoint folders or hub ids; `embedded:NAME` is a shipped model, `tiny:NAME` a fresh
    one."""

    student: str = option("embedded:student", "the model that is trained")
    teacher: str = option(
        "embedded:teacher", "the frozen model that scores its tokens (method opd)"
    )
    trainable: str = option(
        "language",
        "language, or all: with the vision tower and its merger",
        choices=("language", "all"),
    )
    lora_rank: int | None = option(
        None, "of adapters on the language model, trained in its place; null trains it", least=1
    )
    lora_alpha: float = option(32.0, "adapters are scaled by alpha / rank", above=0)
    dtype: str = option(
        "auto",
        "of weights and activations; auto is float32 on a CPU and bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    attention: str = option(
        "auto",
        "of the language model's prompts; auto is the first of these that is installed and that "
        "the device supports",
        choices=("auto", *BACKENDS),
    )
    vision_attention: str = option("auto", "of the vision tower", choices=("auto", *BACKENDS))
    liger: str = option(
        "auto",
        "Liger's RMSNorm, RoPE and SwiGLU; auto is on with a GPU where liger-kernel is installed",
        choices=("auto", "on", "off"),
    )
    save_dtype: str = option(
        "auto", "of the saved student; auto is as trained", choices=("auto", "float32", "bfloat16")
    )


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
class OPDConfig:
    """Method opd: its objectives' settings, and controls."""

    beta: float = option(
        0.5, "of objective jsd: 0 is the forward KL, 1 the reverse KL", least=0, most=1
    )
    k: int = option(32, "tokens that objective topk looks at", least=1)
    support: str = option("teacher", "whose likeliest k", choices=("teacher", "student"))
    tail: bool = option(False, "count all other tokens as one more, instead of renormalising")
    horizon: int | None = option(
        None, "tokens of a completion in the loss, from its first", least=1
    )
    completions: str = option(
        "student",
        "who wrote what is scored; reference answers make it off-policy",
        choices=("student", "reference"),
    )
    reward_coef: float = option(
        0.0, "of a policy gradient on the task's reward, added to the objective", least=0
    )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Method grpo: num_rollouts answers to one prompt are compared with each other."""

    advantage: str = option(
        "std",
        "reward less the group's mean, over its standard deviation or as it is",
        choices=("std", "mean"),
    )
    clip: float = option(0.2, "half-width of the ratio's interval", above=0, below=1)
    kl_coef: float = option(0.0, "of the KL to the student as it starts", least=0)
    epochs: int = option(1, "optimizer steps per batch of rollouts", least=1)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the reward's terms, each in [0, 1] (method grpo)."""

    tiou: float = option(1.0, "temporal IoU with the best matching true span", least=0)
    threshold: float = option(0.0, "1 where the tIoU reaches threshold_at", least=0)
    threshold_at: float = option(0.5, "the tIoU that threshold asks for", above=0, most=1)
    boundary: float = option(0.0, "tIoU less for each boundary's distance (Time-R1)", least=0)
    format: float = option(0.0, "1 where the answer is written as data.prompt asks", least=0)
    choice: float = option(0.0, "1 where the right option of a question is chosen", least=0)


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which examples of the pool are trained on, and in which order."""

    kind: str = option(
        "none",
        "none is the whole pool; tvdf where the teacher is reliable and ahead; scc where it is "
        "reliable, what the student can (anchors) and cannot (frontiers); variance where the "
        "student's answers vary; random as a control",
        choices=("none", "tvdf", "scc", "variance", "random"),
    )
    share: float = option(0.25, "of the pool, chosen in a round", above=0, most=1)
    rounds: int = option(1, "of choosing and training", least=1)
    answers: int = option(4, "sampled per example and model to score it", least=1)
    threshold: float = option(
        0.7,
        "teacher's mean tIoU from which it is reliable (kinds tvdf, scc; ours), and the student's "
        "from which an example is an anchor",
        least=0,
        most=1,
    )
    select: str = option(
        "topk",
        "of the reliable examples: furthest ahead, evenly over the ranking, from five buckets, "
        "drawn around a gap of 0.9; controls: any reliable one, furthest ahead of all",
        choices=("topk", "uniform", "buckets", "gaussian", "reliability", "disagreement"),
    )
    anchors: float = option(0.1, "share of the chosen that are anchors (kind scc)", least=0, most=1)
    frontier_below: float = option(
        0.3, "student's mean tIoU below which an example is a frontier (kind scc)", least=0, most=1
    )
    routing: str = option(
        "auto",
        "suspend the rollouts that are good enough: no teacher, no backward; auto is on with scc",
        choices=("auto", "on", "off"),
    )
    route_below: float = option(
        0.5, "reward of a rollout below which it is trained on (routing)", above=0
    )
    min_std: float = option(
        0.1, "of the student's tIoUs (kind variance; our choice)", least=0, most=1
    )


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


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the frozen teacher's weights are."""

    placement: str = option(
        "auto",
        "replica: whole on every rank; shard: ZeRO-3 over the ranks; offload: in the CPU's memory; "
        "auto is the first that fits",
        choices=("auto", "replica", "shard", "offload"),
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on `data.eval`, before and after training."""

    draws: int = option(4, "sampled answers per query, beside the greedy one", least=0)
    batch_size: int = option(32, "prompts", least=1)
    teacher: bool = option(True, "evaluate the teacher too (method opd)")
    before: bool = option(True, "evaluate the student before training too")
    every: int | None = option(None, "steps between evaluations on the way", least=1)
    metrics: str = option(
        "auto",
        "whose scores opd.evaluate adds; auto is those of the data's format",
        choices=("auto", "grounding", "qvhighlights", "nextgqa", "rextime", "videoqa"),
    )
    recall: str = option(
        "reached",
        "R@m counts a tIoU that has reached m, or, as Time-R1 does, is above it",
        choices=("reached", "above"),
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Decoding of rollouts and of sampled evaluation answers."""

    temperature: float = option(1.0, "of the policy: sampler and loss alike", above=0)
    max_completion_length: int = option(20, "tokens, the end token included", least=1)

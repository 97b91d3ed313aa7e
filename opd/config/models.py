"""Settings of the student, the teacher and where the teacher's weights are."""

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
class TeacherConfig:
    """Where the frozen teacher's weights are."""

    placement: str = option(
        "auto",
        "replica: whole on every rank; shard: ZeRO-3 over the ranks; offload: in the CPU's memory; "
        "auto is the first that fits",
        choices=("auto", "replica", "shard", "offload"),
    )

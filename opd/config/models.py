"""Settings of the student and the teacher."""

from dataclasses import dataclass

from opd.config.options import check_values, option
from opd.errors import require

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
    """Student and teacher.

    A model is a checkpoint folder, a Hugging Face Hub id, `embedded:NAME` (a shipped model) or
    `tiny:NAME` (a new model with random weights).
    """

    student: str = option("embedded:student", "Model that is trained.")
    teacher: str = option(
        "embedded:teacher", "Frozen model that scores the student's tokens (method opd)."
    )
    trainable: str = option(
        "language",
        "Trained part of the student: the language model, or all, which adds the vision tower and "
        "its merger.",
        choices=("language", "all"),
    )
    lora_rank: int | None = option(
        None,
        "Rank of LoRA adapters, which are trained in place of the language model's weights; null "
        "trains the weights.",
        least=1,
    )
    lora_alpha: float = option(
        32.0, "LoRA scale: adapters are multiplied by lora_alpha / lora_rank.", above=0
    )
    dtype: str = option(
        "auto",
        "Data type of weights and activations; auto is float32 on a CPU and bfloat16 on a GPU.",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    attention: str = option(
        "auto",
        "Attention backend for the language model's prompts; auto takes the first one listed that "
        "is installed and that the device supports.",
        choices=("auto", *BACKENDS),
    )
    vision_attention: str = option(
        "auto",
        "Attention backend for the vision tower; auto as for model.attention.",
        choices=("auto", *BACKENDS),
    )
    liger: str = option(
        "auto",
        "Use Liger's RMSNorm, RoPE and SwiGLU kernels; auto uses them on a GPU if liger-kernel is "
        "installed.",
        choices=("auto", "on", "off"),
    )
    save_dtype: str = option(
        "auto",
        "Data type of the saved student; auto is the one it was trained in.",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check_values(self, "model")
        require(
            self.lora_rank is None or self.trainable == "language",
            f"model.trainable={self.trainable}: model.lora_rank trains adapters on the language "
            "model only; use model.trainable=language",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Teacher placement.

    The frozen teacher's weights are on every device, sharded over the ranks, or in CPU memory.
    """

    placement: str = option(
        "auto",
        "Location of the teacher's weights: replica (whole on every rank), shard (ZeRO-3 over the "
        "ranks) or offload (in CPU memory); auto takes the first that fits.",
        choices=("auto", "replica", "shard", "offload"),
    )

    def __post_init__(self) -> None:
        check_values(self, "teacher")

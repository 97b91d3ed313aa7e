"""Settings of evaluation."""

from dataclasses import dataclass

from opd.config.options import check_values, option


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation.

    Answers to the queries of data.eval, before, during and after training.
    """

    draws: int = option(4, "Sampled answers per query, in addition to the greedy one.", least=0)
    batch_size: int = option(
        16, "Prompts per batch, in evaluation and in scoring for the curriculum.", least=1
    )
    teacher: bool = option(True, "Also evaluate the teacher (method opd).")
    before: bool = option(True, "Also evaluate the student before training.")
    every: int | None = option(
        None, "Optimizer steps between evaluations during training; null makes none.", least=1
    )
    metrics: str = option(
        "auto",
        "Official metrics that opd.evaluate adds; auto takes those of the data's format, and "
        "timelens rounds predictions to whole seconds, as TimeLens' own evaluation does.",
        choices=("auto", "grounding", "timelens", "qvhighlights", "nextgqa", "rextime", "videoqa"),
    )
    recall: str = option(
        "reached",
        "Comparison in R@m: reached counts a tIoU of m or more, above only a tIoU greater than m, "
        "as Time-R1 does.",
        choices=("reached", "above"),
    )

    def __post_init__(self) -> None:
        check_values(self, "eval")

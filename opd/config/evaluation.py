"""Settings of evaluation."""

from dataclasses import dataclass

from opd.config.options import option


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

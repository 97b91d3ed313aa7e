"""Settings of the methods, their rollouts, rewards and curricula."""

from dataclasses import dataclass

from opd.config.options import option


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Decoding of rollouts and of sampled evaluation answers."""

    temperature: float = option(1.0, "of the policy: sampler and loss alike", above=0)
    max_completion_length: int = option(20, "tokens, the end token included", least=1)


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

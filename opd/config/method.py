"""Settings of the methods: rollouts, objectives, rewards and curricula."""

from dataclasses import dataclass, fields

from opd.config.options import check_values, is_whole_number, option
from opd.errors import printable, require


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sampling.

    Decoding of rollouts and of sampled answers in evaluation.
    """

    temperature: float = option(
        1.0, "Temperature of the policy, in sampling and in the loss.", above=0
    )
    top_k: int | None = option(
        None,
        "Number of most likely tokens that sampling draws from; null is all. The loss keeps the "
        "whole distribution, so that sampling and loss differ.",
        least=1,
    )
    top_p: float = option(
        1.0,
        "Smallest probability mass of the most likely tokens that sampling draws from; 1 is all. "
        "The loss keeps the whole distribution.",
        above=0,
        most=1,
    )
    max_completion_length: int = option(
        20, "Maximum length of a completion with its end token, in tokens.", least=1
    )

    together: str = option(
        "auto",
        "Micro-batches of a step that are sampled together: off, a number, or auto (as many as fit "
        "into memory). Their prompts are all in memory until they have been learned from.",
    )

    @property
    def truncated(self) -> bool:
        """Whether sampling leaves out unlikely tokens."""
        return self.top_k is not None or self.top_p < 1

    def __post_init__(self) -> None:
        check_values(self, "sample")
        value = self.together
        valid = value in ("off", "auto") or (is_whole_number(value) and int(value) > 0)
        require(valid, f"sample.together={printable(value)}: not off, auto or a number from 1 on")


@dataclass(frozen=True, kw_only=True)
class OPDConfig:
    """Method opd.

    On-policy distillation: parameters of its objectives, and controls for experiments.
    """

    beta: float = option(
        0.5,
        "Interpolation of objective jsd: 0 is the forward KL and 1 the reverse KL.",
        least=0,
        most=1,
    )
    k: int = option(32, "Number of most likely tokens that objective topk compares.", least=1)
    support: str = option(
        "teacher",
        "Model whose k most likely tokens objective topk compares.",
        choices=("teacher", "student"),
    )
    tail: bool = option(
        False,
        "Treat the tokens outside the top k as one more token, instead of renormalising over the "
        "top k (objective topk).",
    )
    horizon: int | None = option(
        None,
        "Number of leading completion tokens that enter the loss; null is the whole completion. "
        "Sampling stops there, too, unless a reward needs the whole answer.",
        least=1,
    )
    completions: str = option(
        "student",
        "Source of the completions that the teacher scores: sampled from the student, or the "
        "reference answers (off-policy).",
        choices=("student", "reference"),
    )
    tolerance: float = option(
        0.0,
        "Probability mass of a token's distribution that objective reverse_kl may leave out of the "
        "comparison, to save work where answers are predictable; the KL reported is then a lower "
        "bound. 0 compares the whole vocabulary.",
        least=0,
        below=1,
    )
    reward_coef: float = option(
        0.0,
        "Weight of a policy gradient on the reward, which is added to the objective.",
        least=0,
    )

    def __post_init__(self) -> None:
        check_values(self, "opd")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Method grpo.

    Group-relative policy optimisation over the num_rollouts completions of each prompt.
    """

    advantage: str = option(
        "std",
        "Advantage of a completion: its reward minus the group's mean, divided by the group's "
        "standard deviation (std) or not divided (mean).",
        choices=("std", "mean"),
    )
    clip: float = option(
        0.2, "Probability ratios are clipped to [1 - clip, 1 + clip].", above=0, below=1
    )
    kl_coef: float = option(0.0, "Weight of the KL divergence from the initial student.", least=0)
    entropy_coef: float = option(
        0.0, "Weight of the student's entropy, which is subtracted from each token's loss.", least=0
    )
    epochs: int = option(1, "Optimizer steps per batch of rollouts.", least=1)

    @property
    def regularised(self) -> bool:
        """Whether the loss has a term that does not depend on rewards."""
        return self.kl_coef > 0 or self.entropy_coef > 0

    def __post_init__(self) -> None:
        check_values(self, "grpo")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward.

    Weights of the reward's terms, each in [0, 1], for method grpo, opd.reward_coef and
    curriculum.routing.
    """

    tiou: float = option(
        1.0,
        "Weight of the temporal IoU with the best matching true span.",
        least=0,
        needs=("spans",),
    )
    threshold: float = option(
        0.0,
        "Weight of a term that is 1 if the tIoU reaches threshold_at.",
        least=0,
        needs=("spans",),
    )
    threshold_at: float = option(
        0.5, "The tIoU at which the threshold term becomes 1.", above=0, most=1
    )
    boundary: float = option(
        0.0,
        "Weight of the tIoU discounted by the distance of both boundaries (Time-R1).",
        least=0,
        needs=("spans",),
    )
    format: float = option(
        0.0,
        "Weight of a term that is 1 if the answer has the form data.prompt asks for.",
        least=0,
        needs=("spans", "options"),
    )
    choice: float = option(
        0.0,
        "Weight of a term that is 1 if the right option of a question is chosen.",
        least=0,
        needs=("options",),
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term of `opd.scoring.judge.TERMS`, by its name."""
        return {e.name: getattr(self, e.name) for e in fields(self) if e.metadata["needs"]}

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of which an example must have at least one to get a reward for what it says; for
        its form, if there is no other term."""
        needs = {e.name: e.metadata["needs"] for e in fields(self)}
        used = [name for name, weight in self.weights.items() if weight]
        used = [name for name in used if name != "format"] or used
        return tuple(dict.fromkeys(field for name in used for field in needs[name]))

    def __post_init__(self) -> None:
        check_values(self, "reward")
        require(
            any(self.weights.values()),
            "reward: every weight is 0, so all answers have the same reward; set one above 0",
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Curriculum.

    Selection of training examples from the pool, repeated at the start of each round.
    """

    kind: str = option(
        "none",
        "Selection criterion: none (the whole pool), tvdf (the teacher is reliable and better than "
        "the student), scc (the teacher is reliable; a mix of anchors, which the student answers "
        "well, and frontiers, which it does not), variance (the student's answers vary) or random "
        "(a control).",
        choices=("none", "tvdf", "scc", "variance", "random"),
    )
    share: float = option(0.25, "Share of the pool selected in each round.", above=0, most=1)
    rounds: int = option(1, "Rounds of selection and training.", least=1)
    answers: int = option(
        4, "Sampled answers per example and model from which scores are computed.", least=1
    )
    threshold: float = option(
        0.7,
        "Mean tIoU at which the teacher counts as reliable (kinds tvdf and scc) and at which the "
        "student's examples count as anchors (kind scc).",
        least=0,
        most=1,
    )
    select: str = option(
        "topk",
        "Selection among reliable examples by the gap between teacher and student (kind tvdf): "
        "topk (largest gaps), uniform (evenly over the ranking), buckets (equally from five equal "
        "parts of the gaps' range), gaussian (around a gap of 0.9), or the controls reliability "
        "(at random) and disagreement (largest gaps, reliable or not).",
        choices=("topk", "uniform", "buckets", "gaussian", "reliability", "disagreement"),
    )
    anchors: float = option(
        0.1, "Share of anchors among the selected examples (kind scc).", least=0, most=1
    )
    frontier_below: float = option(
        0.3,
        "Student's mean tIoU below which an example counts as a frontier (kind scc).",
        least=0,
        most=1,
    )
    routing: str = option(
        "auto",
        "Exclude rollouts that are already good enough from teacher scoring and the backward pass; "
        "auto is on with kind scc.",
        choices=("auto", "on", "off"),
    )
    route_below: float = option(
        0.5,
        "Reward below which a rollout is trained on (routing); the SCC paper has 0.5 in its "
        "formula and 0.7 in its main experiments.",
        above=0,
    )
    min_std: float = option(
        0.1,
        "Standard deviation of the student's tIoU above which its answers vary (kind variance).",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        check_values(self, "curriculum")

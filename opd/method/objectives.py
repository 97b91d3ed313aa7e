"""Objectives: from hidden states to a loss, summed over completion tokens, and token statistics.

    reverse_kl   sum_t sum_v p_S(v) (log p_S(v) - log p_T(v))    over the allowed vocabulary
    sampled      -sum_t rho_t A_t                                Video-OPD (arXiv 2602.02994), with
                 A_t = sg[log p_T(y_t) - log p_S(y_t)] and rho_t = p_S(y_t) / sg p_S(y_t)
    jsd          sum_t JSD_beta(p_T, p_S)                        beta 0 is the forward KL
    topk         sum_t KL(p_S || p_T) on the k likeliest tokens  renormalised, or with a tail
    constant     sum_t log p_S(y_t)                              control: every advantage is -1
    sft          -sum_t log p_S(y_t)                             on the reference answer
    grpo         -sum_t min(rho_t A, clip(rho_t) A) + kl_coef KL(p_S || initial p_S) - entropy_coef
                 H(p_S), where A is the completion's advantage over its group and
                 rho_t = p_S(y_t) / p_old(y_t)

S is the student, T the teacher, y the completion. Every distribution is restricted to the policy's
allowed tokens at the policy's temperature, for student and teacher alike. An objective runs inside
the forward of the student's head, which owns the weight. To add one, write a function with the
signature of `Objective` and name it in `OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fused_kl import (
    LinearKLOutput,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    topk_reverse_kl,
)
from opd.config.run import Config
from opd.device import fetch
from opd.generation.policy import Policy


class Loss(NamedTuple):
    """Result of an objective: `loss` is a differentiable scalar, the sum over N tokens; all others
    are detached fp32 `[N]`. It is a tuple because sharding engines find tensors only in tuples."""

    loss: torch.Tensor
    token_kl: torch.Tensor | None = None
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    student_logprobs: torch.Tensor | None = None

    def cpu(self) -> "Loss":
        """The same values on the host, without a graph."""
        values = {name: fetch(v) for name, v in self._asdict().items() if v is not None}
        return Loss(**values)


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of a loss at N completion tokens.

    Attributes:
        token_ids: int64 `[N]`, the tokens of the completions.
        policy: allowed tokens and temperature.
        teacher_hidden, teacher_lm_head: `[N, H_T]` and `[V', H_T]`; of the initial student for
            grpo with `kl_coef`; None for sft and for grpo without it.
        advantages: fp32 `[N]`; None where the objective uses no rewards.
        old_logprobs: fp32 `[N]`, of the student that sampled; None means the current one, rho = 1.
        token_weight: factor of every token's loss.
    """

    token_ids: torch.Tensor
    policy: Policy
    teacher_hidden: torch.Tensor | None = None
    teacher_lm_head: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    config: Config = field(default_factory=Config)
    token_weight: float = 1.0


def reverse_kl(
    targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor
) -> Loss:
    """KL(student || teacher) over the full vocabulary, or without the `opd.tolerance` of each row
    that is least likely; gradients are computed in forward."""
    sides, tolerance = (student_hidden, student_lm_head), targets.config.opd.tolerance
    rules = {"mode": "sparse", "tolerance": tolerance} if tolerance else {}
    return _divergence(targets, linear_reverse_kl, *sides, **rules)


def sampled(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """The published policy gradient on the sampled tokens, without clip and baseline.

    One update follows each batch of rollouts, so that the old log-probability is the current one,
    detached, and rho is 1.
    """
    sides = student_hidden, student_lm_head
    return _divergence(targets, linear_reverse_kl, *sides, estimator="sampled")


def jsd(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """Generalised Jensen-Shannon divergence with `opd.beta`; `token_kl` is its value."""
    sides = student_hidden, student_lm_head
    return _divergence(targets, linear_reverse_kl, *sides, beta=targets.config.opd.beta)


def topk(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """Reverse KL on the `opd.k` likeliest tokens of one model; `token_kl` is its value."""
    chosen = targets.config.opd
    rules = {"k": chosen.k, "support": chosen.support, "tail": chosen.tail}
    return _divergence(targets, topk_reverse_kl, student_hidden, student_lm_head, **rules)


def constant(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """Policy gradient with an advantage of -1 for every token; a control for `sampled`."""
    with torch.no_grad():
        exact = reverse_kl(targets, student_hidden, student_lm_head)
    out = linear_policy_loss(
        student_hidden,
        student_lm_head,
        targets.token_ids,
        advantages=torch.full(targets.token_ids.shape, -1.0, device=targets.token_ids.device),
        **_rules(targets, student_hidden),
    )
    return exact._replace(loss=out.loss)


def with_reward(
    targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor
) -> Loss:
    """The configured objective plus `opd.reward_coef` times the objective of grpo."""
    sides = student_hidden, student_lm_head
    distilled = OBJECTIVES[targets.config.objective](targets, *sides)
    weight = targets.config.opd.reward_coef * targets.token_weight
    rewarded = grpo(replace(targets, token_weight=weight), *sides)
    return distilled._replace(loss=distilled.loss + rewarded.loss)


def sft(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """Cross-entropy on the reference answer."""
    out = linear_cross_entropy(
        student_hidden,
        student_lm_head,
        targets.token_ids,
        **_rules(targets, student_hidden),
    )
    return Loss(out.loss, student_entropy=out.entropy, student_logprobs=out.logprobs)


def grpo(targets: Targets, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
    """Clipped policy gradient with the advantages of groups (arXiv 2402.03300)."""
    assert targets.advantages is not None
    rules = _rules(targets, student_hidden)
    reference = None
    if targets.config.grpo.kl_coef:
        assert targets.teacher_hidden is not None and targets.teacher_lm_head is not None
        with torch.no_grad():
            reference = linear_logprobs(
                targets.teacher_hidden,
                targets.teacher_lm_head,
                targets.token_ids,
                allowed_columns=targets.policy.allowed_columns,
                temperature=targets.policy.temperature,
            ).logprobs
    out = linear_policy_loss(
        student_hidden,
        student_lm_head,
        targets.token_ids,
        advantages=targets.advantages,
        old_logprobs=targets.old_logprobs,
        reference_logprobs=reference,
        clip=targets.config.grpo.clip,
        kl_coef=targets.config.grpo.kl_coef,
        entropy_coef=targets.config.grpo.entropy_coef,
        **rules,
    )
    return Loss(out.loss, student_entropy=out.entropy, student_logprobs=out.logprobs)


# Takes targets, student_hidden [N, H] and student_lm_head [V, H].
Objective = Callable[[Targets, torch.Tensor, torch.Tensor], Loss]

OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": reverse_kl,
    "sampled": sampled,
    "jsd": jsd,
    "topk": topk,
    "constant": constant,
    "sft": sft,
    "grpo": grpo,
}


def objective_of(config: Config) -> Objective:
    """The objective that the configuration names."""
    if config.opd.reward_coef:
        return with_reward
    return OBJECTIVES[config.objective if config.method == "opd" else config.method]


def _divergence(
    targets: Targets,
    function: Callable[..., LinearKLOutput],
    student_hidden: torch.Tensor,
    student_lm_head: torch.Tensor,
    **rules: Any,
) -> Loss:
    assert targets.teacher_hidden is not None and targets.teacher_lm_head is not None
    out = function(
        student_hidden,
        student_lm_head,
        targets.teacher_hidden,
        targets.teacher_lm_head,
        token_ids=targets.token_ids,
        **_rules(targets, student_hidden),
        **rules,
    )
    return Loss(
        out.loss,
        out.token_kl,
        out.student_entropy,
        out.teacher_entropy,
        out.student_logprobs,
    )


def _rules(targets: Targets, student_hidden: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of every fused loss: the policy, and the weights of the tokens."""
    count, dtype = len(student_hidden), torch.promote_types(student_hidden.dtype, torch.float32)
    return {
        "allowed_columns": targets.policy.allowed_columns,
        "temperature": targets.policy.temperature,
        "token_weights": torch.full(
            (count,), targets.token_weight, dtype=dtype, device=student_hidden.device
        ),
    }

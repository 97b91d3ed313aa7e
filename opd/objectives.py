"""Objectives: hidden states -> loss and per-token statistics, summed over valid completion tokens.

    reverse_kl   sum_t sum_v p_S(v) (log p_S(v) - log p_T(v))    over the allowed vocabulary
    sampled      -sum_t rho_t A_t                                Video-OPD (arXiv 2602.02994), with
                 A_t = sg[log p_T(y_t) - log p_S(y_t)] and rho_t = p_S(y_t) / sg p_S(y_t)
    jsd          sum_t JSD_beta(p_T, p_S)                        beta 0 is the forward KL
    topk         sum_t KL(p_S || p_T) on the k likeliest tokens  renormalised, or with a tail
    constant     sum_t log p_S(y_t)                              a control: the advantage is -1
    sft          -sum_t log p_S(y_t)                             on the reference answer
    grpo         -sum_t min(rho_t A, clip(rho_t) A) + kl_coef KL to the student as it started
                 A one completion's advantage over its group, rho_t = p_S(y_t) / p_old(y_t)

Every distribution is the policy's: its allowed tokens and its temperature, for student and teacher
alike. Each objective runs inside the forward of the student's head, which owns the weight.
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
from opd.config import Config
from opd.device import fetch
from opd.rollout import Policy


class Loss(NamedTuple):
    """`loss` is a differentiable scalar, a sum over tokens. The rest is detached, fp32 `[N]`, one
    value per valid token. A tuple, because sharding engines look for tensors in tuples alone."""

    loss: torch.Tensor
    token_kl: torch.Tensor | None = None
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    student_logprobs: torch.Tensor | None = None

    def cpu(self) -> "Loss":
        """The same numbers, without a graph."""
        found = {k: fetch(v) for k, v in self._asdict().items() if v is not None}
        return Loss(**found)


@dataclass(frozen=True, eq=False)
class Targets:
    """What a loss compares the student with: N valid completion tokens, and the teacher's view of
    them.

    `token_ids` int64 `[N]`; `teacher_hidden` `[N, H_T]` and `teacher_lm_head` `[V', H_T]`, absent
    for sft, and for grpo those of the starting student, if it is asked for. `advantages` and
    `old_logprobs` fp32 `[N]` are those of grpo; without the latter rho is 1. `token_weight` is the
    factor of every token's loss.
    """

    token_ids: torch.Tensor
    policy: Policy
    teacher_hidden: torch.Tensor | None = None
    teacher_lm_head: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    config: Config = field(default_factory=Config)
    token_weight: float = 1.0

    def _rules(self, student_hidden: torch.Tensor) -> dict[str, Any]:
        """What every loss is told: the policy, and the weights of the tokens."""
        count, dtype = len(student_hidden), torch.promote_types(student_hidden.dtype, torch.float32)
        return {
            "allowed_columns": self.policy.allowed_columns,
            "temperature": self.policy.temperature,
            "token_weights": torch.full(
                (count,), self.token_weight, dtype=dtype, device=student_hidden.device
            ),
        }

    def reverse_kl(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """Full-vocabulary KL(student || teacher), `student_hidden` `[N, H]`, gradients made in
        forward."""
        return self._divergence(linear_reverse_kl, student_hidden, student_lm_head)

    def sampled(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The published policy gradient on the sampled tokens: no clip, no baseline.

        One update follows each batch of rollouts, so the old log-probability is the current one,
        detached, and rho is 1.
        """
        sides = student_hidden, student_lm_head
        return self._divergence(linear_reverse_kl, *sides, estimator="sampled")

    def jsd(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The generalised Jensen-Shannon divergence; `token_kl` is its value."""
        sides = student_hidden, student_lm_head
        return self._divergence(linear_reverse_kl, *sides, beta=self.config.opd.beta)

    def topk(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The reverse KL on the likeliest tokens of one side; `token_kl` is its value."""
        chosen = self.config.opd
        rules = {"k": chosen.k, "support": chosen.support, "tail": chosen.tail}
        return self._divergence(topk_reverse_kl, student_hidden, student_lm_head, **rules)

    def constant(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """What the same advantage, -1, for every token does: a control for `sampled`."""
        with torch.no_grad():
            exact = self.reverse_kl(student_hidden, student_lm_head)
        out = linear_policy_loss(
            student_hidden,
            student_lm_head,
            self.token_ids,
            advantages=torch.full(self.token_ids.shape, -1.0, device=self.token_ids.device),
            **self._rules(student_hidden),
        )
        return exact._replace(loss=out.loss)

    def with_reward(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The configured objective plus `opd.reward_coef` times the group's policy gradient."""
        sides = student_hidden, student_lm_head
        distilled = getattr(self, self.config.objective)(*sides)
        weight = self.config.opd.reward_coef * self.token_weight
        rewarded = replace(self, token_weight=weight).grpo(*sides)
        return distilled._replace(loss=distilled.loss + rewarded.loss)

    def _divergence(
        self,
        function: Callable[..., LinearKLOutput],
        student_hidden: torch.Tensor,
        student_lm_head: torch.Tensor,
        **rules: Any,
    ) -> Loss:
        assert self.teacher_hidden is not None and self.teacher_lm_head is not None
        out = function(
            student_hidden,
            student_lm_head,
            self.teacher_hidden,
            self.teacher_lm_head,
            token_ids=self.token_ids,
            **self._rules(student_hidden),
            **rules,
        )
        return Loss(
            out.loss,
            out.token_kl,
            out.student_entropy,
            out.teacher_entropy,
            out.student_logprobs,
        )

    def sft(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """Cross-entropy on the reference answer."""
        out = linear_cross_entropy(
            student_hidden,
            student_lm_head,
            self.token_ids,
            **self._rules(student_hidden),
        )
        return Loss(out.loss, student_entropy=out.entropy, student_logprobs=out.logprobs)

    def grpo(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The clipped surrogate of the group's advantages (arXiv 2402.03300)."""
        assert self.advantages is not None
        rules = self._rules(student_hidden)
        reference = None
        if self.config.grpo.kl_coef:
            assert self.teacher_hidden is not None and self.teacher_lm_head is not None
            with torch.no_grad():
                reference = linear_logprobs(
                    self.teacher_hidden,
                    self.teacher_lm_head,
                    self.token_ids,
                    allowed_columns=self.policy.allowed_columns,
                    temperature=self.policy.temperature,
                ).logprobs
        out = linear_policy_loss(
            student_hidden,
            student_lm_head,
            self.token_ids,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            reference_logprobs=reference,
            clip=self.config.grpo.clip,
            kl_coef=self.config.grpo.kl_coef,
            **rules,
        )
        return Loss(out.loss, student_entropy=out.entropy, student_logprobs=out.logprobs)

"""Objectives: hidden states -> loss and per-token statistics, summed over valid completion tokens.

    reverse_kl   sum_t sum_v p_S(v) (log p_S(v) - log p_T(v))    over the allowed vocabulary
    sampled      -sum_t rho_t A_t                                Video-OPD (arXiv 2602.02994), with
                 A_t = sg[log p_T(y_t) - log p_S(y_t)] and rho_t = p_S(y_t) / sg p_S(y_t)
    sft          -sum_t log p_S(y_t)                             on the reference answer

Every distribution is the policy's: its allowed tokens and its temperature, for student and teacher
alike. Each objective runs inside the forward of the student's head, which owns the weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from fused_kl import linear_cross_entropy, linear_reverse_kl
from opd.rollout import Policy


@dataclass(frozen=True, eq=False)
class Loss:
    """`loss` is a differentiable scalar, a sum over tokens. The rest is detached, fp32 `[N]`, one
    value per valid token."""

    loss: torch.Tensor
    token_kl: torch.Tensor | None = None
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    student_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Targets:
    """What a loss compares the student with: N valid completion tokens, and the teacher's view of
    them.

    `token_ids` int64 `[N]`; `teacher_hidden` `[N, H_T]` and `teacher_lm_head` `[V', H_T]`, absent
    for sft.
    """

    token_ids: torch.Tensor
    policy: Policy
    teacher_hidden: torch.Tensor | None = None
    teacher_lm_head: torch.Tensor | None = None

    def reverse_kl(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """Full-vocabulary KL(student || teacher), `student_hidden` `[N, H]`, gradients made in
        forward."""
        return self._divergence(student_hidden, student_lm_head, "full")

    def sampled(self, student_hidden: torch.Tensor, student_lm_head: torch.Tensor) -> Loss:
        """The published policy gradient on the sampled tokens: no clip, no baseline.

        One update follows each batch of rollouts, so the old log-probability is the current one,
        detached, and rho is 1.
        """
        return self._divergence(student_hidden, student_lm_head, "sampled")

    def _divergence(
        self,
        student_hidden: torch.Tensor,
        student_lm_head: torch.Tensor,
        estimator: Literal["full", "sampled"],
    ) -> Loss:
        assert self.teacher_hidden is not None and self.teacher_lm_head is not None
        out = linear_reverse_kl(
            student_hidden,
            student_lm_head,
            self.teacher_hidden,
            self.teacher_lm_head,
            token_ids=self.token_ids,
            allowed_columns=self.policy.allowed_columns,
            temperature=self.policy.temperature,
            estimator=estimator,
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
            allowed_columns=self.policy.allowed_columns,
            temperature=self.policy.temperature,
        )
        return Loss(out.loss, student_entropy=out.entropy, student_logprobs=out.logprobs)

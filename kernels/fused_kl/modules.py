"""The losses as nn.Modules: options once, tensors at every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_kl.linear import LinearKLOutput, linear_reverse_kl, topk_reverse_kl
from fused_kl.policy import LinearPolicyOutput, linear_cross_entropy, linear_policy_loss


class _Loss(nn.Module):
    """Keyword arguments of the constructor are those of the function of the same name."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearReverseKL(_Loss):
    """`linear_reverse_kl` with fixed options: beta, temperature, mode, ..."""

    def forward(
        self,
        student_hidden: Tensor,
        student_lm_head: Tensor,
        teacher_hidden: Tensor,
        teacher_lm_head: Tensor,
        **tensors: Tensor | None,
    ) -> LinearKLOutput:
        """`tensors` are the optional ones: token_weights, token_ids, allowed_columns, biases."""
        sides = student_hidden, student_lm_head, teacher_hidden, teacher_lm_head
        return linear_reverse_kl(*sides, **self.options, **tensors)  # pyright: ignore


class TopKReverseKL(_Loss):
    """`topk_reverse_kl` with fixed options: k, support, tail, ..."""

    def forward(
        self,
        student_hidden: Tensor,
        student_lm_head: Tensor,
        teacher_hidden: Tensor,
        teacher_lm_head: Tensor,
        **tensors: Tensor | None,
    ) -> LinearKLOutput:
        """As in `LinearReverseKL`."""
        sides = student_hidden, student_lm_head, teacher_hidden, teacher_lm_head
        return topk_reverse_kl(*sides, **self.options, **tensors)  # pyright: ignore


class LinearPolicyLoss(_Loss):
    """`linear_policy_loss` with fixed options: clip, temperature, ..."""

    def forward(
        self, hidden: Tensor, lm_head: Tensor, token_ids: Tensor, **tensors: Tensor | None
    ) -> LinearPolicyOutput:
        """`tensors` are advantages, and the optional old_logprobs, token_weights, ..."""
        return linear_policy_loss(hidden, lm_head, token_ids, **self.options, **tensors)  # pyright: ignore


class LinearCrossEntropy(_Loss):
    """`linear_cross_entropy` with fixed options."""

    def forward(
        self, hidden: Tensor, lm_head: Tensor, token_ids: Tensor, **tensors: Tensor | None
    ) -> LinearPolicyOutput:
        """`tensors` are the optional token_weights, allowed_columns and bias."""
        return linear_cross_entropy(hidden, lm_head, token_ids, **self.options, **tensors)  # pyright: ignore

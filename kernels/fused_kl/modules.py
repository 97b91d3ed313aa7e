"""The losses as nn.Modules, which take options once and tensors at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fused_kl.linear import linear_reverse_kl, topk_reverse_kl
from fused_kl.policy import linear_cross_entropy, linear_policy_loss


class _Loss(nn.Module):
    """`function` with fixed options, which are keyword arguments of it; a call takes its tensors,
    positional or by keyword, and returns its result."""

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *arguments: Tensor, **tensors: Tensor | None) -> Any:
        return type(self).function(*arguments, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearReverseKL(_Loss):
    """`linear_reverse_kl`: options beta, temperature, mode, ...; a call takes the student's hidden
    states and head, the teacher's, and the optional token_weights, token_ids, ..."""

    function = linear_reverse_kl


class TopKReverseKL(_Loss):
    """`topk_reverse_kl`: options k, support, tail, ...; a call is that of `LinearReverseKL`."""

    function = topk_reverse_kl


class LinearPolicyLoss(_Loss):
    """`linear_policy_loss`: options clip, entropy_coef, ...; a call takes hidden states, head and
    token ids, `advantages`, and the optional old_logprobs, token_weights, ..."""

    function = linear_policy_loss


class LinearCrossEntropy(_Loss):
    """`linear_cross_entropy`: a call takes hidden states, head, token ids and the optional
    token_weights, allowed_columns and bias."""

    function = linear_cross_entropy

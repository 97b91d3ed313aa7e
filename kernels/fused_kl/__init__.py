"""Losses of a language-model head from hidden states, without holding `[tokens, vocab]` logits."""

from fused_kl.linear import LinearKLOutput, linear_reverse_kl, topk_reverse_kl
from fused_kl.logits import jsd, reverse_kl
from fused_kl.logprobs import LinearLogprobsOutput, linear_logprobs
from fused_kl.modules import LinearCrossEntropy, LinearPolicyLoss, LinearReverseKL, TopKReverseKL
from fused_kl.policy import LinearPolicyOutput, linear_cross_entropy, linear_policy_loss

__version__ = "0.2.0"

__all__ = [
    "LinearCrossEntropy",
    "LinearKLOutput",
    "LinearLogprobsOutput",
    "LinearPolicyLoss",
    "LinearPolicyOutput",
    "LinearReverseKL",
    "TopKReverseKL",
    "jsd",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_reverse_kl",
    "reverse_kl",
    "topk_reverse_kl",
]

"""Losses of sampled tokens, straight from hidden states: policy gradient and cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fused_kl import checks
from fused_kl.chunks import Gradients, HeadRules, LossWithGradients, Needs
from fused_kl.tiles import Plan
from fused_kl.tokens import Objective, TokenOptions, TokenPass, check_token_arguments


@dataclass(frozen=True, kw_only=True)
class LinearPolicyOutput:
    """What the losses of sampled tokens return; fp32, or fp64 for fp64 inputs; values in nats.

    `loss` is a differentiable scalar. `logprobs` and `entropy` are [N], detached, not weighted, and
    0 in rows of weight 0. `plan` says how many rows of logits were alive at once.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    plan: Plan


def linear_policy_loss(
    hidden: Tensor,
    lm_head: Tensor,
    token_ids: Tensor,
    *,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    clip: float | None = None,
    kl_coef: float = 0.0,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearPolicyOutput:
    """loss = -sum_n w_n min(rho_n A_n, clip(rho_n, 1-c, 1+c) A_n), rho = exp(logprob - old).

    Without `clip` the loss is -sum_n w_n rho_n A_n. With `reference_logprobs` r the penalty
    kl_coef sum_n w_n (e^d - d - 1), d = r - logprob, is added, whose mean over samples is the KL to
    the reference. Gradients are computed in forward: 3 GEMM units, no `[N, V]`, only one backward.

    Args:
        hidden: `[N, H]` fp16, bf16, fp32 or fp64, after the final norm.
        lm_head: `[V, H]`; its gradient is skipped when it does not require grad.
        token_ids: `[N]` int64 or int32, in [0, V); anything in rows of weight 0.
        advantages: `[N]`, constants.
        old_logprobs: `[N]` constants under the same policy; None means the current ones, so that
            rho = 1 and the gradient is -w A dlogprob.
        reference_logprobs: `[N]` constants of a frozen policy, for the penalty.
        token_weights: `[N]`, default ones: factors of each row's loss, penalty included, and of its
            gradient. A row of weight 0 is left out and may hold NaN. With 1/denominator in them the
            loss needs no division, and backward makes no pass over the head's gradient.
        clip: half-width c of the trust interval, in (0, 1), or None.
        kl_coef: of the penalty, at least 0.
        allowed_columns: `[V]` bool; other columns get probability 0 before normalisation. A token
            outside has logprob -inf and moves nothing.
        temperature: divides the logits.
        bias: `[V]`, may require grad.
        softcap: c > 0 replaces the logits z by c tanh(z / c), before the temperature.
        logit_scale: multiplies the logits, before softcap and temperature.
        chunk_size: tokens at once; "auto" keeps to a memory budget (`fused_kl.tiles`).

    Raises:
        ValueError: on a wrong shape, dtype, device or range, or constants that require grad.
        RuntimeError: on a second backward.

    Source: the clipped surrogate of PPO (arXiv 1707.06347), with the penalty of GRPO (2402.03300).
    """
    constants = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "reference_logprobs": reference_logprobs,
    }
    checks.check_rows(hidden.shape[0], **constants)
    checks.check_frozen("constants", **constants)
    checks.check_same_device("hidden", hidden, **constants)
    checks.check_clip(clip)
    checks.check_kl_coef(kl_coef, reference_logprobs)

    def objective(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        advantage = advantages[rows].to(logprobs.dtype)
        if old_logprobs is None:
            ratio = torch.ones_like(logprobs)
        else:
            ratio = (logprobs - old_logprobs[rows].to(logprobs.dtype)).exp()
            ratio = ratio.masked_fill(logprobs.isneginf(), 0)
        value = slope = -ratio * advantage
        if clip is not None:
            clipped = -ratio.clamp(1 - clip, 1 + clip) * advantage
            slope = torch.where(value >= clipped, value, 0)
            value = torch.maximum(value, clipped)
        if reference_logprobs is not None:
            distance = reference_logprobs[rows].to(logprobs.dtype) - logprobs
            distance = distance.masked_fill(logprobs.isneginf(), 0)
            value = value + kl_coef * (distance.expm1() - distance)
            slope = slope - kl_coef * distance.expm1()
        return value, slope

    return _token_loss(
        hidden,
        lm_head,
        token_ids,
        objective,
        token_weights,
        bias,
        TokenOptions(allowed_columns, HeadRules(temperature, softcap, logit_scale), chunk_size),
    )


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    token_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearPolicyOutput:
    """loss = -sum_n w_n log softmax((hidden_n @ lm_head.T + bias) / temperature)[token_ids_n].

    The policy loss at advantage 1, with the log-probability as its value. Arguments, shapes and
    errors as in `linear_policy_loss`; a token outside `allowed_columns` makes the loss +inf, and
    still moves nothing.
    """
    return _token_loss(
        hidden,
        lm_head,
        token_ids,
        lambda rows, logprobs: (-logprobs, -torch.ones_like(logprobs)),
        token_weights,
        bias,
        TokenOptions(allowed_columns, HeadRules(temperature, softcap, logit_scale), chunk_size),
    )


@torch.compiler.disable()  # a clean break of the graph: there is no custom op for it
def _token_loss(
    hidden: Tensor,
    lm_head: Tensor,
    token_ids: Tensor,
    objective: Objective,
    token_weights: Tensor | None,
    bias: Tensor | None,
    options: TokenOptions,
) -> LinearPolicyOutput:
    check_token_arguments(hidden, lm_head, bias, token_ids, options)
    checks.check_rows(hidden.shape[0], token_weights=token_weights)
    checks.check_frozen("constants", token_weights=token_weights)
    checks.check_same_device("hidden", hidden, token_weights=token_weights)
    checks.check_token_range(token_ids, lm_head.shape[0], token_weights)
    token_ids, active, masked = token_ids.long(), None, None
    if token_weights is not None:
        active, masked = token_weights != 0, token_weights == 0
        token_ids = token_ids * active
    token_pass = TokenPass(hidden, lm_head, bias, token_ids, options, active)
    needs = Needs.of(hidden, lm_head, bias)

    def weighted(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = objective(rows, logprobs)
        if token_weights is None or masked is None:
            return value, slope
        weights = token_weights[rows].to(value.dtype)
        # Not a plain product: the row of a masked token may be inf or NaN, and 0 * NaN spreads.
        left_out = masked[rows]
        value, slope = value * weights, slope * weights
        return value.masked_fill_(left_out, 0), slope.masked_fill_(left_out, 0)

    def run() -> tuple[Tensor, tuple[Tensor, ...], Gradients]:
        losses, *details, gradients = token_pass.run(needs, weighted)
        if masked is not None:
            details = [detail.masked_fill_(masked, 0) for detail in details]
        return losses.sum(), tuple(details), gradients

    if any(needs):
        loss, logprobs, entropy = LossWithGradients.apply(run, hidden, lm_head, bias)
    else:
        loss, (logprobs, entropy), _ = run()
    return LinearPolicyOutput(loss=loss, logprobs=logprobs, entropy=entropy, plan=token_pass.plan)

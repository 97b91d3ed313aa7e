"""Losses of given tokens, from hidden states: policy gradient and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fused_kl import checks
from fused_kl.arguments import (
    LogitOptions,
    NeedsGrad,
    TokenInputs,
    TokenOptions,
    under_autocast,
)
from fused_kl.gradients import ComputedLoss, LossWithGradients
from fused_kl.sharded import checked_tokens
from fused_kl.tiles import Plan
from fused_kl.token_pass import RowLoss, TokenPass


@dataclass(frozen=True, kw_only=True)
class LinearPolicyOutput:
    """Result of a loss of given tokens; fp32, or fp64 for fp64 inputs; values in nats.

    Attributes:
        loss: a differentiable scalar.
        logprobs: `[N]`, log-probabilities of `token_ids`.
        entropy: `[N]`.
        plan: how many rows of logits were held at once.

    `logprobs` and `entropy` are detached, not weighted, and 0 in rows of weight 0.
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
    entropy_coef: float = 0.0,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
    group: ProcessGroup | None = None,
) -> LinearPolicyOutput:
    """loss = -sum_n w_n min(rho_n A_n, clip(rho_n, 1-c, 1+c) A_n), rho = exp(logprob - old).

    Without `clip` the loss is -sum_n w_n rho_n A_n. With `reference_logprobs` r the penalty
    kl_coef sum_n w_n (e^d - d - 1), d = r - logprob, is added; its expectation is the KL to the
    reference. The entropy bonus entropy_coef sum_n w_n H_n is subtracted; H_n = -sum_v p log p over
    the allowed columns, at the loss's temperature. Gradients are computed in forward: 3 GEMM units,
    no `[N, V]`, a single backward.

    Args:
        hidden: `[N, H]` fp16, bf16, fp32 or fp64, after the final norm.
        lm_head: `[V, H]`; its gradient is skipped when it does not require grad.
        token_ids: `[N]` int64 or int32, in [0, V); any value in rows of weight 0.
        advantages: `[N]`, without grad.
        old_logprobs: `[N]`, without grad, under the policy that sampled; None stands for the
            current log-probabilities, so that rho = 1 and the gradient is -w A dlogprob.
        reference_logprobs: `[N]`, without grad, of a frozen policy, for the penalty.
        token_weights: `[N]`, default ones: factors of each row's loss, penalty and bonus included,
            and of its gradient. A row of weight 0 is left out and may hold NaN. If they include
            1/denominator, the loss needs no division, and backward makes no pass over the head's
            gradient.
        clip: half-width c of the interval around 1 that rho is clipped to, in (0, 1), or None.
        kl_coef: coefficient of the penalty, at least 0.
        entropy_coef: coefficient of the entropy bonus, at least 0.
        allowed_columns: `[V]` bool; other columns get probability 0 before normalisation. A token
            among these has logprob -inf, and its row has no gradient but that of the entropy bonus.
        temperature: divides the logits.
        bias: `[V]`, may require grad.
        softcap: c > 0 replaces the logits z by c tanh(z / c), before the temperature.
        logit_scale: multiplies the logits, before softcap and temperature.
        chunk_size: tokens at once; "auto" keeps to a memory budget (`fused_kl.tiles`).
        group: process group whose ranks divide the vocabulary in their order, as in
            `linear_reverse_kl`; `token_ids` are those of the whole vocabulary.

    Raises:
        ValueError: on a wrong shape, dtype, device or range, or a constant that requires grad.
        RuntimeError: on a second backward.

    Source: the clipped surrogate of PPO (arXiv 1707.06347), with the penalty of GRPO (2402.03300).
    """
    constants = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "reference_logprobs": reference_logprobs,
    }

    def check() -> None:
        checks.check_rows(hidden.shape[0], **constants)
        checks.check_frozen("constants", **constants)
        checks.check_same_device("hidden", hidden, **constants)
        if clip is not None and not 0.0 < clip < 1.0:
            raise ValueError(f"clip is {clip}, expected None or a number in (0, 1)")
        checks.check_coefficient("kl_coef", kl_coef)
        if kl_coef > 0 and reference_logprobs is None:
            raise ValueError(f"kl_coef is {kl_coef} without reference_logprobs, expected both")
        checks.check_coefficient("entropy_coef", entropy_coef)

    def row_loss(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
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
        TokenInputs(hidden, lm_head, bias, token_ids, allowed_columns),
        TokenOptions(
            LogitOptions(temperature, softcap, logit_scale), checks.chunk_rows(chunk_size)
        ),
        token_weights,
        row_loss,
        entropy_coef,
        group=group,
        check=check,
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
    group: ProcessGroup | None = None,
) -> LinearPolicyOutput:
    """loss = -sum_n w_n log softmax((hidden_n @ lm_head.T + bias) / temperature)[token_ids_n].

    Its gradient is that of `linear_policy_loss` at advantage 1, whose arguments, shapes and errors
    it has. A token outside `allowed_columns` makes the loss +inf and has no gradient.
    """

    def row_loss(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        return -logprobs, -torch.ones_like(logprobs)

    return _token_loss(
        TokenInputs(hidden, lm_head, bias, token_ids, allowed_columns),
        TokenOptions(
            LogitOptions(temperature, softcap, logit_scale), checks.chunk_rows(chunk_size)
        ),
        token_weights,
        row_loss,
        group=group,
    )


@torch.compiler.disable()  # breaks the graph cleanly: this loss has no custom op
def _token_loss(
    inputs: TokenInputs,
    options: TokenOptions,
    token_weights: Tensor | None,
    row_loss: RowLoss,
    entropy_coef: float = 0.0,
    *,
    group: ProcessGroup | None,
    check: Callable[[], None] = lambda: None,
) -> LinearPolicyOutput:
    inputs = under_autocast(inputs)

    def check_weights() -> None:
        check()
        checks.check_rows(inputs.num_rows, token_weights=token_weights)
        checks.check_frozen("constants", token_weights=token_weights)
        checks.check_same_device("hidden", inputs.hidden, token_weights=token_weights)

    options = checked_tokens(inputs, options, group, token_weights, check_weights)
    token_ids, active, masked = inputs.token_ids.long(), None, None
    if token_weights is not None:
        active, masked = token_weights != 0, token_weights == 0
        token_ids = token_ids * active
    token_pass = TokenPass(inputs._replace(token_ids=token_ids), options, active)

    def weighted(rows: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = row_loss(rows, logprobs)
        if token_weights is None or masked is None:
            return value, slope
        weights = token_weights[rows].to(value.dtype)
        # A product alone would not do: the row of a masked token may be inf or NaN, and 0 * NaN
        # is NaN.
        masked_rows = masked[rows]
        value, slope = value * weights, slope * weights
        return value.masked_fill_(masked_rows, 0), slope.masked_fill_(masked_rows, 0)

    entropy_slopes = None
    if entropy_coef:
        weights = token_weights
        if weights is None:
            weights = inputs.hidden.new_ones(inputs.num_rows)
        entropy_slopes = -entropy_coef * weights.to(token_pass.dtype)
    losses, *details, gradients = token_pass.run(
        NeedsGrad.of(inputs.head), weighted, entropy_slopes=entropy_slopes
    )
    if masked is not None:
        details = [detail.masked_fill_(masked, 0) for detail in details]
    if entropy_slopes is not None:
        losses.addcmul_(entropy_slopes, details[-1])
    computed = ComputedLoss(losses.sum(), tuple(details), gradients)
    loss, logprobs, entropy = LossWithGradients.apply(computed, *inputs.head)
    return LinearPolicyOutput(loss=loss, logprobs=logprobs, entropy=entropy, plan=token_pass.plan)

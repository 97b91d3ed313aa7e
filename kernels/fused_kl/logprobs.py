"""Sampled-token log-probabilities and entropy, straight from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import checks
from fused_kl.chunks import Gradients, HeadRules, Needs, compute_dtype, multiplies_half
from fused_kl.tiles import Plan
from fused_kl.tokens import TokenOptions, TokenPass, check_token_arguments, token_plan


@dataclass(frozen=True, kw_only=True)
class LinearLogprobsOutput:
    """What `linear_logprobs` returns, [N] each; fp32, or fp64 for fp64 inputs; values in nats.

    `logprobs` is differentiable, `entropy` detached. `plan` says how many rows of logits were alive
    at once.
    """

    logprobs: Tensor
    entropy: Tensor
    plan: Plan


@torch.compiler.disable()  # a clean break of the graph: there is no custom op for it
def linear_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    token_ids: Tensor,
    *,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
) -> LinearLogprobsOutput:
    """logprobs_n = log softmax((hidden_n @ lm_head.T + bias) / temperature)[token_ids_n].

    Chunked over tokens. A row's gradient is known in forward but for a factor, so that a frozen
    head takes 2 GEMM units. A trained one takes 3 where all rows are one chunk: the gradient of the
    logits is then kept until backward, if it is no larger than the head's. Else, and with a trained
    bias, the logits are made again in backward (4): `linear_policy_loss` takes 3 always.

    Args:
        hidden: `[N, H]` fp16, bf16, fp32 or fp64, after the final norm.
        lm_head: `[V, H]`; its gradient is skipped when it does not require grad.
        token_ids: `[N]` int64 or int32, in [0, V).
        allowed_columns: `[V]` bool; other columns get probability 0 before normalisation. A token
            outside has logprob -inf and moves nothing.
        temperature: divides the logits.
        bias: `[V]`, may require grad.
        softcap: c > 0 replaces the logits z by c tanh(z / c), before the temperature.
        logit_scale: multiplies the logits, before softcap and temperature.
        chunk_size: tokens at once; "auto" keeps to a memory budget (`fused_kl.tiles`).

    Raises:
        ValueError: on a wrong shape, dtype, device or range.
    """
    rules = HeadRules(temperature, softcap, logit_scale)
    options = TokenOptions(allowed_columns, rules, chunk_size)
    check_token_arguments(hidden, lm_head, bias, token_ids, options)
    checks.check_token_range(token_ids, lm_head.shape[0])
    needs = Needs.of(hidden, lm_head, bias)
    plan = token_plan(hidden, lm_head, bias, options)
    function = _Ahead if _is_ahead(needs, hidden, lm_head, plan) else _Recomputed
    logprobs, entropy = function.apply(hidden, lm_head, bias, token_ids.long(), options)
    return LinearLogprobsOutput(logprobs=logprobs, entropy=entropy, plan=plan)


def _is_ahead(needs: Needs, hidden: Tensor, lm_head: Tensor, plan: Plan) -> bool:
    """Whether forward prepares the gradients: not where that costs memory beyond the head's own."""
    if needs.bias or not needs.lm_head:
        return needs.hidden and not needs.bias
    half = multiplies_half(hidden, lm_head)
    itemsize = (torch.bfloat16 if half else compute_dtype(hidden, lm_head)).itemsize
    num_rows, hidden_size = hidden.shape
    return plan.rows >= num_rows and num_rows * itemsize <= hidden_size * lm_head.itemsize


class _Ahead(torch.autograd.Function):
    """Forward makes d logprob / d hidden, and keeps d logprob / d logits for the head's gradient;
    backward multiplies by the rows' factors."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        options: TokenOptions,
    ):
        # The loss may ignore a row of NaN, and 0 * NaN spreads: products get zeros in its place.
        finite = hidden.isfinite().all(1)
        token_pass = TokenPass(hidden, lm_head, bias, token_ids, options, finite)
        _, logprobs, entropy, gradients = token_pass.run(
            Needs(ctx.needs_input_grad[0], False, False),
            lambda _, logprobs: (logprobs, torch.ones_like(logprobs)),
            keep=ctx.needs_input_grad[1],
        )
        for values in (logprobs, entropy):
            values.masked_fill_(~finite, torch.nan)
        if gradients.hidden is not None:
            gradients.hidden.masked_fill_(~finite[:, None], torch.nan)
        ctx.save_for_backward(hidden, logprobs.isneginf())
        ctx.side = token_pass.side
        ctx.hidden_grad, ctx.logits_grad = gradients.hidden, token_pass.logits_grad
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, _):  # pyright: ignore
        hidden, banned = ctx.saved_tensors
        factors = grad_logprobs.masked_fill(banned, 0)[:, None]

        def weighted(rows: Tensor) -> Tensor:
            return torch.where(factors != 0, rows * factors, 0)

        hidden_grad = lm_head_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = weighted(ctx.hidden_grad).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            num_rows, vocab = len(hidden), ctx.side.num_columns
            head = Gradients(ctx.side, Needs(False, True, False), num_rows, vocab, num_rows)
            if num_rows:
                every = slice(0, num_rows), slice(0, vocab)
                head.add(*every, weighted(hidden), ctx.logits_grad)
            lm_head_grad = head.take()[1].to(ctx.side.lm_head.dtype)  # type: ignore[union-attr]
        return hidden_grad, lm_head_grad, None, None, None


class _Recomputed(torch.autograd.Function):
    """Forward keeps its inputs alone; backward makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        options: TokenOptions,
    ):
        token_pass = TokenPass(hidden, lm_head, bias, token_ids, options)
        _, logprobs, entropy, _ = token_pass.run(Needs(False, False, False), None)
        ctx.save_for_backward(hidden, lm_head, bias, token_ids)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, _):  # pyright: ignore
        hidden, lm_head, bias, token_ids = ctx.saved_tensors
        # Rows that the loss ignores may hold NaN hidden states, like those of weight 0 elsewhere.
        active = grad_logprobs != 0
        token_pass = TokenPass(hidden, lm_head, bias, token_ids, ctx.options, active)
        *_, gradients = token_pass.run(
            Needs(*ctx.needs_input_grad[:3]), lambda rows, logprobs: (logprobs, grad_logprobs[rows])
        )
        cast = (
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients.take(), (hidden, lm_head, bias), strict=True)
        )
        return *cast, None, None

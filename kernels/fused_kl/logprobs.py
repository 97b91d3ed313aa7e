"""Log-probabilities of given tokens, and entropy, from hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fused_kl import checks, head
from fused_kl.arguments import (
    NO_GRAD,
    LogitOptions,
    NeedsGrad,
    TokenInputs,
    TokenOptions,
    under_autocast,
)
from fused_kl.gradients import GradientSums, cast_to_inputs
from fused_kl.sharded import checked_tokens
from fused_kl.tiles import Plan
from fused_kl.token_pass import TokenPass, plan_of


@dataclass(frozen=True, kw_only=True)
class LinearLogprobsOutput:
    """Result of `linear_logprobs`; fp32, or fp64 for fp64 inputs; values in nats.

    Attributes:
        logprobs: `[N]`, differentiable.
        entropy: `[N]`, detached.
        plan: how many rows of logits were held at once.
    """

    logprobs: Tensor
    entropy: Tensor
    plan: Plan


@torch.compiler.disable()  # breaks the graph cleanly: this loss has no custom op
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
    group: ProcessGroup | None = None,
) -> LinearLogprobsOutput:
    """logprobs_n = log softmax((hidden_n @ lm_head.T + bias) / temperature)[token_ids_n].

    Computed in chunks of tokens. Forward knows each row's gradient up to a factor, so that a frozen
    head takes 2 GEMM units. A trained head takes 3 where all rows are one chunk and the gradient of
    the logits is no larger than the head: it is then kept until backward. Otherwise, and with a
    trained bias, backward computes the logits again (4). `linear_policy_loss` always takes 3.

    Args:
        hidden: `[N, H]` fp16, bf16, fp32 or fp64, after the final norm.
        lm_head: `[V, H]`; its gradient is skipped when it does not require grad.
        token_ids: `[N]` int64 or int32, in [0, V).
        allowed_columns: `[V]` bool; other columns get probability 0 before normalisation. A token
            among these has logprob -inf and no gradient.
        temperature: divides the logits.
        bias: `[V]`, may require grad.
        softcap: c > 0 replaces the logits z by c tanh(z / c), before the temperature.
        logit_scale: multiplies the logits, before softcap and temperature.
        chunk_size: tokens at once; "auto" keeps to a memory budget (`fused_kl.tiles`).
        group: process group whose ranks divide the vocabulary in their order, as in
            `linear_reverse_kl`; `token_ids` are those of the whole vocabulary.

    Raises:
        ValueError: on a wrong shape, dtype, device or range.
    """
    inputs = under_autocast(TokenInputs(hidden, lm_head, bias, token_ids, allowed_columns))
    options = TokenOptions(
        LogitOptions(temperature, softcap, logit_scale), checks.chunk_rows(chunk_size)
    )
    options = checked_tokens(inputs, options, group)
    plan = plan_of(inputs, options)
    in_forward = _gradients_in_forward(inputs, plan)
    function = _GradientsInForward if in_forward else _GradientsInBackward
    logprobs, entropy = function.apply(*inputs.head, token_ids.long(), allowed_columns, options)
    return LinearLogprobsOutput(logprobs=logprobs, entropy=entropy, plan=plan)


def _gradients_in_forward(inputs: TokenInputs, plan: Plan) -> bool:
    """Whether forward prepares the gradients: only where that takes no more memory than the head's
    gradient does."""
    needs_grad = NeedsGrad.of(inputs.head)
    if needs_grad.bias or not needs_grad.lm_head:
        return needs_grad.hidden and not needs_grad.bias
    hidden, lm_head = inputs.hidden, inputs.lm_head
    half = head.multiplies_half(hidden, lm_head)
    itemsize = (torch.bfloat16 if half else head.compute_dtype(hidden, lm_head)).itemsize
    num_rows, hidden_size = hidden.shape
    return plan.rows >= num_rows and num_rows * itemsize <= hidden_size * lm_head.itemsize


class _GradientsInForward(torch.autograd.Function):
    """Forward computes d logprob / d hidden, and keeps d logprob / d logits for the head's
    gradient; backward multiplies them by the rows' factors."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        allowed_columns: Tensor | None,
        options: TokenOptions,
    ):
        # The loss may ignore a row of NaN, but 0 * NaN is NaN: products get zeros in its place.
        finite = hidden.isfinite().all(1)
        inputs = TokenInputs(hidden, lm_head, bias, token_ids, allowed_columns)
        token_pass = TokenPass(inputs, options, finite)
        _, logprobs, entropy, (hidden_grad, *_) = token_pass.run(
            NeedsGrad(ctx.needs_input_grad[0], False, False),
            lambda _, logprobs: (logprobs, torch.ones_like(logprobs)),
            keep_logits_grad=ctx.needs_input_grad[1],
        )
        for values in (logprobs, entropy):
            values.masked_fill_(~finite, torch.nan)
        if hidden_grad is not None:
            hidden_grad.masked_fill_(~finite[:, None], torch.nan)
        ctx.save_for_backward(hidden, logprobs.isneginf())
        ctx.projection = token_pass.projection
        ctx.hidden_grad, ctx.logits_grad = hidden_grad, token_pass.logits_grad
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
            num_rows, vocab = len(hidden), ctx.projection.num_columns
            sums = GradientSums(
                ctx.projection, NeedsGrad(False, True, False), vocab=vocab, block_rows=num_rows
            )
            if num_rows:
                block = slice(0, num_rows), slice(0, vocab)
                sums.add(*block, weighted(hidden), ctx.logits_grad)
            _, lm_head_grad, _ = sums.take()
            assert lm_head_grad is not None
            lm_head_grad = lm_head_grad.to(ctx.projection.lm_head.dtype)
        return hidden_grad, lm_head_grad, *[None] * 4


class _GradientsInBackward(torch.autograd.Function):
    """Forward keeps its inputs alone; backward computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        allowed_columns: Tensor | None,
        options: TokenOptions,
    ):
        inputs = TokenInputs(hidden, lm_head, bias, token_ids, allowed_columns)
        _, logprobs, entropy, _ = TokenPass(inputs, options).run(NO_GRAD, None)
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, _):  # pyright: ignore
        inputs = TokenInputs(*ctx.saved_tensors)
        # Rows that the loss ignores may hold NaN hidden states, like those of weight 0 elsewhere.
        token_pass = TokenPass(inputs, ctx.options, active=grad_logprobs != 0)
        *_, gradients = token_pass.run(
            NeedsGrad(*ctx.needs_input_grad[:3]),
            lambda rows, logprobs: (logprobs, grad_logprobs[rows]),
        )
        return *cast_to_inputs(gradients, inputs.head), None, None, None

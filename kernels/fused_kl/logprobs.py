"""Sampled-token log-probabilities and entropy, straight from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import checks
from fused_kl.chunks import (
    Gradients,
    HeadRules,
    Needs,
    Side,
    compute_dtype,
    logit_buffer,
    multiplies_half,
    row_programs,
)
from fused_kl.rows import Banned
from fused_kl.tiles import Plan, make_plan, slices


@dataclass(frozen=True, kw_only=True)
class LinearLogprobsOutput:
    """What `linear_logprobs` returns, [N] each; fp32, or fp64 for fp64 inputs; values in nats.

    `logprobs` is differentiable, `entropy` detached. `plan` says how many rows of logits were alive
    at once.
    """

    logprobs: Tensor
    entropy: Tensor
    plan: Plan


# (rows, their logprobs [n]) -> (loss of each row [n], its derivative by the logprob [n])
Objective = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenOptions:
    """The policy, and how to walk over it."""

    allowed_columns: Tensor | None
    rules: HeadRules
    chunk_size: int | str


def token_plan(hidden: Tensor, lm_head: Tensor, bias: Tensor | None, options: TokenOptions) -> Plan:
    """The blocks in which these tokens are walked over."""
    bytes_per_logit = compute_dtype(hidden, lm_head, bias).itemsize
    if options.rules.softcap is not None:
        bytes_per_logit *= 2
    if multiplies_half(hidden, lm_head):
        bytes_per_logit += torch.bfloat16.itemsize
    return make_plan(
        "fast",
        hidden.shape[0],
        lm_head.shape[0],
        bytes_per_logit=bytes_per_logit,
        device_type=hidden.device.type,
        chunk_size=checks.chunk_rows(options.chunk_size),
    )


class TokenPass:
    """One walk over the chunks of a head and its sampled tokens."""

    def __init__(
        self,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        options: TokenOptions,
        active: Tensor | None = None,
    ) -> None:
        self.num_rows, self.vocab = hidden.shape[0], lm_head.shape[0]
        self.dtype = compute_dtype(hidden, lm_head, bias)
        self.side = Side(
            hidden,
            lm_head,
            bias,
            num_columns=self.vocab,
            rules=options.rules,
            active=active,
            dtype=self.dtype,
        )
        self.token_ids = token_ids
        allowed = options.allowed_columns
        self.banned = None if allowed is None else Banned.outside(allowed, self.dtype)
        self.plan = token_plan(hidden, lm_head, bias, options)
        self.logits_grad: Tensor | None = None

    def run(
        self, needs: Needs, objective: Objective | None, keep: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        """Row losses, logprobs and entropy [N], and the gradients of the summed row losses; with
        `keep`, that of the last chunk's logits stays in `self.logits_grad`."""
        gradients = Gradients(self.side, needs, self.num_rows, self.vocab, self.plan.rows)
        losses, logprobs, entropy = (
            self.side.hidden.new_zeros(self.num_rows, dtype=self.dtype) for _ in range(3)
        )
        chunks, columns = slices(self.num_rows, self.plan.rows), slice(0, self.vocab)
        shape = min(self.plan.rows, self.num_rows), self.vocab
        buffer = logit_buffer(losses, shape)
        wanted = objective is not None and (any(needs) or keep)
        half = wanted and self.side.half
        separate = logit_buffer(losses, shape, torch.bfloat16) if half else None
        programs = row_programs(losses)
        for rows in chunks:
            hidden_rows = self.side.rows(rows)
            logits = buffer[: rows.stop - rows.start]
            grad = logits if separate is None else separate[: len(logits)]
            derivative = self.side.project(hidden_rows, logits, columns)

            def scale(part: slice, values: Tensor, start: int = rows.start) -> Tensor:
                assert objective is not None
                place = slice(start + part.start, start + part.stop)
                losses[place], slope = objective(place, values)
                # The logprob of a banned token is constant, so it moves nothing.
                return slope.masked_fill(values.isneginf(), 0) * self.side.slope

            logprobs[rows], entropy[rows] = programs.token_rows_(
                logits,
                self.token_ids[rows],
                banned=self.banned,
                scale=scale if wanted else None,
                grad=grad if wanted else None,
            )
            if objective is not None and not wanted:
                losses[rows] = objective(rows, logprobs[rows])[0]
            if wanted:
                if derivative is not None:
                    grad.mul_(derivative)
                gradients.add(rows, columns, hidden_rows, grad)
                self.logits_grad = grad if keep else None
        return losses, logprobs, entropy, gradients


def check_token_arguments(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    options: TokenOptions,
) -> None:
    """Everything but the range of the ids, which masked rows are exempt from."""
    checks.check_side("hidden", hidden, "lm_head", lm_head, "bias", bias)
    checks.check_same_device(
        "hidden",
        hidden,
        lm_head=lm_head,
        token_ids=token_ids,
        allowed_columns=options.allowed_columns,
        bias=bias,
    )
    checks.check_token_ids(token_ids, hidden.shape[0])
    checks.check_columns(options.allowed_columns, lm_head.shape[0], lm_head.shape[0])
    checks.check_positive("temperature", options.rules.temperature)
    checks.check_positive("softcap", options.rules.softcap)
    checks.check_positive("logit_scale", options.rules.logit_scale)
    checks.chunk_rows(options.chunk_size)


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
        ctx.side, ctx.vocab = token_pass.side, token_pass.vocab
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
            num_rows = len(hidden)
            head = Gradients(ctx.side, Needs(False, True, False), num_rows, ctx.vocab, num_rows)
            if num_rows:
                every = slice(0, num_rows), slice(0, ctx.vocab)
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

"""Losses of given tokens, chunk by chunk: one model, its logits, and one token per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl import head
from fused_kl.arguments import NeedsGrad, TokenInputs, TokenOptions
from fused_kl.gradients import GradientSums, HeadGradients
from fused_kl.head import HeadProjection
from fused_kl.rows import Banned, TokenNorms, TokenRows, TokenScale, as_logprobs, merge_tokens
from fused_kl.tiles import Plan, make_plan, slices

# (rows, their logprobs [n]) -> (loss of each row [n], its derivative by the logprob [n])
RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def plan_of(inputs: TokenInputs, options: TokenOptions) -> Plan:
    """The chunks of rows in which a loss of given tokens is computed."""
    bytes_per_logit = head.compute_dtype(*inputs.head).itemsize
    if options.logits.softcap is not None:
        bytes_per_logit *= 2
    if head.multiplies_half(inputs.hidden, inputs.lm_head):
        bytes_per_logit += torch.bfloat16.itemsize
    shard = options.shard
    return make_plan(
        "fast",
        inputs.num_rows,
        inputs.num_columns if shard is None else shard.widest,
        bytes_per_logit=bytes_per_logit,
        device_type=inputs.hidden.device.type,
        chunk_size=options.chunk_size,
    )


class TokenResults(NamedTuple):
    """Per row the loss, the token's log-probability and the entropy, `[N]` each, and the gradients
    of the sum of the losses."""

    losses: Tensor
    logprobs: Tensor
    entropy: Tensor
    gradients: HeadGradients


class TokenPass:
    """One pass over the logits of a model.

    Args:
        active: `[N]` bool; rows that are not active may hold NaN and count as 0.
    """

    def __init__(
        self, inputs: TokenInputs, options: TokenOptions, active: Tensor | None = None
    ) -> None:
        self.num_rows, self.num_columns = inputs.num_rows, inputs.num_columns
        self.dtype = head.compute_dtype(*inputs.head)
        self.projection = HeadProjection(
            inputs.head,
            options.logits,
            num_columns=self.num_columns,
            active=active,
            dtype=self.dtype,
        )
        self.token_ids = inputs.token_ids
        self.shard, self.banned = options.shard, None
        if inputs.allowed_columns is not None:
            part = self.shard is not None
            self.banned = Banned.outside(inputs.allowed_columns, self.dtype, part=part)
        self.plan = plan_of(inputs, options)
        # The gradient of the last chunk's logits, for `run` with `keep_logits_grad`.
        self.logits_grad: Tensor | None = None

    @torch.no_grad()
    def run(
        self,
        needs_grad: NeedsGrad,
        row_loss: RowLoss | None,
        *,
        entropy_slopes: Tensor | None = None,
        keep_logits_grad: bool = False,
    ) -> TokenResults:
        """Go over all chunks; without `row_loss` the losses are left uninitialised.

        The gradients, and not the losses, include a term that is linear in the entropy of each row,
        with the coefficients `entropy_slopes` [N].
        """
        projection = self.projection
        sums = GradientSums(
            projection, needs_grad, vocab=self.num_columns, block_rows=self.plan.rows
        )
        losses, logprobs, entropy = (
            projection.hidden.new_empty(self.num_rows, dtype=self.dtype) for _ in range(3)
        )
        columns = slice(0, self.num_columns)
        shape = min(self.plan.rows, self.num_rows), self.num_columns
        buffer = head.logit_buffer(losses, shape)
        with_grad = row_loss is not None and (any(needs_grad) or keep_logits_grad)
        # Where products take bf16, the gradient of the logits is bf16, in a buffer of its own.
        grad_buffer = buffer
        if with_grad and projection.half:
            grad_buffer = head.logit_buffer(losses, shape, torch.bfloat16)
        programs = head.row_programs(losses)
        token_rows_ = programs.token_rows_ if self.shard is None else self._sharded_rows_
        entropy_scale = None if entropy_slopes is None else entropy_slopes * projection.slope
        for rows in slices(self.num_rows, self.plan.rows):
            hidden_rows = projection.hidden_rows(rows)
            num_rows = rows.stop - rows.start
            logits, grad = buffer[:num_rows], grad_buffer[:num_rows]
            derivative = projection.project(hidden_rows, logits, columns)

            def scale(part: slice, values: Tensor, start: int = rows.start) -> Tensor:
                assert row_loss is not None
                place = slice(start + part.start, start + part.stop)
                losses[place], slope = row_loss(place, values)
                # The logprob of a banned token is constant, so its gradient is 0.
                return slope.masked_fill(values.isneginf(), 0) * projection.slope

            logprobs[rows], entropy[rows] = token_rows_(
                logits,
                self.token_ids[rows],
                banned=self.banned,
                scale=scale if with_grad else None,
                entropy_scale=None if entropy_scale is None else entropy_scale[rows],
                grad=grad if with_grad else None,
            )
            if row_loss is not None and not with_grad:
                losses[rows] = row_loss(rows, logprobs[rows])[0]
            if with_grad:
                if derivative is not None:
                    grad.mul_(derivative)
                sums.add(rows, columns, hidden_rows, grad)
                self.logits_grad = grad if keep_logits_grad else None
        return TokenResults(losses, logprobs, entropy, sums.take(self.shard))

    def _sharded_rows_(
        self,
        logits: Tensor,
        token_ids: Tensor,
        *,
        banned: Banned | None,
        scale: TokenScale | None,
        entropy_scale: Tensor | None,
        grad: Tensor | None,
    ) -> TokenRows:
        """As `token_rows_`, of this rank's columns, with the statistics of all ranks."""
        shard, programs = self.shard, head.row_programs(logits)
        assert shard is not None
        places = shard.places(token_ids)
        chosen = shard.chosen(logits, places, banned)
        state = merge_tokens(programs.token_statistics(logits, places, banned=banned))
        every = shard.gather(torch.stack((*state, chosen)))
        norms = TokenNorms.of(merge_tokens(every[:, :4]))
        logprobs = as_logprobs(every[:, 4].sum(0) - norms.largest - norms.log_sum)
        if grad is not None and scale is not None:
            scales = scale(slice(0, len(logits)), logprobs)
            options = {"banned": banned, "scale": scales, "entropy_scale": entropy_scale}
            programs.token_gradient_(logits, places, norms, **options, grad=grad)
        return TokenRows(logprobs, norms.entropy)

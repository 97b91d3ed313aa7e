"""One head and its sampled tokens: how losses of them walk over the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
            self.side.hidden.new_empty(self.num_rows, dtype=self.dtype) for _ in range(3)
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

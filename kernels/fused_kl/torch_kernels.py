"""Row programs in plain torch: logits in, statistics out, the gradient written over the logits.

They work on blocks of rows small enough for the cache, with two scratch blocks. All arithmetic is
in the dtype of the logits (fp32 or fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl.tiles import row_block_rows

# Stands for -inf: far below any logit, yet 0 * FLOOR and FLOOR - FLOOR are 0 where -inf gives NaN.
FLOOR = -1e30
# exp(80) is finite in fp32, and a probability ratio beyond it changes no sum.
MAX_LOG_RATIO = 80.0


class TokenRows(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


class Banned(NamedTuple):
    """Columns outside the policy, `columns` [V] bool, and the 0-dim value that their logits get."""

    columns: Tensor
    value: Tensor

    @staticmethod
    def outside(allowed_columns: Tensor, dtype: torch.dtype) -> Banned:
        """Ban every column that is not allowed; if none is, the value is NaN: never silent."""
        floor = torch.full((), FLOOR, dtype=dtype, device=allowed_columns.device)
        value = torch.where(allowed_columns.any(), floor, torch.full_like(floor, torch.nan))
        return Banned(~allowed_columns, value)


def divergence_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    beta: float,
    banned: Banned | None,
    with_grad: bool,
) -> list[Tensor]:
    """Divergence, student's and teacher's entropy of each row, and the student's log-probability
    of a token where it is given; both logits `[n, V]` are overwritten.

    With `with_grad`, `student_logits` ends as dD/dlogits. Near the teacher the log ratio r is
    small, so everything is formed from r: `sum p r - p + q` is off by at most the rounding of a
    probability, 6e-8, whereas `mu - lse(s) + lse(t)` is off by that of lse.
    """
    num_rows, num_columns = student_logits.shape
    stats = [student_logits.new_empty(num_rows) for _ in range(3 + (token_ids is not None))]
    token_kl, student_entropy, teacher_entropy, *logprobs = stats
    block = row_block_rows(num_columns, student_logits.element_size(), student_logits.device.type)
    block = min(block, num_rows)
    scratch = student_logits.new_empty(2, block, num_columns)
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        s, t = student_logits[rows], teacher_logits[rows]
        x, y = scratch[0, : len(s)], scratch[1, : len(s)]
        if banned is not None:
            s.masked_fill_(banned.columns, banned.value)
            t.masked_fill_(banned.columns, banned.value)
        torch.log_softmax(s, -1, out=x)  # x = log p
        if token_ids is not None:
            logprobs[0][rows] = x.gather(-1, token_ids[rows, None].long()).squeeze(-1)
        torch.log_softmax(t, -1, out=y)  # y = log q
        torch.exp(y, out=s)  # s = q
        teacher_entropy[rows] = torch.mul(s, y, out=t).sum(-1).neg_()
        torch.exp(x, out=t)  # t = p
        torch.sub(x, y, out=y)  # y = r = log p - log q
        student_entropy[rows] = x.mul_(t).sum(-1).neg_()
        if beta == 1.0:
            token_kl[rows] = _reverse_block_(s, t, y, x, with_grad)
        elif beta == 0.0:
            token_kl[rows] = _forward_block_(s, t, y, x, with_grad)
        else:
            token_kl[rows] = _jsd_block_(s, t, y, x, beta, with_grad)
    for values in logprobs:
        values.masked_fill_(values < FLOOR / 2, -torch.inf)  # a banned token's
    return stats


def _reverse_block_(q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, with_grad: bool) -> Tensor:
    mean = torch.mul(p, r, out=scratch).sum(-1, keepdim=True)
    value = mean.squeeze(-1) + q.sub_(p).sum(-1)
    if with_grad:
        torch.mul(r.sub_(mean), p, out=q)
    return value.clamp_min_(0)


def _forward_block_(q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, with_grad: bool) -> Tensor:
    cross = torch.mul(q, r, out=scratch).sum(-1)
    torch.sub(p, q, out=scratch)
    value = scratch.sum(-1).sub_(cross)
    if with_grad:
        q.copy_(scratch)
    return value.clamp_min_(0)


def _jsd_block_(
    q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, beta: float, with_grad: bool
) -> Tensor:
    # log(q/m) = -log1p((1-beta) expm1(r)) and log(p/m) = -log1p(beta expm1(-r)): m is never formed.
    r.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    torch.expm1(r, out=scratch).mul_(1 - beta).log1p_()
    teacher_part = scratch.mul_(q).sum(-1).neg_()
    log_ratio = r.neg_().expm1_().mul_(beta).log1p_().neg_()
    student_part = torch.mul(p, log_ratio, out=scratch).sum(-1, keepdim=True)
    if with_grad:
        torch.mul(log_ratio.sub_(student_part).mul_(1 - beta), p, out=q)
    value = teacher_part.mul_(beta).add_(student_part.squeeze(-1), alpha=1 - beta)
    return value.clamp_min_(0)


def token_rows_(
    logits: Tensor, token_ids: Tensor, *, banned: Banned | None, with_grad: bool
) -> TokenRows:
    """Log-probability of one token per row, and entropy; the logits `[n, V]` are overwritten.

    With `with_grad`, `logits` ends as dlogprob/dlogits = onehot - p. A banned token has logprob
    -inf, and its row must then be given the weight 0.
    """
    num_rows, num_columns = logits.shape
    stats = TokenRows(logits.new_empty(num_rows), logits.new_empty(num_rows))
    block = min(row_block_rows(num_columns, logits.element_size(), logits.device.type), num_rows)
    scratch = logits.new_empty(block, num_columns)
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        z, x = logits[rows], scratch[: min(block, num_rows - start)]
        ids = token_ids[rows, None]
        if banned is not None:
            z.masked_fill_(banned.columns, banned.value)
        torch.log_softmax(z, -1, out=x)
        stats.logprobs[rows] = x.gather(-1, ids).squeeze(-1)
        torch.exp(x, out=z)
        stats.entropy[rows] = x.mul_(z).sum(-1).neg_()
        if with_grad:
            # 1 - p of a near-certain token would cancel; the sum over the others does not.
            z.neg_().scatter_(-1, ids, 0)
            z.scatter_(-1, ids, z.sum(-1, keepdim=True).neg_())
    stats.logprobs.masked_fill_(stats.logprobs < FLOOR / 2, -torch.inf)
    return stats

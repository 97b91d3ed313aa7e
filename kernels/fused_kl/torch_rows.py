"""Row programs in plain torch, for every device and for fp32 and fp64: see `rows.RowPrograms`.

Those of two models are here, those of given tokens in `torch_tokens`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kl.rows import MAX_LOG_RATIO, Banned, Norms, Summary, as_logprobs, merge
from fused_kl.rows import summarise as summarise_whole
from fused_kl.torch_shared import blocks
from fused_kl.torch_tokens import chosen_logprobs as chosen_logprobs
from fused_kl.torch_tokens import token_gradient_ as token_gradient_
from fused_kl.torch_tokens import token_rows_ as token_rows_
from fused_kl.torch_tokens import token_statistics as token_statistics

TINY = 1e-30


def divergence_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    beta: float,
    banned: Banned | None,
    scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    # Near the teacher the log ratio r is small, so everything is formed from r: the error of
    # `sum p r - p + q` is the rounding of a probability, 6e-8 at most, whereas that of
    # `mu - lse(s) + lse(t)` is the rounding of lse. But log_softmax adds up 150,000 columns with a
    # relative error of 1e-5, by which p and q miss a sum of 1: gradients, entropies and
    # log-probabilities are divided by their sums, which torch adds in pairs.
    num_rows = len(student_logits)
    stats = [student_logits.new_empty(num_rows) for _ in range(3 + (token_ids is not None))]
    token_kl, student_entropy, teacher_entropy, *logprobs = stats
    for rows, s, t, x, y in blocks(2, banned, student_logits, teacher_logits):
        torch.log_softmax(s, -1, out=x)  # x = log p
        torch.log_softmax(t, -1, out=y)  # y = log q
        torch.exp(y, out=s)  # s = q
        q_sum = s.sum(-1)
        teacher_entropy[rows] = q_sum.log() - torch.mul(s, y, out=t).sum(-1) / q_sum
        torch.exp(x, out=t)  # t = p
        p_sum = t.sum(-1)
        if token_ids is not None:
            chosen = x.gather(-1, token_ids[rows, None]).squeeze(-1)
            logprobs[0][rows] = as_logprobs(chosen - p_sum.log())
        torch.sub(x, y, out=y)  # y = r = log p - log q
        student_entropy[rows] = p_sum.log() - x.mul_(t).sum(-1) / p_sum
        row_scale = None if scale is None or grad is None else scale[rows, None]
        sums = q_sum[:, None], p_sum[:, None]
        if beta == 1.0:
            token_kl[rows] = _reverse_block_(s, t, y, x, sums, row_scale)
        elif beta == 0.0:
            token_kl[rows] = _forward_block_(s, t, y, x, sums, row_scale)
        else:
            token_kl[rows] = _jsd_block_(s, t, y, x, sums, beta, row_scale)
        if grad is not None and grad is not student_logits:
            grad[rows] = s
    return stats


# Each takes q, p and r = log p - log q of a block, and the sums of q and p; returns its divergence
# and, given a scale, leaves the gradient in q.

Sums = tuple[Tensor, Tensor]


def _reverse_block_(
    q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, sums: Sums, scale: Tensor | None
) -> Tensor:
    mean = torch.mul(p, r, out=scratch).sum(-1, keepdim=True)
    value = mean.squeeze(-1) + q.sub_(p).sum(-1)
    if scale is not None:
        torch.mul(r.sub_(mean / sums[1]).mul_(scale / sums[1]), p, out=q)
    return value.clamp_min_(0)


def _forward_block_(
    q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, sums: Sums, scale: Tensor | None
) -> Tensor:
    cross = torch.mul(q, r, out=scratch).sum(-1)
    value = torch.sub(p, q, out=scratch).sum(-1).sub_(cross)
    if scale is not None:
        torch.sub(p.mul_(scale / sums[1]), q.mul_(scale / sums[0]), out=q)
    return value.clamp_min_(0)


def _jsd_block_(
    q: Tensor,
    p: Tensor,
    r: Tensor,
    scratch: Tensor,
    sums: Sums,
    beta: float,
    scale: Tensor | None,
) -> Tensor:
    teacher_part, student_part = _jsd_parts_(q, p, r, scratch, beta)
    if scale is not None:
        mean = student_part[:, None] / sums[1]
        torch.mul(r.sub_(mean).mul_(scale * (1 - beta) / sums[1]), p, out=q)
    return teacher_part.mul_(beta).add_(student_part, alpha=1 - beta).clamp_min_(0)


def _jsd_parts_(
    q: Tensor, p: Tensor, r: Tensor, scratch: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """KL(q || m) and KL(p || m); r is overwritten with log(p/m)."""
    # log(q/m) = -log1p((1-beta) expm1(r)) and log(p/m) = -log1p(beta expm1(-r)): m is never formed.
    r.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    torch.expm1(r, out=scratch).mul_(1 - beta).log1p_()
    teacher_part = scratch.mul_(q).sum(-1).neg_()
    r.neg_().expm1_().mul_(beta).log1p_().neg_()
    return teacher_part, torch.mul(p, r, out=scratch).sum(-1)


def topk_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    k: int,
    student_support: bool,
    tail: bool,
    banned: Banned | None,
    scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """`divergence_rows_` for the reverse KL on the k likeliest columns of one side.

    Both sides are renormalised on these columns, or with `tail` all other columns are one more
    outcome. It has no Triton version.
    """
    num_rows = len(student_logits)
    stats = [student_logits.new_empty(num_rows) for _ in range(3 + (token_ids is not None))]
    token_kl, student_entropy, teacher_entropy, *logprobs = stats
    for rows, s, t, x, y in blocks(2, banned, student_logits, teacher_logits):
        torch.log_softmax(s, -1, out=x)  # x = log p
        torch.log_softmax(t, -1, out=y)  # y = log q
        if token_ids is not None:
            logprobs[0][rows] = as_logprobs(x.gather(-1, token_ids[rows, None]).squeeze(-1))
        places = (x if student_support else y).topk(k).indices
        log_p, log_q = x.gather(-1, places), y.gather(-1, places)
        if not tail:
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        teacher_entropy[rows] = torch.mul(torch.exp(y, out=t), y, out=s).sum(-1).neg_()
        teacher_rest = t.scatter_(-1, places, 0).sum(-1, keepdim=True)
        student_entropy[rows] = torch.mul(torch.exp(x, out=t), x, out=s).sum(-1).neg_()
        p, q, r = log_p.exp(), log_q.exp(), log_p - log_q
        value = (p * r - p + q).sum(-1, keepdim=True)
        rest = t.scatter_(-1, places, 0).sum(-1, keepdim=True)
        # TINY keeps the logarithm of a rest of 0 finite; its product with the rest is still 0.
        rest_r = rest.clamp_min(TINY).log() - teacher_rest.clamp_min(TINY).log()
        if tail:
            value += rest * rest_r - rest + teacher_rest
        token_kl[rows] = value.squeeze(-1).clamp_min_(0)
        if grad is not None and scale is not None:
            row_scale = scale[rows, None]
            mean = (p * r).sum(-1, keepdim=True)
            if tail:
                mean += rest * rest_r
                torch.mul(t, (rest_r - mean) * row_scale, out=s)
            else:
                s.zero_()
            s.scatter_(-1, places, (r - mean) * p * row_scale)
            if grad is not student_logits:
                grad[rows] = s
    return stats


def divergence_statistics(
    student_logits: Tensor, teacher_logits: Tensor, *, banned: Banned | None
) -> Tensor:
    num_rows = len(student_logits)
    state = student_logits.new_empty(8, num_rows)
    for rows, s, t, x, y in blocks(2, banned, student_logits, teacher_logits):
        s_max, t_max = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
        e = torch.sub(s, s_max, out=x).exp()
        f = torch.sub(t, t_max, out=y).exp()
        sums = [e.sum(-1), (e * x).sum(-1), f.sum(-1), (f * y).sum(-1)]
        gap = x.sub_(y)
        sums += [e.mul_(gap).sum(-1), f.mul_(gap).sum(-1).neg_()]
        state[:, rows] = torch.stack((s_max[:, 0], *sums[:2], t_max[:, 0], *sums[2:]))
    return state[None]


def summarise(states: Tensor) -> Summary:
    return summarise_whole(states[0] if len(states) == 1 else merge(states))


def _probabilities(s: Tensor, t: Tensor, norms: Norms, rows: slice) -> tuple:
    """p, q and r = log p - log q of a block of logits s and t, which are overwritten."""
    s.sub_(norms.student_max[rows, None]).sub_(norms.student_log_sum[rows, None])
    t.sub_(norms.teacher_max[rows, None]).sub_(norms.teacher_log_sum[rows, None])
    return s.exp(), t.exp(), s.sub_(t)


def jsd_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    norms: Norms,
    *,
    beta: float,
    banned: Banned | None,
) -> Tensor:
    parts = student_logits.new_empty(2, len(student_logits))
    for rows, s, t, scratch in blocks(1, banned, student_logits, teacher_logits):
        p, q, r = _probabilities(s, t, norms, rows)
        parts[:, rows] = torch.stack(_jsd_parts_(q, p, r, scratch, beta))
    return parts


def divergence_gradient_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    norms: Norms,
    *,
    beta: float,
    student_part: Tensor,
    banned: Banned | None,
    scale: Tensor,
    grad: Tensor,
) -> None:
    for rows, s, t, scratch in blocks(1, banned, student_logits, teacher_logits):
        p, q, r = _probabilities(s, t, norms, rows)
        if beta == 1.0:
            out = r.sub_(norms.mean[rows, None]).mul_(p)
        elif beta == 0.0:
            out = p.sub_(q)
        else:
            _jsd_parts_(q, p, r, scratch, beta)
            out = r.sub_(student_part[rows, None]).mul_(p).mul_(1 - beta)
        torch.mul(out, scale[rows, None], out=s)
        if grad is not student_logits:
            grad[rows] = s


def scale_(values: Tensor, factor: Tensor) -> None:
    # Reading a scalar on the CPU is free; a pass over the head's gradient is not.
    if factor.device.type != "cpu" or factor.item() != 1.0:
        values.mul_(factor)

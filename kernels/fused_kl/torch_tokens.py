"""Row programs of given tokens in plain torch: see `rows.RowPrograms`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kl.rows import Banned, TokenNorms, TokenRows, TokenScale, as_logprobs, chosen_logits
from fused_kl.torch_shared import blocks


def token_rows_(
    logits: Tensor,
    token_ids: Tensor,
    *,
    banned: Banned | None,
    scale: TokenScale | None = None,
    entropy_scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> TokenRows:
    num_rows = len(logits)
    stats = TokenRows(logits.new_empty(num_rows), logits.new_empty(num_rows))
    for rows, z, x in blocks(1, banned, logits):
        ids = token_ids[rows, None]
        torch.log_softmax(z, -1, out=x)
        torch.exp(x, out=z)
        total = z.sum(-1)  # 1, but for the rounding in log_softmax: see `torch_rows`
        stats.logprobs[rows] = as_logprobs(x.gather(-1, ids).squeeze(-1) - total.log())
        mean = x.mul_(z).sum(-1) / total
        stats.entropy[rows] = total.log() - mean
        if grad is not None and scale is not None:
            if entropy_scale is not None:
                x.addcmul_(z, mean[:, None], value=-1)  # x = p (log p + entropy)
            # 1 - p would cancel for a near-certain token; the sum over all others does not.
            z.neg_().scatter_(-1, ids, 0)
            z.scatter_(-1, ids, z.sum(-1, keepdim=True).neg_())
            z.mul_((scale(rows, stats.logprobs[rows]) / total)[:, None])
            if entropy_scale is not None:
                z.addcmul_(x, (entropy_scale[rows] / total)[:, None], value=-1)
            if grad is not logits:
                grad[rows] = z
    return stats


def token_statistics(logits: Tensor, token_ids: Tensor, *, banned: Banned | None) -> Tensor:
    state = logits.new_empty(4, len(logits))
    for rows, z, x in blocks(1, banned, logits):
        ids = token_ids[rows, None]
        largest = z.amax(-1, keepdim=True)
        torch.sub(z, largest, out=x)
        e = x.exp()
        total, first = e.sum(-1), x.mul_(e).sum(-1)
        here = ids >= 0
        chosen = e.gather(-1, ids.clamp_min(0))
        e.scatter_(-1, ids.clamp_min(0), chosen.masked_fill(here, 0))
        state[:, rows] = torch.stack((largest[:, 0], total, first, e.sum(-1)))
    return state[None]


def token_gradient_(
    logits: Tensor,
    token_ids: Tensor,
    norms: TokenNorms,
    *,
    banned: Banned | None,
    scale: Tensor,
    entropy_scale: Tensor | None = None,
    grad: Tensor,
) -> None:
    largest, log_sum, rest, entropy = norms
    for rows, z, x in blocks(1, banned, logits):
        ids = token_ids[rows, None]
        torch.sub(z, (largest + log_sum)[rows, None], out=x)  # x = log p
        torch.exp(x, out=z)
        if entropy_scale is not None:
            x.add_(entropy[rows, None]).mul_(z)  # x = p (log p + entropy)
        z.neg_()
        place = ids.clamp_min(0)
        # 1 - p would cancel for a near-certain token; the sum over all others does not.
        z.scatter_(-1, place, torch.where(ids >= 0, rest[rows, None], z.gather(-1, place)))
        z.mul_(scale[rows, None])
        if entropy_scale is not None:
            z.addcmul_(x, entropy_scale[rows, None], value=-1)
        if grad is not logits:
            grad[rows] = z


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, maxima: Tensor, log_sums: Tensor, banned: Banned | None
) -> Tensor:
    return as_logprobs(chosen_logits(logits, token_ids, banned) - maxima - log_sums)

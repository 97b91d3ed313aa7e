"""Dense definitions of the losses, which the tests compare the fused ones with.

They allocate `[N, V]`. Rows of weight 0 and columns outside the policy are cut out rather than
masked, so that no method, and no mistake, is shared with the fused code. All arithmetic is in
`dtype`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_kl.arguments import PerSide


def log_probs(
    hidden: Tensor,
    lm_head: Tensor,
    *,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """log softmax(z / temperature) over the allowed columns: `[N, number of allowed columns]` from
    `[N, H]` and `[V, H]`.

    z = logit_scale (hidden @ lm_head.T + bias), replaced by c tanh(z / c) with a softcap c.
    """
    logits = hidden.to(dtype) @ lm_head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if allowed_columns is not None:
        logits = logits[:, allowed_columns]
    return torch.log_softmax(logits / temperature, dim=-1)


def entropy(log_probs: Tensor) -> Tensor:
    """-sum_v p log p in nats, `[N]` from `[N, V]`."""
    return -(log_probs.exp() * log_probs).sum(-1)


def divergence(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float) -> Tensor:
    """Divergence of each row in nats, `[N]` from two `[N, V]`.

    beta 1: sum p (log p - log q), the reverse KL. beta 0: sum q (log q - log p), the forward KL.
    Between: beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q.
    """
    p, q = student_log_probs.exp(), teacher_log_probs.exp()
    if beta == 1.0:
        return (p * (student_log_probs - teacher_log_probs)).sum(-1)
    if beta == 0.0:
        return (q * (teacher_log_probs - student_log_probs)).sum(-1)
    log_m = torch.logaddexp(
        student_log_probs + math.log(1 - beta), teacher_log_probs + math.log(beta)
    )
    teacher_part = (q * (teacher_log_probs - log_m)).sum(-1)
    student_part = (p * (student_log_probs - log_m)).sum(-1)
    return beta * teacher_part + (1 - beta) * student_part


def _scatter_rows(kept: Tensor, values: Tensor) -> Tensor:
    out = values.new_zeros(len(kept))
    out[kept] = values
    return out


def _kept(token_weights: Tensor | None, num_rows: int) -> Tensor:
    if token_weights is None:
        return torch.ones(num_rows, dtype=torch.bool)
    return token_weights != 0


def linear_reverse_kl(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    token_weights: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: PerSide[float] = 1.0,
    beta: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerSide[float | None] = None,
    logit_scale: PerSide[float] = 1.0,
    k: int | None = None,
    support: str = "teacher",
    tail: bool = False,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense `fused_kl.linear_reverse_kl`, or with `k` `fused_kl.topk_reverse_kl`; returns loss,
    token_kl, student_entropy and teacher_entropy."""
    vocab = min(len(student_lm_head), len(teacher_lm_head))
    kept = _kept(token_weights, len(student_hidden))
    columns = None if allowed_columns is None else allowed_columns[:vocab]
    of_logits = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    student, teacher = (
        log_probs(
            hidden[kept],
            lm_head[:vocab],
            allowed_columns=columns,
            bias=None if bias is None else bias[:vocab],
            dtype=dtype,
            **{name: x[side] if isinstance(x, tuple) else x for name, x in of_logits.items()},
        )
        for side, (hidden, lm_head, bias) in enumerate(
            (
                (student_hidden, student_lm_head, student_bias),
                (teacher_hidden, teacher_lm_head, teacher_bias),
            )
        )
    )
    if k is None:
        token_kl = divergence(student, teacher, beta)
    else:
        token_kl = divergence(*on_support(student, teacher, k, support, tail), beta)
    weights = 1.0 if token_weights is None else token_weights[kept].to(dtype)
    weighted = weights * token_kl
    return (
        weighted.sum() if reduction == "sum" else _scatter_rows(kept, weighted),
        _scatter_rows(kept, token_kl),
        _scatter_rows(kept, entropy(student)),
        _scatter_rows(kept, entropy(teacher)),
    )


def on_support(
    student: Tensor, teacher: Tensor, k: int, support: str, tail: bool
) -> tuple[Tensor, Tensor]:
    """Both log-probabilities `[N, V]` on the k likeliest columns of one side: renormalised,
    `[N, k]`, or with the mass of all other columns as one more outcome, `[N, k + 1]`."""
    places = (student if support == "student" else teacher).topk(k).indices
    sides = []
    for log_p in (student, teacher):
        inside = log_p.gather(-1, places)
        if tail:
            rest = log_p.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
            sides.append(torch.cat([inside, rest], -1))
        else:
            sides.append(inside.log_softmax(-1))
    return sides[0], sides[1]


def sampled_reverse_kl(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    token_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense `fused_kl.linear_reverse_kl` with `estimator="sampled"`; returns the value of the loss,
    and a surrogate that has its gradient.

    With r_n = log p(y_n) - log q(y_n) these are sum_n w_n r_n and sum_n w_n sg[r_n] log p(y_n),
    where sg stops the gradient.
    """
    vocab = min(len(student_lm_head), len(teacher_lm_head))
    kept = _kept(token_weights, len(student_hidden))
    log_p, log_q = (
        linear_logprobs(
            hidden[kept],
            lm_head[:vocab],
            token_ids[kept],
            allowed_columns=None if allowed_columns is None else allowed_columns[:vocab],
            temperature=temperature,
            bias=None if bias is None else bias[:vocab],
            softcap=softcap,
            logit_scale=logit_scale,
            dtype=dtype,
        )[0]
        for hidden, lm_head, bias in (
            (student_hidden, student_lm_head, student_bias),
            (teacher_hidden, teacher_lm_head, teacher_bias),
        )
    )
    weights = log_p.new_ones(len(log_p)) if token_weights is None else token_weights[kept].to(dtype)
    allowed = log_p.isfinite()  # tokens outside the policy count 0
    weights, log_p, log_q = weights[allowed], log_p[allowed], log_q[allowed]
    log_ratio = (log_p - log_q).detach()
    return (weights * log_ratio).sum(), (weights * log_ratio * log_p).sum()


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense `fused_kl.linear_logprobs`; returns logprobs (-inf outside the policy) and entropy."""
    dense = log_probs(
        hidden,
        lm_head,
        allowed_columns=allowed_columns,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        dtype=dtype,
    )
    full = dense
    if allowed_columns is not None:
        full = dense.new_full((len(hidden), len(lm_head)), -torch.inf)
        full[:, allowed_columns] = dense
    return full.gather(-1, token_ids[:, None].long()).squeeze(-1), entropy(dense)


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense `fused_kl.linear_policy_loss`, without banned tokens: loss, logprobs, entropy."""
    kept = _kept(token_weights, len(hidden))
    logprobs, token_entropy = linear_logprobs(
        hidden[kept],
        lm_head,
        token_ids[kept],
        allowed_columns=allowed_columns,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        dtype=dtype,
    )
    old = logprobs.detach() if old_logprobs is None else old_logprobs[kept].to(dtype)
    advantage = advantages[kept].to(dtype)
    ratio = (logprobs - old).exp()
    surrogate = ratio * advantage
    if clip is not None:
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - clip, 1 + clip) * advantage)
    weights = 1.0 if token_weights is None else token_weights[kept].to(dtype)
    loss = -(weights * surrogate).sum()
    if reference_logprobs is not None:
        distance = reference_logprobs[kept].to(dtype) - logprobs
        loss = loss + kl_coef * (weights * (distance.exp() - distance - 1)).sum()
    loss = loss - entropy_coef * (weights * token_entropy).sum()
    return loss, _scatter_rows(kept, logprobs), _scatter_rows(kept, token_entropy)


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense `fused_kl.linear_cross_entropy`; returns loss, logprobs and entropy."""
    kept = _kept(token_weights, len(hidden))
    logprobs, token_entropy = linear_logprobs(
        hidden[kept],
        lm_head,
        token_ids[kept],
        allowed_columns=allowed_columns,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        dtype=dtype,
    )
    weights = 1.0 if token_weights is None else token_weights[kept].to(dtype)
    loss = -(weights * logprobs).sum()
    return loss, _scatter_rows(kept, logprobs), _scatter_rows(kept, token_entropy)

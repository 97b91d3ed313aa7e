"""The two algorithms behind the divergences of two heads: fast, and lowmem.

fast    all columns of some rows at a time, gradients made with the loss: 4 GEMM units.
lowmem  some columns of all rows at a time, statistics first, recomputed in backward: 6 GEMM units
        (JSD: 8), differentiable per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl.chunks import Gradients, Needs, keep_active
from fused_kl.rows import Norms, as_logprobs, chosen_logits
from fused_kl.torch_kernels import topk_rows_
from fused_kl.walk import Inputs, Rules, Walk


def fast(inputs: Inputs, rules: Rules, needs: Needs) -> tuple[Tensor, tuple, Gradients]:
    """The weighted sum, then per row the divergence, student's and teacher's entropy and, with
    `token_ids`, the student's log-probability, `[N]` each; and the gradients of the sum."""
    walk = Walk(inputs, rules, needs)
    gradients = walk.gradients()
    stats = walk.weights.new_empty(4 + (walk.token_ids is not None), walk.num_rows)
    slope = walk.student.slope
    scales = walk.weights if slope == 1.0 else walk.weights * slope
    for rows, (columns,) in walk.blocks():
        hidden, s, t, derivative = walk.project(rows, columns)
        grad = walk.grad_of(s) if any(needs) else None
        values = _rows(walk, rows, s, t, scales[rows], grad)
        torch.stack(values, out=stats[:, rows])
        del t
        walk.free_teacher()
        if grad is not None:
            if derivative is not None:
                grad.mul_(derivative)
            gradients.add(rows, columns, hidden, grad)
    if walk.active is not None:
        stats.masked_fill_(~walk.active, 0)
    losses, *details = stats.unbind()
    return (walk.weights * losses).sum(), tuple(details), gradients


def _rows(
    walk: Walk, rows: slice, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """What each row adds to the loss, then its statistics; the gradient goes into `grad`."""
    rules, banned, programs = walk.rules, walk.banned, walk.programs
    ids = None if walk.token_ids is None else walk.token_ids[rows]
    if rules.sampled:
        assert ids is not None
        return _sampled_rows(walk, ids, s, t, scale, grad)
    if rules.topk:
        values = topk_rows_(
            s,
            t,
            ids,
            k=rules.topk,
            student_support=rules.student_support,
            tail=rules.tail,
            banned=banned,
            scale=scale,
            grad=grad,
        )
    else:
        values = programs.divergence_rows_(
            s, t, ids, beta=rules.beta, banned=banned, scale=scale, grad=grad
        )
    return [values[0], *values]


def _sampled_rows(
    walk: Walk, ids: Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """log p(y) - log q(y) of the token y, whose gradient is that times that of log p(y)."""
    states = walk.programs.divergence_statistics(s, t, banned=walk.banned)
    summary = walk.programs.summarise(states)
    norms = summary.norms
    sizes = norms.teacher_max, norms.teacher_log_sum
    teacher = walk.programs.chosen_logprobs(t, ids, *sizes, walk.banned)

    def log_ratio(part: slice, logprobs: Tensor) -> Tensor:
        # The logprob of a banned token is constant, so it moves nothing.
        return torch.where(logprobs.isneginf(), 0, logprobs - teacher[part])

    logprobs, _ = walk.programs.token_rows_(
        s,
        ids,
        banned=walk.banned,
        scale=lambda part, logprobs: scale[part] * log_ratio(part, logprobs),
        grad=grad,
    )
    details = [summary.reverse_kl, summary.student_entropy, summary.teacher_entropy, logprobs]
    return [log_ratio(slice(None), logprobs), *details]


class Rowwise(NamedTuple):
    """What the first sweep of lowmem leaves: per row the divergence, student's and teacher's
    entropy, the student's log-probability (empty without `token_ids`), and what the second sweep
    needs, `Norms` and KL(p || m), `[6, N]`."""

    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor
    saved: Tensor


def lowmem(inputs: Inputs, rules: Rules) -> Rowwise:
    """Statistics of all tiles (JSD: then its value), nothing kept but numbers per row."""
    walk = Walk(inputs, rules, Needs(False, False, False))
    make = walk.weights.new_empty
    kl, student_entropy, teacher_entropy = (make(walk.num_rows) for _ in range(3))
    logprobs = make(0 if walk.token_ids is None else walk.num_rows)
    saved = walk.weights.new_zeros(6, walk.num_rows)
    for rows, tiles in walk.blocks():
        states, chosen = [], None
        for columns in tiles:
            _, s, t, _ = walk.project(rows, columns)
            banned = walk.banned_at(columns)
            states.append(walk.programs.divergence_statistics(s, t, banned=banned))
            if walk.token_ids is not None:
                place = walk.token_ids[rows] - columns.start
                here = chosen_logits(s, place.clamp(0, s.shape[1] - 1), banned)
                inside = (place >= 0) & (place < s.shape[1])
                chosen = here if chosen is None else torch.where(inside, here, chosen)
        summary = walk.programs.summarise(torch.cat(states))
        norms = summary.norms
        saved[:5, rows] = torch.stack(norms)
        student_entropy[rows] = summary.student_entropy
        teacher_entropy[rows] = summary.teacher_entropy
        if chosen is not None:
            logprobs[rows] = as_logprobs(chosen - norms.student_max - norms.student_log_sum)
        if rules.beta == 1.0:
            kl[rows] = summary.reverse_kl
        elif rules.beta == 0.0:
            kl[rows] = summary.forward_kl
        else:
            parts = torch.zeros_like(saved[:2, rows])
            for columns in tiles:
                _, s, t, _ = walk.project(rows, columns)
                banned = walk.banned_at(columns)
                parts += walk.programs.jsd_parts(s, t, norms, beta=rules.beta, banned=banned)
            saved[5, rows] = parts[1]
            kl[rows] = (rules.beta * parts[0] + (1 - rules.beta) * parts[1]).clamp_min(0)
    if walk.token_ids is not None:
        logprobs = keep_active(logprobs, walk.active)
    return Rowwise(
        keep_active(kl, walk.active),
        keep_active(student_entropy, walk.active),
        keep_active(teacher_entropy, walk.active),
        logprobs,
        saved,
    )


def lowmem_gradients(
    inputs: Inputs, rules: Rules, needs: Needs, saved: Tensor, grad_kl: Tensor
) -> Gradients:
    """Gradients of sum_n grad_kl_n token_kl_n, `grad_kl` [N]: every tile once more."""
    walk = Walk(inputs, rules, needs)
    gradients = walk.gradients()
    scales = keep_active(grad_kl.to(walk.dtype) * walk.student.slope, walk.active)
    for rows, tiles in walk.blocks():
        *norms, student_part = saved[:, rows]
        for columns in tiles:
            hidden, s, t, derivative = walk.project(rows, columns)
            grad = walk.grad_of(s)
            walk.programs.divergence_gradient_(
                s,
                t,
                Norms(*norms),
                beta=rules.beta,
                student_part=student_part,
                banned=walk.banned_at(columns),
                scale=scales[rows],
                grad=grad,
            )
            if derivative is not None:
                grad.mul_(derivative)
            gradients.add(rows, columns, hidden, grad)
    return gradients

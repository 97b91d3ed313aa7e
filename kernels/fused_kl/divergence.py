"""Divergences of two models, block by block, by one of two algorithms.

fast    all columns of some rows at a time, gradients computed with the loss: 4 GEMM units
        (`fused_kl.sparse`, on some columns: 1 unit and a share of 3).
lowmem  some columns of all rows at a time, statistics first, logits recomputed in backward: 6 GEMM
        units (JSD: 8), differentiable per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_kl.arguments import NO_GRAD, DivergenceInputs, DivergenceOptions, NeedsGrad, Shard
from fused_kl.gradients import ComputedLoss, GradientSums, HeadGradients
from fused_kl.head import keep_active
from fused_kl.pair import ModelPair
from fused_kl.rows import Norms, TokenNorms, as_logprobs, chosen_logits, merge_tokens
from fused_kl.torch_rows import topk_rows_


@torch.no_grad()
def fast(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    needs_grad: NeedsGrad,
    shard: Shard | None = None,
) -> ComputedLoss:
    """The weighted sum and its gradients; the details are, per row, the divergence, the entropies
    of student and teacher and, with `token_ids`, the student's log-probabilities."""
    pair = ModelPair(inputs, options, needs_grad, shard)
    stats, sums = pair.new_stats(), pair.gradient_sums()
    for rows, (columns,) in pair.blocks():
        values = add_rows(pair, sums, rows, *pair.project_student(rows, columns))
        torch.stack(values, out=stats[:, rows])
    return pair.computed(stats, sums)


def add_rows(
    pair: ModelPair,
    sums: GradientSums,
    rows: slice | Tensor,
    hidden_rows: Tensor,
    s: Tensor,
    derivative: Tensor | None,
) -> list[Tensor]:
    """Add the gradients of some rows, given the student's side of them over all columns; returns
    their part of `new_stats`."""
    columns = slice(0, pair.num_columns)
    t = pair.project_teacher(rows, columns)
    grad = pair.grad_of(s) if any(pair.needs_grad) else None
    of_rows = _fast_rows if pair.shard is None else _sharded_rows
    values = of_rows(pair, rows, s, t, pair.scales[rows], grad)
    del t
    pair.free_teacher()
    if grad is not None:
        if derivative is not None:
            grad.mul_(derivative)
        sums.add(rows, columns, hidden_rows, grad)
    return values


def _fast_rows(
    pair: ModelPair, rows: slice | Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """The loss of each row, then its statistics; `grad` receives the gradient of the logits."""
    options, banned = pair.options, pair.banned
    ids = None if pair.token_ids is None else pair.token_ids[rows]
    if options.estimator == "sampled":
        assert ids is not None
        return _sampled_rows(pair, ids, s, t, scale, grad)
    if options.k:
        values = topk_rows_(
            s,
            t,
            ids,
            k=options.k,
            student_support=options.support == "student",
            tail=options.tail,
            banned=banned,
            scale=scale,
            grad=grad,
        )
    else:
        values = pair.programs.divergence_rows_(
            s, t, ids, beta=options.beta, banned=banned, scale=scale, grad=grad
        )
    return [values[0], *values]


def _sampled_rows(
    pair: ModelPair, ids: Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """As `_fast_rows`, with the loss log p(y) - log q(y) of the token y, whose gradient is that
    value times the gradient of log p(y)."""
    programs, banned = pair.programs, pair.banned
    summary = programs.summarise(programs.divergence_statistics(s, t, banned=banned))
    norms = summary.norms
    teacher_logprobs = programs.chosen_logprobs(
        t, ids, norms.teacher_max, norms.teacher_log_sum, banned
    )

    def log_ratio(part: slice, logprobs: Tensor) -> Tensor:
        # The logprob of a banned token is constant, so its gradient is 0.
        return torch.where(logprobs.isneginf(), 0, logprobs - teacher_logprobs[part])

    logprobs, _ = programs.token_rows_(
        s,
        ids,
        banned=banned,
        scale=lambda part, logprobs: scale[part] * log_ratio(part, logprobs),
        grad=grad,
    )
    details = [summary.reverse_kl, summary.student_entropy, summary.teacher_entropy, logprobs]
    return [log_ratio(slice(None), logprobs), *details]


def _sharded_rows(
    pair: ModelPair, rows: slice | Tensor, s: Tensor, t: Tensor, scale: Tensor, grad: Tensor | None
) -> list[Tensor]:
    """As `_fast_rows`, of this rank's columns, with the statistics of all ranks."""
    shard, programs, banned, beta = pair.shard, pair.programs, pair.banned, pair.options.beta
    assert shard is not None
    states = programs.divergence_statistics(s, t, banned=banned)
    places, chosen = None, []
    if pair.token_ids is not None:
        places = shard.places(pair.token_ids[rows])
        chosen = [shard.chosen(logits, places, banned) for logits in (s, t)]
    states, chosen = pair.everywhere(states, *chosen)
    summary = programs.summarise(states)
    norms, details = summary.norms, [summary.student_entropy, summary.teacher_entropy]
    if chosen:
        logprobs = as_logprobs(chosen[0] - norms.student_max - norms.student_log_sum)
        teacher_logprobs = as_logprobs(chosen[1] - norms.teacher_max - norms.teacher_log_sum)
        details.append(logprobs)
        if pair.options.estimator == "sampled":
            ratio = torch.where(logprobs.isneginf(), 0, logprobs - teacher_logprobs)
            if grad is not None:
                assert places is not None
                of_tokens = merge_tokens(programs.token_statistics(s, places, banned=banned))
                every = TokenNorms.of(merge_tokens(shard.gather(of_tokens)))
                rules = {"banned": banned, "scale": scale * ratio, "grad": grad}
                programs.token_gradient_(s, places, every, **rules)
            return [ratio, summary.reverse_kl, *details]
    student_part = norms.mean
    if beta in (0.0, 1.0):
        value = summary.reverse_kl if beta else summary.forward_kl
    else:
        # They may overwrite the logits, which the gradient needs.
        logits = (s, t) if grad is None else (s.clone(), t.clone())
        parts = shard.sum_(programs.jsd_parts(*logits, norms, beta=beta, banned=banned))
        student_part = parts[1]
        value = (beta * parts[0] + (1 - beta) * student_part).clamp_min(0)
    if grad is not None:
        rules = {"beta": beta, "student_part": student_part, "banned": banned, "scale": scale}
        programs.divergence_gradient_(s, t, norms, **rules, grad=grad)
    return [value, value, *details]


class RowDivergences(NamedTuple):
    """Result of lowmem's forward, `[N]` each; `student_logprobs` is empty without `token_ids`.

    `saved` `[6, N]` is what its backward needs: the fields of `Norms`, and KL(p || m).
    """

    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor
    saved: Tensor


def lowmem(
    inputs: DivergenceInputs, options: DivergenceOptions, shard: Shard | None = None
) -> RowDivergences:
    """Statistics from all tiles, and for the JSD its value from all tiles again; only numbers per
    row are kept."""
    pair = ModelPair(inputs, options, NO_GRAD, shard)
    new_empty = pair.weights.new_empty
    kl, student_entropy, teacher_entropy = (new_empty(pair.num_rows) for _ in range(3))
    logprobs = new_empty(0 if pair.token_ids is None else pair.num_rows)
    saved = pair.weights.new_zeros(6, pair.num_rows)
    for rows, tiles in pair.blocks():
        states, chosen, ids = [], [], None
        if pair.token_ids is not None:
            ids = pair.token_ids[rows]
            ids = ids if shard is None else shard.places(ids)
            chosen = [pair.weights.new_zeros(len(ids))]
        for columns in tiles:
            _, s, t, _ = pair.project(rows, columns)
            banned = pair.banned_at(columns)
            states.append(pair.programs.divergence_statistics(s, t, banned=banned))
            if ids is not None:
                place = ids - columns.start
                here = chosen_logits(s, place.clamp(0, s.shape[1] - 1), banned)
                inside = (ids >= 0) & (place >= 0) & (place < s.shape[1])
                chosen[0] = torch.where(inside, here, chosen[0])
        every, chosen = pair.everywhere(torch.cat(states), *chosen)
        summary = pair.programs.summarise(every)
        norms = summary.norms
        saved[:5, rows] = torch.stack(norms)
        student_entropy[rows] = summary.student_entropy
        teacher_entropy[rows] = summary.teacher_entropy
        if chosen:
            logprobs[rows] = as_logprobs(chosen[0] - norms.student_max - norms.student_log_sum)
        if options.beta == 1.0:
            kl[rows] = summary.reverse_kl
        elif options.beta == 0.0:
            kl[rows] = summary.forward_kl
        else:
            parts = torch.zeros_like(saved[:2, rows])
            for columns in tiles:
                _, s, t, _ = pair.project(rows, columns)
                banned = pair.banned_at(columns)
                parts += pair.programs.jsd_parts(s, t, norms, beta=options.beta, banned=banned)
            parts = parts if shard is None else shard.sum_(parts)
            saved[5, rows] = parts[1]
            kl[rows] = (options.beta * parts[0] + (1 - options.beta) * parts[1]).clamp_min(0)
    if pair.token_ids is not None:
        logprobs = keep_active(logprobs, pair.active)
    kl, student_entropy, teacher_entropy = (
        keep_active(values, pair.active) for values in (kl, student_entropy, teacher_entropy)
    )
    return RowDivergences(kl, student_entropy, teacher_entropy, logprobs, saved)


def lowmem_gradients(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    needs_grad: NeedsGrad,
    saved: Tensor,
    grad_kl: Tensor,
    shard: Shard | None = None,
) -> HeadGradients:
    """Gradients of sum_n grad_kl_n token_kl_n, `grad_kl` `[N]`, from every tile once more."""
    pair = ModelPair(inputs, options, needs_grad, shard)
    sums = pair.gradient_sums()
    scales = keep_active(grad_kl.to(pair.dtype) * pair.student.slope, pair.active)
    for rows, tiles in pair.blocks():
        *norms, student_part = saved[:, rows]
        for columns in tiles:
            hidden_rows, s, t, derivative = pair.project(rows, columns)
            grad = pair.grad_of(s)
            pair.programs.divergence_gradient_(
                s,
                t,
                Norms(*norms),
                beta=options.beta,
                student_part=student_part,
                banned=pair.banned_at(columns),
                scale=scales[rows],
                grad=grad,
            )
            if derivative is not None:
                grad.mul_(derivative)
            sums.add(rows, columns, hidden_rows, grad)
    return sums.take(shard)

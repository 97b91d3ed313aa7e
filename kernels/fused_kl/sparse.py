"""The reverse KL on the columns that matter: mode "sparse" of `linear_reverse_kl`.

The student's logits of a chunk are computed in full. Of the vocabulary, only those columns go on in
which some row of the chunk has more than a threshold of probability: the support. The teacher's
logits, the gradient of the hidden states and the rows of the head's gradient are products over the
support alone. Rows of which the support leaves out more than `tolerance` get a wider one of their
own, or take the dense path.

With p the student's probabilities, S the support, e the mass outside it and d = s - t, the gradient
p (d - mu) is taken on S with mu_S = sum_S p d / (1 - e), and is 0 elsewhere. It is the gradient of
(1 - e) KL(p^ || q^), where p^ and q^ are both distributions given S, and this value is a lower
bound of the KL. See "Sparse" in kernels/README.md for both, and for the bound of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused_kl.arguments import (
    DivergenceInputs,
    DivergenceOptions,
    HeadInputs,
    LogitOptions,
    NeedsGrad,
    Support,
)
from fused_kl.divergence import add_rows
from fused_kl.gradients import ComputedLoss
from fused_kl.head import keep_active
from fused_kl.pair import ModelPair
from fused_kl.rows import as_logprobs
from fused_kl.tiles import row_block_rows, slices

WORTH_IT = 0.7  # of the dense path's work, above which a support is not worth it
WIDEST = 0.5  # share of the columns
SUPPORTS = 3  # of a chunk, at most
PASS = 32  # rows whose products take as long as reading the heads and passing over the gradient
GATHER = 80  # rows whose products take as long as gathering the heads, and adding to the gradient
STEP = 8.0  # by which thresholds fall
TRIES = 9
CAPACITY = 16  # on a GPU, this part of the vocabulary; a support of data-dependent size would wait


@torch.no_grad()
def sparse(
    inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad
) -> tuple[ComputedLoss, Support]:
    """As `divergence.fast`, on each chunk's support; without `exact_value` the teacher's entropy is
    that on the support, renormalised."""
    pair = ModelPair(inputs, options, needs_grad)
    stats, sums = pair.new_stats(), pair.gradient_sums()
    if sums.hidden is not None:
        sums.hidden.zero_()  # rows that are not active may be in no part of a chunk
    left_out, bounds = pair.weights.new_zeros(2, pair.num_rows)
    columns, dense_rows = [], []
    largest = _largest_logit(inputs.teacher, pair.teacher.slope, options.sides[1])
    for rows, (every,) in pair.blocks():
        hidden_rows, s, derivative = pair.project_student(rows, every)
        chunk = _Chunk(pair, rows, hidden_rows, s, derivative, *_student_rows(pair, rows, s))
        supports, dense = _supports(chunk, options)
        columns.append(sum(len(index) for index, _ in supports))
        dense_rows.append(len(dense))
        for index, some in supports:
            place = some + rows.start
            values = _on_support(chunk, index, some, largest)
            stats[:, place] = torch.stack(values.stats)
            left_out[place], bounds[place] = values.left_out, values.bound
            if any(needs_grad):
                grad = values.grad.mul_(pair.scales[place, None])
                sums.add_some(place, index, hidden_rows[some], grad)
            if options.exact_value:
                stats[:, place] = torch.stack(_exact_values(chunk, some))
        if len(dense):
            place = dense + rows.start
            s = s if len(dense) == len(s) else s[dense]
            slopes = None if derivative is None else derivative[dense]
            values = add_rows(pair, sums, place, hidden_rows[dense], s, slopes)
            stats[:, place] = torch.stack(values)
    left_out, bounds = (keep_active(values, pair.active) for values in (left_out, bounds))
    counts = (torch.tensor(numbers, dtype=torch.long) for numbers in (columns, dense_rows))
    support = Support(left_out, bounds * pair.scales.abs(), *counts)
    return pair.computed(stats, sums), support


class _Chunk(NamedTuple):
    """The student's side of some rows: logits, the derivative of their softcap, statistics of the
    rows, `[n]` each, and of each column the largest log-probability, `[V]`."""

    pair: ModelPair
    rows: slice
    hidden_rows: Tensor
    s: Tensor
    derivative: Tensor | None
    log_sums: Tensor
    entropy: Tensor
    column_max: Tensor

    def log_probs(self, some: Tensor, index: Tensor) -> Tensor:
        """Log-probabilities of some rows of the chunk at columns `index`."""
        return self.s[some[:, None], index].sub_(self.log_sums[some, None])


def _exact_values(chunk: _Chunk, some: Tensor) -> list[Tensor]:
    """The statistics of some rows of the chunk over the whole vocabulary."""
    pair, place = chunk.pair, some + chunk.rows.start
    t = pair.project_teacher(place, slice(0, pair.num_columns))
    ids = None if pair.token_ids is None else pair.token_ids[place]
    s = chunk.s[some]  # a copy, which is overwritten
    values = pair.programs.divergence_rows_(s, t, ids, beta=1.0, banned=pair.banned)
    return [values[0], *values]


class _OnSupport(NamedTuple):
    stats: list[Tensor]
    left_out: Tensor
    bound: Tensor
    grad: Tensor  # by the logits at the support, not scaled


def _on_support(
    chunk: _Chunk, index: Tensor, some: Tensor, largest: Callable[[Tensor], Tensor]
) -> _OnSupport:
    """The teacher's logits of some rows on their support, and what follows from them."""
    pair, place, entropy = chunk.pair, some + chunk.rows.start, chunk.entropy[some]
    teacher_rows = pair.teacher.hidden_rows(place)
    t, _ = pair.teacher.project_some(teacher_rows, index)
    if pair.banned is not None:
        t.masked_fill_(pair.banned.columns[index], pair.banned.value)
    log_p = chunk.log_probs(some, index)
    p = log_p.exp()
    mass = p.sum(1, dtype=torch.float64).to(pair.dtype)
    teacher_log_sums = t.logsumexp(1)
    log_q = t.sub_(teacher_log_sums[:, None])
    teacher_entropy = -(log_q.exp() * log_q).sum(1)
    ratio = log_q.neg_().add_(log_p)  # up to a constant in each row
    mean = (p * ratio).sum(1) / mass
    value = mass * (mean - mass.log()).clamp_min(0)
    stats = [value, value, entropy, teacher_entropy]
    if pair.token_ids is not None:
        ids = pair.token_ids[place]
        chosen = chunk.s[some, ids]
        if pair.banned is not None:
            chosen = torch.where(pair.banned.columns[ids], pair.banned.value, chosen)
        stats.append(as_logprobs(chosen - chunk.log_sums[some]))
    left = (1 - mass).clamp_min(0)
    # sum p |log p - t - (mean - teacher_log_sums)| over the columns left out, at most.
    tail = (entropy + (p * log_p).sum(1)).clamp_min(0)
    tail = tail + left * ((teacher_log_sums - mean).abs() + largest(teacher_rows))
    grad = ratio.sub_(mean[:, None]).mul_(p)
    if chunk.derivative is not None:
        grad.mul_(chunk.derivative[some[:, None], index])
    return _OnSupport(stats, left, 2 * tail, grad)


def _student_rows(pair: ModelPair, rows: slice, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last three fields of `_Chunk`, in one pass over the student's logits, by blocks that stay
    in the cache. Rows that are not active put no column into a support."""
    log_sums, entropy = s.new_empty(2, len(s))
    column_max = s.new_full((s.shape[1],), -torch.inf)
    block = row_block_rows(s.shape[1], s.element_size(), s.device.type)
    for part in slices(len(s), block):
        logits = s[part]
        if pair.banned is not None:
            logits.masked_fill_(pair.banned.columns, pair.banned.value)
        maxima = logits.amax(1, keepdim=True)
        shifted = logits - maxima
        weights = shifted.exp()
        total = weights.sum(1)
        log_sums[part] = total.log() + maxima[:, 0]
        entropy[part] = total.log() - weights.mul_(shifted).sum(1) / total
        shifted.sub_(total.log()[:, None])
        if pair.active is not None:
            active = pair.active[rows][part]
            shifted.masked_fill_(~active[:, None], -torch.inf)
        torch.maximum(column_max, shifted.amax(0), out=column_max)
    return log_sums, entropy, column_max


def _supports(
    chunk: _Chunk, options: DivergenceOptions
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Supports, each with the rows of the chunk that it serves, and the rows that are left for the
    dense path; int64 all of them. Rows of which a support leaves out too much get one of their own,
    which is wider and serves fewer rows.

    On a GPU there is one support, of as many of the likeliest columns as fit, for every row: what
    it leaves out is reported with the result.
    """
    pair, device = chunk.pair, chunk.s.device
    some = torch.arange(len(chunk.s), device=device)
    none = some[:0]
    capacity = options.capacity or (-(-pair.num_columns // CAPACITY) if chunk.s.is_cuda else 0)
    if capacity:
        most = min(capacity, pair.num_columns)
        return [(chunk.column_max.topk(most).indices.sort().values, some)], none
    if pair.active is not None:
        some = pair.active[chunk.rows].nonzero().flatten()
    supports, column_max = [], chunk.column_max
    while len(some) and len(supports) < SUPPORTS:
        passed = PASS if supports else 0
        index, over = _support(chunk, some, column_max, options.tolerance, passed)
        if not len(index):
            break
        kept = torch.ones_like(some, dtype=torch.bool)
        kept[over] = False
        supports.append((index, some[kept]))
        some = some[over]
        if len(some):
            column_max = (chunk.s[some] - chunk.log_sums[some, None]).amax(0)
    return supports, some


def _support(
    chunk: _Chunk, some: Tensor, column_max: Tensor, tolerance: float, passed: int
) -> tuple[Tensor, Tensor]:
    """Columns of a support, ascending, and the places in `some` of rows of which it leaves out more
    than `tolerance`. Of the thresholds tried, the one with the least work; no columns where the
    dense path has less. Work is counted in columns times rows; `passed` is what the dense path
    takes besides its rows."""
    num_columns, num_rows = chunk.pair.num_columns, len(some)
    best, least = (some[:0], some[:0]), WORTH_IT * num_columns * (num_rows + passed)
    for step in range(TRIES):
        index = (column_max > math.log(tolerance) - step * math.log(STEP)).nonzero().flatten()
        if len(index) > WIDEST * num_columns:
            break
        left_out = 1 - chunk.log_probs(some, index).exp_().sum(1, dtype=torch.float64)
        over = (left_out > tolerance).nonzero().flatten()
        work = len(index) * (num_rows - len(over) + GATHER)
        if len(over):  # what these rows will take is not known yet: half of the dense path, say
            work += 0.5 * num_columns * (len(over) + PASS)
        if work < least and len(over) < num_rows:
            best, least = (index, over), work
        if not len(over):
            break
    return best


_NORMS: Any = WeakTensorKeyDictionary()  # of frozen heads: version, and a row's largest norm


def _largest_logit(
    inputs: HeadInputs, slope: float, options: LogitOptions
) -> Callable[[Tensor], Tensor]:
    """A bound on the absolute value of the logits of hidden states `[n, H]`: `[n]`."""
    weight = inputs.lm_head
    version = None if weight.is_inference() else weight._version
    known, norm = _NORMS.get(weight, (None, None))
    if norm is None or version is None or version != known:
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=wide).amax()
        _NORMS[weight] = version, norm
    bias = 0.0 if inputs.bias is None else inputs.bias.abs().amax()

    def bound(hidden: Tensor) -> Tensor:
        largest = slope * (hidden.to(norm.dtype).norm(dim=1) * norm + bias)
        if options.softcap is None:
            return largest
        return largest.clamp_max(options.softcap) / options.temperature

    return bound

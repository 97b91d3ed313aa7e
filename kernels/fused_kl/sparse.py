"""The reverse KL on the columns that matter: mode "sparse" of `linear_reverse_kl`.

The student's logits of a chunk are computed in full. Of the vocabulary, only those columns go on in
which some row of the chunk has more than a threshold of probability: the support. The teacher's
logits, the gradient of the hidden states and the rows of the head's gradient are products over the
support alone. The threshold is the largest tried that leaves out at most `tolerance` of each row.

With p the student's probabilities, S the support, e the mass outside it and d = s - t, the gradient
p (d - mu) is taken on S with mu_S = sum_S p d / (1 - e), and is 0 elsewhere. It is the gradient of
(1 - e) KL(p^ || q^), where p^ and q^ are both distributions given S, and this value is a lower
bound of the KL. See "Sparse" in kernels/README.md for both, and for the bound of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused_kl.arguments import (
    DivergenceInputs,
    DivergenceOptions,
    HeadInputs,
    NeedsGrad,
    Support,
)
from fused_kl.divergence import ModelPair, fast_rows
from fused_kl.head import ComputedLoss
from fused_kl.rows import as_logprobs, chosen_logits
from fused_kl.tiles import row_block_rows, slices

WIDEST = 0.4  # share of the columns above which a chunk takes the dense path
STEP = 4.0  # by which the threshold falls until enough is in the support
TRIES = 14
CAPACITY = 16  # on a GPU, this part of the vocabulary; a support of data-dependent size would wait


class _Rows(NamedTuple):
    """Statistics of the student's rows, `[n]` each, and of each column the largest
    log-probability, `[V]`."""

    log_sums: Tensor
    entropy: Tensor
    column_max: Tensor


@torch.no_grad()
def sparse(
    inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad
) -> tuple[ComputedLoss, Support]:
    """As `divergence.fast`, on each chunk's support; the teacher's entropy is that on the support,
    renormalised."""
    pair = ModelPair(inputs, options, needs_grad)
    sums = pair.gradient_sums()
    stats = pair.weights.new_empty(4 + (pair.token_ids is not None), pair.num_rows)
    left_out, bounds = pair.weights.new_zeros(2, pair.num_rows)
    slope = pair.student.slope
    scales = pair.weights if slope == 1.0 else pair.weights * slope
    counts = []
    largest = _largest_logit(inputs.teacher, pair.teacher.slope, options)
    for rows, (columns,) in pair.blocks():
        hidden_rows, s, derivative = pair.project_student(rows, columns)
        student = _student_rows(pair, rows, s)
        index = _support(pair, rows, s, student, options)
        counts.append(pair.num_columns if index is None else len(index))
        if index is None:
            t = pair.project_teacher(rows, columns)
            grad = pair.grad_of(s) if any(needs_grad) else None
            torch.stack(fast_rows(pair, rows, s, t, scales[rows], grad), out=stats[:, rows])
            if grad is not None:
                if derivative is not None:
                    grad.mul_(derivative)
                sums.add(rows, columns, hidden_rows, grad)
            continue
        teacher_rows = pair.teacher.hidden_rows(rows)
        t, _ = pair.teacher.project_some(teacher_rows, index)
        log_p = s.index_select(1, index).sub_(student.log_sums[:, None])
        if pair.banned is not None:
            t.masked_fill_(pair.banned.columns[index], pair.banned.value)
        p = log_p.exp()
        mass = p.sum(1, dtype=torch.float64).to(pair.dtype)
        teacher_log_sums = t.logsumexp(1)
        log_q = t - teacher_log_sums[:, None]
        ratio = log_p - log_q  # up to a constant in each row
        mean = (p * ratio).sum(1) / mass
        value = mass * (mean - mass.log()).clamp_min(0)
        teacher_entropy = -(log_q.exp() * log_q).sum(1)
        details = [value, value, student.entropy, teacher_entropy]
        if pair.token_ids is not None:
            chosen = chosen_logits(s, pair.token_ids[rows], pair.banned)
            details.append(as_logprobs(chosen - student.log_sums))
        torch.stack(details, out=stats[:, rows])
        left = (1 - mass).clamp_min(0)
        kept_entropy = -(p * log_p).sum(1)
        # sum p |log p - t - (mean - teacher_log_sums)| over the columns left out, at most.
        shift = (teacher_log_sums - mean).abs() + largest(teacher_rows)
        tail = (student.entropy - kept_entropy).clamp_min(0) + left * shift
        left_out[rows], bounds[rows] = left, 2 * tail
        if any(needs_grad):
            grad = p.mul_(ratio.sub_(mean[:, None])).mul_(scales[rows, None])
            if derivative is not None:
                grad.mul_(derivative.index_select(1, index))
            sums.add_some(rows, index, hidden_rows, grad)
    if pair.active is not None:
        stats.masked_fill_(~pair.active, 0)
        left_out.masked_fill_(~pair.active, 0)
        bounds.masked_fill_(~pair.active, 0)
    losses, *details = stats.unbind()
    bounds *= scales.abs()
    loss = ComputedLoss((pair.weights * losses).sum(), tuple(details), sums.take())
    return loss, Support(left_out, bounds, torch.tensor(counts, dtype=torch.long))


def _student_rows(pair: ModelPair, rows: slice, s: Tensor) -> _Rows:
    """One pass over the student's logits, in blocks that stay in the cache. Rows that are not
    active put no column into the support."""
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
    return _Rows(log_sums, entropy, column_max)


def _support(
    pair: ModelPair, rows: slice, s: Tensor, student: _Rows, options: DivergenceOptions
) -> Tensor | None:
    """Columns of the support, ascending, int64; None where it is too wide. On a GPU, as many of
    the likeliest as fit: what they leave out is reported with the result."""
    capacity = options.capacity or (-(-pair.num_columns // CAPACITY) if s.is_cuda else 0)
    if capacity:
        most = min(capacity, pair.num_columns)
        return student.column_max.topk(most).indices.sort().values
    active = slice(None) if pair.active is None else pair.active[rows]
    for threshold in _thresholds(options.tolerance):
        index = (student.column_max > threshold).nonzero().flatten()
        if len(index) > WIDEST * pair.num_columns:
            return None
        log_p = s.index_select(1, index).sub_(student.log_sums[:, None])
        left_out = 1 - log_p.exp_().sum(1, dtype=torch.float64)[active]
        if left_out.numel() == 0 or float(left_out.max()) <= options.tolerance:
            return index
    return None


def _thresholds(tolerance: float) -> Iterator[float]:
    """Logarithms of thresholds, falling; none for a tolerance of 0."""
    if tolerance > 0:
        for step in range(TRIES):
            yield math.log(tolerance) - step * math.log(STEP)


_NORMS = WeakTensorKeyDictionary()  # of frozen heads: version, and the largest norm of a row


def _largest_logit(
    inputs: HeadInputs, slope: float, options: DivergenceOptions
) -> Callable[[Tensor], Tensor]:
    """A bound on the absolute value of the logits of hidden states `[n, H]`: `[n]`."""
    weight = inputs.lm_head
    version, norm = _NORMS.get(weight, (None, None))
    if norm is None or version != weight._version:
        wide = torch.promote_types(weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=wide).amax()
        _NORMS[weight] = weight._version, norm
    bias = 0.0 if inputs.bias is None else inputs.bias.abs().amax()

    def bound(hidden: Tensor) -> Tensor:
        largest = slope * (hidden.to(norm.dtype).norm(dim=1) * norm + bias)
        if options.softcap is None:
            return largest
        return largest.clamp_max(options.softcap) / options.temperature

    return bound

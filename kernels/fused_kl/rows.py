"""What the row programs of torch and of Triton share: names, bans, and how parts of a vocabulary
merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for -inf: far below any logit, yet 0 * FLOOR and FLOOR - FLOOR are 0 where -inf gives NaN.
FLOOR = -1e30
# exp(80) is finite in fp32, and a probability ratio beyond it changes no sum.
MAX_LOG_RATIO = 80.0

# (rows of the chunk, their logprobs [n]) -> factor of the gradient of each logprob [n]
TokenScale = Callable[[slice, Tensor], Tensor]


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
        columns = ~allowed_columns
        value = torch.full((), FLOOR, dtype=dtype, device=columns.device)
        return Banned(columns, value.masked_fill_(columns.all(), torch.nan))

    def part(self, columns: slice) -> Banned:
        """The same for a tile of the vocabulary."""
        return Banned(self.columns[columns], self.value)


class Norms(NamedTuple):
    """What the whole vocabulary says about each row, [n] each: maxima and log sums of e^(logit -
    max) of student and teacher, and the mean log ratio sum p log(p/q), the reverse KL."""

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor
    mean: Tensor


class Summary(NamedTuple):
    """Norms, both entropies and both KLs of each row; the KLs carry the rounding of a logit."""

    norms: Norms
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


def merge(states: Tensor) -> Tensor:
    """States `[parts, 8, n]` of parts of the vocabulary -> `[8, n]` of the whole.

    With x = s - max s, y = t - max t a state holds max s, sum e^x, sum e^x x, max t, sum e^y,
    sum e^y y, sum e^x (x - y) and sum e^y (y - x); a new maximum shifts x or y and scales e^.
    """
    s_max, s_sum, s_first, t_max, t_sum, t_first, s_cross, t_cross = states.unbind(1)
    s_top, t_top = s_max.amax(0), t_max.amax(0)
    s_shift, t_shift = s_max - s_top, t_max - t_top
    s_scale, t_scale = s_shift.exp(), t_shift.exp()
    gap = s_shift - t_shift
    parts = (
        s_scale * s_sum,
        s_scale * (s_first + s_sum * s_shift),
        t_scale * t_sum,
        t_scale * (t_first + t_sum * t_shift),
        s_scale * (s_cross + s_sum * gap),
        t_scale * (t_cross - t_sum * gap),
    )
    s_sum, s_first, t_sum, t_first, s_cross, t_cross = (part.sum(0) for part in parts)
    return torch.stack((s_top, s_sum, s_first, t_top, t_sum, t_first, s_cross, t_cross))


def summarise(state: Tensor) -> Summary:
    """What a state `[8, n]` of the whole vocabulary amounts to."""
    s_max, s_sum, s_first, t_max, t_sum, t_first, s_cross, t_cross = state
    s_log, t_log = s_sum.log(), t_sum.log()
    reverse_kl = s_cross / s_sum - s_log + t_log
    return Summary(
        Norms(s_max, s_log, t_max, t_log, reverse_kl),
        s_log - s_first / s_sum,
        t_log - t_first / t_sum,
        reverse_kl.clamp_min(0),
        (t_cross / t_sum - t_log + s_log).clamp_min(0),
    )


def chosen_logits(logits: Tensor, token_ids: Tensor, banned: Banned | None) -> Tensor:
    """The logit `[n]` of one column per row, banned ones included."""
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    if banned is None:
        return chosen
    return torch.where(banned.columns[token_ids], banned.value, chosen)


def as_logprobs(values: Tensor) -> Tensor:
    """Log-probabilities with -inf for banned tokens."""
    return values.masked_fill(values < FLOOR / 2, -torch.inf)

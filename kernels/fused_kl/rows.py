"""Row programs: the contract that `torch_rows` and `triton_rows` both implement.

A row program turns a block of logits into per-row statistics and the gradient of the logits. This
file has its interface, the values that it takes and returns, and the rule by which statistics of
parts of a vocabulary merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Stands for -inf: far below any logit, yet 0 * FLOOR and FLOOR - FLOOR are 0 where -inf gives NaN.
FLOOR = -1e30
# exp(80) is finite in fp32, and a larger probability ratio changes no sum.
MAX_LOG_RATIO = 80.0

# (rows of the chunk, their logprobs [n]) -> factor of the gradient of each logprob [n]
TokenScale = Callable[[slice, Tensor], Tensor]


class Banned(NamedTuple):
    """Columns that the policy excludes, and the value that their logits are replaced by."""

    columns: Tensor  # [V] bool
    value: Tensor  # 0-dim

    @staticmethod
    def outside(allowed_columns: Tensor, dtype: torch.dtype, *, part: bool = False) -> Banned:
        """Ban every column that is not allowed.

        If no column is allowed, the value is NaN, so that the mistake shows in the loss, unless
        these columns are a part of the vocabulary.
        """
        columns = ~allowed_columns
        value = torch.full((), FLOOR, dtype=dtype, device=columns.device)
        if not part:
            value.masked_fill_(columns.all(), torch.nan)
        return Banned(columns, value)

    def part(self, columns: slice) -> Banned:
        """The ban on a tile of the vocabulary."""
        return Banned(self.columns[columns], self.value)


class TokenRows(NamedTuple):
    """Log-probability of the given token, and entropy, `[n]` each."""

    logprobs: Tensor
    entropy: Tensor


class TokenNorms(NamedTuple):
    """Per row, over the whole vocabulary: the maximum and log sum e^(logit - maximum), the
    probability of all tokens but the given one, and the entropy; `[n]` each."""

    largest: Tensor
    log_sum: Tensor
    rest: Tensor
    entropy: Tensor

    @staticmethod
    def of(state: Tensor) -> TokenNorms:
        """From the state `[4, n]` of the whole vocabulary (`merge_tokens`)."""
        largest, total, first, others = state
        log_sum = total.log()
        return TokenNorms(largest, log_sum, others / total, log_sum - first / total)


class Norms(NamedTuple):
    """Per row, over the whole vocabulary: the maximum and log sum e^(logit - maximum) of student
    and teacher, and the mean log ratio sum p log(p/q), which is the reverse KL; `[n]` each."""

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor
    mean: Tensor


class Summary(NamedTuple):
    """Norms, entropies and KLs of each row; the error of a KL is the rounding of a logit."""

    norms: Norms
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor


class RowPrograms(Protocol):
    """The functions of a module of row programs.

    Logits are `[n, V]`, or `[n, columns]` for a tile of the vocabulary, and statistics are in their
    dtype, fp32 or fp64. Banned columns count as `banned.value`. `scale` [n] multiplies a row's
    gradient, and `grad`, of the shape of the logits, receives the scaled gradient; it may be the
    student's logits themselves. Unless a function says otherwise, it may overwrite the logits.
    """

    def divergence_rows_(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        token_ids: Tensor | None = None,
        *,
        beta: float,
        banned: Banned | None,
        scale: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> list[Tensor]:
        """Divergence, student entropy and teacher entropy of each row, and with `token_ids` [n] the
        student's log-probabilities of these; writes scale dD/dlogits into `grad`."""
        ...

    def token_rows_(
        self,
        logits: Tensor,
        token_ids: Tensor,
        *,
        banned: Banned | None,
        scale: TokenScale | None = None,
        entropy_scale: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> TokenRows:
        """Log-probability of one token per row, and entropy; writes scale dlogprob/dlogits =
        scale (onehot - p) into `grad`, and given `entropy_scale` [n] adds entropy_scale
        dentropy/dlogits = -entropy_scale p (log p + entropy) to it.

        A banned token has logprob -inf, and its scale must be 0.
        """
        ...

    # Where a block holds only part of the vocabulary, statistics of all tiles come first, then
    # what needs the norms.

    def divergence_statistics(
        self, student_logits: Tensor, teacher_logits: Tensor, *, banned: Banned | None
    ) -> Tensor:
        """States `[parts, 8, n]` of some columns, with the fields of `merge`.

        Logits of banned columns may be replaced by `banned.value`; all others are left unchanged.
        """
        ...

    def summarise(self, states: Tensor) -> Summary:
        """Summary of the states `[parts, 8, n]` of all parts of the vocabulary."""
        ...

    def jsd_parts(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        norms: Norms,
        *,
        beta: float,
        banned: Banned | None,
    ) -> Tensor:
        """Contributions `[2, n]` of some columns to KL(q || m) and KL(p || m)."""
        ...

    def divergence_gradient_(
        self,
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
        """Write scale dD/dlogits of some columns into `grad`.

        `student_part` [n] is KL(p || m) over the whole vocabulary; only JSD uses it.
        """
        ...

    def token_statistics(
        self, logits: Tensor, token_ids: Tensor, *, banned: Banned | None
    ) -> Tensor:
        """States `[parts, 4, n]` of some columns: max z, with x = z - max z sum e^x and sum e^x x,
        and sum e^x of all columns but the token's; an id is -1 where the token is elsewhere."""
        ...

    def token_gradient_(
        self,
        logits: Tensor,
        token_ids: Tensor,
        norms: TokenNorms,
        *,
        banned: Banned | None,
        scale: Tensor,
        entropy_scale: Tensor | None = None,
        grad: Tensor,
    ) -> None:
        """As `token_rows_` writes it, of some columns; an id is -1 where the token is elsewhere."""
        ...

    def chosen_logprobs(
        self,
        logits: Tensor,
        token_ids: Tensor,
        maxima: Tensor,
        log_sums: Tensor,
        banned: Banned | None,
    ) -> Tensor:
        """Log-probability `[n]` of one token per row, -inf for a banned one; `maxima` [n] and
        `log_sums` [n] normalise the logits, which are left unchanged."""
        ...

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """Multiply `values` by the 0-dim `factor` in place, without a pass over them where it is 1.

        The host does not wait for a factor that is on a device.
        """
        ...


def merge(states: Tensor) -> Tensor:
    """Merge the states `[parts, 8, n]` of parts of a vocabulary into the state `[8, n]` of the
    whole.

    With x = s - max s and y = t - max t, a state holds max s, sum e^x, sum e^x x, max t, sum e^y,
    sum e^y y, sum e^x (x - y) and sum e^y (y - x). A larger maximum shifts x or y and rescales e^x
    or e^y.
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


def merge_tokens(states: Tensor) -> Tensor:
    """As `merge`, of the states `[parts, 4, n]` that `token_statistics` returns: `[4, n]`."""
    maxima, sums, firsts, others = states.unbind(1)
    largest = maxima.amax(0)
    shift = maxima - largest
    scale = shift.exp()
    parts = scale * sums, scale * (firsts + sums * shift), scale * others
    return torch.stack((largest, *(part.sum(0) for part in parts)))


def summarise(state: Tensor) -> Summary:
    """Summary of a state `[8, n]` of the whole vocabulary."""
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
    """The logit `[n]` of one column per row, or `banned.value` where the column is banned."""
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    if banned is None:
        return chosen
    return torch.where(banned.columns[token_ids], banned.value, chosen)


def as_logprobs(values: Tensor) -> Tensor:
    """`values` with -inf in place of the log-probabilities of banned tokens."""
    return values.masked_fill(values < FLOOR / 2, -torch.inf)

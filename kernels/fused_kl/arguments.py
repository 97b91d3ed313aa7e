"""Tensors and options of the losses as the layers below the public functions receive them, and the
result that the divergences return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_kl.rows import Banned, chosen_logits
from fused_kl.tiles import Plan

T = TypeVar("T")
PerSide = T | tuple[T, T]  # for both models, or the student's and the teacher's


class HeadInputs(NamedTuple):
    """One model: its hidden states, and the head that turns them into logits."""

    hidden: Tensor  # [N, H]
    lm_head: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class LogitOptions(NamedTuple):
    """How hidden states become logits: z = logit_scale (h W^T + b), with a softcap c
    z = c tanh(z / c), then z / temperature."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


class NeedsGrad(NamedTuple):
    """Which of a head's inputs need a gradient."""

    hidden: bool
    lm_head: bool
    bias: bool

    @staticmethod
    def of(inputs: HeadInputs) -> NeedsGrad:
        """The inputs that require grad; none while grad is disabled."""
        enabled = torch.is_grad_enabled()
        return NeedsGrad(
            *(enabled and tensor is not None and tensor.requires_grad for tensor in inputs)
        )


NO_GRAD = NeedsGrad(False, False, False)

Inputs = TypeVar("Inputs", "DivergenceInputs", "TokenInputs")


def under_autocast(inputs: Inputs) -> Inputs:
    """The inputs as torch's linear takes them: under autocast, hidden states, heads and biases in
    its dtype, unless they are fp64."""
    device_type = inputs[0].device.type
    available = torch.amp.is_autocast_available(device_type)  # pyright: ignore[reportPrivateImportUsage]
    if not available or not torch.is_autocast_enabled(device_type):
        return inputs
    dtype = torch.get_autocast_dtype(device_type)
    cast = {
        name: tensor.to(dtype)
        for name, tensor in inputs._asdict().items()
        if name.endswith(("hidden", "lm_head", "bias"))
        and tensor is not None
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    }
    return inputs._replace(**cast)


class DivergenceInputs(NamedTuple):
    """Tensors of a divergence between two models.

    The custom ops of `fused_kl.ops` take these fields, and those of `DivergenceOptions`, one by
    one: their schema is derived from the two definitions.
    """

    student_hidden: Tensor  # [N, Hs]
    student_lm_head: Tensor  # [V, Hs]
    student_bias: Tensor | None  # [V]
    teacher_hidden: Tensor  # [N, Ht]
    teacher_lm_head: Tensor  # [V', Ht]
    teacher_bias: Tensor | None  # [V']
    token_weights: Tensor | None  # [N]
    token_ids: Tensor | None  # [N]
    allowed_columns: Tensor | None  # [V]

    @property
    def student(self) -> HeadInputs:
        return HeadInputs(self.student_hidden, self.student_lm_head, self.student_bias)

    @property
    def teacher(self) -> HeadInputs:
        return HeadInputs(self.teacher_hidden, self.teacher_lm_head, self.teacher_bias)

    @property
    def sides(self) -> tuple[HeadInputs, HeadInputs]:
        return self.student, self.teacher

    @property
    def num_rows(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def num_columns(self) -> int:
        """Columns of the vocabulary that both heads have."""
        return min(self.student_lm_head.shape[0], self.teacher_lm_head.shape[0])


class DivergenceOptions(NamedTuple):
    """Options of a divergence between two models, named as in `linear_reverse_kl` and
    `topk_reverse_kl`; the first three are the student's."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    teacher_temperature: float = 1.0
    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0
    beta: float = 1.0
    estimator: str = "full"
    k: int = 0  # 0: the full vocabulary
    support: str = "teacher"
    tail: bool = False
    mode: str = "fast"
    chunk_size: int = 0  # 0: "auto"
    tolerance: float = 0.0  # mode "sparse": mass of a row that may be left out
    capacity: int = 0  # mode "sparse": columns of a support; 0: as many as needed
    exact_value: bool = False  # mode "sparse": values over the whole vocabulary

    @property
    def sides(self) -> tuple[LogitOptions, LogitOptions]:
        """How the student's and the teacher's hidden states become logits."""
        return LogitOptions(*self[:3]), LogitOptions(*self[3:6])


class TokenInputs(NamedTuple):
    """Tensors of a loss of given tokens."""

    hidden: Tensor  # [N, H]
    lm_head: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [N]
    allowed_columns: Tensor | None  # [V]

    @property
    def head(self) -> HeadInputs:
        return HeadInputs(self.hidden, self.lm_head, self.bias)

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_columns(self) -> int:
        return self.lm_head.shape[0]


@dataclass(frozen=True)
class Shard:
    """This rank's part of a vocabulary: `columns` columns, from `first` on."""

    group: dist.ProcessGroup
    first: int
    columns: int
    total: int  # columns of all ranks
    widest: int  # columns of the rank with the most

    def gather(self, states: Tensor) -> Tensor:
        """The states `[k, n]` of all ranks, `[ranks, k, n]`."""
        every = states.new_empty(dist.get_world_size(self.group), *states.shape)
        dist.all_gather([*every], states.contiguous(), group=self.group)
        return every

    def sum_(self, values: Tensor) -> Tensor:
        """Add up the values of all ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def places(self, token_ids: Tensor) -> Tensor:
        """The column of each token among this rank's, or -1 where another rank has it."""
        place = token_ids - self.first
        return place.masked_fill((place < 0) | (place >= self.columns), -1)

    def chosen(self, logits: Tensor, places: Tensor, banned: Banned | None) -> Tensor:
        """The logits `[n]` of the tokens at `places`, or 0 where another rank has them."""
        return chosen_logits(logits, places.clamp_min(0), banned).masked_fill(places < 0, 0)


class TokenOptions(NamedTuple):
    """Options that the losses of given tokens share."""

    logits: LogitOptions
    chunk_size: int  # 0: "auto"
    shard: Shard | None = None  # this rank's part of the vocabulary


def counted(token_ids: Tensor, token_weights: Tensor | None) -> Tensor:
    """The ids of rows whose weight is not 0; all where the shapes do not fit, which is an error."""
    if token_weights is None or token_weights.shape != token_ids.shape:
        return token_ids
    return token_ids[token_weights != 0]


class Support(NamedTuple):
    """What mode "sparse" did: the mass that was left out of each row, a bound on the L1 norm of the
    error of each row's gradient by its logits, `[N]` both; and of each chunk the number of columns
    in its supports, and of rows that took the dense path instead, int64 `[chunks]`, on the host."""

    left_out: Tensor
    gradient_bound: Tensor
    columns: Tensor
    dense_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class LinearKLOutput:
    """Result of a divergence between two models; fp32, or fp64 for fp64 inputs; values in nats.

    Attributes:
        loss: differentiable; a scalar, or `[N]` with reduction="none".
        token_kl: `[N]`, the divergence of each row.
        student_entropy: `[N]`.
        teacher_entropy: `[N]`.
        student_logprobs: `[N]`, log-probabilities of `token_ids`; None without `token_ids`.
        plan: how many rows and columns of logits were held at once.
        support: what mode "sparse" left out; None in other modes.

    All `[N]` values except `loss` are detached, not weighted, and 0 in rows of weight 0.
    """

    loss: Tensor
    token_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor | None
    plan: Plan
    support: Support | None = None

"""Attention of completions to a prefix and to themselves, without a mask over all of both.

A token behind a prefix attends to what its prompt sees of the prefix, and causally to its own
branch. Each of these two parts is one call of a fused kernel, which also returns the log-sum-exp of
each row's scores, lse_i. With lse = log sum_i exp(lse_i), the attention to both is

    out = sum_i exp(lse_i - lse) out_i

In backward, each part's kernel gets the merged `out` and `lse`. From them it recomputes its
probabilities as exp(score - lse), which are those of the whole row: its gradients are exact.

The keys of the prefix are read once for all branches and never copied behind one another, and the
work grows with what a token sees: with all branches under one mask it would grow with the square of
their total length.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.models.fused_attention import added_to_scores, fused_backward, fused_forward

FEWEST_TOKENS = 256  # of a group behind its prefix; with fewer, one mask over both parts is as fast


def are_cheaper(branches: int, steps: int) -> bool:
    """Whether so many branches of a group, of so many tokens each, attend faster in two parts than
    with one mask over both."""
    return branches * steps >= FEWEST_TOKENS


@dataclass(frozen=True)
class Branches:
    """Layout of the tokens behind a prefix: per group `prompts * rollouts` branches of `steps`
    tokens, one branch after the other.

    `seen` is boolean `[G, prompts, P]`, the columns of its group's prefix that each prompt sees;
    None where each sees all of them. `prepared` turns it into what a kernel adds to the scores.
    `own`, added to the scores of single tokens, `[1, 1, 1, n]`, hides what a branch does not have
    yet; None where it has all n.
    """

    prompts: int
    rollouts: int
    steps: int
    seen: torch.Tensor | None
    own: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """B, the number of branches of a group."""
        return self.prompts * self.rollouts

    @property
    def apart(self) -> int:
        """Number of parts into which the rows of a group are divided before its prefix: its
        prompts, if they see different columns, so that the mask has one row for each. Rows of
        single tokens are few and stay together."""
        return 1 if self.seen is None or self.steps == 1 else self.prompts

    def prepared(self, dtype: torch.dtype, per_head: int) -> "Branches":
        """With `seen` as `[G * prompts, 1, 1, P]`, or for single tokens `[G, 1, per_head * B, P]`:
        0 where a prompt sees a column, -inf elsewhere. Once for all layers.

        Args:
            per_head: query heads per key/value head.
        """
        if self.seen is None:
            return self
        seen = self.seen.flatten(0, 1)[:, None, None]
        if self.steps == 1:
            rows = self.seen.repeat_interleave(self.rollouts, 1)[:, None, None]
            seen = rows.expand(-1, -1, per_head, -1, -1).flatten(2, 3)
        return replace(self, seen=added_to_scores(seen, dtype))

    def by_branch(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange `[G, heads, B * T, ...]` by branch: `[G * B, heads, T, ...]`."""
        return values.unflatten(2, (self.count, -1)).transpose(1, 2).flatten(0, 1)

    def in_group(self, values: torch.Tensor) -> torch.Tensor:
        """Undo `by_branch`."""
        return values.unflatten(0, (-1, self.count)).transpose(1, 2).flatten(2, 3)


def attend_branches(
    query: torch.Tensor,
    key: tuple[torch.Tensor, torch.Tensor],
    value: tuple[torch.Tensor, torch.Tensor],
    branches: Branches,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of branches to their prefix and to themselves, differentiable in every tensor.

    Args:
        query: `[G, heads, B * T, D]`.
        key, value: of the prefix `[G, kv_heads, P, D]`, and of the branches `[G * B, kv_heads, n,
            D]`: n = T, causal, or with T = 1 everything that a branch has had so far.
        branches: prepared in the query's dtype.
        scale: of the scores; None is 1 / sqrt(D).

    Returns: `[G, heads, B * T, D]`.
    """
    return _Merged.apply(query, key[0], value[0], key[1], value[1], branches, scale)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        query: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        own_key: torch.Tensor,
        own_value: torch.Tensor,
        branches: Branches,
        scale: float | None,
    ) -> torch.Tensor:
        sizes = len(query), query.shape[1], own_key.shape[1]
        past, own = ctx.parts = (
            _PrefixPart(branches, *sizes, scale),
            _OwnPart(branches, *sizes, scale),
        )
        out_past, lse_past = past.forward(query, past_key, past_value)
        out_own, lse_own = own.forward(query, own_key, own_value)
        lse = torch.logaddexp(lse_past, lse_own)
        out = out_past * (lse_past - lse).exp()[..., None]
        out = (out + out_own * (lse_own - lse).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, past_key, past_value, own_key, own_value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        query, past_key, past_value, own_key, own_value, out, lse = ctx.saved_tensors
        past, own = ctx.parts
        rows = grad, query, out, lse
        d_past, d_past_key, d_past_value = past.backward(*rows, past_key, past_value)
        d_own, d_own_key, d_own_value = own.backward(*rows, own_key, own_value)
        return d_past + d_own, d_past_key, d_past_value, d_own_key, d_own_value, None, None


class _Part:
    """One part of the attention, as a call of a fused kernel: how rows (`[G, heads, B * T, ...]`)
    and keys are arranged for it."""

    mask: torch.Tensor | None = None
    causal = False

    def __init__(
        self, branches: Branches, groups: int, heads: int, kv_heads: int, scale: float | None
    ) -> None:
        self.branches, self.groups, self.scale = branches, groups, scale
        self.heads, self.kv_heads, self.per_head = heads, kv_heads, heads // kv_heads

    def arranged(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows for the kernel."""
        raise NotImplementedError

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `arranged`."""
        raise NotImplementedError

    def repeated(self, key: torch.Tensor) -> torch.Tensor:
        """Keys or values for the kernel."""
        return key

    def summed(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of keys or values from that of `repeated`."""
        return grad

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of this part alone, and the log-sum-exp of its scores, `[G, heads, B * T]`."""
        inputs = self.arranged(query), self.repeated(key), self.repeated(value)
        out, lse = fused_forward(*inputs, self.mask, self.causal, self.scale)
        return self.restored(out), self.restored(lse)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This part's gradients of query, key and value, with the merged `out` and `lse`."""
        grad, query, out, lse = (self.arranged(rows) for rows in (grad, query, out, lse))
        others = self.repeated(key), self.repeated(value), self.mask, self.causal, self.scale
        d_query, *d_keys = fused_backward(grad, query, out, lse, *others)
        d_key, d_value = map(self.summed, d_keys)
        return self.restored(d_query), d_key, d_value


class _PrefixPart(_Part):
    """Rows by key/value head, `[G * apart, kv_heads, rows, ...]`: the query heads that share it,
    one after the other."""

    def __init__(self, branches: Branches, *sizes: Any) -> None:
        super().__init__(branches, *sizes)
        self.mask = branches.seen
        self.apart = branches.apart

    def arranged(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.unflatten(2, (self.apart, -1)).unflatten(1, (self.kv_heads, -1))
        return rows.movedim(3, 1).flatten(0, 1).flatten(2, 3)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.unflatten(2, (self.per_head, -1)).unflatten(0, (-1, self.apart))
        return rows.movedim(1, 3).flatten(3, 4).flatten(1, 2)

    def repeated(self, key: torch.Tensor) -> torch.Tensor:
        return key[:, None].expand(-1, self.apart, -1, -1, -1).flatten(0, 1)

    def summed(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if self.apart == 1 else grad.unflatten(0, (-1, self.apart)).sum(1)


class _OwnPart(_Part):
    """Rows by branch: `[G * B, heads, T, ...]` against keys that are repeated for the query heads
    that share them; with T = 1 the rows of these heads one after the other, `[G * B, kv_heads,
    heads / kv_heads, ...]`, and no key is repeated."""

    def __init__(self, branches: Branches, *sizes: Any) -> None:
        super().__init__(branches, *sizes)
        self.causal, self.mask = branches.steps > 1, branches.own

    def arranged(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.branches.by_branch(rows)
        return rows if self.causal else rows.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.causal:
            rows = rows.unflatten(2, (self.per_head, 1)).flatten(1, 2)
        return self.branches.in_group(rows)

    def repeated(self, key: torch.Tensor) -> torch.Tensor:
        return key.repeat_interleave(self.per_head, 1) if self.causal else key

    def summed(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.unflatten(1, (self.kv_heads, -1)).sum(2) if self.causal else grad

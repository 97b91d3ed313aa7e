"""Attention of completions to their prompts and to themselves, in parts that need no mask.

Completions are branches of a tree: behind the tokens that all prompts about a video share, its
trunk, comes each prompt's own query, and behind that its completions. A token attends to the trunk,
to its query and, causally, to its own branch. Each of these parts is a call of a fused kernel,
which also returns the log-sum-exp of each row's scores, lse_i. With lse = log sum_i exp(lse_i), the
attention to all parts is

    out = sum_i exp(lse_i - lse) out_i

In backward, each part's kernel gets the merged `out` and `lse`. From them it recomputes its
probabilities as exp(score - lse), which are those of the whole row: its gradients are exact.

Keys of a prompt are read where they are, once for all its branches, and the work grows with what a
token sees: with all branches under one mask it would grow with the square of their total length.
`Branches` is the layout of whole completions, packed without padding; `NextTokens` that of a
decoding step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, chain
from typing import Any

import torch

from opd.models.fused_attention import (
    Ranges,
    added_to_scores,
    fused_forward,
    ranges_backward,
    ranges_forward,
)

# Tokens of a group behind its prompts from which on attention in parts is faster than with a mask.
# On a GPU it always takes less memory: with a mask, the keys of prompt and completions are joined.
FEWEST_TOKENS = {"cpu": 256}


def are_cheaper(tokens: int, device_type: str) -> bool:
    """Whether so many tokens of a group attend better in parts than with one mask over all."""
    return tokens >= FEWEST_TOKENS.get(device_type, 0)


@dataclass(frozen=True)
class Paths:
    """What the prompts of a group see of its sequence of `length` tokens: the first `shared`, and
    each prompt besides these its own, from `start` to `stop`; none where it is alone."""

    length: int
    shared: int
    own: tuple[tuple[int, int], ...]

    @property
    def are_whole(self) -> bool:
        """Whether every prompt sees all tokens."""
        return self.shared + min(stop - start for start, stop in self.own) == self.length

    def with_own_tokens(self) -> "Paths":
        """The same, where the last token of a prompt alone counts as its own."""
        if any(start < stop for start, stop in self.own):
            return self
        return replace(self, shared=self.shared - 1, own=((self.shared - 1, self.shared),))


@dataclass(frozen=True)
class Branches:
    """Completions packed one after the other, in the order of their prompts, and the parts of their
    attention: to `trunks`, to `queries` unless every prompt is alone, and to their `own` tokens."""

    trunks: Ranges
    queries: Ranges | None
    own: Ranges

    @classmethod
    def of(
        cls,
        paths: Sequence[Paths],
        width: int,
        lengths: Iterable[Sequence[int]],
        device: torch.device,
    ) -> "Branches":
        """Layout of completions of these numbers of tokens, a row for each prompt.

        Args:
            paths: of each group of prompts.
            width: P, the length to which the groups' sequences are left-padded.
        """
        lengths = list(lengths)
        rows, tokens = iter([sum(row) for row in lengths]), sum(map(sum, lengths))
        trunks, queries = [], []
        alone = all(start == stop for group in paths for start, stop in group.own)
        for number, group in enumerate(paths):
            first = (number + 1) * width - group.length
            tree = group if alone else group.with_own_tokens()
            own = [(next(rows), first + start, first + stop) for start, stop in tree.own]
            trunks.append((sum(row[0] for row in own), first, first + tree.shared))
            queries += own
        every = [*chain.from_iterable(lengths)]
        completions = [(n, e - n, e) for n, e in zip(every, accumulate(every), strict=True)]
        keys = width * len(paths)
        return cls(
            trunks=Ranges.of(trunks, keys, False, device),
            queries=None if alone else Ranges.of(queries, keys, False, device),
            own=Ranges.of(completions, tokens, True, device),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: tuple[torch.Tensor, torch.Tensor],
        value: tuple[torch.Tensor, torch.Tensor],
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of S packed tokens, differentiable in every tensor.

        Args:
            query: `[1, heads, S, D]`.
            key, value: of the prompts, `[G, kv_heads, P, D]`, and of the packed tokens, `[1,
                kv_heads, S, D]`.
            scale: of the scores; None is 1 / sqrt(D).

        Returns: `[1, heads, S, D]`.
        """
        tensors = [x.transpose(1, 2).flatten(0, 1) for x in (query, *key, *value)]
        return _Merged.apply(*tensors, self, scale).transpose(0, 1)[None]


class _Merged(torch.autograd.Function):
    """Tensors are `[tokens, heads, D]`, prompts' and completions' apart."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        query: torch.Tensor,
        past_key: torch.Tensor,
        own_key: torch.Tensor,
        past_value: torch.Tensor,
        own_value: torch.Tensor,
        branches: Branches,
        scale: float | None,
    ) -> torch.Tensor:
        parts = [(past_key, past_value, branches.trunks), (own_key, own_value, branches.own)]
        if branches.queries is not None:
            parts.append((past_key, past_value, branches.queries))
        outs, lses = zip(*(ranges_forward(query, *part, scale) for part in parts), strict=True)
        out, lse = merged(outs, lses)
        ctx.branches, ctx.scale = branches, scale
        ctx.save_for_backward(query, past_key, own_key, past_value, own_value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        query, past_key, own_key, past_value, own_value, out, lse = ctx.saved_tensors
        branches, rows = ctx.branches, (grad, query, out, lse)
        past, own = (past_key, past_value), (own_key, own_value)
        d_query, *d_past = ranges_backward(*rows, *past, branches.trunks, ctx.scale)
        if branches.queries is not None:
            more, *d_queries = ranges_backward(*rows, *past, branches.queries, ctx.scale)
            d_query += more
            d_past = [sums.add_(more) for sums, more in zip(d_past, d_queries, strict=True)]
        more, *d_own = ranges_backward(*rows, *own, branches.own, ctx.scale)
        return d_query + more, d_past[0], d_own[0], d_past[1], d_own[1], None, None


def merged(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to all parts, in the parts' dtype, and its log-sum-exp.

    Args:
        outs: of each part, `[..., D]`.
        lses: of each part, `[...]`.
    """
    lse = reduce(torch.logaddexp, lses)
    shares = [out * (own - lse).exp()[..., None] for out, own in zip(outs, lses, strict=True)]
    return reduce(torch.add, shares).to(outs[0].dtype), lse


@dataclass(frozen=True)
class NextTokens:
    """Layout of a decoding step: the next token of each of B completions, in each of G groups.

    `seen` is boolean `[G, B, P]`, the columns of its group's sequence that each completion sees;
    None where each sees all of them. `prepared` turns it into what a kernel adds to the scores.
    `own`, added to the scores, `[1, 1, 1, n]`, hides what completions do not have yet; None where
    they have all n.
    """

    count: int  # B
    seen: torch.Tensor | None
    own: torch.Tensor | None = None

    def prepared(self, dtype: torch.dtype, per_head: int) -> "NextTokens":
        """With `seen` as `[G, 1, per_head * B, P]`: 0 where a completion sees a column, -inf
        elsewhere. Once for all layers.

        Args:
            per_head: query heads per key/value head.
        """
        if self.seen is None:
            return self
        rows = self.seen[:, None, None].expand(-1, -1, per_head, -1, -1).flatten(2, 3)
        return replace(self, seen=added_to_scores(rows, dtype))

    def by_branch(self, values: torch.Tensor) -> torch.Tensor:
        """Arrange `[G, heads, B, ...]` by completion: `[G * B, heads, 1, ...]`."""
        return values.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    @torch.no_grad()
    def attend(
        self,
        query: torch.Tensor,
        key: tuple[torch.Tensor, torch.Tensor],
        value: tuple[torch.Tensor, torch.Tensor],
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of the next tokens to their prompt and to what their completions have so far.

        Query heads that share a key/value head become rows, so that no key is repeated.

        Args:
            query: `[G, heads, B, D]`.
            key, value: of the prompts, `[G, kv_heads, P, D]`, and of the completions, `[G * B,
                kv_heads, n, D]`.
            scale: of the scores; None is 1 / sqrt(D).

        Returns: `[G, heads, B, D]`.
        """
        count = self.count
        rows = query.unflatten(1, (key[0].shape[1], -1))  # [G, kv_heads, per_head, B, D]
        past = fused_forward(rows.flatten(2, 3), key[0], value[0], self.seen, False, scale)
        own_rows = rows.movedim(3, 1).flatten(0, 1)
        own = fused_forward(own_rows, key[1], value[1], self.own, False, scale)
        past = [x.unflatten(2, (-1, count)).flatten(1, 2) for x in past]
        own = [x.unflatten(0, (-1, count)).movedim(1, 3).flatten(1, 2) for x in own]
        return merged(*zip(past, own, strict=True))[0]

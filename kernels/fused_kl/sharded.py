"""Losses over a vocabulary that is divided over the ranks of a process group.

Every rank has the same hidden states, and of each head the rows of its own part of the vocabulary.
For each chunk of rows the ranks exchange the rows' statistics, which `rows.merge` joins, and at the
end they add up their parts of the gradient of the hidden states. The gradient of a head stays where
its rows are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_kl import checks
from fused_kl.arguments import HeadInputs, Shard, TokenInputs, TokenOptions, counted
from fused_kl.checks import FLOATS

# Place of the first model in a rank's description, and numbers that describe a model.
FIRST_SIDE, OF_SIDE = 6, 4


def agree(
    group: dist.ProcessGroup,
    heads: Mapping[str, HeadInputs],
    allowed_columns: Tensor | None,
    token_ids: Tensor | None,
    options: Any,
    check: Callable[[], None],
) -> Shard:
    """This rank's shard, once all ranks have said what they have; on a GPU the host waits for them.

    Args:
        heads: of one model or two, by the prefix of their names.
        token_ids: of the rows that count, `[n]`.
        options: what must be the same on every rank.
        check: raises ValueError if this rank's arguments are wrong.

    Raises:
        ValueError: on every rank, if they do not fit together or the arguments of one are wrong.
    """
    if dist.get_rank(group) < 0:
        raise ValueError("group does not have this rank, expected a group of which it is a member")
    own, error = [0] * (FIRST_SIDE + OF_SIDE * len(heads)), None
    try:
        check()
    except ValueError as problem:
        error = problem
    else:
        own = _described(heads, allowed_columns, token_ids, options)
    device = next(iter(heads.values())).hidden.device
    table = torch.tensor(own, device=device)
    every = table.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather([*every], table, group=group)
    rows = every.tolist()
    if error is not None:
        raise error
    for rank, row in enumerate(rows):
        if not row[0]:
            raise ValueError(f"the arguments of rank {rank} are wrong: its own error says how")
        _check_alike(rank, row, rows[0], list(heads))
    if not any(row[3] for row in rows):
        raise ValueError("allowed_columns allows no column on any rank, expected at least one True")
    columns, rank = [row[0] for row in rows], dist.get_rank(group)
    for bad in (id for row in rows for id in row[4:6] if not 0 <= id < sum(columns)):
        raise ValueError(f"token_ids holds {bad}, expected ids in [0, {sum(columns)})")
    return Shard(group, sum(columns[:rank]), columns[rank], sum(columns), max(columns))


def checked_tokens(
    inputs: TokenInputs,
    options: TokenOptions,
    group: dist.ProcessGroup | None,
    token_weights: Tensor | None = None,
    check: Callable[[], None] = lambda: None,
) -> TokenOptions:
    """The options, with this rank's shard where there is a group, after `check` and all checks of
    the inputs; ids of rows of weight 0 do not matter."""

    def check_all() -> None:
        check()
        checks.check_tokens(inputs, options.logits, sharded=group is not None)

    if group is None:
        check_all()
        checks.check_token_range(inputs.token_ids, inputs.num_columns, token_weights)
        return options
    ids = counted(inputs.token_ids, token_weights)
    shard = agree(group, {"": inputs.head}, inputs.allowed_columns, ids, options, check_all)
    return options._replace(shard=shard)


def _described(
    heads: Mapping[str, HeadInputs],
    allowed_columns: Tensor | None,
    token_ids: Tensor | None,
    options: Any,
) -> list[int]:
    """Columns, rows, a checksum of the options, whether a column is allowed, smallest and largest
    id; then of each model hidden size, dtype, whether there is a bias, and whether the hidden
    states need a gradient."""
    sides = list(heads.values())
    columns, num_rows = len(sides[0].lm_head), len(sides[0].hidden)
    allowed = 1 if allowed_columns is None else int(allowed_columns.any())
    own = [columns, num_rows, zlib.crc32(repr(options).encode()), allowed]
    ends = [0, 0]
    if token_ids is not None and token_ids.numel():
        ends = [int(end) for end in token_ids.aminmax()]
    own += ends
    for hidden, lm_head, bias in sides:
        needs_grad = torch.is_grad_enabled() and hidden.requires_grad
        own += [hidden.shape[1], FLOATS.index(lm_head.dtype), bias is not None, needs_grad]
    return own


def _check_alike(rank: int, row: list[int], expected: list[int], prefixes: list[str]) -> None:
    """Another rank's description, except for the number of columns, is that of rank 0."""
    fields = [(f"{prefixes[0]}hidden", "{} rows", 1), ("the call", "options {}", 2)]
    for number, prefix in enumerate(prefixes):
        place = FIRST_SIDE + OF_SIDE * number
        fields += [
            (f"{prefix}lm_head", "hidden size {}", place),
            (f"{prefix}lm_head", "dtype {}", place + 1),
            (f"{prefix}lm_head", "{} bias", place + 2),
            (f"{prefix}hidden", "{} gradient", place + 3),
        ]
    for name, what, place in fields:
        if row[place] == expected[place]:
            continue
        values = [row[place], expected[place]]
        if "dtype" in what:
            values = [FLOATS[value] for value in values]
        elif place >= FIRST_SIDE and (place - FIRST_SIDE) % OF_SIDE >= 2:
            values = [["no", "a"][value] for value in values]
        if place == 2:
            raise ValueError(f"the options of rank {rank} are not those of rank 0, expected equal")
        mine, other = map(what.format, values)
        raise ValueError(f"{name} has {mine} on rank {rank}, expected {other} as on rank 0")

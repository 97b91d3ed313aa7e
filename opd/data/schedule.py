"""Which examples each step trains on, in a reproducible order, and how ranks divide a batch."""

from collections.abc import Sequence

import numpy as np

from opd import distributed
from opd.config.run import Config
from opd.errors import require


def shuffled(num_examples: int, seed: int, epoch: int, group: int = 0) -> list[int]:
    """Return the order of the examples in one epoch, a pure function of the arguments."""
    key = [seed, epoch, group] if group else [seed, epoch]
    return np.random.default_rng(key).permutation(num_examples).tolist()


def schedule(
    num_examples: int,
    steps: int,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> list[list[int]]:
    """Return the indices of the examples of each step: freshly shuffled epochs, one after another.

    Args:
        weights: how often each example is drawn, relative to others. Examples of equal weight form
            a group with epochs of its own, and every batch holds each group's share of it, to
            within one example.
    """
    weights = weights or [1.0] * num_examples
    members: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        members.setdefault(weight, []).append(index)
    groups = list(members.values())
    shares = np.array([weight * len(group) for weight, group in members.items()]) / sum(weights)
    orders: list[list[int]] = [[] for _ in groups]
    drawn = np.zeros(len(groups), dtype=int)
    order = []
    for position in range(steps * batch_size):
        number = int((shares * (position + 1) - drawn).argmax())  # furthest behind its share
        group, taken = groups[number], int(drawn[number])
        if taken == len(orders[number]):
            orders[number] += shuffled(len(group), seed, taken // len(group), number)
        order.append(group[orders[number][taken]])
        drawn[number] += 1
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def split(batch: list[int], size: int | None) -> list[list[int]]:
    """Split a batch into parts of `size`, the last one possibly smaller; one part for None."""
    size = size or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def micro_batches(config: Config) -> list[range]:
    """Return this rank's share of every batch: positions in the batch, one range per micro-batch.

    Raises ConfigError where the batch does not divide evenly among ranks and micro-batches.
    """
    batch_size, ranks = config.batch_size, distributed.world_size()
    own_positions = range(distributed.rank(), batch_size, ranks)
    size = config.micro_batch_size or len(own_positions)
    require(
        batch_size % ranks == 0,
        f"batch_size={batch_size}: must be a multiple of the {ranks} ranks",
    )
    require(
        len(own_positions) % size == 0,
        f"micro_batch_size={size}: must divide batch_size={batch_size}/{ranks} ranks",
    )
    return [own_positions[i : i + size] for i in range(0, len(own_positions), size)]

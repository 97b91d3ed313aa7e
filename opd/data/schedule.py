"""Which examples each step trains on, in a reproducible order, and how ranks divide a batch."""

import sys
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np

from opd import distributed
from opd.config.run import Config
from opd.data.examples import Example
from opd.errors import require

Item = TypeVar("Item")


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
    videos: Sequence[Hashable] = (),
    queries_per_video: int = 1,
    micro_batches: Sequence[range] = (),
) -> list[list[int]]:
    """Return the indices of the examples of each step: freshly shuffled epochs, one after another,
    each with every example once.

    With `queries_per_video` above 1, every epoch divides the queries about a video anew into groups
    of at most so many, and shuffles the groups. A micro-batch takes the next groups that fit into
    it; where none fits, the next one is divided.

    Args:
        weights: how often each example is drawn, relative to others. Examples of equal weight have
            epochs of their own, and every batch holds their share of it, to within one example or
            group.
        videos: the video of each example.
        micro_batches: positions in the batch of every micro-batch of every rank.
    """
    videos = videos or range(num_examples)
    if queries_per_video == 1 or not micro_batches:
        micro_batches = [range(batch_size)]
    weights = weights or [1.0] * num_examples
    members: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        members.setdefault(weight, []).append(index)
    shares = np.array([weight * len(some) for weight, some in members.items()]) / sum(weights)
    pending: list[list[list[int]]] = [[] for _ in members]
    epochs, drawn = [0] * len(members), np.zeros(len(members), dtype=int)

    def draw(number: int, room: int) -> list[int]:
        """The next group of these members that fits into the room, or a part of the next one."""
        if not pending[number]:
            some = [*members.values()][number]
            order = [some[i] for i in shuffled(len(some), seed, epochs[number], number)]
            pending[number] = _groups(order, videos, queries_per_video, seed, epochs[number])
            epochs[number] += 1
        queue = pending[number]
        at = next((i for i, group in enumerate(queue) if len(group) <= room), 0)
        group = queue.pop(at)
        if len(group) > room:
            queue.insert(at, group[room:])
        return group[:room]

    plan = []
    for _ in range(steps):
        batch = [0] * batch_size
        for positions in micro_batches:
            taken: list[int] = []
            while len(taken) < len(positions):
                behind = shares * (drawn.sum() + 1) - drawn
                number = int(behind.argmax())  # furthest behind its share
                group = draw(number, len(positions) - len(taken))
                taken += group
                drawn[number] += len(group)
            for position, index in zip(positions, taken, strict=True):
                batch[position] = index
        plan.append(batch)
    return plan


def _groups(
    order: list[int], videos: Sequence[Hashable], size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Divide an epoch into groups of at most `size` examples of one video, in random order."""
    if size == 1:
        return [[index] for index in order]
    of_video: dict[Hashable, list[int]] = {}
    for index in order:
        of_video.setdefault(videos[index], []).append(index)
    groups = [some for indices in of_video.values() for some in split(indices, size)]
    key = [seed, epoch, size]
    return [groups[i] for i in np.random.default_rng(key).permutation(len(groups))]


def plan_steps(
    config: Config, examples: Sequence[Example], chosen: Sequence[int], steps: int, seed: int
) -> list[list[list[int]]]:
    """Return the indices of the examples of this rank's micro-batches, by step; all are among
    `chosen`. Says on stderr where groups of `data.queries_per_video` are far from full."""
    ranks = range(distributed.world_size())
    every = [some for rank in ranks for some in micro_batches(config, rank)]
    plan = schedule(
        len(chosen),
        steps,
        config.batch_size,
        seed,
        [examples[i].weight for i in chosen],
        [examples[i].footage for i in chosen],
        min(config.data.group_size, len(every[0])),
        every,
    )
    positions = micro_batches(config)
    own = [[[chosen[batch[i]] for i in some] for some in positions] for batch in plan]
    queries = config.data.queries_per_video or 1
    if queries > 1 and distributed.is_first():
        footage = [[examples[i].footage for i in some] for batch in own for some in batch]
        forwards = sum(len([*groupby(some)]) for some in footage)
        mean = sum(map(len, footage)) / forwards
        if mean < 0.95 * queries:
            print(
                f"data.queries_per_video={queries}: {mean:.1f} queries on average, because many "
                "videos have no more; the memory plan counts on full groups",
                file=sys.stderr,
            )
    return own


def split(batch: list[Item], size: int | None) -> list[list[Item]]:
    """Split a batch into parts of `size`, the last one possibly smaller; one part for None."""
    size = size or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def micro_batches(config: Config, rank: int | None = None) -> list[range]:
    """Return a rank's share of every batch (None: this rank's): positions in the batch, one range
    per micro-batch.

    Raises ConfigError where the batch does not divide evenly among ranks and micro-batches, or
    these are smaller than `data.queries_per_video`.
    """
    batch_size, ranks = config.batch_size, distributed.world_size()
    own_positions = range(distributed.rank() if rank is None else rank, batch_size, ranks)
    size = config.micro_batch_size or len(own_positions)
    require(
        batch_size % ranks == 0,
        f"batch_size={batch_size}: must be a multiple of the {ranks} ranks",
    )
    require(
        len(own_positions) % size == 0,
        f"micro_batch_size={size}: must divide batch_size={batch_size}/{ranks} ranks",
    )
    queries = config.data.queries_per_video
    require(
        queries is None or queries <= size,
        f"data.queries_per_video={queries}: more than the {size} prompts of a micro-batch",
    )
    return [own_positions[i : i + size] for i in range(0, len(own_positions), size)]

"""Batches of prompts, prepared ahead by one thread in a reproducible order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from opd import distributed
from opd.data.batch import PromptBatch, collate, to_device
from opd.data.prompts import Prompts
from opd.data.schedule import split
from opd.device import pin
from opd.errors import DataError


class HasId(Protocol):
    """A row about an example, under the example's `id`."""

    @property
    def id(self) -> str: ...


Row = TypeVar("Row", bound=HasId)


def batches(
    prompts: Prompts,
    plan: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    models: Sequence[Any] = (),
    refill: bool = False,
    ahead: int = 2,
    queries_per_video: int | None = None,
) -> Iterator[PromptBatch]:
    """Yield the batches of a plan, in its order, prepared by one thread.

    Args:
        plan: indices of the examples of each batch.
        device: where the batches go.
        models: those that will see the batches; see `Prompts.prompt_for`.
        refill: replace an example that does not decode by the next one that does, so that batches
            keep their size. Otherwise it is left out, and so is a batch that becomes empty.
        ahead: number of batches that are prepared in advance.
        queries_per_video: most neighbouring prompts about one video that share its forward; None
            is any number.

    Raises DataError where no video decodes.
    """
    pad = prompts.tokenizer.pad_token_id
    device = torch.device(device)
    dtypes = {model.head.weight.dtype for model in models}
    pixel_dtype = dtypes.pop() if len(dtypes) == 1 else None

    def make(indices: Sequence[int]) -> PromptBatch | None:
        candidates = []
        for index in indices:
            prompt = prompts.usable(index, models)
            while prompt is None and refill and len(prompts.broken) < len(prompts):
                index = (index + 1) % len(prompts)
                prompt = prompts.usable(index, models)
            candidates.append(prompt)
        if len(prompts.broken) == len(prompts):
            first_reason = next(iter(prompts.broken.values()))
            raise DataError(f"none of {len(prompts)} videos decodes; the first: {first_reason}")
        usable = [prompt for prompt in candidates if prompt is not None]
        if not usable:
            return None
        batch = collate(
            prompts.arranged(usable, models),
            pad,
            pixel_dtype=pixel_dtype,
            queries_per_video=queries_per_video,
            video_token_id=prompts.lm.model.config.video_token_id,
        )
        if device.type == "cuda":
            batch = replace(batch, pixel_values=pin(batch.pixel_values))
        return batch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        # One OpenMP thread for the loader, since a second team would compete with the model's. The
        # call also changes process-wide settings, which are restored here.
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)
        prompts.expect([i for indices in plan[: ahead + 1] for i in indices], models)
        pending: list[Future[PromptBatch | None]] = [
            pool.submit(make, indices) for indices in plan[:ahead]
        ]
        for position in range(len(plan)):
            batch = pending.pop(0).result()
            next_ones = plan[position + 1 : position + ahead + 2]
            prompts.expect([i for indices in next_ones for i in indices], models)
            if position + ahead < len(plan):
                pending.append(pool.submit(make, plan[position + ahead]))
            if batch is not None:
                yield to_device(batch, device)


def rows_of(
    prompts: Prompts,
    size: int,
    lm: Any,
    make: Callable[[PromptBatch], list[Row]],
    progress: Callable[[int], object] = lambda _: None,
) -> list[Row]:
    """Return a row for each example that decodes, in the order of `prompts`, on every rank.

    Args:
        size: examples per batch; queries of one video are neighbours.
        lm: the model (`VideoLM`) that will see the batches.
        make: returns the rows of a batch, each with the `id` of its example. Ranks share the
            batches.
        progress: called with the number of examples done since its last call.
    """
    first_use = {example.footage: i for i, example in reversed(list(enumerate(prompts.examples)))}
    order = sorted(range(len(prompts)), key=lambda i: first_use[prompts.examples[i].footage])
    plan = split(order, size)
    plan += plan[-1:] * (-len(plan) % distributed.world_size())  # as many batches on each rank
    mine = plan[distributed.rank() :: distributed.world_size()]
    rows: dict[str, Row] = {}
    remaining = len(prompts)
    # With several ranks no batch may be left out; the last one may be answered twice.
    several = distributed.world_size() > 1
    for batch in batches(prompts, mine, lm.device, [lm], refill=several):
        rows |= {row.id: row for row in make(batch)}
        done = min(remaining, len(batch.examples) * distributed.world_size())
        remaining -= done
        progress(done)
    rows = distributed.gather_dict(rows)
    return [rows[example.id] for example in prompts.examples if example.id in rows]

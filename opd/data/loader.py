"""From examples to prompt batches: decoded frames, token ids, positions; prefetched, in a
reproducible order."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from opd import distributed
from opd.data.batch import PromptBatch, collate, to_device
from opd.data.prompts import Prompts
from opd.data.schedule import split
from opd.device import pin
from opd.errors import DataError


def batches(
    prompts: Prompts,
    plan: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    models: Sequence[Any] = (),
    refill: bool = False,
    ahead: int = 2,
) -> Iterator[PromptBatch]:
    """The batches of a plan, in its order, made by one thread that stays at most `ahead` batches in
    front.

    Args:
        models: those that will see them; for `Prompts.seen_by`.
        refill: put the next usable example where one does not decode, so that batches keep their
            size; else it is left out, and a batch of which nothing remains with it.

    Raises DataError where nothing decodes.
    """
    pad = prompts.tokenizer.pad_token_id
    device = torch.device(device)
    dtypes = {model.head.weight.dtype for model in models}
    pixel_dtype = dtypes.pop() if len(dtypes) == 1 else None

    def make(indices: Sequence[int]) -> PromptBatch | None:
        found = []
        for index in indices:
            prompt = prompts.usable(index, models)
            while prompt is None and refill and len(prompts.broken) < len(prompts):
                index = (index + 1) % len(prompts)
                prompt = prompts.usable(index, models)
            found.append(prompt)
        if len(prompts.broken) == len(prompts):
            raise DataError(
                f"no video of {len(prompts)} decodes; {next(iter(prompts.broken.values()))}"
            )
        found = [prompt for prompt in found if prompt is not None]
        if not found:
            return None
        batch = collate(prompts.side_by_side(found, models), pad, pixel_dtype=pixel_dtype)
        if device.type == "cuda":
            batch = replace(batch, pixel_values=pin(batch.pixel_values))
        return batch

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        # One OpenMP thread for the loader's own operations: a second team would fight the model's.
        # The call also changes process-wide settings, which are put back here.
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)
        prompts.expect([i for indices in plan[: ahead + 1] for i in indices], models)
        pending: list[Future[PromptBatch | None]] = [
            pool.submit(make, indices) for indices in plan[:ahead]
        ]
        for position in range(len(plan)):
            batch = pending.pop(0).result()
            coming = plan[position + 1 : position + ahead + 2]
            prompts.expect([i for indices in coming for i in indices], models)
            if position + ahead < len(plan):
                pending.append(pool.submit(make, plan[position + ahead]))
            if batch is not None:
                yield to_device(batch, device)


def rows_of(
    prompts: Prompts,
    size: int,
    lm: Any,
    make: Callable[[PromptBatch], list[dict[str, Any]]],
    progress: Callable[[int], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for each example that decodes, with its `id`, in the order of the pool: `make` sees
    batches of `size`, queries of one video side by side, the ranks share them, and each gets all
    rows."""
    places = {example.video: i for i, example in reversed(list(enumerate(prompts.examples)))}
    order = sorted(range(len(prompts)), key=lambda i: places[prompts.examples[i].video])
    plan = split(order, size)
    plan += plan[-1:] * (-len(plan) % distributed.world_size())  # as many batches on each rank
    mine = plan[distributed.rank() :: distributed.world_size()]
    rows: dict[str, dict[str, Any]] = {}
    left = len(prompts)
    # With several ranks no batch may be left out; the last one may be answered twice.
    several = distributed.world_size() > 1
    for batch in batches(prompts, mine, lm.device, [lm], refill=several):
        rows |= {row["id"]: row for row in make(batch)}
        done = min(left, len(batch.examples) * distributed.world_size())
        left -= done
        progress(done)
    rows = distributed.gather_dict(rows)
    return [rows[example.id] for example in prompts.examples if example.id in rows]

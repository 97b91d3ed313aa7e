"""Will it work? Data looked through, and what a configuration needs in memory, before any weight is
loaded:

python -m opd.check DATA [dotted.key=value ...]
python -m opd.check [CONFIG.yaml] [dotted.key=value ...] [--ranks 8] [--memory-gib 80] [--stages]

DATA is what `data.train` could be. A configuration's own data is looked through, too, where it is
there.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.config.command_line import fail
from opd.config.run import Config, load_config
from opd.data.examples import Example
from opd.data.inspection import describe, inspect, plot
from opd.data.sources import check_leak, check_sources, sources_of
from opd.distributed import progress_bar
from opd.errors import DataError, ModelError, UserError
from opd.models.load import load_options, load_processor
from opd.planning.memory import USABLE, Plan, Shapes, capacity_of, too_little
from opd.planning.shapes import MOMENTS

GIB = 2**30
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*=")  # what a dotted argument begins with


def _parts(title: str, parts: dict[str, int]) -> list[str]:
    """The larger parts first, those below 0.01 GiB left out."""
    known = sorted(parts.items(), key=lambda part: -part[1])
    return [title] + [
        f"  {name:40}{number / GIB:9.2f} GiB" for name, number in known if number >= 0.005 * GIB
    ]


def stage_lines(shapes: Shapes, ranks: int, capacity: int) -> list[str]:
    """What each ZeRO stage needs with so many ranks, a line each, and which needs least."""
    plans = shapes.stages(ranks, capacity)
    told = [
        "ZeRO stages (0: plain torch), each as it would be chosen and with every layer recomputed:"
    ]
    for stage, (chosen, least) in plans.items():
        fits = "" if chosen.total <= USABLE * capacity else ", does not fit"
        told.append(
            f"  {stage}: {chosen.total / GIB:7.2f} GiB with prefix.recompute={chosen.recompute}"
            f"{fits}; {least.total / GIB:7.2f} GiB {MOMENTS[least.peak]}"
        )
    least_stage = min(plans, key=lambda stage: plans[stage][1].total)
    return [*told, f"  stage {least_stage} needs least"]


def lines(plan: Plan, shapes: Shapes, ranks: int, capacity: int) -> list[str]:
    """What the command prints."""
    config = shapes.config
    engine = f"engine {config.engine.kind}, ZeRO stage {config.engine.zero_stage}"
    told = [
        f"{ranks} devices of {capacity / GIB:.0f} GiB, {engine}, {shapes.dtype}".replace(
            "torch.", ""
        ),
        f"prompts of {shapes.tokens} tokens ({shapes.video_tokens} of them vision), "
        f"{shapes.prompts(ranks)} in a micro-batch",
    ]
    for name, size in plan.sizes.items():
        vision, trained = size.vision / 1e9, size.trained / 1e9
        more = f", {trained:.3g}B trained" if name == "student" else ", frozen"
        told.append(f"{name}: {size.total / 1e9:.3g}B weights ({vision:.2g}B vision{more})")
    told += _parts("held throughout a step:", plan.held)
    told += _parts(f"beside them {MOMENTS[plan.peak]}, the peak:", plan.moments[plan.peak])
    told.append(f"{'in all, with 5% for the allocator':42}{plan.total / GIB:9.2f} GiB")
    others = (
        f"{plan.total_at(moment) / GIB:.1f} {MOMENTS[moment]}"
        for moment in plan.moments
        if moment != plan.peak
    )
    told.append(f"less at other moments, GiB: {', '.join(others)}")
    if plan.cpu:
        told.append(f"{'in the machine, for each device':42}{plan.cpu / GIB:9.2f} GiB")
    choice = f"prefix.recompute={plan.recompute}"
    if shapes.teacher is not None:
        choice += f" teacher.placement={plan.placement}"
    fits = "fits" if plan.total <= USABLE * capacity else f"more than {USABLE:.0%}: does not fit"
    return [*told, f"{choice}: {fits}"]


def check_data(texts: dict[str, str], config: Config) -> list[str]:
    """Look through the sources of each key; what was found, line by line. Beside each annotation
    file is left what training is to know of its videos (`.checked.jsonl`) and a picture.

    Raises DataError where an annotation file cannot be read, where nothing of it can be used and
    where evaluation's videos are trained on.
    """
    told: list[str] = []
    examples: dict[str, list[Example]] = {}
    processor = None
    try:
        processor = load_processor(config.model.student).video_processor
    except (ModelError, OSError) as error:
        told.append(f"vision tokens are not counted: {str(error).splitlines()[0]}")
    for key, text in texts.items():
        for source in sources_of(text, config.data):
            with progress_bar(desc=f"check {key}", unit="video") as bar:

                def looked(videos: int, total: int, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(videos)

                found = inspect(source, config.data, looked)
            tokens = found.tokens(config.data, processor) if processor else []
            told += describe(found, tokens)
            picture = Path(f"{found.annotations}.checked.png")
            plot(found, tokens, picture)
            told.append(f"  what training leaves out: {found.write()}; picture: {picture}")
            examples.setdefault(key, []).extend(found.usable)
            if not found.usable:
                raise DataError("\n".join([*told, f"{found.annotations}: nothing can be used"]))
    if {"data.train", "data.eval"} <= examples.keys():
        check_leak(examples["data.train"], examples["data.eval"], config.data)
    return told


def main(arguments: list[str] | None = None) -> None:
    """The command; exit code 2 where data cannot be used and where nothing fits."""
    parser = argparse.ArgumentParser(prog="opd.check", description=__doc__)
    parser.add_argument("--ranks", type=int, default=distributed.world_size(), help="devices")
    parser.add_argument("--memory-gib", type=float, help="of a device; default: of this machine's")
    parser.add_argument("--stages", action="store_true", help="compare the ZeRO stages, too")
    given, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if rest and not rest[0].endswith((".yaml", ".yml")) and not KEY.match(rest[0]):
            config = load_config([f"data.eval={rest[0]}", *rest[1:]])
            print("\n".join(check_data({"data": rest[0]}, config)))
            return
        config = load_config(rest)
        texts = {f"data.{split}": getattr(config.data, split) for split in ("train", "eval")}
        if not all(part.startswith("synthetic:") for t in texts.values() for part in t.split(",")):
            try:
                check_sources(config.data)
            except DataError as error:
                print(f"data not looked through: {error}")
            else:
                print("\n".join(check_data(texts, config)))
        check_memory(config, given.ranks, given.memory_gib, given.stages)
    except UserError as error:
        fail(error)


def check_memory(
    config: Config, ranks: int, memory_gib: float | None, stages: bool = False
) -> None:
    """Print the plan for so many devices, `stages` those of other ZeRO stages, too; ConfigError
    where it does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = load_options(config.model, device)["dtype"]
    if memory_gib is not None and config.model.dtype == "auto":
        dtype = torch.bfloat16
    capacity = int(memory_gib * GIB) if memory_gib else capacity_of(device)
    shapes = Shapes.of(config, dtype)
    plan = shapes.best(ranks, capacity)
    if stages:
        print("\n".join(stage_lines(shapes, ranks, capacity)))
    print("\n".join(lines(plan, shapes, ranks, capacity)))
    if plan.total > USABLE * capacity:
        raise too_little(plan, capacity)


if __name__ == "__main__":
    main()

"""Check data and memory before a run, without loading any weight:

python -m opd.check DATA [dotted.key=value ...]
python -m opd.check [CONFIG.yaml] [dotted.key=value ...] [--ranks 8] [--memory-gib 80] [--stages]

The first form inspects DATA, any value of `data.train`. The second predicts the memory that a
configuration needs, and inspects its data where the files exist.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.config.command_line import ends_in_one_line
from opd.config.run import Config, load_config
from opd.data.examples import Example
from opd.data.inspection import describe, inspect, plot
from opd.data.sources import check_leak, check_sources, sources_of
from opd.distributed import progress_bar
from opd.errors import DataError, ModelError
from opd.models.load import load_options, load_processor
from opd.planning.memory import Shapes
from opd.planning.plan import USABLE, Plan, capacity_of, too_little
from opd.planning.shapes import MOMENTS

GIB = 2**30
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*=")  # what a dotted argument begins with


def _parts(title: str, parts: dict[str, int]) -> list[str]:
    """Lines of the parts, the largest first; those below 0.005 GiB are left out."""
    ranked = sorted(parts.items(), key=lambda part: -part[1])
    return [title] + [
        f"  {name:40}{number / GIB:9.2f} GiB" for name, number in ranked if number >= 0.005 * GIB
    ]


def stage_lines(shapes: Shapes, ranks: int, capacity: int) -> list[str]:
    """Memory of each ZeRO stage on so many ranks, one line each, and the stage that needs least."""
    plans = shapes.stages(ranks, capacity)
    report = [
        "ZeRO stages (0: plain torch), each as it would be chosen and with every layer recomputed:"
    ]
    for stage, (chosen, least) in plans.items():
        fits = "" if chosen.total <= USABLE * capacity else ", does not fit"
        report.append(
            f"  {stage}: {chosen.total / GIB:7.2f} GiB with prefix.recompute={chosen.recompute}"
            f"{fits}; {least.total / GIB:7.2f} GiB {MOMENTS[least.peak]}"
        )
    least_stage = min(plans, key=lambda stage: plans[stage][1].total)
    return [*report, f"  stage {least_stage} needs least"]


def lines(plan: Plan, shapes: Shapes, ranks: int, capacity: int) -> list[str]:
    """Describe a memory plan, line by line."""
    config = shapes.config
    engine = f"engine {config.engine.kind}, ZeRO stage {config.engine.zero_stage}"
    report = [
        f"{ranks} devices of {capacity / GIB:.0f} GiB, {engine}, {shapes.dtype}".replace(
            "torch.", ""
        ),
        f"prompts of {shapes.tokens} tokens ({shapes.video_tokens} of them vision), "
        f"{shapes.prompts(ranks)} in a micro-batch",
    ]
    for name, size in plan.sizes.items():
        vision, trained = size.vision / 1e9, size.trained / 1e9
        more = f", {trained:.3g}B trained" if name == "student" else ", frozen"
        report.append(f"{name}: {size.total / 1e9:.3g}B weights ({vision:.2g}B vision{more})")
    flops = shapes.flops(ranks, plan.recompute)
    shares = ", ".join(f"{name} {n:.3g}" for name, n in flops.items() if n)
    report.append(
        f"a step of {config.batch_size} prompts: {sum(flops.values()):.3g} FLOPs ({shares})"
    )
    report += _parts("held throughout a step:", plan.held)
    report += _parts(f"beside them {MOMENTS[plan.peak]}, the peak:", plan.moments[plan.peak])
    report.append(f"{'in all, with 5% for the allocator':42}{plan.total / GIB:9.2f} GiB")
    others = (
        f"{plan.total_at(moment) / GIB:.1f} {MOMENTS[moment]}"
        for moment in plan.moments
        if moment != plan.peak
    )
    report.append(f"less at other moments, GiB: {', '.join(others)}")
    if plan.cpu:
        report.append(f"{'in the machine, for each device':42}{plan.cpu / GIB:9.2f} GiB")
    choice = f"prefix.recompute={plan.recompute}"
    if shapes.teacher is not None:
        choice += f" teacher.placement={plan.placement}"
    if shapes.micro_batches(ranks) > 1 and not config.on_references:
        choice += f" sample.together={plan.together}"
    fits = "fits" if plan.total <= USABLE * capacity else f"more than {USABLE:.0%}: does not fit"
    return [*report, f"{choice}: {fits}"]


def check_data(texts: dict[str, str], config: Config) -> list[str]:
    """Inspect the sources of each key; returns a report, line by line.

    Next to each annotation file two files are written: `.checked.jsonl`, from which training learns
    which videos to leave out, and a plot, `.checked.png`.

    Raises DataError where an annotation file cannot be read, where none of its examples can be used
    and where a video is in both splits.
    """
    report: list[str] = []
    examples: dict[str, list[Example]] = {}
    processor = None
    try:
        processor = load_processor(config.model.student).video_processor
    except (ModelError, OSError) as error:
        report.append(f"vision tokens are not counted: {str(error).splitlines()[0]}")
    for key, text in texts.items():
        for source in sources_of(text, config.data):
            with progress_bar(desc=f"check {key}", unit="video") as bar:

                def inspected(num_videos: int, total: int, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(num_videos)

                inspection = inspect(source, config.data, inspected)
            tokens = inspection.tokens(config.data, processor) if processor else []
            report += describe(inspection, tokens)
            picture = Path(f"{inspection.annotations}.checked.png")
            plot(inspection, tokens, picture)
            report.append(f"  left out of training: {inspection.write()}; plot: {picture}")
            examples.setdefault(key, []).extend(inspection.usable)
            if not inspection.usable:
                reason = f"{inspection.annotations}: no example can be used"
                raise DataError("\n".join([*report, reason]))
    if {"data.train", "data.eval"} <= examples.keys():
        check_leak(examples["data.train"], examples["data.eval"], config.data)
    return report


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit code 2 if the data cannot be used or no plan fits into memory."""
    parser = argparse.ArgumentParser(prog="opd.check", description=__doc__)
    parser.add_argument(
        "--ranks", type=int, default=distributed.world_size(), help="number of devices"
    )
    parser.add_argument("--memory-gib", type=float, help="memory of a device; default: this one's")
    parser.add_argument("--stages", action="store_true", help="also compare the ZeRO stages")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
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
            print(f"data not inspected: {error}")
        else:
            print("\n".join(check_data(texts, config)))
    check_memory(config, options.ranks, options.memory_gib, options.stages)


def check_memory(
    config: Config, ranks: int, memory_gib: float | None, stages: bool = False
) -> None:
    """Print the memory plan for `ranks` devices, and with `stages` a comparison of ZeRO stages.
    Raises ConfigError if the plan does not fit. `memory_gib` None means this machine's device."""
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

"""What the results say against this project: missed targets, faster peers, choices that do
not pay."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench.compare import OURS
from bench.kernels.measure import PAIRS
from bench.methods.report import cell as spread_cell
from bench.tables import NOT_MEASURED, cell, is_kernel, walk, with_interval
from opd.record.curve import SCORES

Results = Mapping[str, Mapping[str, Any]]  # by the name of the file
SMALL, SMALLER = "512 from 1024, 256 tokens", "512 from 1024, 32 tokens"
LONG, SHORT = (f"{next(iter(PAIRS))}, {count} tokens" for count in (16_384, 640))
RATIO, FAST, MEMORY = "ratio", "over_fast", "peak_mb_beyond_head_gradient"
UNITS = {RATIO: "x bare products", FAST: "x fast", MEMORY: "MB beyond the head's gradient"}
# Targets of the reverse KL: shape, provider, key and limit. Peers are to take at least so much.
TARGETS = (
    (SMALL, "fast", RATIO, 1.25),
    (SMALLER, "fast", RATIO, 1.4),
    (SMALL, "dense", FAST, 1 / 0.95),
    (SMALL, "trl", FAST, 1 / 0.65),
    (SMALL, "liger_chunked", FAST, 1.0),
    (SMALL, "fast", MEMORY, 170),
    (LONG, "fast", RATIO, 1.2),
    (SHORT, "fast", RATIO, 1.3),
    (LONG, "lowmem", RATIO, 2.4),
    (LONG, "trl", FAST, 1.35),
    (LONG, "liger_chunked", FAST, 1.8),
    (LONG, "fast", MEMORY, 2600),
    (LONG, "lowmem", MEMORY, 700),
)

# Arms, and what each of them is meant to be better than.
CONTROLS = {
    "reverse_kl": "grpo",
    "sampled": "grpo",
    "reverse_kl_4": "reverse_kl",
    "tvdf": "random",
    "scc": "random",
    "dual_variance": "dual",
}


def targets(results: Results, gpu: bool) -> list[list[str]]:
    """Rows of a table: a target, its limit, what was measured, in which file, and whether that is
    enough. `results` are of GPUs, or of CPUs."""
    rows = []
    for shape, provider, key, limit in TARGETS:
        if shape.startswith(tuple(PAIRS)) != gpu:
            continue
        at_least = key == FAST
        what = [
            f"{provider}, {UNITS[key]}, {shape}",
            f"at {'least' if at_least else 'most'} {cell(limit)}",
        ]
        values = [
            (name, value)
            for name, result in results.items()
            for path, node in walk(result.get("benchmarks"))
            if "reverse_kl" in path and is_kernel(node) and node["shape"] == shape
            if (value := node["providers"].get(provider, {}).get(key)) is not None
        ]
        for name, value in values:
            reached = value >= limit if at_least else value <= limit
            rows.append([*what, cell(value), name, "yes" if reached else "**no**"])
        if not values:
            rows.append([*what, NOT_MEASURED, "", ""])
    for name, result in results.items():
        for path, node in walk(result.get("benchmarks")):
            for what, limit, value, reached in step_targets(node):
                row = [f"{path}, {what}", limit, cell(value), name]
                rows.append([*row, "yes" if reached else "**no**"])
    return rows


def step_targets(node: Mapping[str, Any]) -> Iterator[tuple[str, str, float, bool]]:
    """Targets that a step benchmark carries: seconds relative to another loop, and FLOPs relative
    to those that the shapes give."""
    target, flops = node.get("target"), node.get("flops")
    if target is not None and "ratio" in node:
        yield "seconds", f"at most {cell(target)}", node["ratio"], node["ratio"] <= target
    if "analytic_ratio" in node and isinstance(flops, Mapping) and "ratio" in flops:
        share = flops["ratio"] / node["analytic_ratio"]
        yield "FLOPs by those of the shapes", "0.95 to 1.05", share, abs(share - 1) <= 0.05


def negative(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about one result."""
    for path, node in walk(result.get("benchmarks")):
        for name, row in node["providers"].items() if is_kernel(node) else ():
            if name not in (*OURS, "gemms") and row.get("over_fast_interval", [1, 1])[1] < 1:
                yield f"{name} takes {with_interval(row, FAST)} of ours at {node['shape']}."
        if "ratio" not in node:
            continue
        ratio, (low, high) = with_interval(node, "ratio"), node["ratio_interval"]
        if node.get("better") == "higher" and high < 1:
            yield f"Slower: {path}, {ratio} of the other's speed."
        if "suspended_share" in node and low > node["analytic_ratio"]:
            yield (
                f"Suspending {cell(100 * node['suspended_share'])}% of the rollouts takes {ratio} "
                f"of a plain step, where their share of it says {cell(node['analytic_ratio'])} "
                f"({path})."
            )
    for _, figures in walk(result):
        if "equal_device_s" in figures:
            yield from behind(figures)
    for place, conditions in walk(result.get("valid")):
        for name, value in conditions.items():
            if value is False:
                yield f"A condition of the protocol is not met: {place or 'it'}, {name}."


def behind(figures: Mapping[str, Any]) -> Iterator[str]:
    """Arms that are behind their control: at equal device time, or on the way to GRPO's best score
    once the teacher's training is counted."""
    seconds = figures["equal_device_s"]["with_scoring"]
    for arm, control in CONTROLS.items():
        for score, label in SCORES.items():
            pair = [figures["arms"].get(name, {}).get(score) for name in (arm, control)]
            if None in pair:
                continue
            first, second = (entry["at_equal_device_s"]["with_scoring"] for entry in pair)
            if None not in (first["mean"], second["mean"]) and first["mean"] < second["mean"]:
                yield (
                    f"{arm} is not ahead of {control} at {seconds:.0f} device seconds: "
                    f"{label} {spread_cell(first)}, {spread_cell(second)}."
                )
            times = [
                ((e.get("device_s_to_grpo_best") or {}).get("with_teacher_training") or {})
                for e in pair
            ]
            first_s, second_s = (time.get("mean") for time in times)
            if control == "grpo" and first_s and second_s and first_s > second_s:
                yield (
                    f"With its teacher's training {arm} takes {first_s:.0f} device seconds to "
                    f"GRPO's best {label}, GRPO {second_s:.0f}."
                )

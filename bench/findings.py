"""What the results say against this project: numbers that were asked for and are missed, peers that
are faster, choices that do not pay."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.compare import OURS
from bench.kernels.measure import PAIRS
from bench.methods.report import cell as scored
from bench.tables import NOT_MEASURED, cell, is_kernel, walk
from opd.record.curve import SCORES

SMALL, SMALLER = "512 from 1024, 256 tokens", "512 from 1024, 32 tokens"
LONG, SHORT = (f"{next(iter(PAIRS))}, {count} tokens" for count in (16_384, 640))


@dataclass(frozen=True)
class Asked:
    """A number of the reverse KL that this project set out to reach."""

    shape: str
    provider: str
    key: str
    limit: float
    at_least: bool = False

    @property
    def gpu(self) -> bool:
        """Whether it is about a GPU."""
        return self.shape.startswith(tuple(PAIRS))

    def of(self, rows: Mapping[str, Any]) -> float | None:
        """What was measured, of the providers at its shape."""
        return rows.get(self.provider, {}).get(self.key)

    def met(self, value: float) -> bool:
        """Whether that is enough."""
        return value >= self.limit if self.at_least else value <= self.limit


RATIO, FAST, MEMORY = "ratio", "over_fast", "peak_mb_beyond_head_gradient"
ASKED = (
    Asked(SMALL, "fast", RATIO, 1.25),
    Asked(SMALLER, "fast", RATIO, 1.4),
    Asked(SMALL, "dense", FAST, 1 / 0.95, at_least=True),
    Asked(SMALL, "trl", FAST, 1 / 0.65, at_least=True),
    Asked(SMALL, "liger_chunked", FAST, 1.0, at_least=True),
    Asked(SMALL, "fast", MEMORY, 170),
    Asked(LONG, "fast", RATIO, 1.2),
    Asked(SHORT, "fast", RATIO, 1.3),
    Asked(LONG, "lowmem", RATIO, 2.4),
    Asked(LONG, "trl", FAST, 1.35, at_least=True),
    Asked(LONG, "liger_chunked", FAST, 1.8, at_least=True),
    Asked(LONG, "fast", MEMORY, 2600),
    Asked(LONG, "lowmem", MEMORY, 700),
)
UNITS = {RATIO: "x bare products", FAST: "x fast", MEMORY: "MB beyond the head's gradient"}

# Arms that are there to be better than another.
CONTROLS = {
    "reverse_kl": "grpo",
    "sampled": "grpo",
    "reverse_kl_4": "reverse_kl",
    "tvdf": "random",
    "scc": "random",
    "dual_variance": "dual",
}


def asked(results: Mapping[str, Mapping[str, Any]], gpu: bool) -> list[list[str]]:
    """Rows of a table: what was asked, what was measured, by which file, and whether that is
    enough; of `results`, which are of one sort of hardware, by name."""
    rows = []
    for wanted in (a for a in ASKED if a.gpu == gpu):
        limit = f"{'at least' if wanted.at_least else 'at most'} {cell(wanted.limit)}"
        what = [f"{wanted.provider}, {UNITS[wanted.key]}, {wanted.shape}", limit]
        found = [
            (name, value)
            for name, result in results.items()
            for path, node in walk(result.get("benchmarks"))
            if "reverse_kl" in path and is_kernel(node) and node["shape"] == wanted.shape
            if (value := wanted.of(node["providers"])) is not None
        ]
        for name, value in found:
            rows.append([*what, cell(value), name, "yes" if wanted.met(value) else "**no**"])
        if not found:
            rows.append([*what, NOT_MEASURED, "", ""])
    for name, result in results.items():
        for path, node in walk(result.get("benchmarks")):
            for what, limit, value, fine in of_step(node):
                rows.append(
                    [f"{path}, {what}", limit, cell(value), name, "yes" if fine else "**no**"]
                )
    return rows


def of_step(node: Mapping[str, Any]) -> Iterator[tuple[str, str, float, bool]]:
    """What a step benchmark says that it should reach: seconds by another loop's, and FLOPs that
    are those of the shapes."""
    target, flops = node.get("target"), node.get("flops")
    if target is not None and "ratio" in node:
        yield "seconds", f"at most {cell(target)}", node["ratio"], node["ratio"] <= target
    if "analytic_ratio" in node and isinstance(flops, Mapping) and "ratio" in flops:
        share = flops["ratio"] / node["analytic_ratio"]
        yield "FLOPs by those of the shapes", "0.95 to 1.05", share, abs(share - 1) <= 0.05


def negative(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about one result."""
    for path, node in walk(result.get("benchmarks")):
        if is_kernel(node):
            yield from faster_peers(node)
        if "ratio" in node:
            yield from slower(path, node)
        if "suspended_share" in node and "ratio" in node:
            yield from routing(path, node)
    for _, told in walk(result):
        if "equal_device_s" in told:
            yield from behind(told)
            yield from training_the_teacher(told)
    for place, fine in walk(result.get("valid")):
        for name, value in fine.items():
            if value is False:
                yield f"A condition of the protocol is not met: {place or 'it'}, {name}."


def faster_peers(node: Mapping[str, Any]) -> Iterator[str]:
    """Who takes less time than ours, beyond the interval."""
    for name, row in node["providers"].items():
        interval = row.get("over_fast_interval")
        if name not in (*OURS, "gemms") and interval and interval[1] < 1:
            taken = f"{cell(row['over_fast'])} {cell(interval)}"
            yield f"{name} takes {taken} of ours at {node['shape']}."


def routing(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    """Where suspending rollouts saves less than their share."""
    if node["ratio_interval"][0] > node["analytic_ratio"]:
        yield (
            f"Suspending {cell(100 * node['suspended_share'])}% of the rollouts takes "
            f"{cell(node['ratio'])} {cell(node['ratio_interval'])} of a plain step, where their "
            f"share of it says {cell(node['analytic_ratio'])} ({path})."
        )


def slower(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    """A speed by another's that is below it, beyond the interval."""
    if node.get("better") == "higher" and node["ratio_interval"][1] < 1:
        found = f"{cell(node['ratio'])} {cell(node['ratio_interval'])}"
        yield f"Slower: {path}, {found} of the other's speed."


def training_the_teacher(told: Mapping[str, Any]) -> Iterator[str]:
    """Where the teacher's training makes OPD later than GRPO at GRPO's best."""
    for arm in (arm for arm, control in CONTROLS.items() if control == "grpo"):
        for score in SCORES:
            pair = [
                (told["arms"].get(name, {}).get(score, {}).get("device_s_to_grpo_best") or {}).get(
                    "with_teacher_training"
                )
                for name in (arm, "grpo")
            ]
            first, second = (found["mean"] if found else None for found in pair)
            if first is not None and second is not None and first > second:
                yield (
                    f"With its teacher's training {arm} takes {first:.0f} device seconds to "
                    f"GRPO's best {SCORES[score]}, GRPO {second:.0f}."
                )


def behind(told: Mapping[str, Any]) -> Iterator[str]:
    """Arms that are behind what they are there to be better than, at equal device time."""
    seconds = told["equal_device_s"]["with_scoring"]
    for arm, control in CONTROLS.items():
        for score in SCORES:
            pair = [told["arms"].get(name, {}).get(score) for name in (arm, control)]
            if None in pair:
                continue
            first, second = (found["at_equal_device_s"]["with_scoring"] for found in pair)
            if None not in (first["mean"], second["mean"]) and first["mean"] < second["mean"]:
                yield (
                    f"{arm} is not ahead of {control} at {seconds:.0f} device seconds: "
                    f"{SCORES[score]} {scored(first)}, {scored(second)}."
                )

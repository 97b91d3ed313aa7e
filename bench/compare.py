"""What became slower: python -m bench.compare OLD.json NEW.json

Both are what `bench.record` wrote, on the same hardware. A ratio has changed where its bootstrap
intervals do not overlap; one that changed for the worse is a regression, and the exit code is 1.
So two runs of one commit should be all the same. Seconds are not compared: they are the machine's
as much as the code's. Ratios that only one of the files has are named and not judged.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import Refused, read

# Of kernel providers: what peers take is their own affair.
OURS = ("fast", "fast_allowed_columns", "lowmem", "torch")


@dataclass(frozen=True)
class Ratio:
    """A measured ratio with its bootstrap interval; smaller is better unless `higher`."""

    value: float
    low: float
    high: float
    higher: bool

    @classmethod
    def of(cls, node: dict[str, Any]) -> "Ratio":
        """From what `bench.timing.ratio` returns."""
        low, high = node["ratio_interval"]
        return cls(node["ratio"], low, high, node.get("better") == "higher")

    def against(self, old: "Ratio") -> str:
        """same, better or worse than an earlier measurement."""
        if self.low <= old.high and old.low <= self.high:
            return "same"
        return "better" if (self.value > old.value) == self.higher else "worse"


def ratios(node: Any, path: str = "") -> Iterator[tuple[str, Ratio]]:
    """Every ratio below a node by its place, but for those of peers."""
    if not isinstance(node, dict):
        return
    if "ratio" in node and "ratio_interval" in node:
        yield path, Ratio.of(node)
    for key, value in node.items():
        if key == "providers" and isinstance(value, dict):
            value = {name: found for name, found in value.items() if name in OURS}
        yield from ratios(value, f"{path} / {key}" if path else key)


def compare(
    old: dict[str, Any], new: dict[str, Any]
) -> list[tuple[str, str, Ratio | None, Ratio | None]]:
    """Place, verdict, old and new of each ratio that either has; those of one alone are "gone" or
    "added".

    Raises Refused for results of different hardware and for two that share no ratio.
    """
    if old["hardware"] != new["hardware"]:
        raise Refused(f"measured on {old['hardware']} and on {new['hardware']}: not comparable")
    before, after = (dict(ratios(found["benchmarks"])) for found in (old, new))
    if not before.keys() & after.keys():
        raise Refused("the two files have no ratio in common")
    rows: list[tuple[str, str, Ratio | None, Ratio | None]] = []
    for place in {**before, **after}:
        earlier, later = before.get(place), after.get(place)
        if earlier is None or later is None:
            verdict = "added" if earlier is None else "gone"
        else:
            verdict = later.against(earlier)
        rows.append((place, verdict, earlier, later))
    return rows


def updated(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The libraries that are of another version, in words."""
    before, after = old.get("versions", {}), new.get("versions", {})
    return ", ".join(
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("usage: python -m bench.compare OLD.json NEW.json")
    try:
        old, new = (_suite(Path(argument)) for argument in arguments)
        rows = compare(old, new)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for place, verdict, before, after in rows:
        numbers = (f"{found.value:8.3f}" if found else " " * 8 for found in (before, after))
        print(f"{verdict:7} {' -> '.join(numbers)}  {place}")
    if changes := updated(old, new):
        print(f"versions: {changes}")
    counts = Counter(verdict for _, verdict, _, _ in rows)
    told = ", ".join(f"{counts[name]} {name}" for name in ("same", "better", "worse"))
    print(f"of {counts.total() - counts['gone'] - counts['added']} ratios {told}", end="")
    print("".join(f", {counts[n]} {n}" for n in ("gone", "added") if counts[n]), end="")
    print(f" ({old['commit']} -> {new['commit']})")
    raise SystemExit(1 if counts["worse"] else 0)


def _suite(path: Path) -> dict[str, Any]:
    found = read(path)
    if not isinstance(found.get("benchmarks"), dict):
        raise Refused(f"{path}: no result of bench.record: it has no benchmarks")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])

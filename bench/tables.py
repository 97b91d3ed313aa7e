"""Markdown tables of what benchmarks keep in `extra_info`, whatever its form."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

LABELS = {
    "first_ms": "ms",
    "second_ms": "ms of the other",
    "first_mb": "MB",
    "second_mb": "MB of the other",
    "target": "asked",
    "over_fast": "x fast",
    "tflops": "TFLOP/s",
    "peak_mb_beyond_head_gradient": "MB beyond the head's gradient",
}
FIRST = ("ratio", "target", "first_ms", "second_ms")  # columns, before all others
LEFT_OUT = ("ratio_quartiles", "reports")
NOT_MEASURED = "not measured"


def cell(value: Any) -> str:
    """A number with three digits, a pair of them as an interval, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(cell, value)) + "]"
    if isinstance(value, bool | str):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, with an empty one behind it."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping below a node, itself first, by its place."""
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f"{path} / {key}" if path else key)


def leaves(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping says itself: its values that are neither mappings nor rows of a table."""
    return {
        key: value
        for key, value in node.items()
        if not isinstance(value, Mapping) and not is_rows(value) and key not in LEFT_OUT
    }


def is_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, a table of its own."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def benchmark(name: str, info: Mapping[str, Any]) -> list[str]:
    """A heading, tables and a line of what holds for all rows: a row for each ratio, and one for
    each other mapping, those of the same keys together."""
    lines = [f"#### {name}", ""]
    if is_kernel(info):
        return [*lines, *providers(info)]
    groups: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    facts: dict[str, Any] = {}
    for path, node in walk(info):
        found = leaves(node)
        if not path and "ratio" not in found:
            facts |= found
        elif found:
            kind = ("ratio",) if "ratio" in found else tuple(found)
            groups.setdefault(kind, {})[path or "all"] = found
        for value in node.values():
            if is_rows(value):
                lines += listed(value)
    for rows in groups.values():
        shared = common(rows)
        facts |= shared
        lines += grid(
            {
                path: {key: value for key, value in row.items() if key not in shared}
                for path, row in rows.items()
            }
        )
    if facts:
        told = ", ".join(f"{LABELS.get(k, words(k))} {cell(v)}" for k, v in facts.items())
        lines += [f"{told[:1].upper()}{told[1:]}.", ""]
    return lines


def words(key: str) -> str:
    """A key as a column's head."""
    return key.replace("_", " ")


def common(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in every one of several rows, measured numbers aside."""
    first, *others = rows.values()
    return {
        key: value
        for key, value in first.items()
        if others
        and not isinstance(value, float | list)
        and all(key in row and row[key] == value for row in others)
    }


def grid(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a row for each mapping; an interval stands behind its number."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    intervals = {f"{key}_interval" for key in keys}
    ordered = dict.fromkeys([*(key for key in FIRST if key in keys), *keys])
    shown = [key for key in ordered if key not in intervals]
    body = [
        [path, *(with_interval(row, key) if key in row else "" for key in shown)]
        for path, row in rows.items()
    ]
    return table(["", *(LABELS.get(key, words(key)) for key in shown)], body)


def with_interval(row: Mapping[str, Any], key: str) -> str:
    """A number, and its interval where the row has one."""
    interval = row.get(f"{key}_interval")
    return cell(row[key]) + (f" {cell(interval)}" if interval else "")


def listed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of a list of mappings."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([words(k) for k in keys], ([cell(row.get(k)) for k in keys] for row in rows))


def is_kernel(info: Mapping[str, Any]) -> bool:
    """Whether these are providers of one loss at one shape."""
    return isinstance(info.get("providers"), Mapping) and "shape" in info


def providers(info: Mapping[str, Any]) -> list[str]:
    """Every implementation of a loss: its time, by that of the bare products and by ours, memory
    and errors; those that failed or were skipped say why."""
    keys = ("first_ms", "ratio", "over_fast", "tflops", "peak_mb_beyond_head_gradient")
    keys = (*keys, "loss_error", "gradient_error")
    body = [
        [name, row["failed"], *[""] * (len(keys) - 1)]
        if "failed" in row
        else [name, *(with_interval(row, key) if key in row else "" for key in keys)]
        for name, row in info["providers"].items()
    ]
    for name, reason in info.get("skipped", {}).items():
        body.append([name, f"skipped: {reason}", *[""] * (len(keys) - 1)])
    labels = LABELS | {"ratio": "x bare products"}
    return table(["", *(labels.get(key, words(key)) for key in keys)], body)

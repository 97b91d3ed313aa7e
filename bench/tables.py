"""The one writer of Markdown tables: of any rows, and of what benchmarks keep in `extra_info`."""

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
LEFT_OUT = ("ratio_quartiles", "failed", "skipped")

Row = Mapping[str, Any]


def cell(value: Any) -> str:
    """A number with three digits, a pair of numbers as an interval, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(cell, value)) + "]"
    if isinstance(value, bool | str):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def with_interval(row: Row, key: str) -> str:
    """A number, and its interval where the row has one; empty where the row lacks the key."""
    if key not in row:
        return ""
    interval = row.get(f"{key}_interval")
    return cell(row[key]) + (f" {cell(interval)}" if interval else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, with an empty line after it."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def label(key: str) -> str:
    """The column heading of a key."""
    return LABELS.get(key, key.replace("_", " "))


def grid(rows: Mapping[str, Row]) -> list[str]:
    """A table with a named row per mapping. An interval stands behind its number; a row that
    `failed` or was `skipped` says why instead."""
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    intervals = {f"{key}_interval" for key in keys}
    ordered = [*(key for key in FIRST if key in keys), *(key for key in keys if key not in FIRST)]
    columns = [key for key in ordered if key not in {*intervals, *LEFT_OUT}]
    body = []
    for name, row in rows.items():
        reason = row.get("failed") or ("skipped" in row and f"skipped: {row['skipped']}")
        cells = [with_interval(row, key) for key in columns]
        body.append([name, cell(reason), *cells[1:]] if reason else [name, *cells])
    return table(["", *map(label, columns or ["failed"])], body)


def listed(rows: Sequence[Row]) -> list[str]:
    """A table of mappings without names."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table(list(map(label, keys)), ([cell(row.get(k)) for k in keys] for row in rows))


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Row]]:
    """Every mapping below a node, the node first, with its place."""
    if isinstance(node, Mapping):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f"{path} / {key}" if path else key)


def provider_rows(rows: Mapping[str, Row], skipped: Mapping[str, str]) -> list[str]:
    """Every implementation of a loss: its time alone, relative to the bare products and to ours,
    memory and errors."""
    return grid({**rows, **{name: {"skipped": reason} for name, reason in skipped.items()}})


def benchmark(name: str, info: Row) -> list[str]:
    """A heading, a table for mappings that have the same keys or that are ratios, and a line of
    single facts."""
    lines = [f"#### {name}", ""]
    if "providers" in info:
        return [*lines, *provider_rows(info["providers"], info.get("skipped", {}))]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    facts: dict[str, Any] = {}
    for path, node in walk(info):
        lists = {
            k: v for k, v in node.items() if isinstance(v, list) and v and isinstance(v[0], dict)
        }
        values = {k: v for k, v in node.items() if k not in lists and not isinstance(v, Mapping)}
        if not path and "ratio" not in values:
            facts = values
        elif values:
            kind = ("ratio",) if "ratio" in values else tuple(values)
            groups.setdefault(kind, {})[path or "all"] = values
        for rows in lists.values():
            lines += listed(rows)
    for rows in groups.values():
        lines += grid(rows)
    text = ", ".join(f"{label(k)} {cell(v)}" for k, v in facts.items() if k not in LEFT_OUT)
    return [*lines, f"{text[:1].upper()}{text[1:]}.", ""] if text else lines

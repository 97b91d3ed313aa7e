"""The page of all kept results: python -m bench.report [FOLDER]

Writes README.md into the folder (`bench/results`) from the JSON files beside it. Each file's own
`hardware` says whether it was measured on a GPU. A file that does not say its hardware, commit or
date is refused, and nothing is written.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.kernels.measure import PAIRS
from bench.methods.report import behind, score_tables
from bench.record import RESULTS, Refused, read
from bench.tables import LABELS, benchmark, cell, listed, table, walk, with_interval

Result = Mapping[str, Any]
Results = Mapping[str, Result]  # by the name of the file, without its end

# Targets of the reverse KL: shape, provider, key and limit. Of `over_fast`, the time of a peer
# relative to ours, the limit is the least.
SMALL, SMALLER = "512 from 1024, 256 tokens", "512 from 1024, 32 tokens"
LONG, SHORT = (f"{next(iter(PAIRS))}, {count} tokens" for count in (16_384, 640))
UNITS = LABELS | {"ratio": "x bare products"}
TARGETS = (
    (SMALL, "fast", "ratio", 1.25),
    (SMALLER, "fast", "ratio", 1.4),
    (SMALL, "dense", "over_fast", 1 / 0.95),
    (SMALL, "trl", "over_fast", 1 / 0.65),
    (SMALL, "liger_chunked", "over_fast", 1.0),
    (SMALL, "fast", "peak_mb_beyond_head_gradient", 170),
    (LONG, "fast", "ratio", 1.2),
    (SHORT, "fast", "ratio", 1.3),
    (LONG, "lowmem", "ratio", 2.4),
    (LONG, "trl", "over_fast", 1.35),
    (LONG, "liger_chunked", "over_fast", 1.8),
    (LONG, "fast", "peak_mb_beyond_head_gradient", 2600),
    (LONG, "lowmem", "peak_mb_beyond_head_gradient", 700),
)


def read_all(folder: Path) -> Results:
    """Every result of a folder. Raises Refused, naming the file that is none."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def document(results: Results) -> str:
    """The text of README.md."""
    rows = [
        [
            f"[{name}]({name}.json)",
            cell(result["hardware"]),
            result["commit"],
            result["date"],
            ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items()),
        ]
        for name, result in results.items()
    ]
    missed: list[str] = []
    measured: list[str] = []
    for kind in ("GPU", "CPU"):
        on_cpu = kind == "CPU"
        group = {name: r for name, r in results.items() if ("no GPU" in r["hardware"]) == on_cpu}
        checked = targets(group, not on_cpu)
        missed += [f"- {s} ({name}, on a {kind})" for name in group for s in negative(group[name])]
        missed += [
            f"- {what}: {value}, asked {limit}. ({name})"
            for what, limit, value, name, reached in checked
            if reached == "**no**"
        ]
        measured += [f"## On a {kind}", "", "### Targets", ""]
        measured += table(["", "asked", "measured", "file", "reached"], checked)
        for name, result in group.items():
            measured += section(name, result)
    lines = [
        "# Results",
        "",
        "Written by `python -m bench.report` from the JSON files of this folder. A bracket behind "
        "a ratio is the bootstrap interval (95%) of the median of its paired rounds.",
        "",
        *table(["file", "measured on", "commit", "date", "versions"], rows),
        "## What does not pay, and what is missed",
        "",
        *missed,
        "",
        *measured,
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def targets(results: Results, gpu: bool) -> list[list[str]]:
    """Rows of a table: a target, its limit, what was measured, in which file, and whether that is
    enough."""
    rows: list[list[str]] = []

    def add(what: str, limit: str, value: float, name: str, met: bool) -> None:
        rows.append([what, limit, cell(value), name, "yes" if met else "**no**"])

    nodes = [(n, *node) for n, result in results.items() for node in walk(result.get("benchmarks"))]
    for shape, provider, key, limit in TARGETS:
        if shape.startswith(tuple(PAIRS)) != gpu:
            continue
        least = key == "over_fast"
        words = f"at least {cell(limit)}" if least else f"at most {cell(limit)}"
        what = f"{provider}, {UNITS[key]}, {shape}", words
        before = len(rows)
        for name, path, node in nodes:
            if "reverse_kl" in path and "providers" in node and node["shape"] == shape:
                value = node["providers"].get(provider, {}).get(key)
                if value is not None:
                    add(*what, value, name, value >= limit if least else value <= limit)
        if len(rows) == before:
            rows.append([*what, "not measured", "", ""])
    for name, path, node in nodes:
        if (limit := node.get("target")) is not None and "ratio" in node:
            add(path, f"at most {cell(limit)}", node["ratio"], name, node["ratio"] <= limit)
    return rows


def negative(result: Result) -> Iterator[str]:
    """Sentences about what speaks against this project in one result."""
    for path, node in walk(result.get("benchmarks")):
        for name, row in node.get("providers", {}).items():
            peer = not name.startswith(("fast", "lowmem", "gemms"))
            if peer and row.get("over_fast_interval", [1, 1])[1] < 1:
                yield f"{name} takes {with_interval(row, 'over_fast')} of ours at {node['shape']}."
        if node.get("better") == "higher" and node["ratio_interval"][1] < 1:
            yield f"Slower: {path}, {with_interval(node, 'ratio')} of the other's speed."
    for _, figures in walk(result):
        if "equal_device_s" in figures:
            yield from behind(figures)
    for place, conditions in walk(result.get("valid")):
        for name, value in conditions.items():
            if value is False:
                yield f"A condition of the protocol is not met: {place or 'it'}, {name}."


def section(name: str, result: Result) -> list[str]:
    """The results of one file."""
    lines = [f"### {name}", "", f"{result['hardware']}; {result['commit']}, {result['date']}.", ""]
    if "outcome" in result:  # of a part of bench.gpu
        lines += [f"`{result['command']}`: {result['outcome']}.", ""]
        lines += [f"- {test}: {cell(text[:300])}" for test, text in result["failed"].items()]
    if "note" in result:
        lines += [result["note"], ""]
    if "protocol" in result:
        lines += [f"[{name}.md]({name}.md) has the tables.", "", f"![{name}]({name}.png)", ""]
    if "seeds" in result:
        rows = [
            {
                "method": method,
                "seed": seed,
                **run["after"],
                "device seconds": run["train_device_s"],
            }
            for method, runs in result["seeds"].items()
            for seed, run in runs.items()
            if seed != "command"
        ]
        lines += listed(rows)
    for title, info in result.get("benchmarks", {}).items():
        if "equal_steps" in info:  # a comparison of methods in its short form
            lines += [f"#### {title}", "", *score_tables(info)]
        else:
            lines += benchmark(title, info)
    return lines


def main(arguments: list[str]) -> None:
    """The command."""
    folder = Path(arguments[0]) if arguments else RESULTS
    try:
        if len(arguments) > 1 or not folder.is_dir():
            raise Refused("usage: python -m bench.report [FOLDER]")
        text = document(read_all(folder))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    (folder / "README.md").write_text(text)
    print(folder / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

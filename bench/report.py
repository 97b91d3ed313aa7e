"""The page of all kept results: python -m bench.report [FOLDER]

Writes README.md into the folder (`bench/results`) from the JSON files beside it. Each file's own
`hardware` says whether it was measured on a GPU. A file that does not say its hardware, commit or
date is refused, and nothing is written.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import findings
from bench.methods.report import headline, totals
from bench.record import RESULTS, Refused, read
from bench.tables import benchmark, cell, listed, table
from opd.record.curve import SCORES

Result = Mapping[str, Any]
Results = Mapping[str, Result]  # by the name of the file, without its end


def on_gpu(result: Result) -> bool:
    """Whether it was measured on a GPU, by what it says of its hardware."""
    return "no GPU" not in result["hardware"]


def read_all(folder: Path) -> Results:
    """Every result of a folder. Raises Refused, naming the file that is none."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def document(results: Results) -> str:
    """The text of README.md."""
    groups = {
        "GPU": {name: result for name, result in results.items() if on_gpu(result)},
        "CPU": {name: result for name, result in results.items() if not on_gpu(result)},
    }
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
    negative = [
        f"- {sentence} ({name}, on a {kind})"
        for kind, group in groups.items()
        for name, result in group.items()
        for sentence in findings.negative(result)
    ]
    measured: list[str] = []
    for kind, group in groups.items():
        targets = findings.targets(group, kind == "GPU")
        negative += [
            f"- {what}: {value}, asked {limit}. ({name})"
            for what, limit, value, name, reached in targets
            if reached == "**no**"
        ]
        measured += [f"## On a {kind}", "", "### Targets", ""]
        measured += table(["", "asked", "measured", "file", "reached"], targets)
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
        *negative,
        "",
        *measured,
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def section(name: str, result: Result) -> list[str]:
    """The results of one file."""
    lines = [f"### {name}", "", f"{result['hardware']}; {result['commit']}, {result['date']}.", ""]
    if result.get("complete") is False:
        lines += [f"Partial: `{result['command']}` has not measured all of it yet.", ""]
    for task, reason in result.get("errors", {}).items():
        lines += [f"Not measured: {task}: {cell(reason)}", ""]
    if "note" in result:
        lines += [result["note"], ""]
    if "protocol" in result:
        lines += [f"[{name}.md]({name}.md) has the tables.", "", f"![{name}]({name}.png)", ""]
    if "seeds" in result:
        lines += seeds(result["seeds"])
    for title, info in result.get("benchmarks", {}).items():
        if "equal_steps" in info:  # a comparison of methods in its short form
            scores = [score for score in SCORES if score in info["start"]]
            lines += [f"#### {title}", "", *headline(info, scores), "Device seconds in all:", ""]
            lines += totals(info)
        else:
            lines += benchmark(title, info)
    return lines


def seeds(methods: Mapping[str, Any]) -> list[str]:
    """Whole runs of the embedded task: a row for each method and seed."""
    rows = [
        {"method": method, "seed": seed, **run["after"], "device seconds": run["train_device_s"]}
        for method, runs in methods.items()
        for seed, run in runs.items()
        if seed != "command"
    ]
    return listed(rows)


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

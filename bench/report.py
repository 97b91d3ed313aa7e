"""Tables and plots of every result that is kept: python -m bench.report [FOLDER]

Writes README.md into the folder (`bench/results`) from the JSON files beside it, and plots of
kernels and precision. What ran on a GPU and what did not is told by each file's own `hardware`. A
file that does not say its hardware, commit or date is refused, and nothing is written.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import findings
from bench.kernels import precision
from bench.kernels.measure import PAIRS, TASKS, shapes_of
from bench.kernels.providers import MASKED
from bench.methods.report import headline, totals
from bench.record import RESULTS, Refused, read
from bench.tables import (
    NOT_MEASURED,
    benchmark,
    cell,
    is_kernel,
    is_rows,
    listed,
    table,
    walk,
    with_interval,
)
from opd.record.curve import SCORES

Result = Mapping[str, Any]
Results = dict[str, Result]  # by the name of the file, without its end
STEP_PAIR = "Qwen3-VL 2B from 8B"
STEP_PHASES = ("vision", "prefill", "sample", "teacher", "extend", "loss", "backward", "optimizer")


def on_gpu(result: Result) -> bool:
    """Whether it was measured on a GPU, by what it says of its hardware."""
    return "no GPU" not in result["hardware"]


def read_all(folder: Path) -> Results:
    """Every result of a folder. Raises Refused, naming the file that is none."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def document(results: Results) -> str:
    """README.md."""
    gpu = {name: result for name, result in results.items() if on_gpu(result)}
    cpu = {name: result for name, result in results.items() if not on_gpu(result)}
    lines = [
        "# Results",
        "",
        "Written by `python -m bench.report` from the JSON files of this folder. A bracket behind "
        "a ratio is the bootstrap interval (95%) of the median of its paired rounds.",
        "",
        *table(
            ["file", "measured on", "commit", "date", "versions"],
            (
                [
                    f"[{name}]({name}.json)",
                    cell(result["hardware"]),
                    result["commit"],
                    result["date"],
                    ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items()),
                ]
                for name, result in results.items()
            ),
        ),
        "## What does not pay, and what is missed",
        "",
        *against(results),
    ]
    lines += ["## On a GPU", "", *gpu_kernels(gpu), *gpu_steps(gpu), *asked(gpu, True)]
    for name, result in gpu.items():
        lines += section(name, result)
    lines += ["## On a CPU", "", *asked(cpu, False)]
    for name, result in cpu.items():
        lines += section(name, result)
    return "\n".join(lines).rstrip("\n") + "\n"


def against(results: Results) -> list[str]:
    """A line for each thing that speaks against this project."""
    found = [
        f"- {said} ({name}, on {'a GPU' if on_gpu(result) else 'a CPU'})"
        for name, result in results.items()
        for said in findings.negative(result)
    ]
    for gpu in (True, False):
        alike = {name: result for name, result in results.items() if on_gpu(result) == gpu}
        for what, limit, value, name, verdict in findings.asked(alike, gpu):
            if verdict == "**no**":
                found.append(f"- {what}: {value}, asked {limit}. ({name})")
    return [*found, ""]


def asked(results: Results, gpu: bool) -> list[str]:
    """The table of numbers that were asked for."""
    head = ["", "asked", "measured", "file", "reached"]
    return ["### Numbers asked for", "", *table(head, findings.asked(results, gpu))]


def kernels(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The kernel benchmarks of a result, by their place in it."""
    for path, node in walk(result):
        if is_kernel(node):
            yield path, node


def gpu_kernels(results: Results) -> list[str]:
    """For every real pair and token count each provider's time by that of the bare products."""
    lines = ["### Kernels on a GPU, seconds by those of the bare products", ""]
    for task in TASKS:
        names = [*task.ours, MASKED, "torch", "dense", "compiled", *task.peers]
        rows = []
        for shape in (shape for pair in PAIRS for shape in shapes_of(pair)):
            found = [
                (name, node["providers"])
                for name, result in results.items()
                for path, node in kernels(result)
                if task.name in path and node["shape"] == shape.name
            ]
            for name, providers in found or [("", {})]:
                cells = (of_provider(providers, provider) for provider in names)
                rows.append([shape.name, *cells, name])
        lines += [f"{task.name}:", "", *table(["", *names, "file"], rows)]
    return lines


def of_provider(providers: Mapping[str, Any], name: str) -> str:
    """A provider's ratio to the bare products, or why there is none."""
    row = providers.get(name)
    if row is None:
        return NOT_MEASURED
    return str(row["failed"]) if "failed" in row else with_interval(row, "ratio")


def gpu_steps(results: Results) -> list[str]:
    """Phases, use of the device and memory of the two methods' steps at real size, by recompute
    mode; the one that `auto` chooses comes first."""
    rows = []
    for method in ("opd", "grpo"):
        found = [
            (name, f"{mode}{', auto' * (mode == node['auto'])}", measured)
            for name, result in results.items()
            for _, node in walk(result)
            if node.get("method") == method and "recompute" in node
            for mode, measured in node["recompute"].items()
        ]
        for name, mode, node in found or [("", NOT_MEASURED, {})]:
            seconds = node.get("seconds", {})
            cells = [node.get("step_s"), *(seconds.get(phase) for phase in STEP_PHASES)]
            cells += [node.get("mfu"), node.get("peak_gib")]
            missing = node.get("failed", NOT_MEASURED)
            shown = [missing if value is None else cell(value) for value in cells]
            rows.append([f"{method.upper()}, {STEP_PAIR}", mode, *shown, name])
    head = ["", "recompute", "step s", *STEP_PHASES, "MFU", "peak GiB", "file"]
    return ["### Steps on a GPU, 8,192 video tokens", "", *table(head, rows)]


def section(name: str, result: Result) -> list[str]:
    """All that one file says."""
    lines = [f"### {name}", "", f"{result['hardware']}; {result['commit']}, {result['date']}.", ""]
    if result.get("complete") is False:
        lines += [f"Partial: `{result['command']}` has not measured all of it yet.", ""]
    for what, reason in result.get("errors", {}).items():
        lines += [f"Not measured: {what}: {cell(reason)}", ""]
    if "note" in result:
        lines += [result["note"], ""]
    for what, file in plots(name, result).items():
        lines += [f"![{name}: {what}]({file})", ""]
    if "benchmarks" in result:
        for title, info in result["benchmarks"].items():
            lines += of_methods(title, info) if "equal_steps" in info else benchmark(title, info)
    elif "protocol" in result:
        lines += of_methods(result["protocol"], result)
        lines += [f"More in [{name}.md]({name}.md), a plot in [{name}.png]({name}.png).", ""]
    elif "seeds" in result:
        lines += of_seeds(result["seeds"])
    else:
        for dtype, rows in errors(result):
            lines += [f"{dtype}, relative error of the gradient:", "", *listed(rows)]
        for title, info in result.items():
            if isinstance(info, Mapping) and title != "versions":
                lines += benchmark(title, info)
    return lines


def of_methods(title: str, told: Mapping[str, Any]) -> list[str]:
    """Methods side by side: a protocol's, or their short form."""
    if "start" not in told:
        return [f"{title}: no arm is measured to its end yet.", ""]
    scores = [score for score in SCORES if score in told["start"]]
    budget = told["equal_device_s"]["with_scoring"]
    head = ["arm", f"score at {budget:.0f} device s", f"at step {told['equal_steps']:.0f}", "end"]
    lines = [f"#### {title}", ""]
    if told.get("grpo_best"):
        lines += headline(dict(told), scores)
    else:
        for score in scores:
            rows = []
            for arm, entry in told["arms"].items():
                if score in entry:
                    places = entry[score]["at_equal_device_s"]["with_scoring"]
                    places = places, entry[score]["at_equal_steps"], entry[score]["end"]
                    rows.append([arm, *map(findings.scored, places)])
                else:
                    rows.append([arm, *[NOT_MEASURED] * 3])
            lines += [f"{SCORES[score]}, at the start {told['start'][score]:.3f}:", ""]
            lines += table(head, rows)
    return [*lines, "Device seconds in all:", "", *totals(dict(told))]


def of_seeds(methods: Mapping[str, Any]) -> list[str]:
    """Whole runs of the embedded task: a row for each method and seed."""
    rows = [
        {"method": method, "seed": seed, **run["after"], "device seconds": run["train_device_s"]}
        for method, runs in methods.items()
        for seed, run in runs.items()
        if seed != "command"
    ]
    return listed(rows)


def errors(result: Result) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The precision tables of a result, by dtype."""
    for _, node in walk(result):
        for key, value in node.items():
            if is_rows(value) and {"logit_std", "gap"} <= value[0].keys():
                yield str(node.get("dtype", key)), value


def plots(name: str, result: Result) -> dict[str, str]:
    """The plots that a result has, and their files."""
    has = {"kernels": any(kernels(result)), "precision": any(errors(result))}
    suite = "benchmarks" in result
    return {w: f"{name}-{w}.png" if suite else f"{name}.png" for w, there in has.items() if there}


def draw(name: str, result: Result, folder: Path) -> None:
    """Its plots."""
    title = f"{result['hardware']}, {result['commit']}, {result['date']}"
    for what, file in plots(name, result).items():
        if what == "kernels":
            plot_kernels(result, title, folder / file)
        else:
            precision.plot(dict(errors(result)), title, folder / file)


def plot_kernels(result: Result, title: str, path: Path) -> None:
    """A panel for each benchmark: every provider's time by that of the bare products."""
    found = list(kernels(result))
    size = (7, 0.8 + sum(0.7 + 0.25 * len(node["providers"]) for _, node in found))
    figure, axes = plt.subplots(len(found), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (place, node) in zip(axes[:, 0], found, strict=True):
        rows = {n: r for n, r in reversed(node["providers"].items()) if "ratio" in r}
        middle = [row["ratio"] for row in rows.values()]
        ends = [
            [abs(row["ratio"] - row["ratio_interval"][end]) for row in rows.values()]
            for end in (0, 1)
        ]
        axis.barh(list(rows), middle, xerr=ends, color="#4c72b0", ecolor="black")
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_title(place.rpartition("::")[2], fontsize=9)
    axes[-1, 0].set_xlabel("seconds by those of the bare products of the same round")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    """The command."""
    folder = Path(arguments[0]) if arguments else RESULTS
    try:
        if len(arguments) > 1 or not folder.is_dir():
            raise Refused("usage: python -m bench.report [FOLDER]")
        results = read_all(folder)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, result in results.items():
        draw(name, result, folder)
    (folder / "README.md").write_text(document(results))
    print(folder / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])

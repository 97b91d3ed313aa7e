"""What the runs of a protocol come to, side by side: a JSON file, tables, a plot.

Every figure is a spread over the seeds of an arm, stored under the name of its column.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.methods.protocol import Protocol, Result
from bench.record import short, write
from bench.tables import label, table, walk
from opd.record.curve import SCORES, Curve, plot, thresholds

# Arms, and what each of them is meant to be better than.
CONTROLS = {
    "reverse_kl": "grpo",
    "sampled": "grpo",
    "reverse_kl_4": "reverse_kl",
    "tvdf": "random",
    "scc": "random",
    "dual_variance": "dual",
}
Teacher = Mapping[str, Any]  # `training_s`, and its scores if they are known


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, lowest and highest; no mean where a seed has no value."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values) or not numbers:
        return {"mean": None, "seeds": values}
    mean = sum(numbers) / len(numbers)
    return {"mean": mean, "low": min(numbers), "high": max(numbers), "seeds": values}


def compare(
    results: Mapping[str, Sequence[Result]], scores: Sequence[str], teacher: Teacher | None
) -> dict[str, Any]:
    """Scores at the end, at equal steps and at equal device time, device seconds to fixed scores
    and to GRPO's best, and totals, of the runs of each arm, one for each seed.

    GRPO's best is the highest score on the way of each of its runs, and their mean is what the
    other arms have to reach. Device seconds include the teacher's and the curriculum's scoring,
    except where a name says otherwise; equal ones are those of the shortest run.
    """
    curves = {arm: [Curve(run["curve"]) for run in runs] for arm, runs in results.items()}
    trained = {arm: with_training(curves[arm], teacher) for arm in curves}
    every = [curve for arm in curves for curve in curves[arm]]
    steps = min(curve.along("step")[-1] for curve in every)
    with_scoring, without = (
        min(c.seconds(scoring)[-1] for c in every) for scoring in (True, False)
    )
    first = next(iter(curves.values()))
    start = {score: spread([c.points[0][score] for c in first])["mean"] for score in scores}
    highest = {
        score: [max(point[score] for point in curve.points) for curve in curves.get("grpo", ())]
        for score in scores
    }

    def of_score(arm: str, score: str) -> dict[str, Any]:
        def at(position: float, axis: str, scoring: bool = True) -> dict[str, Any]:
            return spread([curve.at(position, score, axis, scoring) for curve in curves[arm]])

        def seconds_to(
            levels: Sequence[float],
            of: Mapping[str, Sequence[Curve]] = curves,
            scoring: bool = True,
        ) -> dict[str, Any]:
            pairs = zip(of[arm], levels, strict=False)  # none where the training is not known
            return spread([c.reaches(level, score, "device_s", scoring) for c, level in pairs])

        entry = {
            "end": spread([curve.points[-1][score] for curve in curves[arm]]),
            "at_equal_steps": at(steps, "step"),
            "at_equal_device_s": at(with_scoring, "device_s"),
            "at_equal_device_s_without_scoring": at(without, "device_s", False),
        }
        if teacher and score in teacher:
            for level in thresholds(start[score], teacher[score]):
                entry[f"device_s_to_{level:.3f}"] = seconds_to([level] * len(curves[arm]))
        if best := highest[score]:
            mean = sum(best) / len(best)
            levels = best if arm == "grpo" else [mean] * len(curves[arm])
            entry["device_s_to_GRPO_best"] = seconds_to(levels)
            entry["device_s_to_GRPO_best_without_scoring"] = seconds_to(levels, scoring=False)
            entry["device_s_to_GRPO_best_with_teacher_training"] = seconds_to(levels, trained)
        return entry

    def totals(arm: str) -> dict[str, Any]:
        scoring = [curve.seconds()[-1] - curve.seconds(False)[-1] for curve in curves[arm]]
        return {
            "own_loop": spread([curve.seconds()[-1] for curve in curves[arm]]),
            "of_it_scoring": spread(scoring),
            "with_teacher_training": spread([curve.seconds()[-1] for curve in trained[arm]]),
        }

    return {
        "arms": {
            arm: {score: of_score(arm, score) for score in scores}
            | {
                "gain": [run["gain"] for run in runs],
                "trained_share": spread([run["trained_share"] for run in runs]),
                "device_s": totals(arm),
            }
            for arm, runs in results.items()
        },
        "teacher": teacher,
        "start": start,
        "equal_steps": steps,
        "equal_device_s": {"with_scoring": with_scoring, "without_scoring": without},
        "grpo_best": {score: spread(best) for score, best in highest.items() if best},
    }


def with_training(curves: Sequence[Curve], teacher: Teacher | None) -> list[Curve]:
    """The curves with the teacher's training before them, where a teacher was used; none where its
    seconds are not known."""
    if teacher is None:
        return []
    uses_teacher = [curve.points[-1]["device_s"]["teacher"] > 0 for curve in curves]
    before_s = [teacher["training_s"] if used else 0.0 for used in uses_teacher]
    return [Curve(curve.points, s) for curve, s in zip(curves, before_s, strict=True)]


def summarise(protocol: Protocol, teacher: Teacher | None = None) -> dict[str, Any]:
    """Everything measured so far, side by side."""
    arms: dict[str, Any] = {}
    results: dict[str, list[Result]] = {}
    for arm in protocol.arms:
        tuned = zip(protocol.rates, protocol.tuned(arm), strict=True)
        ends = {rate: run.outcome()["curve"][-1] for rate, run in tuned if run.result.is_file()}
        best = protocol.best_rate(arm)
        arms[arm] = {
            "rates": {rate: {s: end[s] for s in protocol.scores} for rate, end in ends.items()},
            "best_rate": best,
            "inside_grid": best and best not in (protocol.rates[0], protocol.rates[-1]),
        }
        finals = protocol.final(arm)
        if finals and all(run.result.is_file() for run in finals):
            results[arm] = [run.outcome() for run in finals]
    summary: dict[str, Any] = {"protocol": protocol.name, "arms": arms}
    if not results:
        return summary
    curves = {arm: [Curve(run["curve"]) for run in runs] for arm, runs in results.items()}
    plot(curves, protocol.results.with_suffix(".png"))
    figures = compare(results, protocol.scores, teacher)
    for arm, entry in figures.pop("arms").items():
        arms[arm] |= entry
    runs = [run for finals in results.values() for run in finals]
    return summary | {
        "hardware": "; ".join(sorted({run["hardware"] for run in runs})),
        "commit": ", ".join(sorted({short(commit) for run in runs for commit in run["commit"]})),
        "date": max(run["date"] for run in runs),
        **figures,
        "valid": validity(arms, figures["start"], teacher),
    }


def validity(
    arms: Mapping[str, Any], start: Mapping[str, float], teacher: Teacher | None
) -> dict[str, Any]:
    """The protocol's conditions, as far as they can be told."""
    valid: dict[str, Any] = {"best_rates_inside": {a: e["inside_grid"] for a, e in arms.items()}}
    if teacher:
        gains = [gain for run in arms["grpo"].get("gain", []) for gain in run.values()]
        enough = all(gain["mean"] >= 0.05 and gain["interval"][0] > 0 for gain in gains)
        valid["grpo_gains"] = enough if gains else None
        valid["teacher_ahead"] = all(teacher[score] - start[score] >= 0.15 for score in start)
    return valid


def spread_cell(entry: Mapping[str, Any], digits: int = 3) -> str:
    """A spread in words: its mean, and its ends where it has several seeds."""
    if entry["mean"] is None:
        return "-"
    mean, low, high = (f"{entry[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if len(entry["seeds"]) == 1 else f"{mean} ({low} to {high})"


def spreads(arms: Mapping[str, Any], key: str) -> list[str]:
    """The lines of a table of the spreads below a key of each arm; seconds without decimals."""
    cells = {
        arm: {
            path: spread_cell(node, 0 if "_s_to_" in path or key == "device_s" else 3)
            for path, node in walk(entry.get(key, {}))
            if "mean" in node
        }
        for arm, entry in arms.items()
    }
    columns = list(dict.fromkeys(path for row in cells.values() for path in row))
    rows = ([arm, *(row.get(c, "not measured") for c in columns)] for arm, row in cells.items())
    return table(["arm", *map(label, columns)], rows)


def score_tables(figures: Mapping[str, Any]) -> list[str]:
    """The lines of a table for each score, and of one of device seconds."""
    budget, teacher = figures["equal_device_s"], figures.get("teacher") or {}
    lines = [
        f"Mean (lowest to highest) of the seeds; equal steps: {figures['equal_steps']:.0f}; equal "
        f"device time: {budget['with_scoring']:.0f} s of one CPU thread, or "
        f"{budget['without_scoring']:.0f} s where scoring by the teacher and for the curriculum is "
        "left out.",
        "",
    ]
    for score, start in figures["start"].items():
        about = f"start {start:.3f}"
        about += f", teacher {teacher[score]:.3f}" if score in teacher else ""
        best = figures["grpo_best"].get(score)
        about += f", GRPO's best {spread_cell(best)}" if best else ""
        lines += [f"**{SCORES[score]}** ({about})", "", *spreads(figures["arms"], score)]
    return [*lines, "**Device seconds**", "", *spreads(figures["arms"], "device_s")]


def behind(figures: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about arms that are behind their control: at equal device time, or on the way to
    GRPO's best score once the teacher's training is counted."""
    seconds = figures["equal_device_s"]["with_scoring"]
    arms = figures["arms"]
    for arm, control in CONTROLS.items():
        for score, name in SCORES.items():
            own, other = (arms.get(a, {}).get(score, {}) for a in (arm, control))
            first, second = (e.get("at_equal_device_s", {}) for e in (own, other))
            if (first.get("mean") or 1) < (second.get("mean") or 0):
                yield (
                    f"{arm} is not ahead of {control} at {seconds:.0f} device seconds: "
                    f"{name} {spread_cell(first)}, {spread_cell(second)}."
                )
            key = "device_s_to_GRPO_best_with_teacher_training"
            first, second = (e.get(key, {}).get("mean") for e in (own, other))
            if control == "grpo" and first and second and first > second:
                yield (
                    f"With its teacher's training {arm} takes {first:.0f} device seconds to GRPO's "
                    f"best {name}, GRPO {second:.0f}."
                )


def page(summary: Mapping[str, Any], scores: Sequence[str]) -> str:
    """The summary as Markdown."""
    lines = [f"# {summary['protocol']}", ""]
    if "start" not in summary:
        return "\n".join([*lines, "No arm is measured to its end yet.", ""])
    tried = [
        [arm, rate, *(f"{ends[s]:.3f}" for s in scores), "best" * (rate == entry["best_rate"])]
        for arm, entry in summary["arms"].items()
        for rate, ends in entry["rates"].items()
    ]
    head = ["arm", "learning rate", *(SCORES[s] for s in scores), ""]
    return "\n".join([*lines, *score_tables(summary), "**Rates tried**", "", *table(head, tried)])


def write_report(protocol: Protocol, teacher: Teacher | None) -> Path:
    """Write the report beside the results, and return the JSON file."""
    summary, target = summarise(protocol, teacher), protocol.results.with_suffix(".json")
    write(target, summary)
    target.with_suffix(".md").write_text(page(summary, protocol.scores))
    return target

"""What the runs of a protocol come to, side by side: a JSON file, a table, a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.methods.protocol import Protocol
from bench.record import short
from bench.tables import NOT_MEASURED
from bench.tables import table as markdown
from opd.record.curve import NOT_TRAINING, SCORES, Curve, plot, thresholds


def published_style_s(result: dict[str, Any]) -> float:
    """An estimate of the device seconds of the same steps in the published loop, from the seconds
    of this one: n rollouts are n sequences, each of them forwarded once to generate and three times
    beside (for the old log-probabilities, for nothing, to train), every forward with its prompt."""
    end = result["curve"][-1]
    spent = {k: v for k, v in end["device_s"].items() if k not in NOT_TRAINING}
    if not end["rollouts"]:
        return sum(spent.values())
    generated, prompts = end["generated_tokens"], result["tokens"] - end["generated_tokens"]
    options = dict(key.split("=", 1) for key in result["keys"])
    repeated = int(options.get("num_rollouts", 1)) * prompts
    longer = (repeated + generated) / (prompts + generated)  # than what is forwarded here
    forward = spent["prefill"] + spent["extend"]
    generating = forward * repeated / (prompts + generated)
    grown = longer * (3 * forward + spent["teacher"] + spent["backward"])
    apart = ("prefill", "extend", "teacher", "backward")
    return generating + grown + sum(s for name, s in spent.items() if name not in apart)


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, lowest and highest; no mean where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "seeds": values}
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "seeds": values}


def report(protocol: Protocol, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything measured so far, side by side; `known` is the teacher."""
    arms: dict[str, Any] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in protocol.arms:
        tuned = zip(protocol.rates, protocol.tuned(arm), strict=True)
        measured = {rate: outcome for rate, run in tuned if (outcome := run.outcome())}
        best = protocol.best_rate(arm)
        arms[arm] = {
            "rates": {
                rate: {score: outcome["curve"][-1][score] for score in protocol.scores}
                for rate, outcome in measured.items()
            },
            "best_rate": best,
            "inside_grid": best and best not in (protocol.rates[0], protocol.rates[-1]),
        }
        finals = [run.outcome() for run in protocol.final(arm)]
        if finals and all(finals):
            results[arm] = [outcome for outcome in finals if outcome]
    summary: dict[str, Any] = {"protocol": protocol.name, "arms": arms}
    if not results:
        return summary
    plot(_curves(results), protocol.results.with_suffix(".png"))
    figures = side_by_side(results, protocol.scores, known)
    for arm, found in figures.pop("arms").items():
        arms[arm] |= found
    outcomes = [outcome for found in results.values() for outcome in found]
    return summary | {
        "hardware": "; ".join(sorted({outcome["hardware"] for outcome in outcomes})),
        "commit": ", ".join(sorted({short(c) for outcome in outcomes for c in outcome["commit"]})),
        "date": max(outcome["date"] for outcome in outcomes),
        "teacher": known,
        **figures,
        "valid": _valid(arms, figures["start"], known),
    }


def _curves(results: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[Curve]]:
    return {arm: [Curve(outcome["curve"]) for outcome in found] for arm, found in results.items()}


def side_by_side(
    results: Mapping[str, Sequence[dict[str, Any]]],
    scores: Sequence[str],
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Scores at the end, at equal steps and at equal device time, device seconds to fixed scores
    and to GRPO's best, and totals, of the runs of each arm, a run a seed.

    GRPO's best is the highest score on the way of each of its runs, and their mean is what the
    other arms have to reach. `known` is the teacher: its `training_s`, and its scores if any.
    """
    curves = _curves(results)
    every = [curve for found in curves.values() for curve in found]
    begun = [curve.points[0] for curve in next(iter(curves.values()))]
    start = {s: sum(point[s] for point in begun) / len(begun) for s in scores}
    steps = min(curve.along("step")[-1] for curve in every)
    budget = {
        "with_scoring": min(curve.seconds()[-1] for curve in every),
        "without_scoring": min(curve.seconds(scoring=False)[-1] for curve in every),
    }
    best = {
        score: [max(point[score] for point in curve.points) for curve in curves.get("grpo", ())]
        for score in scores
    }
    training_s = known["training_s"] if known else None
    arms: dict[str, Any] = {}
    for arm, found in curves.items():
        entry = arms[arm] = {}
        for score in scores:
            entry[score] = places = {
                "end": spread([c.points[-1][score] for c in found]),
                "at_equal_steps": spread([c.at(steps, score, "step") for c in found]),
                "at_equal_device_s": {
                    name: spread(
                        [c.at(s, score, "device_s", scoring=name == "with_scoring") for c in found]
                    )
                    for name, s in budget.items()
                },
            }
            if known and score in known:
                places["device_s_to"] = [
                    {"score": level} | _seconds_to(found, [level] * len(found), score, training_s)
                    for level in thresholds(start[score], known[score])
                ]
            if best[score]:
                mean = sum(best[score]) / len(best[score])
                levels = best[score] if arm == "grpo" else [mean] * len(found)
                places["device_s_to_grpo_best"] = _seconds_to(found, levels, score, training_s)
        entry |= _spent(results[arm], found, training_s)
    return {
        "arms": arms,
        "start": start,
        "equal_steps": steps,
        "equal_device_s": budget,
        "grpo_best": {score: spread(found) for score, found in best.items() if found},
    }


def _spent(
    outcomes: Sequence[dict[str, Any]], found: Sequence[Curve], training_s: float | None
) -> dict[str, Any]:
    """What an arm gained, what it trained on, and its totals of device seconds."""
    return {
        "gain": [outcome["gain"] for outcome in outcomes],
        "trained_share": spread([outcome["trained_share"] for outcome in outcomes]),
        "device_s": {
            "own_loop": spread([c.seconds()[-1] for c in found]),
            "of_it_scoring": spread([c.seconds()[-1] - c.seconds(False)[-1] for c in found]),
            "with_teacher_training": spread([c.seconds()[-1] for c in _taught(found, training_s)]),
            "published_style_estimate": spread([published_style_s(o) for o in outcomes]),
        },
    }


def _taught(found: Sequence[Curve], training_s: float | None) -> list[Curve]:
    """The curves with the teacher's training before them, where a teacher was used; none where its
    seconds are not known."""
    if training_s is None:
        return []
    taught = [c.points[-1]["device_s"]["teacher"] > 0 for c in found]
    return [Curve(c.points, training_s if t else 0.0) for c, t in zip(found, taught, strict=True)]


def _seconds_to(
    found: Sequence[Curve], levels: Sequence[float], score: str, training_s: float | None
) -> dict[str, Any]:
    """Device seconds to a score, each curve's own: training alone, with the teacher's and the
    curriculum's scoring, and with the teacher's training too."""

    def spent(curves: Sequence[Curve], scoring: bool = True) -> dict[str, Any]:
        pairs = zip(curves, levels, strict=True)
        return spread([c.reaches(level, score, "device_s", scoring) for c, level in pairs])

    behind = _taught(found, training_s)
    return {
        "without_scoring": spent(found, False),
        "with_scoring": spent(found),
        "with_teacher_training": spent(behind) if behind else None,
    }


def _valid(arms: dict[str, Any], start: Any, known: dict[str, Any] | None) -> dict[str, Any]:
    """The protocol's conditions, as far as they are known."""
    valid: dict[str, Any] = {"best_rates_inside": {a: e["inside_grid"] for a, e in arms.items()}}
    if known:
        gains = [gain for found in arms["grpo"].get("gain", []) for gain in found.values()]
        enough = all(gain["mean"] >= 0.05 and gain["interval"][0] > 0 for gain in gains)
        valid["grpo_gains"] = enough if gains else None
        valid["teacher_ahead"] = all(known[score] - start[score] >= 0.15 for score in start)
    return valid


def cell(entry: Any, digits: int = 3) -> str:
    """A spread in words: its mean, and its ends where it has several seeds."""
    if entry is None or entry["mean"] is None:
        return "-"
    mean, low, high = (f"{entry[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return mean if len(entry["seeds"]) == 1 else f"{mean} ({low} to {high})"


def headline(figures: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    """The lines of a table a score: what each arm needs to GRPO's best, and where it is at equal
    device time and at equal steps. None without GRPO."""
    steps, budget = figures["equal_steps"], figures["equal_device_s"]["with_scoring"]
    lines: list[str] = []
    for score in scores if figures.get("grpo_best") else ():
        level = cell(figures["grpo_best"][score])
        head = ["device s to it", "without scoring", "with the teacher's training"]
        head += [f"score at {budget:.0f} device s", f"at step {steps:.0f}"]
        lines += [
            f"{SCORES[score]}: GRPO's best is {level}, the start {figures['start'][score]:.3f}."
        ]
        rows = []
        for arm, entry in figures["arms"].items():
            if score not in entry:
                continue
            found = entry[score]
            to = found["device_s_to_grpo_best"]
            names = ("with_scoring", "without_scoring", "with_teacher_training")
            cells = [cell(to[name], 0) for name in names]
            cells += [cell(found["at_equal_device_s"]["with_scoring"])]
            cells += [cell(found["at_equal_steps"])]
            rows.append([arm, *cells])
        lines += ["", *markdown(["arm", *head], rows)]
    return lines


def totals(figures: Mapping[str, Any]) -> list[str]:
    """The lines of the table of each arm's device seconds."""
    head = ["arm", "own loop", "of it scoring", "with the teacher's training"]
    rows = (
        [arm, *(cell(spent, 0) for spent in entry["device_s"].values())]
        for arm, entry in figures["arms"].items()
        if "device_s" in entry
    )
    return markdown([*head, "published loop, estimated"], rows)


def table(figures: dict[str, Any], scores: list[str]) -> str:
    """The report as Markdown: a section a score, a row an arm; what was not measured says so."""
    lines = [f"# {figures['protocol']}", ""]
    if "start" not in figures:
        return "\n".join([*lines, "No arm is measured to its end yet.", ""])
    steps, budget = figures["equal_steps"], figures["equal_device_s"]
    lines += [
        f"Mean (lowest to highest) of the seeds; equal steps: {steps:.0f}; equal device time: "
        f"{budget['with_scoring']:.0f} s of one CPU thread, or {budget['without_scoring']:.0f} s "
        "where the teacher's and the curriculum's scoring is left out.",
        "",
    ]
    for score in scores:
        known = f", teacher {figures['teacher'][score]:.3f}" if figures["teacher"] else ""
        lines += [f"## {SCORES[score]} (start {figures['start'][score]:.3f}{known})", ""]
        head = ["arm", "rate", "end", "equal steps", "equal time", "without scoring"]
        if figures["teacher"]:
            levels = thresholds(figures["start"][score], figures["teacher"][score])
            head += [f"s to {level:.3f}" for level in levels]
        rows = []
        for arm, entry in figures["arms"].items():
            found = entry.get(score)
            if found is None:
                rows.append([arm, NOT_MEASURED, *[""] * (len(head) - 2)])
                continue
            times = found["at_equal_device_s"]
            cells = [arm, entry["best_rate"], cell(found["end"]), cell(found["at_equal_steps"])]
            cells += [cell(times["with_scoring"]), cell(times["without_scoring"])]
            cells += [cell(row["with_scoring"], 0) for row in found.get("device_s_to", [])]
            rows.append(cells)
        lines += markdown(head, rows)
    if figures["grpo_best"]:
        lines += ["## To GRPO's best", "", *headline(figures, scores)]
    lines += ["## Device seconds", "", *totals(figures)]
    rows = []
    for arm, entry in figures["arms"].items():
        for rate, ends in entry["rates"].items():
            name = f"**{rate}**" if rate == entry["best_rate"] else rate
            rows.append([f"{arm}, {name}", *(f"{ends[s]:.3f}" for s in scores)])
    lines += ["## Rates tried", "", *markdown(["arm", *(SCORES[s] for s in scores)], rows)]
    return "\n".join(lines)


def write(protocol: Protocol, known: dict[str, Any] | None) -> Path:
    """Write the report beside the results, and return the JSON file."""
    figures, target = report(protocol, known), protocol.results.with_suffix(".json")
    target.write_text(json.dumps(figures, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(figures, protocol.scores))
    return target

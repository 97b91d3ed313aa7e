"""What a run shows a person: the table at its end, and its curve."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from opd.evaluate import Evaluation
from opd.metrics import paired_interval

COLUMNS = (
    "miou",
    "sampled_miou",
    "recall@0.3",
    "recall@0.5",
    "recall@0.7",
    "parse_failures",
    "queries",
)


def comparison(
    before: Evaluation | None, after: Evaluation, teacher: Evaluation | None
) -> dict[str, Any]:
    """Gains with their paired 95% intervals over the queries, and the share of the gap to the
    teacher that was closed."""
    if before is None:
        return {}
    result: dict[str, Any] = {"gain": {}, "gap_closed": {}}
    for name, attribute in (("miou", "greedy_tious"), ("sampled_miou", "sampled_tious")):
        start, end = before.summary[name], after.summary[name]
        if start is None or end is None:
            continue
        interval = paired_interval(getattr(before, attribute), getattr(after, attribute))
        result["gain"][name] = {"mean": end - start, "interval": interval}
        if teacher is not None and teacher.summary[name] not in (None, start):
            result["gap_closed"][name] = (end - start) / (teacher.summary[name] - start)
    return result


def table(summary: dict[str, Any]) -> str:
    """The evaluations side by side, then where the time went."""
    lines = [" " * 9 + "".join(f"{c:>15}" for c in COLUMNS)]
    for name in ("before", "after", "teacher"):
        if summary[name]:
            cells = [summary[name][c] for c in COLUMNS]
            shown = [
                "-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells
            ]
            lines.append(f"{name:<9}" + "".join(f"{s:>15}" for s in shown))
    for name, share in summary.get("gap_closed", {}).items():
        low, high = summary["gain"][name]["interval"]
        mean = summary["gain"][name]["mean"]
        lines.append(
            f"{name}: {mean:+.3f} (95% {low:+.3f} to {high:+.3f}), "
            f"{share:.0%} of the gap to the teacher closed"
        )
    lines.append(
        f"greedy mIoU of the best answer in timestamps {summary['ceiling']:.3f}, "
        f"of the best constant answer {summary['best_constant']:.3f}"
    )
    hours = summary["device_hours"]
    total = hours["total"] or 1.0
    shares = sorted(((h / total, n) for n, h in hours.items() if n != "total"), reverse=True)
    busy = ", ".join(f"{n} {s:.0%}" for s, n in shares if s >= 0.01)
    lines.append(f"device time {3600 * total:.0f} s ({busy})")
    lines.append(
        f"wall {summary['wall_s']:.0f} s, first step after {summary['first_step_s']:.0f} s, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB, "
        f"student prompt forwards per step {summary['student_prompt_forwards_per_step']:.3f}"
    )
    return "\n".join(lines)


def plot_curve(run_dir: Path) -> Path:
    """Draw loss and KL against steps, and the evaluations, into `curve.png`."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for key in ("loss", "kl"):
        if rows[0][key] is not None:
            left.plot(steps, [row[key] for row in rows], label=key, linewidth=1)
    left.set(xlabel="optimizer step", ylabel="nats", title=summary["method"], yscale="symlog")
    left.legend()
    names = [name for name in ("before", "after", "teacher") if summary[name]]
    for offset, key in enumerate(("miou", "sampled_miou")):
        heights = [summary[name][key] or 0.0 for name in names]
        bars = right.bar([x + 0.4 * offset for x in range(len(names))], heights, 0.38, label=key)
        right.bar_label(bars, fmt="%.3f")
    right.set(
        xticks=[x + 0.2 for x in range(len(names))],
        xticklabels=names,
        ylim=(0, 1),
        title="held-out queries",
    )
    right.legend()
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

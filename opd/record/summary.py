"""Summary of a finished run, as `summary.json`, as a table on stdout and as a plot."""

import resource
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.files import read_rows
from opd.record.curve import NOT_TRAINING
from opd.record.flops import mfu
from opd.scoring.evaluation import Evaluation
from opd.scoring.metrics import paired_interval

COLUMNS = (
    "miou",
    "sampled_miou",
    "recall@0.3",
    "recall@0.5",
    "recall@0.7",
    "accuracy",
    "acc@gqa",
    "parse_failures",
    "queries",
)


def summarise(
    trainer: Any, evaluations: dict[str, Evaluation | None], left_out: dict[str, int]
) -> dict[str, Any]:
    """Summary of a finished run; the keys are those of `summary.json`.

    Args:
        trainer: the run's `Trainer`.
        evaluations: `before`, `after` and `teacher`; None where an evaluation was not made.
        left_out: number of examples that could not be used, by split.
    """
    config, ledger, progress = trainer.config, trainer.ledger, trainer.progress
    before, after, teacher = (evaluations[name] for name in ("before", "after", "teacher"))
    assert after is not None
    hours = ledger.device_hours()
    outside = ("total", *NOT_TRAINING)
    busy_s = 3600 * sum(h for name, h in hours.items() if name not in outside)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    peak = distributed.all_max(peak)
    return {
        "method": config.method,
        "objective": config.objective if config.method == "opd" else None,
        "seed": config.seed,
        "steps": config.steps,
        **{name: e.summary if e else None for name, e in evaluations.items()},
        **comparison(before, after, teacher),
        "ceiling": after.ceiling,
        "best_constant": after.constant,
        "device_hours": hours,
        "flops": ledger.flops | {"total": sum(ledger.flops.values())},
        "tokens_per_s": ledger.tokens / progress.train_s,
        "mfu": mfu(ledger.flops, busy_s),
        "queries_per_video": progress.prompts / progress.groups,
        "prompt_tokens_per_query": progress.prompt_tokens / progress.prompts,
        "student_prompt_forwards_per_step": trainer.counter.passes(
            "prompt", progress.prompt_tokens
        ),
        "student_prompt_recomputes_per_step": trainer.counter.passes(
            "recompute", progress.prompt_tokens
        ),
        "generated_tokens": progress.generated_tokens,
        "trained_tokens": progress.trained_tokens,
        "skipped_steps": progress.skipped,
        "trained_share": progress.trained_rollouts / progress.rollouts
        if progress.rollouts
        else None,
        "equal_groups": progress.equal_groups if config.method == "grpo" else None,
        "left_out": left_out,
        "curve": read_rows(Path(config.run_dir, "curve.jsonl")),
        "first_step_s": progress.first_step_s,
        "wall_s": progress.wall_s,
        "peak_memory_mib": peak / 2**20,
    }


def comparison(
    before: Evaluation | None, after: Evaluation, teacher: Evaluation | None
) -> dict[str, Any]:
    """Gains with paired 95% bootstrap intervals over the queries, and the share of the gap between
    student and teacher that training closed."""
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
    """Table of the evaluations, followed by gains, device time and what was left out."""
    evaluations = [summary[name] for name in ("before", "after", "teacher") if summary[name]]
    columns = [c for c in COLUMNS if any(scores.get(c) is not None for scores in evaluations)]
    lines = [" " * 9 + "".join(f"{c:>15}" for c in columns)]
    for name in ("before", "after", "teacher"):
        if summary[name]:
            cells = [summary[name].get(c) for c in columns]
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
    if summary["ceiling"] is not None:
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
    flops, mfu = summary["flops"], summary["mfu"]
    lines.append(
        f"{flops['total']:.3g} FLOPs (student {flops['student']:.3g}, "
        f"teacher {flops['teacher']:.3g}, recomputation {flops['recompute']:.3g}), "
        f"{summary['tokens_per_s']:.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
    )
    for split, number in summary["left_out"].items():
        if number:
            lines.append(f"left out of {split}: {number} examples, named in left_out.txt")
    if summary["equal_groups"]:
        lines.append(
            f"groups whose answers all had the same reward, which prefer none of them: "
            f"{summary['equal_groups']} in {summary['steps']} steps"
        )
    if summary["skipped_steps"]:
        lines.append(
            f"steps skipped because loss or gradient was not finite: {summary['skipped_steps']}"
        )
    return "\n".join(lines)


def plot_curves(run_dir: Path, summary: dict[str, Any]) -> Path:
    """Plot loss, KL, entropy, completion length, scores and device time into `curve.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(run_dir / "metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, title, unit, keys in (
        (axes[0, 0], "loss", "nats", ("loss",)),
        (axes[0, 1], "KL to the teacher, a token", "nats", ("kl", "kl_number", "kl_template")),
        (axes[0, 2], "entropy, a token", "nats", ("student_entropy", "teacher_entropy")),
        (axes[1, 0], "completion length", "tokens", ("completion_length",)),
    ):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, linewidth=1)
                axis.legend()
        axis.set(xlabel="optimizer step", ylabel=unit, title=title)
    axis = axes[1, 1]
    names = [name for name in ("before", "after", "teacher") if summary[name]]
    for offset, key in enumerate(("miou", "sampled_miou")):
        heights = [summary[name][key] or 0.0 for name in names]
        bars = axis.bar([x + 0.4 * offset for x in range(len(names))], heights, 0.38, label=key)
        axis.bar_label(bars, fmt="%.3f")
    axis.set(
        xticks=[x + 0.2 for x in range(len(names))],
        xticklabels=names,
        ylim=(0, 1),
        title="held-out queries",
    )
    axis.legend()
    hours = {n: 3600 * h for n, h in summary["device_hours"].items() if n != "total" and h}
    bars = axes[1, 2].barh(list(hours), list(hours.values()))
    axes[1, 2].bar_label(bars, fmt="%.1f")
    axes[1, 2].set(title="device time", xlabel="seconds")
    path = run_dir / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

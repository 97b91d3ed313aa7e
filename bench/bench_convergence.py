"""OPD against GRPO from the shipped student, in short: what each spends to GRPO's best, and where
it is at equal device time and at equal steps.

Two runs of `opd.train` with the keys of `bench/methods.yaml`, each at the rate that won there, are
cut to 20 steps, one seed and 64 held-out queries, which makes a minute of what takes hours.

It can say what the steps of each cost, and which is ahead early by more than a few hundredths, the
standard error of a score on so few queries. GRPO's greedy score hardly moves within 20 steps, so
that what reaches it says little there; its sampled score does. It cannot say where either ends, how
seeds differ, which rates are best after so few steps, or how other methods do: all that is
`python -m bench.methods`.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.methods.protocol import Protocol, Run
from bench.methods.report import headline, side_by_side, totals
from bench.methods.run import carry_out
from bench.record import hardware

FULL = Path(__file__).with_name("methods.yaml")
ARMS = ("grpo", "reverse_kl")
# The rate rises over as many steps as in the full form's 150: over fewer, OPD's is too steep.
SHORT = (
    "steps=20",
    "optim.warmup=0.225",
    "eval.every=10",
    "data.limit_train=320",
    "data.limit_eval=64",
    "seed=0",
)


def short_runs(folder: Path, full: dict[str, Any], *more: str) -> list[Run]:
    """Of both arms, at the rates that won in `full` (`bench/results/methods.json`); results go to
    `folder`."""
    protocol = Protocol.read(FULL)
    return [
        Run(
            arm,
            "short",
            (*protocol.common, *protocol.arms[arm], rate(full, arm), *SHORT, *more),
            folder / f"{arm}.json",
        )
        for arm in ARMS
    ]


def rate(full: dict[str, Any], arm: str) -> str:
    """The key of the rate that an arm won with."""
    return f"optim.lr={full['arms'][arm]['best_rate']}"


def compared(runs: list[Run], folder: Path, full: dict[str, Any]) -> dict[str, Any]:
    """Make the runs, side by side where two cores do not share a GPU, and their figures. The
    teacher's training is in them if it was timed on hardware like this."""
    beside = 1 if torch.cuda.is_available() else min(len(runs), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(beside) as pool:
        list(pool.map(lambda run: carry_out(run, folder), runs))
    results = {run.arm: [outcome] for run in runs if (outcome := run.outcome())}
    known = {"training_s": full["teacher"]["training_s"]}
    same = full["hardware"] == hardware()
    figures = side_by_side(results, Protocol.read(FULL).scores, known if same else None)
    for run in runs:
        figures["arms"][run.arm]["keys"] = " ".join(run.keys)
    return figures


def test_device_seconds_to_the_best_of_grpo(benchmark, tmp_path: Path) -> None:
    full = json.loads(Protocol.read(FULL).results.with_suffix(".json").read_text())
    runs = short_runs(tmp_path, full)
    figures = benchmark.pedantic(compared, (runs, tmp_path, full), rounds=1)
    benchmark.extra_info.update(figures)
    print("\n" + "\n".join([*headline(figures, Protocol.read(FULL).scores), *totals(figures)]))
    for arm, found in figures["arms"].items():
        assert found["sampled_miou"]["end"]["mean"] > figures["start"]["sampled_miou"], arm

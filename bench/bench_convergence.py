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
from pathlib import Path
from typing import Any

from bench.methods.protocol import Protocol, Run
from bench.methods.report import compare, score_tables
from bench.methods.run import carry_out
from bench.record import RESULTS

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


def short_runs(folder: Path, *more: str) -> list[Run]:
    """Of both arms, at the rates that won in `bench/results/methods.json`; results go to
    `folder`."""
    protocol = Protocol.read(Path(__file__).with_name("methods.yaml"))
    arms = json.loads((RESULTS / "methods.json").read_text())["arms"]
    runs = []
    for arm in ARMS:
        rate = f"optim.lr={arms[arm]['best_rate']}"
        keys = (*protocol.common, *protocol.arms[arm], rate, *SHORT, *more)
        runs.append(Run(arm, "short", keys, folder / f"{arm}.json"))
    return runs


def compared(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Make the runs, one after the other, and their figures."""
    for run in runs:
        carry_out(run, folder)
    figures = compare({run.arm: [run.outcome()] for run in runs}, ("miou", "sampled_miou"), None)
    return figures | {"keys": {run.arm: " ".join(run.keys) for run in runs}}


def test_device_seconds_to_the_best_of_grpo(benchmark: Any, tmp_path: Path) -> None:
    figures = benchmark.pedantic(compared, (short_runs(tmp_path), tmp_path), rounds=1)
    benchmark.extra_info.update(figures)
    print("\n" + "\n".join(score_tables(figures)))
    for arm, entry in figures["arms"].items():
        start = figures["start"]["sampled_miou"]
        assert entry["sampled_miou"]["end"]["mean"] > start, arm

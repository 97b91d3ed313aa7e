"""Several ranks: steps under plain data parallelism and under ZeRO 1, 2 and 3 equal those of one
process at the same global batch, for each configuration."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.config.run import load_config
from opd.data.schedule import micro_batches
from opd.errors import ConfigError
from opd.planning.auto import resolve_auto
from tests.engine.zero_worker import CASES

ROOT = Path(__file__).parents[2]
SAME = {  # cases whose steps equal those of another case
    "offloaded": "plain",
    "layer_by_layer": "plain",
    "interrupted": "plain",
    "persistent": "plain",
    "teacher_shard": "teacher_replica",
    "teacher_offload": "teacher_replica",
    "together": "accumulated",
    "together_routed": "routed",
    "grouped": "separate",
    "grouped_routed": "separate_routed",
}
GATHERS = ("gathers", "gathers_recomputed")  # cases whose gathers are counted
ALL = [name for name in CASES if name not in SAME and name not in GATHERS]
# Of three ranks, what one of them does differently from two.
FEW = ("plain", "accumulated", "tied", "routed", "nothing_routed", "grpo")
# Stages 1 and 2 shard only optimizer and gradients, which few cases affect; OPD_EVERY_CASE=1 runs
# every case under them, too.
SOME = (
    ALL if os.environ.get("OPD_EVERY_CASE") else ("accumulated", "tied", "nothing_routed", "lora")
)
LAUNCHES = {  # ranks: cases and stages
    1: [
        *(f"{name}:0" for name in (*ALL, "grouped", "grouped_routed")),
        *(f"plain:{stage}" for stage in (1, 2, 3)),
    ],
    2: [
        *(f"{name}:{stage}" for name in ALL for stage in (0, 3)),
        *(f"{name}:{stage}" for name in SOME for stage in (1, 2) if (name, stage) != ("bf16", 1)),
        *(f"offloaded:{stage}" for stage in (1, 2, 3)),
        *(f"{name}:{stage}" for name in ("grouped", "grouped_routed") for stage in (0, 2, 3)),
        "layer_by_layer:3",
        *(f"{name}:{stage}" for name in ("together", "together_routed") for stage in (0, 2, 3)),
        *(f"{name}:{stage}" for name in ("teacher_shard", "teacher_offload") for stage in (0, 3)),
        "interrupted:3",
        "persistent:3",
        "plain:recorded",
        "offloaded:recorded",
    ],
    3: [f"{name}:{stage}" for name in FEW for stage in (0, 3)],
}
BLOCKING = {  # runs that prefetch layers: bit-identical to runs without it
    **{f"{name}:3": f"{name}:blocking" for name in ("tied", "recomputed", "lora")},
    **dict.fromkeys(
        ("plain:3", "layer_by_layer:3", "persistent:3", "interrupted:3"), "plain:blocking"
    ),
    **dict.fromkeys(
        ("teacher_shard:3", "teacher_offload:3", "teacher_offload:late"), "teacher_shard:blocking"
    ),
}
AHEAD = {*BLOCKING, *BLOCKING.values(), *(f"{name}:3" for name in GATHERS), "gathers:blocking"}
AHEAD = sorted(AHEAD - set(LAUNCHES[2]))  # two ranks run them too


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program on this many ranks, as a user would."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch += ["--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.run(
        [*launch, *command], capture_output=True, text=True, timeout=900, env=environment
    )


QUICK = (  # cases that are not slow
    *((1, case) for case in ("plain:0", "grouped:0", "grouped_routed:0")),
    *((2, case) for case in ("plain:0", "plain:2", "plain:3", "grouped:3", "grouped_routed:3")),
)


def case(ranks: int, name: str) -> Any:
    return pytest.param(ranks, name, marks=() if (ranks, name) in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of the cases by number of ranks and name; those of the selected tests run together,
    where the first of them is asked for."""
    out = tmp_path_factory.mktemp("zero")
    done: set[int] = set()
    quick = all(item.get_closest_marker("slow") is None for item in request.session.items)

    def launched(ranks: int) -> list[str]:
        if not quick:
            return [*LAUNCHES[ranks], *(AHEAD if ranks == 2 else [])]
        cases = [name for number, name in QUICK if number == ranks]
        if ranks == 1:
            cases += [f"{SAME[n]}:0" for n in SAME if n.startswith("grouped")]
        return cases

    def result(ranks: int, case: str) -> dict[str, Any]:
        if ranks not in done:
            done.add(ranks)
            command = [
                str(ROOT / "tests" / "engine" / "zero_worker.py"),
                str(out),
                *launched(ranks),
            ]
            process = torchrun(ranks, *command)
            assert process.returncode == 0, process.stderr[-3000:]
        return torch.load(out / f"{ranks}_{case.replace(':', '_')}.pt")

    return result


def length(weights: dict[str, Tensor], others: dict[str, Tensor] | None = None) -> float:
    """Norm of all weights, or of the difference between two sets of them."""
    assert others is None or weights.keys() == others.keys()
    parts = [w - others[n] if others else w for n, w in weights.items()]
    return float(torch.cat([part.flatten().double() for part in parts]).norm())


@pytest.mark.parametrize(
    ("ranks", "case"), [case(n, name) for n, names in LAUNCHES.items() for name in names]
)
def test_ranks_step_as_one_process(results: Any, ranks: int, case: str) -> None:
    name = case.split(":")[0]
    actual = results(ranks, case)
    expected = results(1, f"{SAME.get(name, name)}:0")
    assert actual["rollouts"] == expected["rollouts"]
    lengths = {len(answer) for answers in actual["rollouts"].values() for answer in answers}
    assert len(lengths) > 1 or name == "sft"
    if name.startswith("grouped"):
        assert actual["tokens"] < expected["tokens"]
    else:
        assert actual["tokens"] == expected["tokens"]
    # With several queries behind one forward, products have other shapes, and round otherwise.
    rounding = 1e-3 if name == "bf16" else 1e-4 if name.startswith("grouped") else 3e-5
    for row, truth in zip(actual["rows"], expected["rows"], strict=True):
        for key in ("loss", "grad_norm", "kl"):
            close = truth[key] if truth[key] is None else pytest.approx(truth[key], rel=rounding)
            assert row[key] == close, key
        for key in ("lr", "completion_length", "trained_share"):
            assert row[key] == truth[key], key
    # Exactly 1, so that a fused loss need not scale its gradients.
    if name != "no_number" and (actual["incoming"] or name != "nothing_routed"):
        assert actual["incoming"] == [1.0]
    moved = length(expected["weights"], expected["before"])
    assert length(actual["before"], expected["before"]) == 0
    assert length(actual["weights"], expected["weights"]) <= 1e-5 * length(expected["weights"])
    if name in ("nothing_routed", "no_number"):
        assert moved == 0 and length(actual["weights"], actual["before"]) == 0
    else:
        share = 0.1 if name == "bf16" else 1e-2
        assert length(actual["weights"], expected["weights"]) <= share * moved


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKING)
def test_a_layer_gathered_ahead_changes_no_bit(results: Any, case: str) -> None:
    ahead, blocking = results(2, case), results(2, BLOCKING[case])
    assert ahead["rows"] == blocking["rows"]
    assert ahead["rollouts"] == blocking["rollouts"]
    assert ahead["weights"].keys() == blocking["weights"].keys()
    for name, weight in ahead["weights"].items():
        assert torch.equal(weight, blocking["weights"][name]), name
    if not case.startswith("persistent"):
        assert ahead["whole_after_backward"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", GATHERS)
def test_layers_are_gathered_while_others_compute(results: Any, case: str) -> None:
    ahead, blocking = results(2, f"{case}:3"), results(2, "gathers:blocking")
    layers = 6
    passes = {  # of the first rank: 2 steps of 3 prompts
        "prefill": 2 * 3,
        "teacher": 2 * (3 + 1) if case == "gathers" else 0,  # the embedded one, a replica else
        "extend": 2,
        "backward": 2 * (3 + 1),  # with and without recomputation
    }
    assert ahead["gathers"] == {phase: layers * count for phase, count in passes.items()}
    for phase, count in passes.items():
        assert ahead["overlapping"][phase] >= (layers - 1) * count, phase
        assert ahead["most_layers"][phase] <= 2, phase
    assert not any(blocking["overlapping"].values())
    assert blocking["most_layers"]["backward"] == layers  # DeepSpeed alone keeps them all


def test_unequal_shares_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"^batch_size=8: must be a multiple of the 3 ranks$"):
        micro_batches(load_config([]))
    message = r"^micro_batch_size=3: must divide batch_size=12/3 ranks$"
    with pytest.raises(ConfigError, match=message):
        micro_batches(load_config(["batch_size=12", "micro_batch_size=3"]))
    monkeypatch.setenv("RANK", "1")
    shares = micro_batches(load_config(["batch_size=12", "micro_batch_size=2"]))
    assert [list(places) for places in shares] == [[1, 4], [7, 10]]


def test_what_deepspeed_gets_wrong_is_refused() -> None:
    keys = ["engine.kind=deepspeed", "engine.zero_stage=1", "model.dtype=bfloat16"]
    with pytest.raises(
        ConfigError, match=r"^engine.zero_stage=1: DeepSpeed's gradients are wrong in bf"
    ):
        resolve_auto(load_config(keys), torch.device("cpu"))

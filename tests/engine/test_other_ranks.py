"""A saved state fits any engine and any number of ranks: the next step is that of a run that was
never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_zero import SAME, length, torchrun

# In this order, each with its number of ranks. `>` saves the state after the first of two steps,
# `<` loads one in place of the first step.
LAUNCHES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("plain:0>one", "bf16:0>one_bf16", "lora:0>one_lora", "tied:0>one_tied")),
    (
        2,
        (
            *("plain:0>two", "plain:1>two_zero1", "plain:2>two_zero2", "plain:3>two_zero3"),
            *("bf16:2>two_bf16", "lora:3>two_lora", "no_number:2>two_no_number"),
            *(f"plain:{stage}<one" for stage in (0, 1, 2, 3)),
            *("offloaded:2<one", "offloaded:3<one", "persistent:3<one", "layer_by_layer:3<one"),
            *("bf16:2<one_bf16", "bf16:3<one_bf16", "lora:2<one_lora", "tied:3<one_tied"),
            *("plain:3<two_zero2", "plain:2<two_zero3"),
            *("plain:0<two", "plain:2<two_zero2", "plain:3<two_zero3"),
        ),
    ),
    (3, ("plain:0<two", "plain:2<two_zero3", "plain:3<two_zero2", "lora:3<two_lora")),
    (
        1,
        (
            *("plain:0<two", "plain:0<two_zero1", "plain:0<two_zero2", "plain:0<two_zero3"),
            *("plain:3<two_zero2", "bf16:0<two_bf16", "lora:0<two_lora"),
            "no_number:0<two_no_number",
        ),
    ),
)
RESUMED = [(ranks, case) for ranks, cases in LAUNCHES for case in cases if "<" in case]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("states")
    worker = str(Path(__file__).with_name("zero_worker.py"))
    for ranks, cases in LAUNCHES:
        process = torchrun(ranks, worker, str(out), *cases, "no_number:0")
        assert process.returncode == 0, process.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), RESUMED)
def test_a_state_is_continued_on_other_ranks(folder: Path, ranks: int, case: str) -> None:
    name, _, rest = case.partition(":")
    actual: dict[str, Any] = torch.load(folder / f"{ranks}_{name}_{rest.replace('<', '_')}.pt")
    expected = torch.load(folder / f"1_{SAME.get(name, name)}_0.pt")
    rounding = 1e-3 if name == "bf16" else 3e-5
    (row,), (_, truth) = actual["rows"], expected["rows"]
    for key in ("loss", "grad_norm"):
        close = truth[key] if truth[key] is None else pytest.approx(truth[key], rel=rounding)
        assert row[key] == close, key
    second = {key: x for key, x in expected["rollouts"].items() if key.startswith("1/")}
    assert actual["rollouts"] == second
    assert actual["tokens"] == expected["tokens"]
    for key in ("flops", "prompt_tokens"):  # paddings differ between micro-batches
        assert actual[key] == pytest.approx(expected[key], rel=0.2), key
    moved = length(expected["weights"], expected["before"])
    share = 0.1 if name == "bf16" else 1e-4
    assert length(actual["weights"], expected["weights"]) <= share * moved
    if name != "no_number":
        assert length(actual["before"], actual["weights"]) > 0.5 * moved > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["0<two", "2<two_zero2", "3<two_zero3"])
def test_on_the_same_ranks_a_state_is_continued_to_the_bit(folder: Path, case: str) -> None:
    actual = torch.load(folder / f"2_plain_{case.replace('<', '_')}.pt")
    expected = torch.load(folder / f"2_plain_{case[0]}.pt")
    assert actual["rows"] == expected["rows"][1:]
    assert length(actual["weights"], expected["weights"]) == 0


@pytest.mark.slow
def test_the_time_of_all_ranks_is_kept(folder: Path) -> None:
    """Each process spends at least its own start; the saved state of two counts twice."""
    saved = torch.load(folder / "two" / "trainer.pt")["ledger"]["device"]
    alone = torch.load(folder / "1_plain_0_two.pt")
    assert alone["device_s"] > sum(saved.values()) > 0
    names = {path.name for path in (folder / "two").iterdir()}
    assert "trainer.pt" in names and len(names) == 3  # and one file of each rank

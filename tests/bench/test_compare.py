"""Regressions are told from noise, and nothing is compared that cannot be."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compare import main
from bench.kernels.problems import Loss, Problem, Shape, bare_gemms
from bench.kernels.providers import fast
from bench.timing import interleaved, ratio

NODE = {"ratio": 1.0, "ratio_interval": [0.95, 1.05]}


def write(path: Path, benchmarks: dict[str, Any], /, **more: Any) -> str:
    known = {"hardware": "2 cores", "commit": "abc", "date": "2026-11-21"}
    known |= {"benchmarks": benchmarks}
    path.write_text(json.dumps(known | more))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code, out + err


@pytest.mark.parametrize(
    ("node", "verdict"),
    [
        ({"ratio": 1.04, "ratio_interval": [1.0, 1.08]}, "same"),
        ({"ratio": 1.2, "ratio_interval": [1.1, 1.3]}, "worse"),
        ({"ratio": 0.8, "ratio_interval": [0.7, 0.9]}, "better"),
        ({"ratio": 1.2, "ratio_interval": [1.1, 1.3], "better": "higher"}, "better"),
        ({"ratio": 0.8, "ratio_interval": [0.7, 0.9], "better": "higher"}, "worse"),
    ],
)
def test_a_verdict(tmp_path, capsys, node, verdict):
    old = write(tmp_path / "old.json", {"step": {"deep": NODE}})
    new = write(tmp_path / "new.json", {"step": {"deep": node, "added": NODE}}, commit="def")
    code, told = run(capsys, old, new)
    assert told.startswith(f"{verdict:7}    1.000 -> ") and "step / deep" in told
    counts = {"same": 0, "better": 0, "worse": 0} | {verdict: 1}
    said = "of 1 ratios " + ", ".join(f"{n} {name}" for name, n in counts.items())
    assert told.endswith(said + ", 1 added (abc -> def)\n")
    assert code == (verdict == "worse")


def test_what_is_missing_is_told(tmp_path, capsys):
    both, alone = {"a": NODE, "b": {"x": NODE, "y": NODE}}, {"a": NODE}
    old, new = write(tmp_path / "old.json", both), write(tmp_path / "new.json", alone)
    code, told = run(capsys, old, new)
    assert code == 0 and told.splitlines()[-1].startswith(
        "of 1 ratios 1 same, 0 better, 0 worse, 2 gone"
    )
    assert "gone       1.000 ->           b / x\n" in told
    code, told = run(capsys, new, old)
    assert code == 0 and "2 added" in told and "added            ->    1.000  b / y\n" in told


def test_other_versions_are_told(tmp_path, capsys):
    old = write(tmp_path / "old.json", {"a": NODE}, versions={"torch": "2.11", "triton": "3"})
    new = write(tmp_path / "new.json", {"a": NODE}, versions={"torch": "2.15", "triton": "3"})
    told = run(capsys, old, new)[1]
    assert "versions: torch 2.11 -> 2.15\n" in told
    assert "versions" not in run(capsys, old, old)[1]


def timed(loss: Loss) -> dict[str, Any]:
    """A provider as the kernel benchmarks time it, on a small shape."""
    shape = Shape("small", 32, 8000, 64, 128)
    problem = Problem.of(shape, dtype=torch.float32, device="cpu")

    def step(_: int) -> None:
        loss(problem).backward()
        problem.clear()

    times = interleaved({"gemms": lambda _: bare_gemms(problem), "fast": step}, 15)
    return {"small": {"providers": {"fast": ratio(times["fast"], times["gemms"])}}}


def test_a_slow_provider_is_caught(tmp_path, capsys):
    def slow(problem: Problem) -> torch.Tensor:
        time.sleep(0.1)
        return fast(problem)

    old = write(tmp_path / "old.json", timed(fast))
    new = write(tmp_path / "new.json", timed(slow))
    code, told = run(capsys, old, new)
    assert code == 1 and told.startswith("worse") and "small / providers / fast" in told
    assert run(capsys, new, old)[0] == 0, "the other way round it is better"


def test_what_peers_take_is_no_regression(tmp_path, capsys):
    slow = {"ratio": 2.0, "ratio_interval": [1.9, 2.1]}
    old = write(tmp_path / "old.json", {"kernel": {"providers": {"fast": NODE, "dense": NODE}}})
    new = write(tmp_path / "new.json", {"kernel": {"providers": {"fast": NODE, "dense": slow}}})
    assert run(capsys, old, new)[0] == 0
    new = write(tmp_path / "new.json", {"kernel": {"providers": {"fast": slow, "dense": NODE}}})
    assert run(capsys, old, new)[0] == 1


def test_what_cannot_be_compared(tmp_path, capsys):
    old = write(tmp_path / "old.json", {"a": NODE})
    for more, told in (
        ({"hardware": "H200"}, "error: measured on 2 cores and on H200: not comparable"),
        ({"hardware": ""}, "does not say its hardware"),
        ({"commit": None}, "does not say its commit"),
        ({"benchmarks": None}, "no result of bench.record: it has no benchmarks"),
    ):
        code, found = run(capsys, old, write(tmp_path / "new.json", {"a": NODE}, **more))
        assert code == 2 and told in found
    code, found = run(capsys, old, write(tmp_path / "new.json", {"b": NODE}))
    assert code == 2 and "no ratio in common" in found
    (tmp_path / "new.json").write_text("{}")
    code, found = run(capsys, old, str(tmp_path / "new.json"))
    assert code == 2 and "new.json: does not say its hardware" in found
    assert run(capsys, old, str(tmp_path / "gone.json"))[0] == 2


def test_shipped_results_compare_with_themselves(capsys):
    results = Path(__file__).parents[2] / "bench" / "results"
    suites = [p for p in results.glob("*.json") if "benchmarks" in json.loads(p.read_text())]
    assert suites
    for path in map(str, suites):
        code, told = run(capsys, path, path)
        verdicts = {line.split()[0] for line in told.splitlines()[:-1]}
        assert code == 0 and verdicts == {"same"} and " 0 better, 0 worse (" in told

"""bench/results/README.md says what the result files say, all of it, and each thing where it
belongs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.record import RESULTS
from bench.tables import benchmark, cell

CPU = {"hardware": "2 cores of X, no GPU", "commit": "0ab", "date": "2026-11-21", "versions": {}}
GPU = CPU | {"hardware": "NVIDIA H200"}
PAIR = "Qwen3-VL 2B from 8B, 16384 tokens"


def node(ratio: float, **more: Any) -> dict[str, Any]:
    times = {"rounds": 9, "first_ms": 10 * ratio, "second_ms": 10.0, "ratio": ratio}
    return times | {"ratio_interval": [ratio - 0.01, ratio + 0.01]} | more


def kernel(shape: str, **ratios: float) -> dict[str, Any]:
    providers = {
        name: node(ratio, over_fast=ratio / ratios["fast"], over_fast_interval=[0.9, 0.95])
        for name, ratio in ratios.items()
    }
    return {"shape": shape, "providers": providers, "skipped": {"trl": "not installed (pip …)"}}


def suite(origin: dict[str, Any], **benchmarks: Any) -> dict[str, Any]:
    return origin | {"benchmarks": {f"bench_x.py::test_{n}": b for n, b in benchmarks.items()}}


def row(text: str, first: str) -> list[str]:
    """The cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return line[2:-2].split(" | ")


def part(text: str, title: str) -> str:
    """What stands below a heading, up to the next of its rank."""
    rank = title.split()[0]
    return re.split(rf"\n{rank} ", text.partition(f"\n{title}\n")[2])[0]


def test_the_page_is_up_to_date() -> None:
    """If this fails: python -m bench.report"""
    results = report.read_all(RESULTS)
    page = (RESULTS / "README.md").read_text()
    assert report.document(results) == page
    linked = re.findall(r"\]\(([^)]*)\)", page)
    assert {f"{name}.json" for name in results} <= set(linked)
    assert all((RESULTS / name).is_file() for name in linked)


def test_a_cpu_is_never_in_a_gpu_table() -> None:
    """Names and shapes of a GPU do not make one; only what the file says of its hardware does."""
    results = {
        "gpu_kernels": suite(CPU, reverse_kl=kernel(PAIR, fast=1.11)),
        "cpu_kernels": suite(GPU, reverse_kl=kernel(PAIR, fast=1.22)),
    }
    text = report.document(results)
    on_gpu, on_cpu = part(text, "## On a GPU"), part(text, "## On a CPU")
    assert "1.11 [" not in on_gpu and "### gpu_kernels" not in on_gpu
    assert "1.11 [1.1, 1.12]" in on_cpu and "### gpu_kernels" in on_cpu
    assert "### cpu_kernels" in on_gpu and "1.22" not in on_cpu


def test_what_was_not_measured_says_so() -> None:
    text = part(report.document({"a": suite(CPU, y=node(1.0))}), "## On a GPU")
    target = row(text, f"fast, x bare products, {PAIR}")
    assert target[1:] == ["at most 1.2", "not measured", "", ""]
    assert text.count("not measured") == 7


def test_a_gpu_fills_its_cells() -> None:
    step = {"method": "opd", "mfu": 0.31, "phases_ms": {"vision": 1.5, "loss": 0.25}}
    kernels = kernel(PAIR, fast=1.25, lowmem=2.0)
    kernels["providers"]["dense"] = {"failed": "out of memory"}
    about = {"command": "python -m bench.gpu x", "outcome": "finished after 9 s, 3 passed"}
    result = suite(GPU, reverse_kl=kernels, step=step) | about | {"failed": {"test_x": "E   one"}}
    text = report.document({"g": result})
    assert row(text, "phases_ms") == ["phases_ms", "1.5", "0.25"]
    assert "Method opd, mfu 0.31." in text
    assert row(text, "fast")[1] == "1.25 [1.24, 1.26]"
    assert row(text, "dense")[1] == "out of memory"
    assert row(text, "trl")[1] == "skipped: not installed (pip …)"
    assert "`python -m bench.gpu x`: finished after 9 s, 3 passed.\n\n- test_x: E   one" in text
    target = row(text, f"fast, x bare products, {PAIR}")
    assert target[1:] == ["at most 1.2", "1.25", "g", "**no**"]
    assert f"- fast, x bare products, {PAIR}: 1.25, asked at most 1.2. (g)" in text


def test_negative_results_are_told() -> None:
    results = {
        "slow": suite(
            CPU,
            reverse_kl=kernel("512 from 1024, 32 tokens", fast=1.1, compiled=1.0),
            step=node(0.95, target=0.9),
            fine=node(0.85, target=0.9),
            decode={"a / b": node(0.8, better="higher"), "c / d": node(1.2, better="higher")},
        )
    }
    text = part(report.document(results), "## What does not pay, and what is missed")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == 3
    assert "compiled takes 0.909 [0.9, 0.95] of ours at 512 from 1024, 32 tokens." in text
    assert "test_step: 0.95, asked at most 0.9. (slow)" in text
    assert "Slower: bench_x.py::test_decode / a / b, 0.8 [0.79, 0.81]" in text


def test_the_comparison_says_what_is_behind() -> None:
    summary = json.loads((RESULTS / "methods.json").read_text())
    text = report.document({"m": summary})
    assert "- tvdf is not ahead of random at 133 device seconds: greedy mIoU 0.560 (" in text
    assert "- With its teacher's training reverse_kl takes 473 device seconds to GRPO's" in text
    summary["arms"]["tvdf"] = summary["arms"]["random"]
    assert "tvdf is not ahead" not in report.document({"m": summary})
    summary["valid"] = {"best_rates_inside": {"grpo": False}}
    text = report.document({"m": summary})
    assert "A condition of the protocol is not met: best_rates_inside, grpo." in text


def test_any_benchmark_has_a_table() -> None:
    info = {
        "opd / sft": node(1.5, target=2.0, flops={"first": 3_000_000, "ratio": 0.5}),
        "grpo / sft": node(1.7),
        "phases_ms": {"opd": {"vision": 1.25, "loss": 0.0001}, "sft": {"vision": 2.0, "loss": 0.0}},
        "rows": [{"case": 1, "error": None}, {"case": 2, "error": 0.5}],
        "threads": 1,
    }
    text = "\n".join(benchmark("b", info))
    assert row(text, "opd / sft") == ["opd / sft", "1.5 [1.49, 1.51]", "2", "15", "10", "9", ""]
    assert row(text, "opd / sft / flops")[1:] == ["0.5", "", "", "", "", "3,000,000"]
    assert row(text, "phases_ms / opd")[1:] == ["1.25", "1.0e-04"]
    assert row(text, "phases_ms / sft")[1:] == ["2", "0"]
    assert row(text, "1") == ["1", "-"] and row(text, "2") == ["2", "0.5"]
    assert "Threads 1" in text
    assert [cell(v) for v in (True, "a|b", 12345, 12345.6, 0.05, None)] == [
        *("True", "a\\|b", "12,345", "12,346", "0.05", "-")
    ]


@pytest.mark.parametrize("missing", ["hardware", "commit", "date"])
def test_a_result_that_does_not_say_where_it_is_from(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fine.json").write_text(json.dumps(suite(CPU, y=node(1.0))))
    (tmp_path / "bad.json").write_text(json.dumps(suite(CPU, y=node(1.0)) | {missing: ""}))
    with pytest.raises(SystemExit) as error:
        report.main([str(tmp_path)])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    assert message.endswith(f"bad.json: does not say its {missing}\n")
    assert not (tmp_path / "README.md").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"logit_std": 3.0, "gap": gap, "fast": gap, "dense": None} for gap in (1.0, 0.1)]
    both = suite(CPU, reverse_kl=kernel("s", fast=1.1), precision={"dtype": "bf16", "rows": rows})
    (tmp_path / "all.json").write_text(json.dumps(both))
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    text = (tmp_path / "README.md").read_text()
    assert "| logit std | gap | fast | dense |" in text and "| 3 | 0.1 | 0.1 | - |" in text
    report.main([str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == text
    with pytest.raises(SystemExit) as error:
        report.main([str(tmp_path / "gone")])
    assert error.value.code == 2 and "usage" in capsys.readouterr().err

"""The benchmarks compare like with like: the same loss and update, and the FLOPs that arithmetic
says; what they record is what they measured."""

import json
from pathlib import Path

import pytest
import torch

from bench import precision, providers, record, timing
from bench.bench_kernels import prove_equal
from bench.bench_step import analytic_share, flops, make_trainer, single_pass_step
from bench.conventional import conventional_step
from opd.config import Config, load_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config([f"data.video_root={tmp_path_factory.mktemp('videos')}", "batch_size=3"])


def test_both_loops_make_the_same_update(config: Config) -> None:
    (ours, batch), (theirs, _) = make_trainer(config), make_trainer(config)
    single_pass_step(ours, batch, 0)
    conventional_step(theirs, batch, 0)
    for a, b in zip(ours.engine.parameters, theirs.engine.parameters, strict=True):
        # Adam's first update is the sign of the gradient times the rate: compare its moments.
        x, y = (e.optimizer.state[p]["exp_avg"] for e, p in ((ours.engine, a), (theirs.engine, b)))
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_flops_are_the_analytic_share(config: Config) -> None:
    trainer, batch = make_trainer(config)
    ours = flops(lambda: single_pass_step(trainer, batch, 0))
    theirs = flops(lambda: conventional_step(trainer, batch, 0))
    share = analytic_share(trainer, batch)
    assert 0.8 < share < 0.87, "the shipped teacher has about twice the student's layers"
    assert abs(ours / theirs / share - 1) < 0.05


SMALL = providers.Shape("small", 8, 151_936, 64, 96)


def test_no_provider_of_another_loss_is_timed() -> None:
    proof = prove_equal({"fast": providers.fast, "lowmem": providers.lowmem}, SMALL)
    assert all(max(errors.values()) < 1e-3 for errors in proof.values())
    with pytest.raises(AssertionError):
        prove_equal({"wrong": lambda problem: 1.1 * providers.dense(problem)}, SMALL)


def test_every_provider_computes_the_reverse_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    found = providers.providers("cpu")
    found.pop("compiled")  # the same function as dense, compiled
    assert {"fast", "lowmem", "dense"} <= found.keys()
    prove_equal(found, SMALL)


def test_ratios_by_hand() -> None:
    found = timing.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 4.0])
    assert (found["rounds"], found["ratio"], found["first_ms"]) == (3, 2.0, 3000.0)
    low, high = found["ratio_interval"]  # pyright: ignore
    assert low == 2.0 and high == 3.0


def test_calls_are_interleaved_and_counted() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda n, name=name: seen.append((name, n)) for name in "ab"}
    times = timing.interleaved(calls, 3, warmup=1)
    assert seen == [(name, n) for n in range(4) for name in "ab"]
    assert all(len(values) == 3 and min(values) >= 0 for values in times.values())


def test_peak_memory_is_what_a_call_allocates() -> None:
    timing.peak_bytes(lambda: torch.ones(1000))
    for size in (50_000_000, 200_000_000):
        peak = timing.peak_bytes(lambda size=size: torch.ones(size // 4).sum())
        assert abs(peak - size) < 20_000_000


def test_precision_by_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CASES", [(10.0, 0.1)])
    monkeypatch.setattr(precision, "SHAPE", providers.Shape("small", 16, 4001, 32, 64))
    (row,) = precision.table("cpu", torch.bfloat16)
    assert row["fast"] < 0.01 and row["lowmem"] < 0.01 < 0.2 < row["dense"]


def test_records_are_kept(tmp_path: Path) -> None:
    report = {
        "datetime": "2026-11-21T10:00:00",
        "commit_info": {"id": "0123456789", "dirty": False},
        "benchmarks": [{"fullname": "bench/bench_x.py::test_y", "extra_info": {"ratio": 0.5}}],
    }
    source, target = tmp_path / "run.json", tmp_path / "result.json"
    source.write_text(json.dumps(report))
    record.main([str(source), str(target)])
    kept = json.loads(target.read_text())
    assert kept["benchmarks"] == {"bench_x.py::test_y": {"ratio": 0.5}}
    assert (kept["commit"], kept["date"]) == ("0123456", "2026-11-21")
    assert kept["versions"]["torch"] and kept["hardware"]

"""Comparing runs: what is read off curves, and the runner of the comparison."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.bench_convergence import compared, short_runs
from bench.methods import protocol as protocols
from bench.methods.protocol import Protocol, Run
from bench.methods.report import headline, published_style_s, report, side_by_side, table, write
from bench.methods.run import begin, carry_out
from bench.record import hardware
from opd.config.run import load_config
from opd.record.curve import Curve, shared, thresholds
from opd.report import main

ROOT = Path(__file__).parents[2]


def point(step: int, greedy: float, sampled: float | None, **seconds: float) -> dict[str, Any]:
    names = ("prefill", "extend", "backward", "teacher", "curriculum")
    spent = dict.fromkeys(names, 0.0) | {"evaluate": 9.0, "idle": 7.0}
    return {
        "step": step,
        "rollouts": 16 * step,
        "generated_tokens": 200 * step,
        "device_s": spent | seconds,
        "miou": greedy,
        "sampled_miou": sampled,
    }


CURVE = Curve(
    [
        point(0, 0.4, 0.3, curriculum=5.0),
        point(10, 0.5, 0.3, curriculum=5.0, prefill=20.0, teacher=10.0),
        point(20, 0.45, 0.4, curriculum=5.0, prefill=40.0, teacher=20.0),
        point(30, 0.7, 0.6, curriculum=5.0, prefill=60.0, teacher=30.0),
    ]
)


def test_a_curve_by_hand() -> None:
    assert CURVE.seconds() == [5, 35, 65, 95]
    assert CURVE.seconds(scoring=False) == [0, 20, 40, 60]
    assert Curve(CURVE.points, before_s=100).seconds() == [105, 135, 165, 195]
    assert Curve(CURVE.points, before_s=100).seconds(scoring=False) == [0, 20, 40, 60]
    assert CURVE.at(5, "miou", "step") == pytest.approx(0.45)
    assert CURVE.at(50, "sampled_miou", "device_s") == pytest.approx(0.35)
    assert CURVE.at(50, "sampled_miou", "device_s", scoring=False) == pytest.approx(0.5)
    assert CURVE.at(31, "miou", "step") is None and CURVE.at(4, "miou", "device_s") is None
    # First, not best: 0.5 is reached at step 10, and left again.
    assert CURVE.reaches(0.5, "miou", "step") == 10
    assert CURVE.reaches(0.55, "miou", "step") == pytest.approx(24)
    assert CURVE.reaches(0.2, "miou", "step") == 0 and CURVE.reaches(0.8, "miou", "step") is None
    assert CURVE.reaches(0.5, "sampled_miou", "device_s") == pytest.approx(80)
    assert thresholds(0.4, 1.0) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert shared([CURVE, Curve([point(0, 0.5, None)])]) == ["miou"]


def write_run(folder: Path, points: Any) -> str:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"curve": points}))
    return str(folder)


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", CURVE.points)
    second = write_run(tmp_path / "b", CURVE.points[:3])
    main([first, second])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines[:3] if line.startswith(first))
    # start, end, at step 20, at 65 s, device seconds, of it scoring
    assert row[1:] == ["0.400", "0.700", "0.450", "0.450", "95", "35"]
    assert (tmp_path / "a" / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_what_is_no_run_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    told = capsys.readouterr().err
    assert error.value.code == 2 and told.count("\n") == 1 and "summary.json" in told


@pytest.fixture
def protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Protocol:
    monkeypatch.setattr(protocols, "RESULTS", tmp_path / "results")
    return Protocol(
        name="small",
        common=["steps=30"],
        rates=["1", "2", "4"],
        tuning=["seed=100"],
        seeds=[0, 1],
        scores=["miou", "sampled_miou"],
        arms={"grpo": ["method=grpo", "num_rollouts=8"], "opd": []},
        teacher_training={"keys": [], "timed_steps": 1, "steps": 1},
    )


def keep(run: Run, points: Any, **more: Any) -> None:
    run.result.parent.mkdir(parents=True, exist_ok=True)
    gain = {"miou": {"mean": 0.3, "interval": [0.2, 0.4]}}
    common = {"hardware": "h", "commit": ["0123456789-dirty"], "date": "2026-11-21"}
    common |= {"gain": gain, "trained_share": 1.0, "tokens": 9999}
    run.result.write_text(json.dumps({"curve": points, "keys": list(run.keys)} | common | more))


def test_the_best_rate_needs_all_and_is_the_mean_of_the_scores(protocol: Protocol) -> None:
    ends = [(0.6, 0.2), (0.5, 0.5), (0.7, 0.1)]
    for run, (greedy, sampled) in zip(protocol.tuned("opd"), ends, strict=True):
        assert protocol.best_rate("opd") is None and protocol.final("opd") == []
        keep(run, [point(30, greedy, sampled)])
    assert protocol.best_rate("opd") == "2"
    other = replace(protocol, chosen_by={"opd": ["miou"]})
    assert other.best_rate("opd") == "4", "an arm may be chosen by its own scores"
    assert other.final("opd")[0].result != protocol.final("opd")[0].result
    runs = protocol.final("opd")
    assert [run.keys for run in runs] == [
        ("steps=30", "optim.lr=2", f"seed={seed}") for seed in (0, 1)
    ]
    assert protocol.tuned("grpo")[0].keys == (
        *("steps=30", "method=grpo", "num_rollouts=8", "seed=100", "optim.lr=1"),
    )


def test_the_report_by_hand(protocol: Protocol) -> None:
    known = {"miou": 1.0, "sampled_miou": 0.9, "training_s": 100.0}
    for arm in ("opd", "grpo"):
        for run, greedy in zip(protocol.tuned(arm), (0.5, 0.6, 0.55), strict=True):
            keep(run, [point(30, greedy, 0.3)])
    own = [dict(p, device_s=p["device_s"] | {"teacher": 0.0}) for p in CURVE.points[:3]]
    for run in protocol.final("opd"):
        keep(run, CURVE.points)
    assert set(report(protocol, known)["arms"]["grpo"]) == {"rates", "best_rate", "inside_grid"}
    for run in protocol.final("grpo"):
        keep(run, own)
    found = report(protocol, known)
    assert found["start"] == {"miou": 0.4, "sampled_miou": pytest.approx(0.3)}
    assert found["equal_steps"] == 20
    assert found["equal_device_s"] == {"with_scoring": 45, "without_scoring": 40}
    opd, grpo = found["arms"]["opd"]["miou"], found["arms"]["grpo"]["miou"]
    assert opd["end"]["mean"] == 0.7 and opd["at_equal_steps"]["seeds"] == [0.45, 0.45]
    assert opd["at_equal_device_s"]["with_scoring"]["mean"] == pytest.approx(0.5 - 0.05 / 3)
    assert opd["at_equal_device_s"]["without_scoring"]["mean"] == pytest.approx(0.45)
    first = opd["device_s_to"][0]  # 0.4 + 0.6 / 6
    assert first["score"] == pytest.approx(0.5)
    assert first["without_scoring"]["mean"] == pytest.approx(20)
    assert first["with_scoring"]["mean"] == pytest.approx(35)
    assert first["with_teacher_training"]["mean"] == pytest.approx(135)
    assert grpo["device_s_to"][0]["with_teacher_training"]["mean"] == pytest.approx(25)
    assert grpo["device_s_to"][1]["with_scoring"]["mean"] is None
    assert (found["hardware"], found["commit"], found["date"]) == ("h", "0123456+", "2026-11-21")
    # GRPO's runs are the first 20 steps of the other's: its best on the way is 0.5, at step 10.
    assert found["grpo_best"]["miou"]["mean"] == 0.5
    to = opd["device_s_to_grpo_best"]
    assert [to[name]["mean"] for name in to] == pytest.approx([20, 35, 135])
    assert list(to) == ["without_scoring", "with_scoring", "with_teacher_training"]
    assert grpo["device_s_to_grpo_best"]["with_teacher_training"]["mean"] == pytest.approx(25)
    spent = found["arms"]["opd"]["device_s"]
    assert spent["with_teacher_training"]["mean"] == 195 and spent["own_loop"]["mean"] == 95
    assert found["arms"]["grpo"]["device_s"]["with_teacher_training"]["mean"] == 45
    valid = found["valid"]
    assert valid["best_rates_inside"] == {"grpo": True, "opd": True}
    assert valid["grpo_gains"] and valid["teacher_ahead"]
    for run in protocol.tuned("opd"):
        keep(run, [point(30, float(run.keys[-1].removeprefix("optim.lr=")) / 10, 0.3)])
    for run in protocol.final("opd"):
        keep(run, CURVE.points)
    assert report(protocol, known)["valid"]["best_rates_inside"] == {"grpo": True, "opd": False}
    rows = table(found, protocol.scores).splitlines()
    (line,) = (row for row in rows if row.startswith("| opd | 2 |") and "0.700 (" in row)
    assert "| 0.450 (0.450 to 0.450) | 0.483 (0.483 to 0.483) | 0.450 (0.450 to 0.450) |" in line
    assert "| opd | 95 (95 to 95) | 35 (35 to 35) | 195 (195 to 195) |" in "\n".join(rows)
    assert "greedy mIoU: GRPO's best is 0.500 (0.500 to 0.500), the start 0.400." in rows
    (line,) = (
        row for row in rows if row.startswith("| opd | 35 (35 to 35) | 20 (20 to 20) | 135 ")
    )
    assert line.endswith("| 0.483 (0.483 to 0.483) | 0.450 (0.450 to 0.450) |")
    protocol.final("grpo")[1].result.unlink()
    text = write(protocol, known).with_suffix(".md").read_text()
    assert "| grpo | not measured |" in text and "| opd | 4 |" in text


def test_the_published_loop_forwards_every_rollout_with_its_prompt() -> None:
    names = ("vision", "prefill", "sample", "teacher", "extend", "loss", "backward", "idle")
    spent = dict(zip(names, (1.0, 8.0, 2.0, 6.0, 2.0, 1.0, 20.0, 50.0), strict=True))
    end = {"rollouts": 4, "generated_tokens": 100, "device_s": spent}
    result = {"curve": [end], "tokens": 1000, "keys": ["num_rollouts=2"]}
    # 900 prompt tokens twice and 100 generated: 1.9 times what is forwarded here.
    generating = 10 * 1800 / 1000
    assert published_style_s(result) == pytest.approx(generating + 1.9 * (30 + 6 + 20) + 4)
    assert published_style_s(result | {"curve": [end | {"rollouts": 0}]}) == 40


def test_a_run_is_made_once_and_a_failed_one_is_named(
    protocol: Protocol, videos: Path, tmp_path: Path
) -> None:
    run = Run("opd", "bad", ("steps=0",), protocol.results / "opd" / "bad.json")
    with pytest.raises(RuntimeError, match=r"bad: exit code 2: error: steps=0"):
        carry_out(run, tmp_path / "runs")
    assert run.outcome() is None
    keys = ("steps=1", "batch_size=2", "data.limit_train=4", "data.limit_eval=2", "eval.draws=1")
    run = protocol._run("opd", "good", *keys, "threads=1", f"data.video_root={videos}")
    carry_out(run, tmp_path / "runs")
    found = run.outcome()
    assert found and [p["step"] for p in found["curve"]] == [0, 1]
    assert found["versions"]["torch"] and found["hardware"] and found["gain"]["miou"]
    (tmp_path / "runs" / "opd" / "good" / "summary.json").unlink()
    carry_out(run, tmp_path / "runs")  # its result is there
    assert run.outcome() == found


def test_the_model_that_arms_start_from_is_one_and_the_same(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(protocol)  # the shipped student
    assert not protocol.results.exists()
    trained: list[list[str]] = []
    run_dir = tmp_path / "first"

    def train(keys: list[str], folder: Path) -> None:
        (folder / "student").mkdir(parents=True, exist_ok=True)
        (folder / "student" / "model.safetensors").write_bytes(b"weights")
        (folder / "summary.json").write_text("{}")
        trained.append(keys)

    monkeypatch.setattr("bench.methods.run.train", train)
    protocol = replace(protocol, first={"keys": ["steps=2"], "run_dir": str(run_dir)})
    for _ in range(2):
        begin(protocol)
    assert trained == [["steps=2"]]
    assert json.loads((protocol.results / "first.json").read_text())["hardware"]
    (run_dir / "student" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"first/student: not what the runs in .*first\.json"):
        begin(protocol)


@pytest.mark.parametrize("name", ["methods", "rlt"])
def test_every_run_of_the_protocols_is_a_configuration(name: str) -> None:
    protocol = Protocol.read(ROOT / "bench" / f"{name}.yaml")
    if protocol.first:
        keys = [str(ROOT / key) if key.endswith(".yaml") else key for key in protocol.first["keys"]]
        assert load_config(keys).run_dir == protocol.first["run_dir"]
    seen = set()
    for arm in protocol.arms:
        for run in [*protocol.tuned(arm), protocol._run(arm, "x", "optim.lr=1e-3", "seed=0")]:
            config = load_config(list(run.keys))
            assert config.threads == 1 and config.steps % (config.eval.every or 1) == 0
            seen.add(run.keys)
    text = yaml.safe_load((ROOT / "bench" / f"{name}.yaml").read_text())
    rates = [float(rate) for rate in text["rates"]]
    assert len(seen) == len(protocol.arms) * (len(rates) + 1)
    assert len(rates) >= 3
    assert all(2.9 < high / low < 10.1 for low, high in pairwise(rates)), "log-spaced"


def test_the_short_form_is_the_full_one_cut_short() -> None:
    full = json.loads((ROOT / "bench" / "results" / "methods.json").read_text())
    full["arms"]["grpo"]["best_rate"] = "7e-5"
    long = load_config(list(Protocol.read(ROOT / "bench" / "methods.yaml").common))
    for run, rate in zip(short_runs(Path("x"), full), (7e-5, 1e-3), strict=True):
        config = load_config(list(run.keys))
        assert config.optim.lr == rate, "that which won, wherever it is"
        assert (config.method, config.num_rollouts) == (
            ("grpo", 8) if run.arm == "grpo" else ("opd", 1)
        )
        assert config.steps * config.optim.warmup == pytest.approx(long.steps * long.optim.warmup)
        assert config.batch_size == long.batch_size and config.optim.schedule == "constant"


def test_the_short_form_makes_real_runs(videos: Path, tmp_path: Path) -> None:
    full = json.loads((ROOT / "bench" / "results" / "methods.json").read_text())
    full["hardware"] = hardware()
    cut = ("steps=2", "eval.every=1", "batch_size=2", "data.limit_train=4", "data.limit_eval=2")
    runs = short_runs(tmp_path, full, *cut, "eval.draws=1", f"data.video_root={videos}")
    found = compared(runs, tmp_path, full)
    assert found["equal_steps"] == 2 and set(found["arms"]) == {"grpo", "reverse_kl"}
    spent = {arm: entry["device_s"] for arm, entry in found["arms"].items()}
    assert (
        spent["grpo"]["of_it_scoring"]["mean"] < spent["reverse_kl"]["of_it_scoring"]["mean"] / 10
    )
    own, with_teacher = (
        spent["reverse_kl"][name]["mean"] for name in ("own_loop", "with_teacher_training")
    )
    assert with_teacher - own == pytest.approx(full["teacher"]["training_s"]) and own > 0
    assert "num_rollouts=8" in found["arms"]["grpo"]["keys"]
    for arm in found["arms"]:
        assert any(line.startswith(f"| {arm} | ") for line in headline(found, ["miou"]))


def test_grpo_is_measured_against_each_runs_own_best() -> None:
    """Two runs of GRPO with bests of 0.5 and 0.7; the mean of them is what the other must reach."""

    def outcome(points: Any) -> dict[str, Any]:
        return {"curve": points, "gain": {}, "trained_share": None, "tokens": 9999, "keys": []}

    grpo = [outcome(CURVE.points[:3]), outcome(CURVE.points)]
    found = side_by_side({"grpo": grpo, "opd": [outcome(CURVE.points)]}, ["miou"], None)
    assert found["grpo_best"]["miou"]["seeds"] == [0.5, 0.7]
    to = found["arms"]["grpo"]["miou"]["device_s_to_grpo_best"]
    assert to["with_scoring"]["seeds"] == pytest.approx([35, 95])
    to = found["arms"]["opd"]["miou"]["device_s_to_grpo_best"]
    assert to["with_scoring"]["seeds"] == pytest.approx([65 + 30 * 0.15 / 0.25])
    assert to["with_teacher_training"] is None, "the teacher is not known"
    lines = headline(found, ["miou"])
    assert any(line.startswith("| opd | 83 | 52 | - | 0.450 | 0.450 |") for line in lines)
    assert headline(side_by_side({"opd": grpo}, ["miou"], None), ["miou"]) == []

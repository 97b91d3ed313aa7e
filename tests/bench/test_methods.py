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
from bench.methods import report, run
from bench.methods.protocol import Protocol, Run
from bench.methods.report import compare, score_tables, summarise
from bench.methods.run import begin, carry_out
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
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and "summary.json" in message


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


def keep(planned: Run, points: Any) -> None:
    planned.result.parent.mkdir(parents=True, exist_ok=True)
    gain = {"miou": {"mean": 0.3, "interval": [0.2, 0.4]}}
    common = {"hardware": "h", "commit": ["0123456789-dirty"], "date": "2026-11-21"}
    common |= {"gain": gain, "trained_share": 1.0, "tokens": 9999}
    planned.result.write_text(json.dumps({"curve": points, "keys": list(planned.keys)} | common))


def test_the_best_rate_needs_all_and_is_the_mean_of_the_scores(protocol: Protocol) -> None:
    ends = [(0.6, 0.2), (0.5, 0.5), (0.7, 0.1)]
    for tuned, (greedy, sampled) in zip(protocol.tuned("opd"), ends, strict=True):
        assert protocol.best_rate("opd") is None and protocol.final("opd") == []
        keep(tuned, [point(30, greedy, sampled)])
    assert protocol.best_rate("opd") == "2"
    other = replace(protocol, chosen_by={"opd": ["miou"]})
    assert other.best_rate("opd") == "4", "an arm may be chosen by its own scores"
    assert other.final("opd")[0].result != protocol.final("opd")[0].result
    runs = protocol.final("opd")
    assert [final.keys for final in runs] == [
        ("steps=30", "optim.lr=2", f"seed={seed}") for seed in (0, 1)
    ]
    assert protocol.tuned("grpo")[0].keys == (
        *("steps=30", "method=grpo", "num_rollouts=8", "seed=100", "optim.lr=1"),
    )


def test_the_report_by_hand(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda curves, path: path.touch())
    teacher = {"miou": 1.0, "sampled_miou": 0.9, "training_s": 100.0}
    for arm in ("opd", "grpo"):
        for tuned, greedy in zip(protocol.tuned(arm), (0.5, 0.6, 0.55), strict=True):
            keep(tuned, [point(30, greedy, 0.3)])
    own = [dict(p, device_s=p["device_s"] | {"teacher": 0.0}) for p in CURVE.points[:3]]
    for final in protocol.final("opd"):
        keep(final, CURVE.points)
    summary = summarise(protocol, teacher)
    assert set(summary["arms"]["grpo"]) == {"rates", "best_rate", "inside_grid"}
    for final in protocol.final("grpo"):
        keep(final, own)
    summary = summarise(protocol, teacher)
    assert summary["start"] == {"miou": 0.4, "sampled_miou": pytest.approx(0.3)}
    assert summary["equal_steps"] == 20
    assert summary["equal_device_s"] == {"with_scoring": 45, "without_scoring": 40}
    opd, grpo = summary["arms"]["opd"]["miou"], summary["arms"]["grpo"]["miou"]
    means = {name: entry["mean"] for name, entry in opd.items()}
    # GRPO's runs are the first 20 steps of the other's: its best on the way is 0.5, at step 10.
    # The first level is 0.4 + 0.6 / 6.
    assert means == pytest.approx(
        {
            "end": 0.7,
            "at_equal_steps": 0.45,
            "at_equal_device_s": 0.5 - 0.05 / 3,
            "at_equal_device_s_without_scoring": 0.45,
            "device_s_to_0.500": 35,
            "device_s_to_0.600": 65 + 30 * 0.15 / 0.25,
            "device_s_to_0.700": 95,
            "device_s_to_0.800": None,
            "device_s_to_0.900": None,
            "device_s_to_GRPO_best": 35,
            "device_s_to_GRPO_best_without_scoring": 20,
            "device_s_to_GRPO_best_with_teacher_training": 135,
        }
    )
    assert opd["at_equal_steps"]["seeds"] == [0.45, 0.45]
    assert grpo["device_s_to_0.500"]["mean"] == pytest.approx(25)
    assert grpo["device_s_to_GRPO_best_with_teacher_training"]["mean"] == pytest.approx(25)
    assert grpo["device_s_to_0.600"]["mean"] is None
    assert (summary["hardware"], summary["commit"]) == ("h", "0123456+")
    assert summary["date"] == "2026-11-21" and summary["grpo_best"]["miou"]["mean"] == 0.5
    spent = summary["arms"]["opd"]["device_s"]
    assert [entry["mean"] for entry in spent.values()] == [95, 35, 195]
    assert summary["arms"]["grpo"]["device_s"]["with_teacher_training"]["mean"] == 45
    valid = summary["valid"]
    assert valid["best_rates_inside"] == {"grpo": True, "opd": True}
    assert valid["grpo_gains"] and valid["teacher_ahead"]
    page = report.page(summary, protocol.scores)
    assert (
        "**greedy mIoU** (start 0.400, teacher 1.000, GRPO's best 0.500 (0.500 to 0.500))" in page
    )
    assert (
        "| opd | 0.700 (0.700 to 0.700) | 0.450 (0.450 to 0.450) | 0.483 (0.483 to 0.483) " in page
    )
    assert "| 35 (35 to 35) | 20 (20 to 20) | 135 (135 to 135) |" in page
    assert "| opd | 95 (95 to 95) | 35 (35 to 35) | 195 (195 to 195) |" in page
    assert "| grpo | 2 | 0.600 | 0.300 | best |" in page


def test_what_is_not_measured_says_so(protocol: Protocol) -> None:
    """With the plot that the other tests leave out."""
    page = report.write_report(protocol, None).with_suffix(".md")
    assert "No arm is measured to its end yet." in page.read_text()
    for arm in protocol.arms:
        for tuned in protocol.tuned(arm):
            rate = float(tuned.keys[-1].removeprefix("optim.lr="))
            keep(tuned, [point(30, rate / 10, 0.3)])
    for final in protocol.final("opd"):
        keep(final, CURVE.points)
    path = report.write_report(protocol, None)
    assert path.with_suffix(".png").stat().st_size > 10_000
    valid = json.loads(path.read_text())["valid"]
    assert valid == {"best_rates_inside": {"grpo": False, "opd": False}}
    assert "| grpo | not measured |" in page.read_text()


def test_a_run_is_made_once(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was measured on is its own environment's commit, and this machine."""
    trained: list[list[str]] = []

    def train(keys: list[str], run_dir: Path) -> None:
        run_dir.mkdir(parents=True)
        summary = {"curve": [point(0, 0.4, 0.3)], "gain": {}, "steps": 9}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        (run_dir / "environment.jsonl").write_text('{"commit": "abc"}\n{"commit": "abc-dirty"}\n')
        (run_dir / "metrics.jsonl").write_text('{"tokens": 3}\n{"tokens": 4}\n')
        trained.append(keys)

    monkeypatch.setattr(run, "train", train)
    planned = protocol.run("opd", "good", "seed=7")
    carry_out(planned, tmp_path / "runs")
    result = planned.outcome()
    assert (result["arm"], result["tokens"], result["gain"]) == ("opd", 7, {})
    assert result["commit"] == ["abc", "abc-dirty"] and result["keys"] == ["steps=30", "seed=7"]
    assert result["versions"]["torch"] and result["hardware"] and "steps" not in result
    carry_out(planned, tmp_path / "runs")  # its result is there
    planned.result.unlink()
    carry_out(planned, tmp_path / "runs")  # the run itself is
    assert trained == [["steps=30", "seed=7"]] and planned.outcome() == result


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

    monkeypatch.setattr(run, "train", train)
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
        for planned in [*protocol.tuned(arm), protocol.run(arm, "x", "optim.lr=1e-3", "seed=0")]:
            config = load_config(list(planned.keys))
            assert config.threads == 1 and config.steps % (config.eval.every or 1) == 0
            seen.add(planned.keys)
    text = yaml.safe_load((ROOT / "bench" / f"{name}.yaml").read_text())
    rates = [float(rate) for rate in text["rates"]]
    assert len(seen) == len(protocol.arms) * (len(rates) + 1)
    assert len(rates) >= 3
    assert all(2.9 < high / low < 10.1 for low, high in pairwise(rates)), "log-spaced"


def test_the_short_form_is_the_full_one_cut_short() -> None:
    arms = json.loads((ROOT / "bench" / "results" / "methods.json").read_text())["arms"]
    long = load_config(list(Protocol.read(ROOT / "bench" / "methods.yaml").common))
    for planned in short_runs(Path("x")):
        config = load_config(list(planned.keys))
        assert config.optim.lr == float(arms[planned.arm]["best_rate"])
        expected = ("grpo", 8) if planned.arm == "grpo" else ("opd", 1)
        assert (config.method, config.num_rollouts) == expected
        assert config.steps * config.optim.warmup == pytest.approx(long.steps * long.optim.warmup)
        assert config.batch_size == long.batch_size and config.optim.schedule == "constant"


@pytest.mark.slow
def test_the_short_form_makes_real_runs(videos: Path, tmp_path: Path) -> None:
    cut = ("steps=2", "eval.every=1", "batch_size=2", "data.limit_train=4", "data.limit_eval=2")
    runs = short_runs(tmp_path, *cut, "eval.draws=1", f"data.video_root={videos}")
    figures = compared(runs, tmp_path)
    assert figures["equal_steps"] == 2 and set(figures["arms"]) == {"grpo", "reverse_kl"}
    spent = {arm: entry["device_s"] for arm, entry in figures["arms"].items()}
    scoring = {arm: entry["of_it_scoring"]["mean"] for arm, entry in spent.items()}
    assert scoring["grpo"] < scoring["reverse_kl"] / 10
    assert "num_rollouts=8" in figures["keys"]["grpo"]
    for arm in figures["arms"]:
        assert sum(line.startswith(f"| {arm} | ") for line in score_tables(figures)) == 3
    bad = Run("opd", "bad", ("steps=0",), tmp_path / "bad.json")
    with pytest.raises(RuntimeError, match=r"bad: exit code 2: error: steps=0"):
        carry_out(bad, tmp_path / "runs")
    assert not bad.result.is_file()


def test_grpo_is_measured_against_each_runs_own_best() -> None:
    """Two runs of GRPO with bests of 0.5 and 0.7; the mean of them is what the other must reach."""

    def outcome(points: Any) -> dict[str, Any]:
        return {"curve": points, "gain": {}, "trained_share": None}

    grpo = [outcome(CURVE.points[:3]), outcome(CURVE.points)]
    figures = compare({"grpo": grpo, "opd": [outcome(CURVE.points)]}, ["miou"], None)
    assert figures["grpo_best"]["miou"]["seeds"] == [0.5, 0.7]
    own, other = (figures["arms"][arm]["miou"] for arm in ("grpo", "opd"))
    assert own["device_s_to_GRPO_best"]["seeds"] == pytest.approx([35, 95])
    assert other["device_s_to_GRPO_best"]["seeds"] == pytest.approx([65 + 30 * 0.15 / 0.25])
    without_training = other["device_s_to_GRPO_best_with_teacher_training"]
    assert without_training["mean"] is None, "the teacher is not known"
    assert any(line.endswith("| 83 | 52 | - |") for line in score_tables(figures))
    alone = compare({"opd": grpo}, ["miou"], None)
    assert not alone["grpo_best"] and "device_s_to_GRPO_best" not in alone["arms"]["opd"]["miou"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml: no such file"),
        (["--arms", "gpro"], "gpro: no such arm (known: grpo, reverse_kl, "),
        (["--job"], "argument --jobs: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["bench.methods", *arguments])
    with pytest.raises(SystemExit) as ended:
        run.main()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"bench.methods: error: {message}")

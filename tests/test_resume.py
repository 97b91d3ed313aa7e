"""Stopped runs: the step is finished, the state saved, and going on changes nothing."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opd import train
from opd.checkpoint import Stopped
from opd.config import ConfigError
from opd.train import Trainer
from tests.helpers import metric_rows, run

SHORT = (
    "steps=6",
    "batch_size=2",
    "data.limit_train=9",
    "data.limit_eval=3",
    "eval.draws=1",
    "eval.teacher=false",
    "eval.every=4",
)


def outcome(run_dir: Path) -> list[Any]:
    """Everything a run leaves behind that is no time."""
    names = ("before", "step_4", "after")
    evaluations = [(run_dir / f"eval_{name}.jsonl").read_bytes() for name in names]
    weights = (run_dir / "student" / "model.safetensors").read_bytes()
    summary = json.loads((run_dir / "summary.json").read_text())
    curve = [{k: v for k, v in row.items() if k != "device_s"} for row in summary["curve"]]
    counted = {k: summary[k] for k in ("flops", "student_prompt_forwards_per_step", "gain")}
    return [
        metric_rows(run_dir),
        metric_rows(run_dir, "samples.jsonl"),
        evaluations,
        weights,
        counted,
        curve,
    ]


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(videos, run_dir, *SHORT)
    return outcome(run_dir)


@pytest.mark.parametrize("draw", range(10))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    draw: int, whole: list[Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call of one of these, at random, is where the signal comes: in a step or in an evaluation.
    chance = random.Random(draw)
    where, calls = chance.choice([("step", 6), ("step", 6), ("sample", 12)]), [0]
    at = chance.randint(1, where[1])
    owner: Any = Trainer if where[0] == "step" else sys.modules["opd.train"]
    if where[0] == "sample" and draw % 2:
        owner, at = sys.modules["opd.evaluate"], chance.randint(1, 4)
    original = getattr(owner, where[0])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(chance.choice([signal.SIGINT, signal.SIGTERM]))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, where[0], interrupted)
    stopped = 0
    for _ in range(2):
        try:
            run(videos, tmp_path / "run", *SHORT, "resume=auto")
            break
        except Stopped as error:
            stopped += 1
            assert "resume=auto goes on from there" in str(error)
            assert error.exit_code in (130, 143)
            assert not (tmp_path / "run" / "summary.json").exists()
    assert stopped == (calls[0] >= at)
    assert outcome(tmp_path / "run") == whole
    assert not (tmp_path / "run" / "state.pt").exists()


def test_sigterm_as_a_user_meets_it(whole: list[Any], videos: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    places = [f"data.video_root={videos}", f"run_dir={run_dir}", "threads=1"]
    command = [sys.executable, "-m", "opd.train", *SHORT, *places]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").exists() or len(metric_rows(run_dir)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    done = len(metric_rows(run_dir))
    last = errors.rstrip().splitlines()[-1]
    assert last == (
        f"error: SIGTERM: stopped after step {done} of 6; resume=auto goes on from there"
    )
    assert "Traceback" not in errors
    run(videos, run_dir, *SHORT, "resume=auto")
    assert outcome(run_dir) == whole


def test_rows_after_the_saved_state_are_dropped(
    whole: list[Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a crash: the last state is two steps old, and a line is cut short.
    class Crash(BaseException):
        pass

    step = Trainer.step

    def crashing(self: Trainer, micro_batches: Any, number: int) -> Any:
        if number == 5:
            raise Crash
        return step(self, micro_batches, number)

    monkeypatch.setattr(Trainer, "step", crashing)
    with pytest.raises(Crash):
        run(videos, tmp_path / "run", *SHORT, "save_every=3")
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    run(videos, tmp_path / "run", *SHORT, "resume=auto", "save_every=3")
    assert outcome(tmp_path / "run") == whole


def test_resuming_asks_for_the_same_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    signals = train.signals

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return signals(*args)

    monkeypatch.setattr(train, "signals", interrupted)
    with pytest.raises(Stopped):
        run(videos, run_dir, *SHORT)
    monkeypatch.undo()
    with pytest.raises(ConfigError) as caught:
        run(videos, run_dir, *SHORT, "resume=auto", "seed=1")
    assert str(caught.value) == f"resume=auto: 'seed: 1' here, 'seed: 0' in {run_dir}/config.yaml"
    with pytest.raises(ConfigError, match="not empty; choose another or say overwrite=true"):
        run(videos, run_dir, *SHORT)
    assert (run_dir / "state.pt").exists()
    run(videos, run_dir, *SHORT, "resume=auto", "data.limit_eval=3")
    with pytest.raises(ConfigError, match="not empty"):
        run(videos, run_dir, *SHORT, "resume=auto")

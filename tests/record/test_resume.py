"""Stopped runs: the step is finished, the state saved, and going on changes nothing."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from opd.config.run import load_config
from opd.data.synthetic.splits import ensure_split
from opd.errors import ConfigError, Stopped
from opd.evaluate import main as evaluate_again
from opd.files import read_rows
from opd.method import trainer
from opd.method.trainer import Trainer
from opd.models.load import resolve
from opd.record.folder import RunFolder
from tests.helpers import metric_rows, run, slow_after

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


@pytest.mark.parametrize("draw", slow_after(1, range(10)))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    draw: int, whole: list[Any], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A call of one of these, at random, is where the signal comes: in a step or in an evaluation.
    chance = random.Random(draw)
    where, calls = chance.choice([("step", 6), ("step", 6), ("sample", 12)]), [0]
    at = chance.randint(1, where[1])
    owner: Any = Trainer if where[0] == "step" else sys.modules["opd.method.trainer"]
    if where[0] == "sample" and draw % 2:
        owner, at = sys.modules["opd.method.answering"], chance.randint(1, 4)
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
            assert "resume=auto continues from there" in str(error)
            assert error.exit_code in (130, 143)
            assert not (tmp_path / "run" / "summary.json").exists()
    assert stopped == (calls[0] >= at)
    assert outcome(tmp_path / "run") == whole
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
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
        f"error: SIGTERM: stopped after step {done} of 6; resume=auto continues from there"
    )
    assert "Traceback" not in errors
    run(videos, run_dir, *SHORT, "resume=auto")
    assert outcome(run_dir) == whole


class Crash(BaseException):
    """What no code of ours handles, as if the process had been killed."""


def crash(videos: Path, run_dir: Path, at: int, *keys: str) -> None:
    """A run that ends so when a step begins."""
    step = Trainer.step

    def crashing(self: Trainer, micro_batches: Any, number: int) -> Any:
        if number == at:
            raise Crash
        return step(self, micro_batches, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "step", crashing)
        run(videos, run_dir, *SHORT, *keys)


@pytest.fixture(scope="module")
def crashed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("crashed") / "run"
    crash(videos, run_dir, 3, "save_every=1", "keep_last=2")
    return run_dir


def test_rows_after_the_saved_state_are_dropped(
    whole: list[Any], videos: Path, tmp_path: Path
) -> None:
    # As after a crash: the last state is two steps old, and a line is cut short.
    crash(videos, tmp_path / "run", 5, "save_every=3")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    run(videos, tmp_path / "run", *SHORT, "resume=auto", "save_every=3")
    assert outcome(tmp_path / "run") == whole


def test_a_run_of_groups_that_a_curriculum_chooses_goes_on(videos: Path, tmp_path: Path) -> None:
    """Several queries behind one forward; the second of two rounds begins between two states."""
    train = ensure_split(videos, "student", 8)
    keys = [f"data.train={train}", "data.limit_train=20", "data.prompt={video}{query}. When?"]
    keys += ["data.queries_per_video=3", "batch_size=6", "curriculum.kind=random"]
    keys += ["curriculum.rounds=2", "curriculum.share=0.6"]
    summary = run(videos, tmp_path / "whole", *SHORT, *keys)
    assert 1.5 < summary["queries_per_video"] <= 3
    assert summary["student_prompt_forwards_per_step"] == 1
    crash(videos, tmp_path / "run", 4, "save_every=2", *keys)
    run(videos, tmp_path / "run", *SHORT, *keys, "save_every=2", "resume=auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    chosen = [tmp_path / name / "curriculum" / "round_1.jsonl" for name in ("run", "whole")]
    assert chosen[0].read_bytes() == chosen[1].read_bytes()


def test_resuming_asks_for_the_same_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    signals = trainer.signals

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return signals(*args)

    monkeypatch.setattr(trainer, "signals", interrupted)
    with pytest.raises(Stopped):
        run(videos, run_dir, *SHORT)
    monkeypatch.undo()
    with pytest.raises(ConfigError) as caught:
        run(videos, run_dir, *SHORT, "resume=auto", "seed=1")
    assert str(caught.value) == f"resume=auto: 'seed: 1' here, 'seed: 0' in {run_dir}/config.yaml"
    with pytest.raises(ConfigError, match="not empty; choose another folder or set overwrite=true"):
        run(videos, run_dir, *SHORT)
    assert list((run_dir / "checkpoints").glob("step_*"))
    run(videos, run_dir, *SHORT, "resume=auto")
    # Finished: nothing is left to do, as for a job that a queue starts once more.
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert run(videos, run_dir, *SHORT, "resume=auto")["steps"] == 6
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == files
    with pytest.raises(ConfigError, match="resume=auto: 'seed: 1' here"):
        run(videos, run_dir, *SHORT, "resume=auto", "seed=1")


@pytest.mark.parametrize("key", ["resume=auto", "overwrite=true"])
def test_two_runs_in_one_folder_are_refused(
    key: str, crashed: Path, tmp_path: Path, videos: Path
) -> None:
    run_dir = shutil.copytree(crashed, tmp_path / "run")
    rows = metric_rows(run_dir)
    with (run_dir / "config.yaml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a run in another process does
        with pytest.raises(ConfigError, match=f"^run_dir={run_dir}: another run is writing there$"):
            run(videos, run_dir, *SHORT, key)
    assert metric_rows(run_dir) == rows


@pytest.mark.parametrize("by_link", [False, True])
@pytest.mark.parametrize("key", ["model.student", "model.teacher", "data.train", "data.video_root"])
def test_a_run_never_removes_what_it_reads(
    key: str, by_link: bool, crashed: Path, tmp_path: Path, videos: Path
) -> None:
    run_dir = shutil.copytree(crashed, tmp_path / "run")
    source = run_dir / "student"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text("{}")
    if by_link:
        (tmp_path / "link").symlink_to(source)
        source = tmp_path / "link"
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    message = f"^{key}={source}: lies in run_dir={run_dir}, whose earlier run would be removed; "
    with pytest.raises(ConfigError, match=message):
        RunFolder(load_config([f"run_dir={run_dir}", "overwrite=true", f"{key}={source}"]))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == files
    other = tmp_path / "other"
    RunFolder(load_config([f"run_dir={other}", "overwrite=true", f"{key}={source}"]))


def test_links_in_a_run_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "student").symlink_to(precious)
    (run_dir / "curve.png").symlink_to(tmp_path / "nowhere")
    folder = RunFolder(load_config([f"run_dir={run_dir}", "overwrite=true"]))
    folder.open(0)
    assert (precious / "file").read_text() == "kept"
    assert not os.path.lexists(run_dir / "student") and not os.path.lexists(run_dir / "curve.png")


def test_a_run_holds_its_folder_to_its_end(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[str] = []
    step = Trainer.step

    def second_run(self: Trainer, micro_batches: Any, number: int) -> Any:
        monkeypatch.setattr(Trainer, "step", step)
        with pytest.raises(ConfigError) as caught:
            run(videos, tmp_path / "run", *SHORT, "overwrite=true")
        again.append(str(caught.value))
        return step(self, micro_batches, number)

    monkeypatch.setattr(Trainer, "step", second_run)
    keys = ["steps=1", "batch_size=2", "data.limit_train=2", "data.limit_eval=2", "eval.draws=0"]
    run(videos, tmp_path / "run", *keys, "eval.teacher=false", "overwrite=true")
    assert again == [f"run_dir={tmp_path / 'run'}: another run is writing there"]
    run(videos, tmp_path / "run", *keys, "eval.teacher=false", "overwrite=true")


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
LAUNCH += ["--rdzv-endpoint=localhost:0"]
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
KILLS = int(os.environ.get("OPD_KILLS", "1"))  # random kills for each engine


def rows_in(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("draw", range(KILLS))
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    draw: int, engine: str, whole: list[Any], videos: Path, tmp_path: Path
) -> None:
    """SIGKILL at random times, until a run comes to its end."""
    chance, run_dir = random.Random(draw), tmp_path / "run"
    keys = [*SHORT, "save_every=1", "resume=auto", "threads=1", f"data.video_root={videos}"]
    command = [sys.executable, "-m", "opd.train"]
    expected = whole
    if engine == "deepspeed":
        keys += ["engine.kind=deepspeed", f"engine.zero_stage={3 - draw % 3}"]
        command = [*LAUNCH, "--nproc_per_node=2", "-m", "opd.train"]
        told = subprocess.run([*command, *keys, f"run_dir={tmp_path / 'whole'}"], **QUIET)
        assert told.returncode == 0
        expected = outcome(tmp_path / "whole")
        for mine, alone in zip(expected[0], whole[0], strict=True):  # the same run, to rounding
            assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-2)
            assert mine["tokens"] == alone["tokens"] and mine["lr"] == alone["lr"]
    for kill in (True, True, False):
        process = subprocess.Popen([*command, *keys, f"run_dir={run_dir}"], **QUIET)
        if kill:
            begun = rows_in(run_dir)
            while process.poll() is None and rows_in(run_dir) == begun:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1.5))  # steps, checkpoints, an evaluation
            if process.poll() is not None:
                break
            family = psutil.Process(process.pid).children(recursive=True)
            for one in [process, *family]:  # a launcher's ranks outlive it
                one.kill()
            psutil.wait_procs(family, timeout=30)
        if process.wait(timeout=300) == 0:
            break
    assert process.returncode == 0
    assert outcome(run_dir) == expected


@pytest.mark.parametrize("where", slow_after(1, ["fsync", "rename", "rmtree"]))
@pytest.mark.parametrize("call", slow_after(1, [1, 3]))
def test_a_crash_while_saving_leaves_the_state_before(
    where: str, call: int, whole: list[Any], videos: Path, tmp_path: Path
) -> None:
    owner: Any = {"fsync": os, "rename": Path, "rmtree": shutil}[where]
    original, calls = getattr(owner, where), [0]

    def crashing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 2:
            raise Crash
        return original(*args, **kwargs)

    keys = [*SHORT, "save_every=1", "keep_last=2"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(owner, where, crashing)
        run(videos, tmp_path / "run", *keys)
    run(videos, tmp_path / "run", *keys, "resume=auto")
    assert outcome(tmp_path / "run") == whole


def test_the_last_states_are_kept(videos: Path, tmp_path: Path) -> None:
    crash(videos, tmp_path / "run", 5, "save_every=1", "keep_last=3")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_3", "step_4", "step_5"]


@pytest.fixture
def stopped(crashed: Path, tmp_path: Path) -> Path:
    """A run with the states of steps 2 and 3, of one's own."""
    return shutil.copytree(crashed, tmp_path / "run")


@pytest.mark.parametrize("file", ["engine_0_*.safetensors", "trainer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_state_is_named_and_never_used(
    file: str, damage: str, stopped: Path, videos: Path
) -> None:
    last = stopped / "checkpoints" / "step_3"
    (file,) = (path.name for path in last.glob(file))
    content = bytearray((last / file).read_bytes())
    if damage == "missing":
        (last / file).unlink()
    else:
        content[len(content) // 2] ^= 4
        (last / file).write_bytes(content if damage == "flipped" else content[:-9])
    keys = [*SHORT, "save_every=1", "keep_last=2", "resume=auto"]
    with pytest.raises(ConfigError) as caught:
        run(videos, stopped, *keys)
    told = str(caught.value)
    assert told.startswith(f"{last}: ") and told.endswith("; delete it to resume from step_2")
    assert file in told or (file == "manifest.json" and damage == "flipped")


def test_without_the_damaged_state_a_run_goes_on_from_the_one_before(
    stopped: Path, whole: list[Any], videos: Path
) -> None:
    shutil.rmtree(stopped / "checkpoints" / "step_3")
    run(videos, stopped, *SHORT, "save_every=1", "keep_last=2", "resume=auto")
    assert outcome(stopped) == whole


CRASHING = """
import os
from opd.method.trainer import Trainer
from opd.train import main

step = Trainer.step

def crashing(self, micro_batches, number):
    if number == 3:
        os._exit(1)
    return step(self, micro_batches, number)

Trainer.step = crashing
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("order", ["one then two", "two then one"])
def test_a_run_goes_on_with_another_number_of_ranks(
    order: str, engine: str, whole: list[Any], crashed: Path, videos: Path, tmp_path: Path
) -> None:
    """The plain engine on one rank, and the plain engine or ZeRO-3 on two."""
    run_dir, script = tmp_path / "run", tmp_path / "crashing.py"
    script.write_text(CRASHING)
    keys = [*SHORT, "save_every=1", "keep_last=2", "resume=auto", "threads=1"]
    two = [*keys, f"data.video_root={videos}", f"run_dir={run_dir}"]
    if engine == "deepspeed":
        two += ["engine.kind=deepspeed", "engine.zero_stage=3", "engine.persistence_threshold=0"]
    if order == "one then two":
        shutil.copytree(crashed, run_dir)
        command = [*LAUNCH, "--nproc_per_node=2", "-m", "opd.train", *two]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-3000:]
    else:
        command = [*LAUNCH, "--nproc_per_node=2", str(script), *two]
        assert subprocess.run(command, **QUIET).returncode != 0
        assert rows_in(run_dir) == 3
        run(videos, run_dir, *keys)
    rows, _, evaluations, *_ = outcome(run_dir)
    answers, expected_answers = (
        [json.loads(line)["answer"] for line in evaluation.decode().splitlines()]
        for evaluation in (evaluations[-1], whole[2][-1])
    )
    assert answers == expected_answers
    for actual, expected in zip(rows, whole[0], strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert actual["tokens"] == expected["tokens"] and actual["lr"] == expected["lr"]
    weights = load_file(run_dir / "student" / "model.safetensors")
    expected_weights = load_safetensors(whole[3])
    start = load_file(Path(resolve("embedded:student")) / "model.safetensors")
    moved = torch.cat([(expected_weights[k] - start[k]).float().flatten() for k in start]).norm()
    apart = torch.cat([(expected_weights[k] - weights[k]).float().flatten() for k in start]).norm()
    assert apart < 0.01 * moved


def test_what_decides_no_result_may_change(stopped: Path, whole: list[Any], videos: Path) -> None:
    run(videos, stopped, *SHORT, "save_every=1", "keep_last=2", "resume=auto", "micro_batch_size=1")
    rows = metric_rows(stopped)
    assert [r["lr"] for r in rows] == [r["lr"] for r in whole[0]]
    for actual, expected in zip(rows, whole[0], strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert load_config([str(stopped / "config.yaml")]).micro_batch_size == 1


@pytest.mark.slow
def test_the_best_student_is_kept(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = ["steps=4", "batch_size=2", "data.limit_train=6", "data.limit_eval=4", "eval.draws=0"]
    more = ["eval.every=1", "eval.teacher=false", "keep_best=miou", "optim.lr=1e-2"]
    run(videos, folder, *keys, *more)
    curve = [row for row in read_rows(folder / "curve.jsonl") if row["step"]]
    best = max(curve, key=lambda row: row["miou"])  # the first of equals
    evaluate_again(
        [
            str(folder / "best"),
            f"run_dir={tmp_path / 'again'}",
            *keys[3:4],
            f"data.video_root={videos}",
            "eval.draws=0",
        ]
    )
    name = "after" if best["step"] == 4 else f"step_{best['step']}"
    answers = [row["answer"] for row in read_rows(folder / f"eval_{name}.jsonl")]
    assert [r["answer"] for r in read_rows(tmp_path / "again" / "evaluation.jsonl")] == answers
    with pytest.raises(ConfigError, match=r"^keep_best=miou: needs eval.every"):
        load_config(["keep_best=miou"])

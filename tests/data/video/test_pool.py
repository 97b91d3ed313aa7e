"""Worker processes return the same frames as this process; a worker that hangs, crashes or sends
wrong answers costs one reported file."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from opd.data.video.budget import RECIPES, processor_budget, target_size
from opd.data.video.decoding import probe_duration
from opd.data.video.pool import Decoders
from opd.data.video.sampling import sample_frames
from opd.data.video.worker import HEADER, READY
from opd.data.video.worker_process import Worker
from opd.errors import DataError
from opd.models.tiny import processor
from tests.processes import is_gone
from tests.videos import (
    BACKENDS,
    decoded_numbers,
    real_video_folder,
    write_beyond_decord,
    write_coded,
    write_zoo,
)

ROOT = Path(__file__).parents[3]
SAMPLING: Any = {"fps": 2.0, "max_frames": 16}

# A worker that misbehaves as the name of the file says.
FAULTY = """
import os, sys, time
import opd.data.video.worker as worker
from opd.data.video.decoding import plan_frames

def plan(path, **sampling):
    if "hang" in path.name:
        time.sleep(600)
    if "crash" in path.name:
        import ctypes
        ctypes.string_at(0)
    if "raise" in path.name:
        raise KeyError("a mistake of ours")
    if "exit" in path.name:
        os._exit(3)
    if "once" in path.name and not path.with_suffix(".seen").exists():
        path.with_suffix(".seen").touch()
        os.kill(os.getpid(), 9)
    if "noise" in path.name:
        os.write(1, b"noise" * 100000)
        os.write(2, b"noise" * 100000)
        print("noise", flush=True)
    return plan_frames(path, **sampling)

worker.plan_frames = plan
worker.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def zoo(folder: Path) -> dict[str, Path]:
    return write_zoo(folder)


@pytest.fixture(scope="module")
def coded(folder: Path) -> list[Path]:
    """Videos that tell which they are: the k-th starts at number 4 k."""
    return [write_coded(folder / f"coded_{k}.mp4", 50, first=4 * k) for k in range(12)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Decoders]:
    with Decoders(2) as decoders:
        yield decoders


@pytest.fixture
def faulty(tmp_path: Path) -> list[str]:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    return [sys.executable, "-P", str(script)]


def named(path: Path, name: str) -> Path:
    link = path.with_name(f"{name}.mp4")
    link.write_bytes(path.read_bytes())
    return link


def pids(decoders: Decoders) -> set[int]:
    return {worker._process.pid for worker in decoders._live}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_same_as_in_this_process(
    pool: Decoders, zoo: dict[str, Path], tmp_path: Path, backend: Any
) -> None:
    files = zoo if backend == "decord" else zoo | write_beyond_decord(tmp_path)
    for path in files.values():
        expected = sample_frames(path, **SAMPLING, backend=backend)
        video = pool.decode(path, **SAMPLING, backend=backend)
        assert video.frames.equal(expected.frames) and video.frames.is_contiguous()
        assert vars(video) | {"frames": 0} == vars(expected) | {"frames": 0}
        assert pool.duration(path) == probe_duration(path)


def test_real_videos(pool: Decoders) -> None:
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        path = real_video_folder() / f"{name}.mp4"
        assert pool.decode(path, **SAMPLING).frames.equal(sample_frames(path, **SAMPLING).frames)


def test_errors_are_those_of_this_process(pool: Decoders, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "täxt \udcff.mp4").write_text("no video")
    for name in ("empty.mp4", "text.mp4", "täxt \udcff.mp4", "absent.mp4", ""):
        messages = []
        for decode in (sample_frames, pool.decode):
            with pytest.raises(DataError) as caught:
                decode(tmp_path / name, **SAMPLING)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="cannot sample with fps=0"):
        pool.decode(tmp_path / "text.mp4", fps=0, max_frames=8)
    with pytest.raises(ValueError, match="unknown video backend 'opencv'"):
        pool.decode(tmp_path / "text.mp4", **SAMPLING, backend="opencv")  # pyright: ignore
    with pytest.raises(ValueError, match="out of range: workers=0"):
        Decoders(0)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_scaled_by_the_worker_is_scaled_by_the_processor(pool: Decoders, family: Any) -> None:
    video_processor: Any = processor(family).video_processor
    path = real_video_folder() / "bikes.mp4"
    whole = pool.decode(path, **SAMPLING)
    frames, _, height, width = whole.frames.shape
    budget = processor_budget(video_processor, family, frames, video_tokens=200)
    small = pool.decode(path, **SAMPLING, budget=budget)
    assert small.frames.shape[2:] == target_size(frames, height, width, budget) != (height, width)
    ours, theirs = (
        video_processor(
            videos=[v.frames], do_sample_frames=False, return_tensors="pt", **budget.options
        )
        for v in (small, whole)
    )
    assert ours["pixel_values_videos"].equal(theirs["pixel_values_videos"])
    assert ours["video_grid_thw"].equal(theirs["video_grid_thw"])
    assert vars(small) | {"frames": 0} == vars(whole) | {"frames": 0}


def test_a_shape_that_no_budget_allows(pool: Decoders, tmp_path: Path) -> None:
    path = write_coded(tmp_path / "long.mp4", 4, size=(2, 500))
    with pytest.raises(DataError, match=r"long.mp4: frames of .* exceed the aspect ratio 200"):
        pool.decode(path, **SAMPLING, budget=RECIPES["time_r1"].budget(4))


def test_many_threads_get_their_own_videos(pool: Decoders, coded: list[Path]) -> None:
    order = [k for _ in range(8) for k in range(len(coded))]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(6) as threads:
        videos = list(threads.map(lambda k: pool.decode(coded[k], **SAMPLING), order))
    for k, video in zip(order, videos, strict=True):
        assert decoded_numbers(video.frames) == [4 * k + index for index in video.indices]
    assert len(pids(pool)) <= 2


def test_a_file_is_probed_once(tmp_path: Path, coded: list[Path]) -> None:
    """A cached plan is used for the unchanged file and the same sampling alone."""
    path, requests = tmp_path / "video.mp4", []
    path.write_bytes(coded[0].read_bytes())
    with Decoders(1) as decoders:
        take = decoders._take

        def watched() -> Any:
            worker = take()
            ask = Worker.ask.__get__(worker)
            worker.ask = lambda n, request, t: requests.append(request) or ask(n, request, t)
            return worker

        decoders._take = watched  # pyright: ignore
        for fps, is_planned in [(2.0, False), (2.0, True), (4.0, False), (2.0, True)]:
            expected = sample_frames(path, fps=fps, max_frames=16)
            assert decoders.decode(path, fps=fps, max_frames=16).frames.equal(expected.frames)
            assert (requests[-1]["plan"] is not None) == is_planned
        write_coded(path, 75, first=1)
        assert decoders.duration(path, **SAMPLING) == 3 and requests[-1]["plan"] is None
        video = decoders.decode(path, **SAMPLING)
        assert requests[-1]["plan"] is not None
        assert decoded_numbers(video.frames) == [1 + index for index in video.indices]
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(DataError, match=r"video\.mp4: "):
            decoders.decode(path, **SAMPLING)


def test_workers_start_when_they_are_needed(coded: list[Path]) -> None:
    with Decoders(4) as decoders:
        assert pids(decoders) == set()
        for path in coded[:3]:
            decoders.decode(path, **SAMPLING)
        (pid,) = pids(decoders)
    assert is_gone(pid)


def test_a_hang_costs_the_time_limit(coded: list[Path], tmp_path: Path, faulty: list[str]) -> None:
    path = named(coded[0], "hang")
    with Decoders(2, timeout_s=2, retries=1, command=faulty) as decoders:
        with ThreadPoolExecutor(1) as thread:
            decoders.decode(coded[1], **SAMPLING)
            first = pids(decoders)
            begun = time.monotonic()
            hanging = thread.submit(decoders.decode, path, **SAMPLING)
            others = [decoders.decode(coded[k], **SAMPLING) for k in range(6)]
            with pytest.raises(DataError) as caught:
                hanging.result()
        assert str(caught.value) == f"{path}: decoding took longer than 2 s, 2 attempts"
        assert 4 < time.monotonic() - begun < 60
        for k, video in enumerate(others):
            assert decoded_numbers(video.frames) == [4 * k + index for index in video.indices]
        gone = first - pids(decoders)
        decoders.decode(coded[1], **SAMPLING)
    assert all(is_gone(pid) for pid in gone)
    with (
        Decoders(1, timeout_s=0.3, retries=0, command=faulty) as decoders,
        pytest.raises(DataError, match=r"longer than 0.3 s$"),
    ):
        decoders.decode(path, **SAMPLING)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "the decoder died (SIGSEGV)"),
        ("exit", "the decoder died (exit code 3)"),
        ("raise", "the decoder died (KeyError: 'a mistake of ours')"),
    ],
)
def test_a_crash_costs_one_file(
    coded: list[Path], faulty: list[str], name: str, reason: str
) -> None:
    path = named(coded[0], name)
    with Decoders(1, command=faulty) as decoders:
        with pytest.raises(DataError) as caught:
            decoders.decode(path, **SAMPLING)
        assert str(caught.value) == f"{path}: {reason}, 2 attempts"
        video = decoders.decode(coded[2], **SAMPLING)
        assert decoded_numbers(video.frames) == [8 + index for index in video.indices]


def test_what_fails_once_is_tried_again(coded: list[Path], faulty: list[str]) -> None:
    path = named(coded[3], "once")
    with Decoders(1, command=faulty) as decoders:
        video = decoders.decode(path, **SAMPLING)
    assert path.with_suffix(".seen").exists()
    assert decoded_numbers(video.frames) == [12 + index for index in video.indices]


def test_noise_is_no_answer(coded: list[Path], faulty: list[str], capfd: Any) -> None:
    path = named(coded[4], "noise")
    with Decoders(1, command=faulty) as decoders:
        video = decoders.decode(path, **SAMPLING)
    assert decoded_numbers(video.frames) == [16 + index for index in video.indices]
    assert "noise" not in "".join(capfd.readouterr())


LIAR = """
import json, sys
from opd.data.video import worker

lie = sys.argv[1]
answer = worker.answer

def answer_wrongly(request, send):
    if lie == "path":
        request["path"] = {other!r}
        answer(request, send)
    elif lie == "frames":
        answer(request, lambda kind, data=b"": kind == worker.IMAGE or send(kind, data))
        send(worker.READY)
    elif lie == "size":
        answer(request, lambda kind, data=b"":
               send(kind, data[:, :-2] if kind == worker.IMAGE else data))

if lie == "number":
    sender = worker.sender
    worker.sender = lambda replies, number: sender(replies, number and number + 1)
else:
    worker.answer = answer_wrongly
worker.main()
"""


@pytest.mark.parametrize("lie", ["path", "frames", "size", "number"])
def test_an_answer_to_something_else_is_none(coded: list[Path], tmp_path: Path, lie: str) -> None:
    script = tmp_path / "liar.py"
    script.write_text(LIAR.replace("{other!r}", repr(str(coded[1]))))
    with (
        Decoders(1, retries=0, command=[sys.executable, "-P", str(script), lie]) as decoders,
        pytest.raises(DataError, match=f"{coded[0]}: the decoder answered .* instead of "),
    ):
        decoders.decode(coded[0], **SAMPLING)


def test_workers_are_replaced(coded: list[Path]) -> None:
    with Decoders(1, recycle=3) as decoders:
        seen = []
        for k in range(7):
            video = decoders.decode(coded[k], **SAMPLING)
            assert decoded_numbers(video.frames)[0] == 4 * k
            seen.append(pids(decoders))
        assert [len(s) for s in seen] == [1, 1, 0, 1, 1, 0, 1]
        assert seen[0] == seen[1] != seen[3] == seen[4] != seen[6] != seen[0]
        assert all(is_gone(pid) for pid in seen[0] | seen[3])


def test_a_worker_that_does_not_start(coded: list[Path]) -> None:
    for code, reason in (("1 / 0", "ZeroDivisionError"), ("print('hello there, parent')", "")):
        with (
            Decoders(1, command=[sys.executable, "-c", code]) as decoders,
            pytest.raises(RuntimeError, match=f"no decoder starts: .*{reason}"),
        ):
            decoders.decode(coded[0], **SAMPLING)


def test_closing_ends_what_runs(coded: list[Path], faulty: list[str]) -> None:
    decoders = Decoders(1, command=faulty)
    decoders.decode(coded[0], **SAMPLING)
    (pid,) = pids(decoders)
    with ThreadPoolExecutor(2) as threads:
        path = named(coded[0], "hang")
        running = [threads.submit(decoders.decode, path, **SAMPLING) for _ in range(2)]
        time.sleep(0.3)
        decoders.close()
        for future in running:
            with pytest.raises(RuntimeError, match="the decoders are closed"):
                future.result(60)
    assert is_gone(pid) and not pids(decoders)
    with pytest.raises(RuntimeError, match="the decoders are closed"):
        decoders.decode(coded[0], **SAMPLING)
    decoders.close()


def test_a_forgotten_pool_ends_its_workers(coded: list[Path]) -> None:
    decoders = Decoders(1)
    decoders.decode(coded[0], **SAMPLING)
    (pid,) = pids(decoders)
    del decoders
    assert is_gone(pid)


@pytest.mark.slow
def test_workers_end_with_their_parent(coded: list[Path]) -> None:
    code = (
        "import os, sys; from opd.data.video.pool import Decoders; d = Decoders(1);"
        "d.decode(sys.argv[1], fps=2, max_frames=16);"
        "print(*[w._process.pid for w in d._live], flush=True); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(coded[0])]
    output = subprocess.run(command, env=environment, capture_output=True).stdout
    assert is_gone(int(output))


def test_a_hanging_worker_ends_itself(coded: list[Path], faulty: list[str]) -> None:
    path = named(coded[0], "hang")
    process = subprocess.Popen(
        faulty,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.read(HEADER.size) == HEADER.pack(READY, 0, 0)
    request = {"number": 1, "path": str(path), "limit_s": 0.3, "grid": SAMPLING, "plan": None}
    request["decode"] = {"backend": "decord", "budget": None}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.close()  # the parent is gone
    assert process.wait(60) == -signal.SIGALRM
    process.stdout.close()


IMPORTS_SLOWLY = """
import time
import opd.data.video.worker as worker

import_module = worker._import

def import_slowly(name, send):
    def send_late(kind):
        send(kind)
        if kind == worker.LOADING:
            time.sleep(6)
    return import_module(name, send_late)

worker._import = import_slowly
worker.main()
"""


def test_a_worker_that_imports_slowly_is_not_late(coded: list[Path], tmp_path: Path) -> None:
    """Importing torch, only where a size changes or for torchcodec, does not count as decoding."""
    script = tmp_path / "slow.py"
    script.write_text(IMPORTS_SLOWLY)
    command = [sys.executable, "-P", str(script)]
    with Decoders(1, timeout_s=5, retries=0, command=command) as decoders:
        same = RECIPES["video_opd"].budget(4)
        assert decoders.decode(coded[0], **SAMPLING, budget=same).frames.shape == (4, 3, 64, 64)
        (worker,) = decoders._live
        maps = Path(f"/proc/{worker._process.pid}/maps").read_text()
        assert "libtorch" in maps
    with Decoders(1) as decoders:
        decoders.decode(coded[0], **SAMPLING)
        (worker,) = decoders._live
        assert "libtorch" not in Path(f"/proc/{worker._process.pid}/maps").read_text()


def damaged(zoo: dict[str, Path], folder: Path, count: int) -> list[Path]:
    """Files that were cut, flipped, mixed up or are no files."""
    source, files = random.Random(1), []
    contents = {path: path.read_bytes() for path in zoo.values()}
    for k in range(count):
        path, whole = source.choice(list(contents.items()))
        content = bytearray(whole)
        target = folder / f"damaged_{k}{path.suffix}"
        kind = source.choice(["cut", "flip", "flip", "flip", "hole", "head", "mixed", "odd"])
        if kind == "cut":
            del content[source.randrange(len(content)) :]
        elif kind == "flip":
            for _ in range(source.choice([1, 3, 30])):
                content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        elif kind == "hole":
            at = source.randrange(len(content))
            content[at : at + 400] = bytes(min(400, len(content) - at))
        elif kind == "head":
            at = source.randrange(min(600, len(content)))
            content[at] = source.randrange(256)
        elif kind == "mixed":
            other = source.choice(list(contents.values()))
            content = content[: len(content) // 2] + other[len(other) // 2 :]
            target = target.with_suffix(source.choice([".mp4", ".webm", ".avi", ".txt"]))
        if kind != "odd":
            target.write_bytes(content)
        elif k % 4 == 0:
            target.mkdir()
        elif k % 4 == 1:
            target.symlink_to(target)
        elif k % 4 == 2:
            target.touch()
        else:
            target.write_bytes(whole)
            target.chmod(0)
        files.append(target)
    return files


def test_damaged_files_cost_no_more_than_themselves(
    zoo: dict[str, Path], coded: list[Path], tmp_path: Path
) -> None:
    """Of 300 damaged files each is decoded or reported in one line that names it; whole ones in
    between come out right."""
    files = damaged(zoo, tmp_path, 300)
    with Decoders(2, timeout_s=10, retries=0) as decoders:

        def outcome(k: int) -> str:
            begun = time.monotonic()
            try:
                video = decoders.decode(files[k], **SAMPLING, backend=("decord", "pyav")[k % 2])
                assert video.frames.dtype == torch.uint8 and len(video.frames) % 2 == 0
                assert len(video.frames) == len(video.indices) <= 16
                reason = ""
            except DataError as error:
                reason = str(error)
                assert reason.startswith(f"{files[k]}: ") and "\n" not in reason
            assert time.monotonic() - begun < 60
            if k % 3 == 0:
                j = k // 3 % len(coded)
                whole = decoders.decode(coded[j], **SAMPLING)
                assert decoded_numbers(whole.frames) == [4 * j + i for i in whole.indices]
            return reason

        with ThreadPoolExecutor(2) as threads:
            reasons = list(threads.map(outcome, range(len(files))))
    died = [reason for reason in reasons if "died" in reason or "longer than" in reason]
    refused = sum(map(bool, reasons))
    print(f"{len(files) - refused} decoded, {refused} refused, {len(died)} of them by force")
    for reason in died:
        print(reason)
    assert 100 < refused < 280
    assert len(died) <= 3


def test_memory_stays_flat(coded: list[Path]) -> None:
    """Resident memory of the workers, and of this process, over OPD_DECODES decodes."""
    total, sizes, own = int(os.environ.get("OPD_DECODES", "200")), [], []
    with Decoders(1) as decoders:
        for k in range(total):
            decoders.decode(coded[k % len(coded)], **SAMPLING)
            if k % max(1, total // 40) == 0:
                resident = [psutil.Process(pid).memory_info().rss for pid in pids(decoders)]
                sizes.append(sum(resident) / 2**20)
                own.append(psutil.Process().memory_info().rss / 2**20)
    print(f"worker {min(sizes):.0f} to {max(sizes):.0f} MiB, parent {own[0]:.0f} to {own[-1]:.0f}")
    assert max(sizes[len(sizes) // 2 :]) < 1.15 * max(sizes[: len(sizes) // 2]) + 10
    assert own[-1] < own[len(own) // 4] + 20

"""The frame cache returns what was stored, with concurrent writers and damaged files too."""

import contextlib
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.data.video.cache import FrameCache
from opd.data.video.sampling import VideoFrames
from opd.errors import ConfigError


def frames_of(seed: int, count: int = 4, height: int = 6, width: int = 5) -> VideoFrames:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    return VideoFrames(
        frames=pixels.to(torch.uint8),
        indices=[7 * k for k in range(count)],
        source_fps=30000 / 1001,
        source_frames=7 * count,
        duration_s=7 * count * 1001 / 30000,
        decoder="pyav",
    )


def same(first: VideoFrames | None, second: VideoFrames) -> bool:
    if first is None:
        return False
    names = ("indices", "source_fps", "source_frames", "duration_s", "decoder")
    return first.frames.equal(second.frames) and all(
        getattr(first, name) == getattr(second, name) for name in names
    )


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.frames"))


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_what_went_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, seed: int, pairs: int, height: int, width: int
) -> None:
    cache = FrameCache(tmp_path_factory.mktemp("cache"), 10**6)
    video = frames_of(seed, 2 * pairs, height, width)
    assert cache.get("a") is None
    assert cache.put("a", video)
    assert same(cache.get("a"), video)
    assert cache.get("b") is None


def test_frames_that_are_a_view(tmp_path: Path) -> None:
    video = frames_of(0)
    turned = VideoFrames(**{**vars(video), "frames": video.frames.transpose(2, 3)})
    cache = FrameCache(tmp_path, 10**6)
    assert cache.put("a", turned) and same(cache.get("a"), turned)


def test_an_entry_belongs_to_a_file_and_to_the_sampling(tmp_path: Path) -> None:
    video, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    video.write_bytes(b"one"), other.write_bytes(b"one")
    sampling = {"fps": 2.0, "max_frames": 8, "backend": "decord", "budget": None}
    key = FrameCache.key(video, **sampling)
    assert key == FrameCache.key(str(video), **dict(reversed(sampling.items())))
    link = tmp_path / "link.mp4"
    link.symlink_to(video)
    assert FrameCache.key(link, **sampling) == key
    changed = [sampling | {name: 4} for name in sampling] + [sampling | {"more": 1}]
    keys = {key, FrameCache.key(other, **sampling), *(FrameCache.key(video, **s) for s in changed)}
    assert len(keys) == 7
    status = video.stat()
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert FrameCache.key(video, **sampling) not in keys
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FrameCache.key(video, **sampling) == key
    video.write_bytes(b"more")
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FrameCache.key(video, **sampling) not in keys
    assert FrameCache.key(tmp_path / "absent.mp4", **sampling) is None
    cache = FrameCache(tmp_path / "cache", 1000)
    assert cache.get(None) is None and not cache.put(None, frames_of(0))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 10**6)
    cache.put("0", frames_of(0))
    (path,) = entries(tmp_path)
    size = path.stat().st_size
    cache = FrameCache(tmp_path, 10 * size)
    for k in range(1, 10):
        assert cache.put(str(k), frames_of(k))
        time.sleep(0.002)
    assert cache.get("0") is not None  # used again, so 1 is now the oldest
    assert cache.put("10", frames_of(10))
    # Room is made for a tenth more, rounded to whole entries: 8 of 9 allowed ones stay, then 10.
    kept = [k for k in range(11) if cache.get(str(k)) is not None]
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert sum(p.stat().st_size for p in entries(tmp_path)) <= 10 * size


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 1000)
    assert not cache.put("a", frames_of(0, height=64, width=64))
    assert entries(tmp_path) == [] and cache.get("a") is None


def test_damaged_entries_are_missing_and_removed(tmp_path: Path) -> None:
    cache, video, source = FrameCache(tmp_path, 10**6), frames_of(1), random.Random(0)
    cache.put("a", video)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        kind = source.choice(["flip", "cut", "longer", "empty"])
        if kind == "flip":
            content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        elif kind == "cut":
            del content[source.randrange(len(content)) :]
        elif kind == "longer":
            content += b"x"
        else:
            content.clear()
        path.write_bytes(content)
        assert cache.get("a") is None, kind
        assert not path.exists()
        assert cache.put("a", video) and same(cache.get("a"), video)


def test_files_left_behind_are_removed_in_time(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 2000)
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    for k in range(12):
        cache.put(str(k), frames_of(k))
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/frames")):
        with pytest.raises(ConfigError, match="cannot be written: ") as caught:
            FrameCache(folder, 1000)
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must be at least 1"):
        FrameCache(tmp_path, 0)


def test_a_folder_that_vanishes_costs_no_more_than_the_frames(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", 10**6)
    cache.put("a", frames_of(0))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert cache.get("a") is None
    assert not cache.put("a", frames_of(0))


def size_of(path: Path) -> int:
    """Size of an entry; 0 where another process has just removed it because it is damaged."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def hammer(folder: Path, seed: int, limit: int) -> None:
    """Read, fill and damage a cache; exit code 0 where every check holds."""
    cache, source, hits = FrameCache(folder, limit), random.Random(seed), 0
    for _ in range(150):
        k = source.randrange(20)
        cached = cache.get(str(k))
        if cached is None:
            assert cache.put(str(k), frames_of(k, 2 + k % 3 * 2))
        else:
            assert same(cached, frames_of(k, 2 + k % 3 * 2)), k
            hits += 1
        if source.random() < 0.03:
            with (
                contextlib.suppress(FileNotFoundError),
                (folder / f"{k}.frames").open("r+b") as file,
            ):
                file.truncate(50)  # a damaged entry, never a new file that the cache does not count
        with (
            cache._locked()
        ):  # or an entry that moves in meanwhile is counted beside what it replaced
            used = sum(size_of(path) for path in entries(folder))
        assert used <= limit, used
    assert hits > 10


def test_several_processes_at_once(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 10**6)
    cache.put("probe", frames_of(0))
    (path,) = entries(tmp_path)
    limit = 9 * path.stat().st_size  # 20 entries of 1/2 to 1 1/2 the size: about half find room
    path.unlink()
    context = multiprocessing.get_context("fork")  # to import torch again would take seconds
    running = [context.Process(target=hammer, args=(tmp_path, k, limit)) for k in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    assert not list(tmp_path.glob("*.tmp"))

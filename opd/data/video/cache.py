"""Sampled frames on disk, so that a video is decoded once for all epochs, runs and ranks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from opd.data.video.sampling import VideoFrames
from opd.errors import ConfigError

SUFFIX, ASIDE, LOCK = ".frames", ".tmp", "lock"
STALE_S = 3600.0
"""Age at which a file that somebody began to write counts as left behind."""
_PREFIX = struct.Struct("<8sQII")  # magic, bytes of pixels, bytes of the head, checksum of both
_MAGIC = b"opdfrm01"


class FrameCache:
    """Frames of videos as `VideoFrames`, kept in files of one folder.

    An entry belongs to a file as it is now (path, size, time of change) and to all that decided how
    it was sampled. Several processes may use a folder at once: entries appear whole or not at all,
    and the least recently used go when together they would be larger than `max_bytes`.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Raises ConfigError where the folder cannot be written, ValueError for a size below 1."""
        if max_bytes < 1:
            raise ValueError(f"a cache of {max_bytes} bytes holds nothing")
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"{folder}: the folder for decoded frames cannot be written: {error.strerror}"
            ) from error

    @staticmethod
    def key(video: str | Path, **sampling: Any) -> str | None:
        """The name of an entry; None where there is no such file. Take it before decoding: a file
        that is replaced meanwhile is another one.

        Args:
            sampling: all that decides which frames come out and how; anything that JSON holds.
        """
        try:
            status = os.stat(video)
        except (OSError, ValueError):
            return None
        identity = [os.path.realpath(video), status.st_size, status.st_mtime_ns]
        text = json.dumps([identity, sampling], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str | None) -> VideoFrames | None:
        """The frames of an entry, now the most recently used; None where there is none. A damaged
        one is removed."""
        if key is None:
            return None
        path = self._path(key)
        try:
            with path.open("rb") as file:
                video = _read(file)
            if video is None:
                path.unlink(missing_ok=True)
            else:
                os.utime(path)
        except OSError:
            return None
        return video

    def put(self, key: str | None, video: VideoFrames) -> bool:
        """Keep an entry; False where it is larger than the cache or the disk does not take it."""
        if key is None:
            return False
        head, pixels, size = _packed(video)
        if size > self.max_bytes:
            return False
        aside = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=ASIDE, delete=False) as file:
                aside = Path(file.name)
                file.write(head)
                file.write(pixels)
            with self._locked() as total:
                self._make_room(total, size)
                aside.replace(self._path(key))
        except OSError:
            if aside is not None:
                aside.unlink(missing_ok=True)
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Hold the folder against other processes; gives the file that says how full it is."""
        with open(self.folder / LOCK, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _make_room(self, total: BinaryIO, size: int) -> None:
        """Count `size` bytes more; remove what was used longest ago where that is too much.

        What the file says is an upper limit: entries that are replaced or removed stay counted
        until the folder is looked through, which happens when it seems full.
        """
        total.seek(0)
        said = total.read()
        used = int(said) if said.isdigit() else self.max_bytes
        if used + size > self.max_bytes:
            # A tenth more than needed, or else each entry from now on would look through all.
            used = self._evict(min(self.max_bytes - size, self.max_bytes * 9 // 10))
        total.truncate(0)
        total.write(str(used + size).encode())

    def _evict(self, allowed: int) -> int:
        """Remove entries, the least recently used first, down to `allowed` bytes; what is left."""
        entries, used = [], 0
        for found in os.scandir(self.folder):
            try:
                status = found.stat()
                if found.name.endswith(SUFFIX):
                    entries.append((status.st_mtime_ns, found.path, status.st_size))
                    used += status.st_size
                elif found.name.endswith(ASIDE) and time.time() - status.st_mtime > STALE_S:
                    os.unlink(found.path)
            except FileNotFoundError:  # renamed or removed by another process
                continue
        for _, path, size in sorted(entries):
            if used <= allowed:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


def _packed(video: VideoFrames) -> tuple[bytes, memoryview, int]:
    """What an entry consists of, and its size in bytes."""
    frames = np.ascontiguousarray(video.frames.numpy())
    pixels = frames.data.cast("B")
    head = json.dumps(
        {
            "shape": frames.shape,
            "indices": video.indices,
            "source_fps": video.source_fps,
            "source_frames": video.source_frames,
            "duration_s": video.duration_s,
        }
    ).encode()
    check = zlib.crc32(pixels, zlib.crc32(head))
    prefix = _PREFIX.pack(_MAGIC, len(pixels), len(head), check)
    return prefix + head, pixels, len(prefix) + len(head) + len(pixels)


def _read(file: BinaryIO) -> VideoFrames | None:
    """The entry in a file; None where it is not whole."""
    start = file.read(_PREFIX.size)
    if len(start) < _PREFIX.size:
        return None
    magic, num_bytes, num_head, check = _PREFIX.unpack(start)
    size = os.fstat(file.fileno()).st_size
    if magic != _MAGIC or size != _PREFIX.size + num_head + num_bytes:
        return None
    head = file.read(num_head)
    pixels = np.empty(num_bytes, dtype=np.uint8)
    view = pixels.data
    if file.readinto(view) != num_bytes or zlib.crc32(view, zlib.crc32(head)) != check:  # pyright: ignore
        return None
    values = json.loads(head)
    frames = torch.from_numpy(pixels.reshape(values.pop("shape")))
    return VideoFrames(frames=frames, **values)

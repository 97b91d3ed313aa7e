"""Disk cache of sampled frames: a video is decoded once for all epochs, runs and ranks."""

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

SUFFIX, UNFINISHED, LOCK = ".frames", ".tmp", "lock"
STALE_S = 3600.0
"""Age after which an unfinished file counts as abandoned."""
_PREFIX = struct.Struct("<8sQII")  # magic, bytes of pixels, bytes of the header, checksum of both
_MAGIC = b"opdfrm02"


class FrameCache:
    """A cache of `VideoFrames` in the files of one folder.

    The key of an entry covers the video file (path, size, modification time) and everything that
    decides how it is sampled. Several processes may share a folder: entries appear whole or not at
    all, and the least recently used are removed before the total exceeds `max_bytes`.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Open the cache; creates its folder.

        Raises ConfigError where the folder cannot be written, ValueError for a size below 1.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: must be at least 1")
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"{folder}: the frame cache cannot be written: {error.strerror}"
            ) from error

    @staticmethod
    def key(video: str | Path, **sampling: Any) -> str | None:
        """Return the key of an entry, None where the file does not exist.

        Compute it before decoding, so that a file that is replaced meanwhile gets another key.

        Args:
            sampling: everything that decides which frames are taken and how; JSON values.
        """
        try:
            status = os.stat(video)
        except (OSError, ValueError):
            return None
        identity = [os.path.realpath(video), status.st_size, status.st_mtime_ns]
        text = json.dumps([identity, sampling], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str | None) -> VideoFrames | None:
        """Return the frames of an entry and mark it as used; None where there is none. A damaged
        entry is removed."""
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
        """Store an entry; return False where it exceeds the cache or cannot be written."""
        if key is None:
            return False
        head, pixels, size = _packed(video)
        if size > self.max_bytes:
            return False
        unfinished = None
        try:
            with tempfile.NamedTemporaryFile(
                dir=self.folder, suffix=UNFINISHED, delete=False
            ) as file:
                unfinished = Path(file.name)
                file.write(head)
                file.write(pixels)
            with self._locked() as total:
                self._make_room(total, size)
                unfinished.replace(self._path(key))
        except OSError:
            if unfinished is not None:
                unfinished.unlink(missing_ok=True)
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Lock the folder against other processes; yields the file that holds its total size."""
        with open(self.folder / LOCK, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _make_room(self, total: BinaryIO, size: int) -> None:
        """Add `size` bytes to the total; evict old entries where it would exceed the limit.

        The total on file is an upper bound: entries that are replaced or removed stay counted until
        the folder is scanned, which happens when it seems full.
        """
        total.seek(0)
        content = total.read()
        used = int(content) if content.isdigit() else self.max_bytes
        if used + size > self.max_bytes:
            # Free a tenth more than needed, or each further entry would scan the folder again.
            used = self._evict(min(self.max_bytes - size, self.max_bytes * 9 // 10))
        total.truncate(0)
        total.write(str(used + size).encode())

    def _evict(self, allowed: int) -> int:
        """Remove the least recently used entries down to `allowed` bytes; return the bytes left."""
        entries, used = [], 0
        for file in os.scandir(self.folder):
            try:
                status = file.stat()
                if file.name.endswith(SUFFIX):
                    entries.append((status.st_mtime_ns, file.path, status.st_size))
                    used += status.st_size
                elif file.name.endswith(UNFINISHED) and time.time() - status.st_mtime > STALE_S:
                    os.unlink(file.path)
            except FileNotFoundError:  # renamed or removed by another process
                continue
        for _, path, size in sorted(entries):
            if used <= allowed:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


def _packed(video: VideoFrames) -> tuple[bytes, memoryview, int]:
    """Serialise an entry; return its header, its pixels and its size in bytes."""
    frames = np.ascontiguousarray(video.frames.numpy())
    pixels = frames.data.cast("B")
    head = json.dumps(
        {
            "shape": frames.shape,
            "indices": video.indices,
            "source_fps": video.source_fps,
            "source_frames": video.source_frames,
            "duration_s": video.duration_s,
            "decoder": video.decoder,
            "start_s": video.start_s,
        }
    ).encode()
    check = zlib.crc32(pixels, zlib.crc32(head))
    prefix = _PREFIX.pack(_MAGIC, len(pixels), len(head), check)
    return prefix + head, pixels, len(prefix) + len(head) + len(pixels)


def _read(file: BinaryIO) -> VideoFrames | None:
    """Read an entry from a file; None where it is damaged."""
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

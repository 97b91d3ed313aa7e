"""Where sampled frames come from: memory, a cache on disk, processes that decode ahead, or this
one."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from opd.config.data import DataConfig
from opd.data.video.budget import Budget, Recipe
from opd.data.video.cache import FrameCache
from opd.data.video.decoding import Backend
from opd.data.video.pool import Decoders
from opd.data.video.sampling import VideoFrames, sample_frames


class Frames:
    """Sampled frames of videos, made as the configuration says.

    `data.workers` processes decode what is expected, ahead of its use, as many videos as fit into
    `data.prefetch_mb`; without workers a video is decoded when it is asked for. With a `budget`,
    workers send frames already scaled as the video processor would scale them.
    """

    def __init__(self, config: DataConfig, budget: Budget | Recipe | None = None) -> None:
        """Raises ConfigError where the cache's folder cannot be written."""
        self.config, self.budget = config, budget if config.workers else None
        self.sampling: dict[str, Any] = {
            "fps": config.fps,
            "max_frames": config.max_frames,
            "backend": cast(Backend, config.backend),
        }
        self.cache = None
        if config.frame_cache is not None:
            self.cache = FrameCache(config.frame_cache, int(config.frame_cache_gb * 2**30))
        self.decoders = None
        if config.workers:
            limits = {"timeout_s": config.decode_timeout_s, "retries": config.decode_retries}
            self.decoders = Decoders(config.workers, **limits)
            self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="decode")
        self._coming: dict[Path, Future[VideoFrames]] = {}
        self._largest = 0  # bytes of a video's frames, of those seen

    def expect(self, videos: Sequence[Path]) -> None:
        """Begin to decode what will be asked for next, in this order; forget what was expected
        before and is no longer."""
        if self.decoders is None:
            return
        for video in [video for video in list(self._coming) if video not in videos]:
            self._coming.pop(video).cancel()
        for video in dict.fromkeys(videos):
            room = self.config.workers
            if self._largest:
                room = max(1, self.config.prefetch_mb * 2**20 // self._largest)
            if video not in self._coming and len(self._coming) < room:
                self._coming[video] = self._threads.submit(self._made, video)

    def get(self, video: Path) -> VideoFrames:
        """The frames of a video; DataError, which names it, where it does not decode."""
        coming = self._coming.pop(video, None)
        frames = self._made(video) if coming is None else coming.result()
        self._largest = max(self._largest, frames.frames.nbytes)
        return frames

    def _made(self, video: Path) -> VideoFrames:
        if self.cache is None:
            return self._decoded(video)
        scaled = None if self.budget is None else asdict(self.budget)
        key = self.cache.key(video, **self.sampling, budget=scaled)
        found = self.cache.get(key)
        if found is None:
            found = self._decoded(video)
            self.cache.put(key, found)
        return found

    def _decoded(self, video: Path) -> VideoFrames:
        if self.decoders is not None:
            return self.decoders.decode(video, **self.sampling, budget=self.budget)
        return sample_frames(video, **self.sampling)

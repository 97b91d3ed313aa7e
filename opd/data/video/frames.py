"""Sampled frames on request: from the disk cache, workers that decode ahead, or this process."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from opd.config.data import DataConfig
from opd.data.video.backends import Backend
from opd.data.video.budget import Budget, Recipe
from opd.data.video.cache import FrameCache
from opd.data.video.clips import Footage
from opd.data.video.pool import Decoders
from opd.data.video.sampling import VideoFrames, sample_frames


class Frames:
    """Sampled frames of videos, as the configuration sets them.

    `data.workers` processes decode the expected videos ahead of use, as many as fit into
    `data.prefetch_mb`; without workers a video is decoded on request. With a `budget`, workers
    return frames already resized as the video processor would resize them.
    """

    def __init__(self, config: DataConfig, budget: Budget | Recipe | None = None) -> None:
        """Prepare the cache and workers. Raises ConfigError where the cache cannot be written."""
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
        self._pending: dict[Footage, Future[VideoFrames]] = {}
        self._largest = 0  # bytes of frames, over the videos so far
        self.by_pyav: set[Path] = set()  # with data.backend=auto: those that decord cannot decode

    def expect(self, videos: Sequence[Footage]) -> None:
        """Start decoding the videos that are requested next, in this order; drop earlier
        expectations that are not among them."""
        if self.decoders is None:
            return
        for video in [video for video in list(self._pending) if video not in videos]:
            self._pending.pop(video).cancel()
        for video in dict.fromkeys(videos):
            room = self.config.workers
            if self._largest:
                room = max(1, self.config.prefetch_mb * 2**20 // self._largest)
            if video not in self._pending and len(self._pending) < room:
                self._pending[video] = self._threads.submit(self._load, video)

    def get(self, video: Footage) -> VideoFrames:
        """Return the frames of a video. Raises DataError, naming it, where it does not decode."""
        pending = self._pending.pop(video, None)
        frames = self._load(video) if pending is None else pending.result()
        self._largest = max(self._largest, frames.frames.nbytes)
        if self.config.backend == "auto" and frames.decoder == "pyav":
            self.by_pyav.add(video[0])
        return frames

    def _load(self, video: Footage) -> VideoFrames:
        if self.cache is None:
            return self._decode(video)
        scaled = None if self.budget is None else asdict(self.budget)
        path, clip = video
        of_clip = {} if clip is None else {"clip": clip}
        key = self.cache.key(path, **self.sampling, budget=scaled, **of_clip)
        frames = self.cache.get(key)
        if frames is None:
            frames = self._decode(video)
            self.cache.put(key, frames)
        return frames

    def _decode(self, video: Footage) -> VideoFrames:
        path, clip = video
        if self.decoders is not None:
            return self.decoders.decode(path, **self.sampling, budget=self.budget, clip=clip)
        return sample_frames(path, **self.sampling, clip=clip)

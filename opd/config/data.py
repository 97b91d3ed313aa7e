"""Settings of data: sources, sampling of videos, prompts, decoding."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from opd.config.options import option

Family = Literal["qwen3_vl", "qwen2_5_vl"]
RECIPES: dict[str, tuple[Family, float, int, int, int | None, int | None]] = {
    # Model family, fps, max_frames, video_tokens, min_frame_tokens, max_frame_tokens.
    # The configuration of Qwen3-VL's checkpoints: 4,096 to 25,165,824 pixels.
    "qwen3_vl": ("qwen3_vl", 2.0, 768, 12_288, None, None),
    # arXiv 2602.02994; its least size of a frame is not told.
    "video_opd": ("qwen3_vl", 2.0, 768, 8192, None, None),
    # arXiv 2512.14698 and its code: min_tokens 64, total_tokens 14336, fps_max_frames 448.
    "timelens_8b": ("qwen3_vl", 2.0, 448, 14_336, 64, 768),
    "timelens_7b": ("qwen2_5_vl", 2.0, 448, 14_336, 64, 768),
    # arXiv 2503.13377 and its code: total_pixels 3584 * 28 * 28, min_pixels 16 * 28 * 28.
    "time_r1": ("qwen2_5_vl", 2.0, 768, 3584, 16, 768),
    # qwen-vl-utils as it is: 90% of 128,000 tokens.
    "qwen2_5_vl": ("qwen2_5_vl", 2.0, 768, 115_200, 128, 768),
}
FORMATS = (  # of annotation files, read by opd/data/formats.py
    "timerft",
    "charades",
    "activitynet",
    "rextime",
    "qvhighlights",
    "tacos",
    "timelens",
    "timelens_100k",
    "tvgbench",
    "nextgqa",
    "mcq",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, several separated by commas: `[FORMAT:]PATH[?root=DIR&weight=W&part=train]`, part
    train or held_out, split by videos (`holdout=0.1`); `synthetic:SPLIT` is written on first use
    below `video_root`."""

    train: str = option("synthetic:train", "what is trained on")
    eval: str = option("synthetic:eval", "what is evaluated on")
    format: str = option(
        "auto",
        "of sources that name none; auto recognises it, and says so",
        choices=("auto", *FORMATS),
    )
    video_root: str = option("runs/synthetic", "folder that videos are named relative to")
    allow_leak: bool = option(False, "evaluate on videos that are trained on, too")
    limit_train: int | None = option(None, "the first so many examples", least=1)
    limit_eval: int | None = option(None, "the first so many examples", least=1)
    fps: float = option(4.0, "frames sampled per second of video", above=0)
    max_frames: int = option(768, "frames per video at most", least=4)
    video_tokens: int | None = option(
        None,
        "vision tokens of a video at most: larger frames are scaled down; null leaves the "
        "processor's own budget",
        least=16,
    )
    min_frame_tokens: int | None = option(
        None, "vision tokens' worth of pixels that a frame has at least, over video_tokens", least=1
    )
    max_frame_tokens: int | None = option(None, "that it has at most", least=1)
    recipe: str | None = option(
        None,
        "how published runs sampled videos: stands in for those of fps, max_frames, video_tokens, "
        "min_frame_tokens and max_frame_tokens that are left as they are",
        choices=tuple(RECIPES),
    )
    prompt: str = option(
        "default",
        "the user's turn and the form of its answer: a template's name, a file (see "
        "opd/text/templates.py), or a text; {video} stands where the frames go",
    )
    reading: str = option(
        "lenient",
        "lenient reads an answer in any form; strict in the prompt's alone",
        choices=("lenient", "strict"),
    )
    backend: str = option("decord", "who decodes", choices=("decord", "pyav"))
    workers: int = option(
        0, "processes that decode, ahead of use; 0 decodes in the run's own process", least=0
    )
    prefetch_mb: int = option(2048, "MiB of frames that workers decode ahead", least=1)
    decode_timeout_s: float = option(60.0, "that a worker may take for one video", above=0)
    decode_retries: int = option(1, "further attempts at a video that took too long", least=0)
    frame_cache: str | None = option(None, "folder where decoded frames are kept between runs")
    frame_cache_gb: float = option(50.0, "GiB of it at most; the least recently used go", above=0)
    cache_mb: int = option(
        1024,
        "MiB a split of vision tokens (of frozen towers; else of frames) kept in memory",
        least=0,
    )

    def filled(self) -> "DataConfig":
        """With the recipe's values where the defaults are."""
        if self.recipe is None:
            return self
        names = ("fps", "max_frames", "video_tokens", "min_frame_tokens", "max_frame_tokens")
        values: dict[str, Any] = dict(zip(names, RECIPES[self.recipe][1:], strict=True))
        default = DataConfig()
        left = {k: v for k, v in values.items() if getattr(self, k) == getattr(default, k)}
        return replace(self, **left)

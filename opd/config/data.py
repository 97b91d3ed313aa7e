"""Settings of data: sources, sampling of videos, prompts and decoding."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from opd.config.options import check_values, option
from opd.errors import ConfigError, printable, require
from opd.text.templates import Template, load_template

Family = Literal["qwen3_vl", "qwen2_5_vl"]
RECIPES: dict[str, tuple[Family, float, int, int, int | None, int | None, str]] = {
    # Model family, fps, max_frames, video_tokens, min_frame_tokens, max_frame_tokens, timestamps
    # Configuration of the Qwen3-VL checkpoints: 4,096 to 25,165,824 pixels.
    "qwen3_vl": ("qwen3_vl", 2.0, 768, 12_288, None, None, "processor"),
    # arXiv 2602.02994, which does not state a minimum frame size.
    "video_opd": ("qwen3_vl", 2.0, 768, 8192, None, None, "processor"),
    # arXiv 2512.14698 and its training code: min_tokens 64, total_tokens 14336, fps_max_frames 448.
    "timelens_8b": ("qwen3_vl", 2.0, 448, 14_336, 64, 768, "processor"),
    "timelens_7b": ("qwen2_5_vl", 2.0, 448, 14_336, 64, 768, "text"),
    # arXiv 2503.13377 and its code: total_pixels 3584 * 28 * 28, min_pixels 16 * 28 * 28.
    "time_r1": ("qwen2_5_vl", 2.0, 768, 3584, 16, 768, "processor"),
    # Defaults of qwen-vl-utils: 90% of 128,000 tokens.
    "qwen2_5_vl": ("qwen2_5_vl", 2.0, 768, 115_200, 128, 768, "processor"),
}
QUERIES = 4  # about one video that share its forward, where none are asked for
FORMATS = (  # of annotation files; opd/data/annotations/formats.py reads them
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
    """Data.

    A source is [FORMAT:]PATH[?root=DIR&weight=W&part=PART&holdout=SHARE], PART being train or
    held_out, or synthetic:SPLIT, which is written on first use; commas separate several.
    """

    train: str = option("synthetic:train", "Sources of the training examples.")
    eval: str = option("synthetic:eval", "Sources of the evaluation examples.")
    format: str = option(
        "auto",
        "Annotation format of sources that do not name one; auto recognises the format and "
        "reports it.",
        choices=("auto", *FORMATS),
    )
    video_root: str = option(
        "runs/synthetic", "Folder that the video names in annotations are relative to."
    )
    allow_leak: bool = option(False, "Allow evaluation on videos that are also trained on.")
    limit_train: int | None = option(
        None, "Number of training examples used, from the first; null uses all.", least=1
    )
    limit_eval: int | None = option(
        None, "Number of evaluation examples used, from the first; null uses all.", least=1
    )
    fps: float = option(4.0, "Frame sampling rate, in frames per second of video.", above=0)
    max_frames: int = option(768, "Maximum number of frames per video.", least=4)
    video_tokens: int | None = option(
        None,
        "Maximum size of a video, in vision tokens: larger frames are scaled down; null keeps the "
        "budget of the checkpoint's processor.",
        least=16,
    )
    min_frame_tokens: int | None = option(
        None,
        "Minimum frame size, in vision tokens; it takes precedence over video_tokens.",
        least=1,
    )
    max_frame_tokens: int | None = option(None, "Maximum frame size, in vision tokens.", least=1)
    recipe: str | None = option(
        None,
        "Published recipe of video sampling, whose values are the defaults of fps, max_frames, "
        "video_tokens, min_frame_tokens, max_frame_tokens and timestamps; keys that are set win.",
        choices=tuple(RECIPES),
    )
    timestamps: str = option(
        "processor",
        "Times among the frames: processor leaves them to the checkpoint's processor, which writes "
        "them for Qwen3-VL alone; text writes them for Qwen2.5-VL, as TimeLens-7B has them.",
        choices=("processor", "text"),
    )
    patch_seconds: str = option(
        "processor",
        "Seconds per temporal patch in the positions of Qwen2.5-VL: processor divides the length "
        "of the video by its patches, as its checkpoints saw; times takes the mean distance of "
        "the sampled frames.",
        choices=("processor", "times"),
    )
    prompt: str = option(
        "default",
        "Wording of the prompt and form of the answer: the name of a template, a template file, or "
        "a text in which {query} and {video} mark the places of the query and the frames.",
    )
    queries_per_video: int | None = option(
        None,
        "Maximum number of queries about one video that training answers behind one forward of it; "
        "more than 1 needs a prompt with the video before the query. null is 4 where it has, or a "
        "micro-batch that is smaller.",
        least=1,
    )
    reading: str = option(
        "lenient",
        "Parsing of answers: lenient accepts every known form, strict only the form that the "
        "prompt asks for.",
        choices=("lenient", "strict"),
    )
    backend: str = option(
        "decord",
        "Video decoding library; auto is decord, or pyav for a video that decord cannot decode.",
        choices=("auto", "decord", "pyav", "torchcodec"),
    )
    workers: int = option(
        0,
        "Number of processes that decode videos ahead of use; 0 decodes in the main process.",
        least=0,
    )
    prefetch_mb: int = option(
        2048, "Maximum size of the frames that workers decode ahead, in MiB.", least=1
    )
    decode_timeout_s: float = option(
        60.0, "Time limit for a worker to decode one video, in seconds.", above=0
    )
    decode_retries: int = option(
        1, "Number of further attempts to decode a video after a time-out.", least=0
    )
    frame_cache: str | None = option(
        None, "Folder in which decoded frames are kept between runs; null keeps none."
    )
    frame_cache_gb: float = option(
        50.0,
        "Maximum size of frame_cache, in GiB; the least recently used frames are removed.",
        above=0,
    )
    cache_mb: int = option(
        1024,
        "Memory per split for the vision tokens of frozen vision towers, or for decoded frames if "
        "a tower is trained, in MiB.",
        least=0,
    )

    def __post_init__(self) -> None:
        check_values(self, "data")
        try:
            _ = self.template
        except ConfigError as error:
            message = str(error)
            prefix = "" if "data.prompt" in message else "data.prompt: "
            raise ConfigError(f"{prefix}{message}") from None
        require(
            self.queries_per_video in (None, 1) or self.template.video_first,
            f"data.queries_per_video={self.queries_per_video}: needs a prompt with the video "
            f"before the query, which data.prompt={printable(self.prompt)} is not",
        )
        for key in ("min_frame_tokens", "max_frame_tokens"):
            value = getattr(self, key)
            require(
                value is None or self.recipe is not None or self.video_tokens is not None,
                f"data.{key}={value}: needs data.video_tokens, the limit of the whole video",
            )

    @cached_property
    def template(self) -> Template:
        """The prompt template that `prompt` names or holds."""
        return load_template(self.prompt)

    @property
    def group_size(self) -> int:
        """Maximum number of queries about one video that share its forward in training."""
        return self.queries_per_video or (QUERIES if self.template.video_first else 1)

    @classmethod
    def of_recipe(cls, recipe: str) -> "DataConfig":
        """Return the defaults, with those that a published recipe replaces."""
        names = ("fps", "max_frames", "video_tokens", "min_frame_tokens", "max_frame_tokens")
        values = RECIPES[recipe][1:]
        published: dict[str, Any] = dict(zip((*names, "timestamps"), values, strict=True))
        return cls(recipe=recipe, **published)

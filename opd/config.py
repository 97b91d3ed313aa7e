"""Configuration: frozen dataclasses whose defaults are the embedded run; merge(defaults, YAML,
dotted overrides)."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

METHODS = ("opd", "sft")
OBJECTIVES = ("reverse_kl", "sampled")


class ConfigError(ValueError):
    """A user's mistake in the configuration, told in one line."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key}={value}: not one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Checkpoint folders or hub ids; `embedded:NAME` is a shipped model, `tiny:NAME` a fresh
    one."""

    student: str = "embedded:student"
    teacher: str = "embedded:teacher"
    trainable: str = "language"  # language | all (with the vision tower and its merger)
    dtype: str = "auto"  # auto (float32 on CPU, bfloat16 on a GPU) | float32 | bfloat16 | float64
    save_dtype: str = "auto"  # of the saved student: auto (as trained) | float32 | bfloat16

    def __post_init__(self) -> None:
        _choice("model.trainable", self.trainable, ("language", "all"))
        _choice("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float64"))
        _choice("model.save_dtype", self.save_dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files, several separated by commas; `synthetic:SPLIT` is written on first use
    below `video_root`."""

    train: str = "synthetic:train"
    eval: str = "synthetic:eval"
    format: str = "timerft"
    video_root: str = "runs/synthetic"
    limit_train: int | None = None  # examples; the first ones
    limit_eval: int | None = None  # examples; the first ones
    fps: float = 4.0  # frames sampled per second of video
    max_frames: int = 768  # per video
    prompt: str = "{query}. When?{video}"  # the user's turn; {video} stands where the frames go
    backend: str = "decord"  # decord | pyav
    cache_mb: int = 1024  # frozen towers' vision tokens (else frames) kept, MiB a split; 0 is none

    def __post_init__(self) -> None:
        _choice("data.backend", self.backend, ("decord", "pyav"))
        _require(self.fps > 0, f"data.fps={self.fps}: must be above 0")
        _require(self.max_frames >= 4, f"data.max_frames={self.max_frames}: must be 4 or more")
        _require(self.cache_mb >= 0, f"data.cache_mb={self.cache_mb}: must be 0 or more")
        for part in ("{video}", "{query}"):
            _require(
                self.prompt.count(part) == 1, f"data.prompt={self.prompt!r}: must hold {part} once"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The rate rises linearly over `warmup` of the steps, then follows `schedule`."""

    lr: float = 1e-3
    schedule: str = "cosine"  # constant | linear | cosine (the last two fall to min_lr_ratio)
    warmup: float = 0.03  # share of the steps
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr}: must be above 0")
        _choice("optim.schedule", self.schedule, ("constant", "linear", "cosine"))
        _require(0 <= self.warmup < 1, f"optim.warmup={self.warmup}: must be in [0, 1)")
        _require(
            self.max_grad_norm > 0, f"optim.max_grad_norm={self.max_grad_norm}: must be above 0"
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Decoding of rollouts and of sampled evaluation answers."""

    temperature: float = 1.0  # of the policy: sampler and loss alike
    max_completion_length: int = 20  # tokens, the end token included

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"sample.temperature={self.temperature}: must be above 0")
        _require(
            self.max_completion_length > 0,
            f"sample.max_completion_length={self.max_completion_length}: must be 1 or more",
        )


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """`recompute`: none, all, or the number of layers whose activations are recomputed in
    backward."""

    recompute: str = "none"

    def __post_init__(self) -> None:
        known = self.recompute in ("none", "all") or self.recompute.isdecimal()
        _require(known, f"prefix.recompute={self.recompute}: not none, all or a number of layers")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who shards: plain torch on one device, or (not in this version) DeepSpeed ZeRO."""

    kind: str = "torch"
    zero_stage: int = 0

    def __post_init__(self) -> None:
        _choice("engine.kind", self.kind, ("torch",))
        _require(
            self.zero_stage == 0,
            f"engine.zero_stage={self.zero_stage}: engine.kind=torch has stage 0 only",
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which examples of the pool are trained on, and in which order; `none` is a fresh shuffle each
    epoch."""

    kind: str = "none"

    def __post_init__(self) -> None:
        _choice("curriculum.kind", self.kind, ("none",))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on `data.eval` before and after training: one greedy answer and `draws` sampled
    ones a query."""

    draws: int = 4
    batch_size: int = 32  # prompts
    teacher: bool = True  # evaluate the teacher too (method opd)
    before: bool = True

    def __post_init__(self) -> None:
        _require(self.draws >= 0, f"eval.draws={self.draws}: must be 0 or more")
        _require(self.batch_size > 0, f"eval.batch_size={self.batch_size}: must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. The defaults are the embedded one: minutes on two CPU cores."""

    method: str = "opd"  # opd | sft
    objective: str = "reverse_kl"  # of method opd: reverse_kl | sampled
    normalize: str = (
        "sequence"  # sequence (token sum, mean over rollouts) | token (mean over tokens)
    )
    seed: int = 0
    steps: int = 600  # optimizer steps
    batch_size: int = 16  # prompts per optimizer step, all ranks
    micro_batch_size: int | None = None  # prompts per backward; None is the whole batch
    num_rollouts: int = 1  # completions per prompt
    run_dir: str = "runs/default"
    overwrite: bool = False
    threads: int | None = None  # CPU threads; None leaves torch's choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("objective", self.objective, OBJECTIVES)
        _choice("normalize", self.normalize, ("sequence", "token"))
        for key in ("steps", "batch_size", "num_rollouts"):
            _require(getattr(self, key) > 0, f"{key}={getattr(self, key)}: must be 1 or more")
        if self.micro_batch_size is not None:
            _require(
                self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size}: "
                f"must divide batch_size={self.batch_size}",
            )
        _require(
            self.method == "opd" or self.num_rollouts == 1,
            f"num_rollouts={self.num_rollouts}: method sft trains on the one reference answer",
        )


def load_config(arguments: list[str]) -> Config:
    """Merge the defaults, an optional YAML file (the first argument without `=`) and
    `dotted.key=value` overrides.

    Raises ConfigError with one line that names the key.
    """
    files = [a for a in arguments if "=" not in a]
    dotted = [a for a in arguments if "=" in a]
    _require(len(files) <= 1, f"{' '.join(files[1:])}: only one configuration file is read")
    try:
        merged = OmegaConf.structured(Config)
        if files:
            path = Path(files[0])
            _require(path.is_file(), f"{path}: no such configuration file")
            merged = OmegaConf.merge(merged, OmegaConf.load(path))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(dotted))
        config = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def fail(message: object) -> None:
    """End as a user's mistake ends: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

"""Configuration: frozen dataclasses whose defaults are the embedded run; merge(defaults, YAML,
dotted overrides)."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf

from opd.options import ConfigError, check, describe, merge, option, require, shown
from opd.settings import (
    CurriculumConfig,
    EngineConfig,
    EvalConfig,
    GRPOConfig,
    OPDConfig,
    PrefixConfig,
    RewardConfig,
    SampleConfig,
)

__all__ = ["Config", "ConfigError", "command_line", "fail", "load_config", "to_yaml"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Checkpoint folders or hub ids; `embedded:NAME` is a shipped model, `tiny:NAME` a fresh
    one."""

    student: str = option("embedded:student", "the model that is trained")
    teacher: str = option(
        "embedded:teacher", "the frozen model that scores its tokens (method opd)"
    )
    trainable: str = option(
        "language",
        "language, or all: with the vision tower and its merger",
        choices=("language", "all"),
    )
    lora_rank: int | None = option(
        None, "of adapters on the language model, trained in its place; null trains it", least=1
    )
    lora_alpha: float = option(32.0, "adapters are scaled by alpha / rank", above=0)
    dtype: str = option(
        "auto",
        "of weights and activations; auto is float32 on a CPU and bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    save_dtype: str = option(
        "auto", "of the saved student; auto is as trained", choices=("auto", "float32", "bfloat16")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files, several separated by commas; `synthetic:SPLIT` is written on first use
    below `video_root`."""

    train: str = option("synthetic:train", "what is trained on")
    eval: str = option("synthetic:eval", "what is evaluated on")
    format: str = option(
        "timerft",
        "of annotation files",
        choices=("timerft", "charades", "activitynet", "qvhighlights", "tacos"),
    )
    video_root: str = option("runs/synthetic", "folder that videos are named relative to")
    limit_train: int | None = option(None, "the first so many examples", least=1)
    limit_eval: int | None = option(None, "the first so many examples", least=1)
    fps: float = option(4.0, "frames sampled per second of video", above=0)
    max_frames: int = option(768, "frames per video at most", least=4)
    prompt: str = option(
        "{query}. When?{video}", "the user's turn; {video} stands where the frames go"
    )
    backend: str = option("decord", "who decodes", choices=("decord", "pyav"))
    cache_mb: int = option(
        1024,
        "MiB a split of vision tokens (of frozen towers; else of frames) kept in memory",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The rate rises linearly over `warmup`, then follows `schedule`."""

    lr: float = option(1e-3, "highest learning rate", above=0)
    schedule: str = option(
        "cosine",
        "the last two fall to min_lr_ratio of lr",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = option(0.03, "share of the steps", least=0, below=1)
    min_lr_ratio: float = option(0.1, "rate of the last step, as a share of lr", least=0, most=1)
    weight_decay: float = option(0.0, "of matrices; norms and biases have none", least=0)
    beta1: float = option(0.9, "decay of the gradient's mean, a step", least=0, below=1)
    beta2: float = option(0.95, "decay of its square's mean, a step", least=0, below=1)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to it", above=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. The defaults are the embedded one: minutes on two CPU cores."""

    method: str = option("opd", "what trains the student", choices=("opd", "grpo", "sft"))
    objective: str = option(
        "reverse_kl",
        "of method opd; constant is a control that only makes sampled tokens less likely",
        choices=("reverse_kl", "sampled", "jsd", "topk", "constant"),
    )
    normalize: str = option(
        "sequence",
        "sequence: token sum, mean over rollouts; token: mean over tokens",
        choices=("sequence", "token"),
    )
    seed: int = option(0, "of weights, order and sampling", least=0, most=2**63 - 1)
    steps: int = option(450, "optimizer steps", least=1)
    batch_size: int = option(16, "prompts per optimizer step, all ranks", least=1)
    micro_batch_size: int | None = option(
        None, "prompts per backward; null is the whole batch", least=1
    )
    num_rollouts: int = option(1, "completions per prompt", least=1)
    run_dir: str = option("runs/default", "folder that a run writes")
    overwrite: bool = option(False, "replace what an earlier run wrote into run_dir")
    resume: str = option(
        "never", "auto: go on with the stopped run in run_dir, if any", choices=("never", "auto")
    )
    save_every: int | None = option(
        None, "steps between saved states; null is when stopped", least=1
    )
    max_skipped: int = option(
        5, "steps in a row without a finite loss and gradient that end a run", least=1
    )
    threads: int | None = option(
        None, "CPU threads; null leaves torch's choice", least=1, most=1024
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def on_references(self) -> bool:
        """Whether reference answers are trained on, instead of sampled ones."""
        return self.method == "sft" or self.opd.completions == "reference"

    @property
    def compares(self) -> bool:
        """Whether answers to one prompt are compared with each other."""
        return self.method == "grpo" or self.opd.reward_coef > 0

    @property
    def routes(self) -> bool:
        """Whether rollouts that are good enough are suspended."""
        chosen = self.curriculum
        return chosen.routing == "on" or (chosen.routing == "auto" and chosen.kind == "scc")

    @property
    def needs(self) -> tuple[str, ...]:
        """What a training example must have, one of these at least."""
        if self.on_references:
            return "spans", "answer"
        if self.compares or self.routes:
            reward = self.reward
            timed = reward.tiou or reward.threshold or reward.boundary or reward.format
            return ("spans",) * bool(timed) + ("options",) * bool(reward.choice)
        kind = self.curriculum.kind
        if kind == "variance":
            return "spans", "options"
        return ("spans",) if kind in ("tvdf", "scc") else ()

    def __post_init__(self) -> None:
        check(self)
        for part in ("{video}", "{query}"):
            prompt = self.data.prompt
            require(prompt.count(part) == 1, f"data.prompt={shown(prompt)}: must hold {part} once")
        recompute = self.prefix.recompute
        known = recompute in ("none", "all") or (recompute.isascii() and recompute.isdecimal())
        require(known, f"prefix.recompute={shown(recompute)}: not none, all or a number")
        if self.micro_batch_size is not None:
            require(
                self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size}: "
                f"must divide batch_size={self.batch_size}",
            )
        require(
            self.model.lora_rank is None or self.model.trainable == "language",
            f"model.trainable={self.model.trainable}: model.lora_rank trains adapters on the "
            "language model alone",
        )
        method, default = self.method, ModelConfig().teacher
        require(
            not self.on_references or self.num_rollouts == 1,
            f"num_rollouts={self.num_rollouts}: there is one reference answer to a prompt",
        )
        require(
            method == "opd" or self.opd == OPDConfig(),
            f"opd: method {method} has none of these settings",
        )
        require(
            self.opd.completions == "student" or self.objective not in ("sampled", "constant"),
            f"objective={self.objective}: needs tokens that the student sampled, "
            "not opd.completions=reference",
        )
        require(
            method != "grpo" or self.num_rollouts > 1,
            f"num_rollouts={self.num_rollouts}: method grpo compares answers, at least 2",
        )
        require(
            self.opd.reward_coef == 0 or self.num_rollouts > 1,
            f"num_rollouts={self.num_rollouts}: opd.reward_coef compares answers, at least 2",
        )
        require(
            method == "opd" or self.objective == "reverse_kl",
            f"objective={self.objective}: method {method} has an objective of its own",
        )
        require(
            method == "opd" or self.model.teacher == default,
            f"model.teacher={shown(self.model.teacher)}: method {method} has no teacher",
        )
        require(
            method == "opd" or self.curriculum.kind not in ("tvdf", "scc"),
            f"curriculum.kind={self.curriculum.kind}: method {method} has no teacher to be "
            "reliable",
        )
        require(
            not self.routes or (method == "opd" and not self.on_references),
            f"curriculum.routing={self.curriculum.routing}: suspends sampled answers of method opd",
        )
        require(
            not self.routes or self.normalize == "sequence",
            f"normalize={self.normalize}: with curriculum.routing the denominator is preset: "
            "sequence",
        )
        require(
            not self.routes or self.opd.reward_coef == 0,
            f"opd.reward_coef={self.opd.reward_coef}: compares whole groups, which "
            "curriculum.routing breaks up",
        )
        require(
            self.curriculum.rounds <= self.steps,
            f"curriculum.rounds={self.curriculum.rounds}: more than steps={self.steps}",
        )
        terms = ("tiou", "threshold", "boundary", "format", "choice")
        require(
            any(getattr(self.reward, term) for term in terms),
            "reward: every weight is 0, so no answer is better than another",
        )
        require(
            not (self.overwrite and self.resume == "auto"),
            "overwrite=true: excludes resume=auto",
        )
        require(
            self.engine.zero_stage == 0,
            f"engine.zero_stage={self.engine.zero_stage}: engine.kind=torch has stage 0 only",
        )


def load_config(arguments: list[str]) -> Config:
    """Merge the defaults, an optional YAML file (the first argument without `=`) and
    `dotted.key=value` overrides.

    Raises ConfigError with one line that names the key.
    """
    files = [a for a in arguments if "=" not in a]
    extra = " ".join(map(shown, files[1:]))
    require(len(files) <= 1, f"{extra}: only one configuration file is read")
    file = Path(files[0]) if files else None
    return merge(Config(), file, [a for a in arguments if "=" in a])


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def command_line(command: str, arguments: list[str]) -> list[str]:
    """The arguments of a command without its flags; `--help` and `--print-config` print what they
    say and end it."""
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    known = ("-h", "--help", "--print-config")
    for flag in flags:
        require(flag in known, f"{shown(flag)}: no such flag (known: {', '.join(known)})")
    rest = [a for a in arguments if a not in flags]
    if "--print-config" in flags:
        print(to_yaml(load_config(rest)), end="")
    elif flags:
        print(f"usage: python -m {command}\n")
        print("--print-config prints the whole configuration; as a file it repeats the run.\n")
        print("\n".join(describe(Config())))
    if flags:
        raise SystemExit(0)
    return rest


def fail(message: object, exit_code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2 is a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)

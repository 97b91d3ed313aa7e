"""Configuration: frozen dataclasses whose defaults are the embedded run; merge(defaults, YAML,
dotted overrides)."""

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf

from opd.config.data import DataConfig
from opd.config.evaluation import EvalConfig
from opd.config.method import CurriculumConfig, GRPOConfig, OPDConfig, RewardConfig, SampleConfig
from opd.config.models import ModelConfig, TeacherConfig
from opd.config.optimisation import EngineConfig, OptimConfig, PrefixConfig
from opd.config.options import check, merge, option
from opd.errors import ConfigError, printable, require
from opd.text.templates import Template, load_template


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
        "never",
        "auto: go on with the stopped run in run_dir, if any; leave a finished one",
        choices=("never", "auto"),
    )
    save_every: int | None = option(
        None, "steps between saved states; null is when stopped", least=1
    )
    keep_last: int = option(1, "saved states that stay; gone when the run is done", least=1)
    keep_best: str | None = option(
        None,
        "score whose best evaluation on the way (eval.every) leaves its student in run_dir/best",
        choices=("miou", "sampled_miou", "recall@0.5", "recall@0.7", "accuracy", "acc@gqa"),
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
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def on_references(self) -> bool:
        """Whether reference answers are trained on, instead of sampled ones."""
        return self.method == "sft" or self.opd.completions == "reference"

    @cached_property
    def template(self) -> Template:
        """How prompts are written and answers are asked for."""
        return load_template(self.data.prompt)

    @property
    def strict_form(self) -> str | None:
        """The form in which alone answers count; None where any does."""
        return self.template.form if self.data.reading == "strict" else None

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
        try:
            _ = self.template
        except ConfigError as error:
            told = str(error)
            raise ConfigError(told if "data.prompt" in told else f"data.prompt: {told}") from None
        recompute = self.prefix.recompute
        known = recompute in ("none", "all", "auto")
        known = known or (recompute.isascii() and recompute.isdecimal())
        require(known, f"prefix.recompute={printable(recompute)}: not none, all, auto or a number")
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
        data = self.data
        for key in ("min_frame_tokens", "max_frame_tokens"):
            value = getattr(data, key)
            told = f"data.{key}={value}: needs data.video_tokens, the video's own limit"
            known = data.recipe is not None or data.video_tokens is not None
            require(value is None or known, told)
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
            f"model.teacher={printable(self.model.teacher)}: method {method} has no teacher",
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
        require(
            self.keep_best is None or self.eval.every is not None,
            f"keep_best={self.keep_best}: eval.every says at which steps; it is null",
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
        stage, kind = self.engine.zero_stage, self.engine.kind
        require(
            (stage > 0) == (kind == "deepspeed"),
            f"engine.zero_stage={stage}: engine.kind={kind} has "
            + ("stages 1, 2 and 3" if kind == "deepspeed" else "stage 0 only"),
        )
        require(
            not self.engine.offload or kind == "deepspeed",
            f"engine.offload=true: engine.kind={kind} has none",
        )


def load_config(arguments: list[str]) -> Config:
    """Merge the defaults, an optional YAML file (the first argument without `=`) and
    `dotted.key=value` overrides.

    Raises ConfigError with one line that names the key.
    """
    files = [a for a in arguments if "=" not in a]
    extra = " ".join(map(printable, files[1:]))
    require(len(files) <= 1, f"{extra}: only one configuration file is read")
    file = Path(files[0]) if files else None
    merged: Config = merge(Config(), file, [a for a in arguments if "=" in a])
    return replace(merged, data=merged.data.filled())


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))

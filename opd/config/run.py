"""The configuration of a run: all sections, the checks between them, loading and printing."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from omegaconf import OmegaConf

from opd.config.data import DataConfig
from opd.config.evaluation import EvalConfig
from opd.config.method import CurriculumConfig, GRPOConfig, OPDConfig, RewardConfig, SampleConfig
from opd.config.models import ModelConfig, TeacherConfig
from opd.config.optimisation import EngineConfig, OptimConfig, PrefixConfig
from opd.config.options import check_values, is_whole_number, merge, option
from opd.errors import printable, require
from opd.text.templates import Template


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run.

    What is trained, for how long, and where the results go; the defaults are the embedded run.
    """

    method: str = option(
        "opd",
        "Training method: on-policy distillation (opd), group-relative policy optimisation (grpo) "
        "or supervised fine-tuning on reference answers (sft).",
        choices=("opd", "grpo", "sft"),
    )
    objective: str = option(
        "reverse_kl",
        "Objective of method opd: reverse_kl and jsd over the full vocabulary, sampled over the "
        "sampled tokens, topk over the most likely tokens, or the control constant, which makes "
        "every sampled token less likely.",
        choices=("reverse_kl", "sampled", "jsd", "topk", "constant"),
    )
    normalize: str = option(
        "sequence",
        "Reduction of token losses: sequence sums over tokens and averages over rollouts, token "
        "averages over all tokens.",
        choices=("sequence", "token"),
    )
    seed: int = option(0, "Seed of weights, data order and sampling.", least=0, most=2**63 - 1)
    steps: int = option(280, "Number of optimizer steps.", least=1)
    batch_size: int = option(8, "Prompts per optimizer step, over all ranks.", least=1)
    micro_batch_size: int | None = option(
        None, "Prompts per backward pass; null is the whole batch of a rank.", least=1
    )
    num_rollouts: int = option(1, "Completions per prompt.", least=1)
    run_dir: str = option("runs/default", "Folder into which the run is written.")
    overwrite: bool = option(False, "Replace an earlier run in run_dir.")
    resume: str = option(
        "never",
        "Resumption: auto continues an interrupted run in run_dir, starts one if there is none, "
        "and leaves a finished one as it is.",
        choices=("never", "auto"),
    )
    save_every: int | None = option(
        None,
        "Optimizer steps between saved states; null saves a state only when the run is stopped.",
        least=1,
    )
    keep_last: int = option(
        1, "Number of saved states that are kept; a finished run keeps none.", least=1
    )
    keep_best: str | None = option(
        None,
        "Score by which the best student of all evaluations after the start is kept in "
        "run_dir/best; needs eval.every.",
        choices=("miou", "sampled_miou", "recall@0.5", "recall@0.7", "accuracy", "acc@gqa"),
    )
    max_skipped: int = option(
        5, "Consecutive steps without a finite loss and gradient that end the run.", least=1
    )
    threads: int | None = option(
        None,
        "Number of CPU threads; null keeps PyTorch's choice, or takes 1 for the embedded models, "
        "whose operations are too small for more.",
        least=1,
        most=1024,
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
    def cpu_threads(self) -> int | None:
        """Number of CPU threads to set; None keeps PyTorch's choice."""
        embedded = self.model.student.startswith(("embedded:", "tiny:"))
        return 1 if self.threads is None and embedded else self.threads

    @property
    def on_references(self) -> bool:
        """Whether training uses reference answers instead of sampled ones."""
        return self.method == "sft" or self.opd.completions == "reference"

    @property
    def template(self) -> Template:
        """The prompt template, which also sets the form of the answers."""
        return self.data.template

    @property
    def strict_form(self) -> str | None:
        """The only form in which answers are accepted; None where every form is."""
        return self.template.form if self.data.reading == "strict" else None

    @property
    def compares(self) -> bool:
        """Whether the rewards of a prompt's completions are compared with each other."""
        return self.method == "grpo" or self.opd.reward_coef > 0

    @property
    def routes(self) -> bool:
        """Whether rollouts that are good enough are excluded from training."""
        routing, kind = self.curriculum.routing, self.curriculum.kind
        return routing == "on" or (routing == "auto" and kind == "scc")

    @property
    def sampled_length(self) -> int:
        """Tokens at which sampling for training stops: `sample.max_completion_length`, or the
        horizon where nothing behind it is used."""
        length, horizon = self.sample.max_completion_length, self.opd.horizon
        if horizon is None or self.on_references or self.compares or self.routes:
            return length
        return min(length, horizon)

    @property
    def together(self) -> int:
        """Number of micro-batches that are sampled together; 1 until `auto` is resolved."""
        together = self.sample.together
        return int(together) if is_whole_number(together) and not self.on_references else 1

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of which a training example must have at least one; empty if it needs none."""
        if self.on_references:
            return "spans", "answer"
        if self.compares or self.routes:
            return self.reward.needs
        kind = self.curriculum.kind
        if kind == "variance":
            return "spans", "options"
        return ("spans",) if kind in ("tvdf", "scc") else ()

    def __post_init__(self) -> None:
        """Check the keys outside sections and what several sections must agree on."""
        check_values(self)
        if self.micro_batch_size is not None:
            require(
                self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size}: "
                f"must divide batch_size={self.batch_size}",
            )
        require(
            not (self.overwrite and self.resume == "auto"),
            "overwrite=true: excludes resume=auto",
        )
        require(
            self.keep_best is None or self.eval.every is not None,
            f"keep_best={self.keep_best}: needs eval.every, which is null",
        )
        self._check_method()
        self._check_objective()
        self._check_rollouts()
        self._check_curriculum()

    def _check_method(self) -> None:
        method = self.method
        if method == "opd":
            return
        require(
            self.opd == OPDConfig(),
            f"opd: these keys have no effect with method={method}; leave them at their defaults",
        )
        require(
            self.objective == "reverse_kl",
            f"objective={self.objective}: method={method} has an objective of its own; "
            "leave this key out",
        )
        require(
            self.model.teacher == ModelConfig().teacher,
            f"model.teacher={printable(self.model.teacher)}: method={method} has no teacher; "
            "leave this key out",
        )

    def _check_objective(self) -> None:
        require(
            not self.opd.tolerance or self.objective == "reverse_kl",
            f"opd.tolerance={self.opd.tolerance}: has no effect with objective={self.objective}; "
            "leave it at 0",
        )

    def _check_rollouts(self) -> None:
        count = f"num_rollouts={self.num_rollouts}"
        require(
            not self.on_references or self.num_rollouts == 1,
            f"{count}: a prompt has one reference answer; use num_rollouts=1",
        )
        require(
            self.opd.completions == "student" or self.objective not in ("sampled", "constant"),
            f"objective={self.objective}: needs tokens sampled from the student; use "
            "opd.completions=student",
        )
        for key, compares in (
            ("method=grpo", self.method == "grpo"),
            ("opd.reward_coef", self.opd.reward_coef > 0),
        ):
            require(
                not compares or self.num_rollouts > 1,
                f"{count}: {key} compares the answers to a prompt; use 2 or more",
            )

    def _check_curriculum(self) -> None:
        kind, rounds = self.curriculum.kind, self.curriculum.rounds
        require(
            self.method == "opd" or kind not in ("tvdf", "scc"),
            f"curriculum.kind={kind}: needs a teacher, which method={self.method} does not have",
        )
        require(rounds <= self.steps, f"curriculum.rounds={rounds}: more than steps={self.steps}")
        if not self.routes:
            return
        require(
            self.method == "opd" and not self.on_references,
            f"curriculum.routing={self.curriculum.routing}: needs method=opd with sampled "
            "completions",
        )
        require(
            self.normalize == "sequence",
            f"normalize={self.normalize}: curriculum.routing needs normalize=sequence, whose "
            "denominator is known before routing",
        )
        require(
            self.opd.reward_coef == 0,
            f"opd.reward_coef={self.opd.reward_coef}: compares whole groups of rollouts, which "
            "curriculum.routing breaks up; use opd.reward_coef=0",
        )


def load_config(arguments: list[str]) -> Config:
    """Load a configuration from the arguments of a command.

    Args:
        arguments: an optional YAML file and `dotted.key=value` texts, which replace its values.

    Raises:
        ConfigError: for any mistake in them, in one line with the key or the file.
    """
    files = [a for a in arguments if "=" not in a]
    extra = " ".join(map(printable, files[1:]))
    require(len(files) <= 1, f"{extra}: only one configuration file can be given")
    file = Path(files[0]) if files else None
    keys = [a for a in arguments if "=" in a]
    merged: Config = merge(Config(), file, keys)
    if merged.data.recipe is None:
        return merged
    return merge(replace(Config(), data=DataConfig.of_recipe(merged.data.recipe)), file, keys)


def to_yaml(config: Config, without: Collection[str] = ()) -> str:
    """The configuration as YAML, except for the keys and sections in `without`; loading the whole
    one gives an equal configuration."""
    kept = asdict(config)
    for name in without:
        *sections, key = name.split(".")
        section = kept
        for each in sections:
            section = section[each]
        del section[key]
    return OmegaConf.to_yaml(OmegaConf.create(kept))

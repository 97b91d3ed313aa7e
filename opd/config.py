"""Configuration: frozen dataclasses whose defaults are the embedded run; merge(defaults, YAML,
dotted overrides)."""

import difflib
import math
import sys
from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A user's mistake in the configuration, told in one line."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _key(
    default: object,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """A key with its default, what it means (with its unit), and which values are possible."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"doc": doc, "choices": choices, **limits})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Checkpoint folders or hub ids; `embedded:NAME` is a shipped model, `tiny:NAME` a fresh
    one."""

    student: str = _key("embedded:student", "the model that is trained")
    teacher: str = _key("embedded:teacher", "the frozen model that scores its tokens (method opd)")
    trainable: str = _key(
        "language",
        "language, or all: with the vision tower and its merger",
        choices=("language", "all"),
    )
    dtype: str = _key(
        "auto",
        "of weights and activations; auto is float32 on a CPU and bfloat16 on a GPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    save_dtype: str = _key(
        "auto", "of the saved student; auto is as trained", choices=("auto", "float32", "bfloat16")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Annotation files, several separated by commas; `synthetic:SPLIT` is written on first use
    below `video_root`."""

    train: str = _key("synthetic:train", "what is trained on")
    eval: str = _key("synthetic:eval", "what is evaluated on")
    format: str = _key("timerft", "of annotation files")
    video_root: str = _key("runs/synthetic", "folder that videos are named relative to")
    limit_train: int | None = _key(None, "the first so many examples", least=1)
    limit_eval: int | None = _key(None, "the first so many examples", least=1)
    fps: float = _key(4.0, "frames sampled per second of video", above=0)
    max_frames: int = _key(768, "frames per video at most", least=4)
    prompt: str = _key(
        "{query}. When?{video}", "the user's turn; {video} stands where the frames go"
    )
    backend: str = _key("decord", "who decodes", choices=("decord", "pyav"))
    cache_mb: int = _key(
        1024,
        "MiB a split of vision tokens (of frozen towers; else of frames) kept in memory",
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The rate rises linearly over `warmup`, then follows `schedule`."""

    lr: float = _key(1e-3, "highest learning rate", above=0)
    schedule: str = _key(
        "cosine",
        "the last two fall to min_lr_ratio of lr",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = _key(0.03, "share of the steps", least=0, below=1)
    min_lr_ratio: float = _key(0.1, "rate of the last step, as a share of lr", least=0, most=1)
    weight_decay: float = _key(0.0, "of matrices; norms and biases have none", least=0)
    beta1: float = _key(0.9, "decay of the gradient's mean, a step", least=0, below=1)
    beta2: float = _key(0.95, "decay of its square's mean, a step", least=0, below=1)
    max_grad_norm: float = _key(1.0, "longer gradients are scaled down to it", above=0)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Decoding of rollouts and of sampled evaluation answers."""

    temperature: float = _key(1.0, "of the policy: sampler and loss alike", above=0)
    max_completion_length: int = _key(20, "tokens, the end token included", least=1)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """The prompt's forward."""

    recompute: str = _key(
        "none", "layers whose activations are computed again in backward: none, all or a number"
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who shards: plain torch on one device, or (not in this version) DeepSpeed ZeRO."""

    kind: str = _key("torch", "who holds the weights and steps", choices=("torch",))
    zero_stage: int = _key(0, "what DeepSpeed shards", least=0, most=3)


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which examples of the pool are trained on, and in which order."""

    kind: str = _key("none", "none is a fresh shuffle each epoch", choices=("none",))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on `data.eval`, before and after training."""

    draws: int = _key(4, "sampled answers per query, beside the greedy one", least=0)
    batch_size: int = _key(32, "prompts", least=1)
    teacher: bool = _key(True, "evaluate the teacher too (method opd)")
    before: bool = _key(True, "evaluate the student before training too")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. The defaults are the embedded one: minutes on two CPU cores."""

    method: str = _key("opd", "what trains the student", choices=("opd", "sft"))
    objective: str = _key("reverse_kl", "of method opd", choices=("reverse_kl", "sampled"))
    normalize: str = _key(
        "sequence",
        "sequence: token sum, mean over rollouts; token: mean over tokens",
        choices=("sequence", "token"),
    )
    seed: int = _key(0, "of weights, order and sampling", least=0, most=2**63 - 1)
    steps: int = _key(450, "optimizer steps", least=1)
    batch_size: int = _key(16, "prompts per optimizer step, all ranks", least=1)
    micro_batch_size: int | None = _key(
        None, "prompts per backward; null is the whole batch", least=1
    )
    num_rollouts: int = _key(1, "completions per prompt", least=1)
    run_dir: str = _key("runs/default", "folder that a run writes")
    overwrite: bool = _key(False, "replace what an earlier run wrote into run_dir")
    threads: int | None = _key(None, "CPU threads; null leaves torch's choice", least=1, most=1024)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for key, entry, _ in _keys(Config):
            _check(key, _value(self, key), entry)
        for part in ("{video}", "{query}"):
            prompt = self.data.prompt
            _require(
                prompt.count(part) == 1, f"data.prompt={_shown(prompt)}: must hold {part} once"
            )
        recompute = self.prefix.recompute
        known = recompute in ("none", "all") or (recompute.isascii() and recompute.isdecimal())
        _require(known, f"prefix.recompute={_shown(recompute)}: not none, all or a number")
        if self.micro_batch_size is not None:
            _require(
                self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size}: "
                f"must divide batch_size={self.batch_size}",
            )
        _require(
            self.method == "opd" or self.num_rollouts == 1,
            f"num_rollouts={self.num_rollouts}: method sft trains on the one reference answer",
        )
        _require(
            self.method == "opd" or self.objective == "reverse_kl",
            f"objective={self.objective}: method sft has an objective of its own",
        )
        _require(
            self.engine.zero_stage == 0,
            f"engine.zero_stage={self.engine.zero_stage}: engine.kind=torch has stage 0 only",
        )


def _keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key below a dataclass: its dotted name, its field and its type."""
    types = get_type_hints(kind)
    for entry in fields(kind):
        if is_dataclass(types[entry.name]):
            yield from _keys(types[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, types[entry.name]


def _value(config: object, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _shown(value: object) -> str:
    """A value as one line can hold it."""
    text = "null" if value is None else str(value)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check(key: str, value: Any, entry: Field[Any]) -> None:
    """Raise ConfigError unless the value is possible for the key."""
    told, limits = f"{key}={_shown(value)}", entry.metadata
    if isinstance(value, str):
        _require(value.isprintable() and bool(value.strip()), f"{told}: must be one line of text")
        choices = limits["choices"]
        _require(not choices or value in choices, f"{told}: not one of {', '.join(choices)}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _require(math.isfinite(value), f"{told}: must be a finite number")
        least, above, most, below = (limits[k] for k in ("least", "above", "most", "below"))
        inside = least <= value <= most and above < value < below
        low = f"[{least}" if math.isfinite(least) else f"({above}"
        high = f"{most}]" if math.isfinite(most) else f"{below})"
        if math.isfinite(min(most, below)):
            _require(inside, f"{told}: must be in {low}, {high}")
        _require(
            inside,
            f"{told}: must be "
            + (f"{least} or more" if math.isfinite(least) else f"above {above}"),
        )


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value as the key's type; nothing is rounded, and only whole numbers become text."""
    if type(None) in get_args(kind):
        return None if value is None else _typed(key, value, get_args(kind)[0])
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    fits = isinstance(value, int | float if kind is float else kind)
    fits = fits and (kind is bool or not isinstance(value, bool))
    hint = " (put it in quotes)" if kind is str and isinstance(value, bool | float) else ""
    _require(fits, f"{key}={_shown(value)}: not {names[kind]}{hint}")
    try:
        return kind(value)
    except OverflowError:
        raise ConfigError(f"{key}={_shown(value)}: must be a finite number") from None


def _nearest(key: str) -> str:
    """The real key most like a wrong one, by its whole name or its last part."""

    def likeness(known: str) -> float:
        pairs = ((key, known), (key.rpartition(".")[2], known.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last) + 0.1 * whole

    return max((name for name, _, _ in _keys(Config)), key=likeness)


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_file(path: Path) -> dict[Any, Any]:
    known = any(str(path) == key for key, _, _ in _keys(Config))
    hint = f" (to set the key, write {path}=VALUE)" if known else ""
    try:
        _require(path.is_file(), f"{_shown(path)}: no such configuration file{hint}")
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{_shown(path)}: not YAML: {' '.join(str(error).split())}") from error
    _require(isinstance(tree, dict), f"{path}: must hold `key: value` lines")
    return tree


def load_config(arguments: list[str]) -> Config:
    """Merge the defaults, an optional YAML file (the first argument without `=`) and
    `dotted.key=value` overrides; `${key}` in a value stands for another key's.

    Raises ConfigError with one line that names the key.
    """
    files = [a for a in arguments if "=" not in a]
    _require(
        len(files) <= 1, f"{' '.join(map(_shown, files[1:]))}: only one configuration file is read"
    )
    known = {key: kind for key, _, kind in _keys(Config)}
    groups = {key.rpartition(".")[0] for key in known} - {""}
    merged = OmegaConf.create(asdict(Config()))
    sources: list[Any] = [_read_file(Path(file)) for file in files]
    given: set[str] = set()
    for argument in (a for a in arguments if "=" in a):
        key, _, text = argument.partition("=")
        _require(key not in given, f"{_shown(key)}: set twice on the command line")
        given.add(key)
        if known.get(key) is str and text[:1] not in ("'", '"'):
            sources.append({key: text})  # as it is: YAML has other plans for {video} or 1e3
            continue
        try:
            sources.append(OmegaConf.to_container(OmegaConf.from_dotlist([argument])))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            told = f"{_shown(key)}={_shown(text)}"
            raise ConfigError(f"{told}: not a value: {' '.join(str(error).split())}") from error
    key = ""
    try:
        for key, value in (leaf for source in sources for leaf in _leaves(source)):
            _require(key not in groups, f"{key}={_shown(value)}: a group; set {key}.KEY")
            if key not in known:
                raise ConfigError(f"{_shown(key)}: no such key; the nearest is {_nearest(key)}")
            OmegaConf.update(merged, key, value)
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or key
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    values = {key: _typed(key, value, known[key]) for key, value in _leaves(tree)}
    return _build(Config, values)


def _build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    parts = {}
    for name, part in get_type_hints(kind).items():
        key = prefix + name
        parts[name] = _build(part, values, f"{key}.") if is_dataclass(part) else values[key]  # type: ignore[arg-type]
    return kind(**parts)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def command_line(command: str, arguments: list[str]) -> list[str]:
    """The arguments of a command without its flags; `--help` and `--print-config` print what they
    say and end it."""
    flags = [a for a in arguments if a.startswith("-") and "=" not in a]
    for flag in flags:
        known = ("-h", "--help", "--print-config")
        _require(flag in known, f"{_shown(flag)}: no such flag (known: {', '.join(known)})")
    rest = [a for a in arguments if a not in flags]
    if "--print-config" in flags:
        print(to_yaml(load_config(rest)), end="")
    elif flags:
        print(f"usage: python -m {command}\n")
        print("--print-config prints the whole configuration; saved as a file it repeats the run.")
        default = Config()
        for key, entry, _ in _keys(Config):
            choices = entry.metadata["choices"]
            listed = f" [{' | '.join(choices)}]" if choices else ""
            print(f"\n{key}={_shown(_value(default, key))}\n    {entry.metadata['doc']}{listed}")
    if flags:
        raise SystemExit(0)
    return rest


def fail(message: object) -> None:
    """End as a user's mistake ends: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

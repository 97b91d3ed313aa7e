"""A dataclass of dataclasses as a set of dotted keys: what they mean, which values are possible,
and a merge of defaults, a YAML file and `dotted.key=value` arguments."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import Field, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.errors import ConfigError, printable, require


def option(
    default: object,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """A key's default, what it means (with its unit), and which values are possible."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"doc": doc, "choices": choices, **limits})


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key of a dataclass and the dataclasses in it: dotted name, field and type."""
    types = get_type_hints(kind)
    for entry in fields(kind):
        if is_dataclass(types[entry.name]):
            yield from keys_of(types[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, types[entry.name]


def describe(default: Any) -> Iterator[str]:
    """Two lines for every key: its default, then its meaning and possible values."""
    for key, entry, _ in keys_of(type(default)):
        choices = entry.metadata["choices"]
        listed = f" [{' | '.join(choices)}]" if choices else ""
        yield f"{key}={printable(_value(default, key))}"
        yield f"    {entry.metadata['doc']}{listed}"


def check(config: Any) -> None:
    """Raise ConfigError unless every value is possible for its key."""
    for key, entry, _ in keys_of(type(config)):
        value, limits = _value(config, key), entry.metadata
        told = f"{key}={printable(value)}"
        if isinstance(value, str):
            require(
                value.isprintable() and bool(value.strip()), f"{told}: must be one line of text"
            )
            choices = limits["choices"]
            require(not choices or value in choices, f"{told}: not one of {', '.join(choices)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            require(math.isfinite(value), f"{told}: must be a finite number")
            least, above, most, below = (limits[k] for k in ("least", "above", "most", "below"))
            if math.isfinite(min(most, below)):
                low = f"[{least}" if math.isfinite(least) else f"({above}"
                high = f"{most}]" if math.isfinite(most) else f"{below})"
                wanted = f"in {low}, {high}"
            else:
                wanted = f"{least} or more" if math.isfinite(least) else f"above {above}"
            inside = least <= value <= most and above < value < below
            require(inside, f"{told}: must be {wanted}")


def merge(default: Any, file: Path | None, arguments: list[str]) -> Any:
    """The defaults with a YAML file's values and then those of `dotted.key=value` arguments; later
    ones win, and `${key}` in a value stands for another key's.

    Args: default: an instance of the dataclass, every part of it included.

    Raises ConfigError, in one line that names the key, for an unknown key and for a value of
    another type: nothing is rounded, and only whole numbers become text.
    """
    types = {key: kind for key, _, kind in keys_of(type(default))}
    groups = {key.rpartition(".")[0] for key in types} - {""}
    sources = [] if file is None else [_read_file(file, types)]
    sources += [_read_argument(argument, types) for argument in arguments]
    merged = OmegaConf.create(asdict(default))
    key = ""
    try:
        for key, value in (leaf for source in sources for leaf in _leaves(source)):
            require(key not in groups, f"{key}={printable(value)}: a group; set {key}.KEY")
            if key not in types:
                raise ConfigError(
                    f"{printable(key)}: no such key; the nearest is {_nearest(key, types)}"
                )
            OmegaConf.update(merged, key, value)
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or key
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    values = {key: _typed(key, value, types[key]) for key, value in _leaves(tree)}
    return _build(type(default), values)


def _read_file(path: Path, types: dict[str, Any]) -> dict[Any, Any]:
    hint = f" (to set the key, write {path}=VALUE)" if str(path) in types else ""
    try:
        require(path.is_file(), f"{printable(path)}: no such configuration file{hint}")
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{printable(path)}: not YAML: {' '.join(str(error).split())}") from error
    require(isinstance(tree, dict), f"{path}: must hold `key: value` lines")
    return tree


def _read_argument(argument: str, types: dict[str, Any]) -> Any:
    key, _, text = argument.partition("=")
    if types.get(key) is str and text[:1] not in ("'", '"'):
        return {key: text}  # as it is: YAML has other plans for {video} or 1e3
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        told = f"{printable(key)}={printable(text)}"
        raise ConfigError(f"{told}: not a value: {' '.join(str(error).split())}") from error


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nearest(key: str, known: dict[str, Any]) -> str:
    """The real key most like a wrong one, by its whole name or its last part."""

    def likeness(name: str) -> float:
        pairs = ((key, name), (key.rpartition(".")[2], name.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last) + 0.1 * whole

    return max(known, key=likeness)


def _typed(key: str, value: Any, kind: Any) -> Any:
    if type(None) in get_args(kind):
        return None if value is None else _typed(key, value, get_args(kind)[0])
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    fits = isinstance(value, int | float if kind is float else kind)
    fits = fits and (kind is bool or not isinstance(value, bool))
    hint = " (put it in quotes)" if kind is str and isinstance(value, bool | float) else ""
    require(fits, f"{key}={printable(value)}: not {names[kind]}{hint}")
    try:
        return kind(value)
    except OverflowError:
        raise ConfigError(f"{key}={printable(value)}: must be a finite number") from None


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    parts: dict[str, Any] = {}
    for name, part in get_type_hints(kind).items():
        key = prefix + name
        parts[name] = _build(part, values, f"{key}.") if is_dataclass(part) else values[key]  # type: ignore[arg-type]
    return kind(**parts)

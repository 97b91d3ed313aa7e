"""Keys of a configuration: defaults, descriptions and limits, and the merge of their values.

A configuration is a dataclass of dataclasses; its keys are the dotted names of their fields.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
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
    needs: tuple[str, ...] = (),
) -> Any:
    """A dataclass field for a key.

    Args:
        default: value unless a file or an argument sets another.
        doc: plain sentence that says what the key does, with its unit.
        choices: possible values of a text; empty where any text is possible.
        least, above, most, below: limits of a number, the first and third included.
        needs: for the weight of a reward term, the fields of which an example must have one.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"doc": doc, "choices": choices, "needs": needs, **limits}
    return field(default=default, metadata=metadata)


def is_whole_number(text: str) -> bool:
    """Whether a text consists of the digits 0 to 9, and of one at least."""
    return text.isascii() and text.isdecimal()


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Iterate over the keys of a dataclass and of those within it: dotted name, field, type."""
    types = get_type_hints(kind)
    for entry in fields(kind):
        if is_dataclass(types[entry.name]):
            yield from keys_of(types[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, types[entry.name]


def limits_of(entry: Field[Any]) -> str:
    """The limits of a number in words: `in [0, 1)`, `1 or more`, `above 0`; empty without any."""
    least, above, most, below = (entry.metadata[k] for k in ("least", "above", "most", "below"))
    if math.isfinite(min(most, below)):
        low = f"[{least}" if math.isfinite(least) else f"({above}"
        high = f"{most}]" if math.isfinite(most) else f"{below})"
        return f"in {low}, {high}"
    if math.isfinite(least):
        return f"{least} or more"
    return f"above {above}" if math.isfinite(above) else ""


def check_values(section: Any, name: str = "") -> None:
    """Raise ConfigError unless every key of one dataclass has a possible value; dataclasses within
    it check themselves. `name` is what the section's keys begin with."""
    for entry in fields(section):
        limits, value = entry.metadata, getattr(section, entry.name)
        if not limits:
            continue  # a section
        setting = f"{name}.{entry.name}".lstrip(".") + f"={printable(value)}"
        if isinstance(value, str):
            valid = value.isprintable() and bool(value.strip())
            require(valid, f"{setting}: must be one line of text")
            choices = limits["choices"]
            require(not choices or value in choices, f"{setting}: not one of {', '.join(choices)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            require(math.isfinite(value), f"{setting}: must be a finite number")
            inside = limits["least"] <= value <= limits["most"]
            inside = inside and limits["above"] < value < limits["below"]
            require(inside, f"{setting}: must be {limits_of(entry)}")


def merge(default: Any, file: Path | None, arguments: list[str]) -> Any:
    """Merge the defaults, the values of a YAML file and those of `dotted.key=value` arguments.

    Later values win, and `${key}` in a value stands for the value of another key. Nothing is
    rounded, and only whole numbers become text.

    Args:
        default: an instance of the dataclass, with all of its sections.
        file: the YAML file, or None.
        arguments: `dotted.key=value` texts.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type, in one line with the key.
    """
    types = {key: kind for key, _, kind in keys_of(type(default))}
    sections = {key.rpartition(".")[0] for key in types} - {""}
    sources = [] if file is None else [_read_file(file, types)]
    sources += [_read_argument(argument, types) for argument in arguments]
    merged = OmegaConf.create(asdict(default))
    key = ""
    try:
        for key, value in (leaf for source in sources for leaf in leaves(source)):
            require(
                key not in sections,
                f"{key}={printable(value)}: a section has no value; set {key}.KEY",
            )
            if key not in types:
                raise ConfigError(
                    f"{printable(key)}: no such key; the nearest is {_nearest(key, types)}"
                )
            OmegaConf.update(merged, key, value)
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or key
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    values = {key: _typed(key, value, types[key]) for key, value in leaves(tree)}
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
    require(isinstance(tree, dict), f"{path}: must consist of `key: value` lines")
    return tree


def _read_argument(argument: str, types: dict[str, Any]) -> Any:
    key, _, text = argument.partition("=")
    if types.get(key) is str and text[:1] not in ("'", '"'):
        return {key: text}  # YAML would read {video} as a mapping and 1e3 as a number
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        setting = f"{printable(key)}={printable(text)}"
        raise ConfigError(f"{setting}: not a value: {' '.join(str(error).split())}") from error


def leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the dotted names and values of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nearest(key: str, types: Mapping[str, Any]) -> str:
    """The existing key most similar to an unknown one, by its whole name or its last part."""

    def similarity(name: str) -> float:
        pairs = ((key, name), (key.rpartition(".")[2], name.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last) + 0.1 * whole

    return max(types, key=similarity)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """A value as its key's type; ConfigError if it is of another type."""
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


def _build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """An instance of a dataclass and of those within it, from the values of dotted keys."""
    parts: dict[str, Any] = {}
    for name, part in get_type_hints(kind).items():
        key = prefix + name
        parts[name] = _build(part, values, f"{key}.") if is_dataclass(part) else values[key]  # type: ignore[arg-type]
    return kind(**parts)

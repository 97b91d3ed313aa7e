"""Where examples come from: annotation files and our own splits, checked against their videos.

A source is written `[FORMAT:]PATH[?root=DIR&weight=W&part=train|held_out&holdout=0.1]`; several are
separated by commas. `synthetic:SPLIT` is written on first use.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd.config.data import DataConfig
from opd.data.annotations.formats import FORMATS, read_examples, recognise
from opd.data.checked import checked_path, is_of, read_checked
from opd.data.examples import Example
from opd.data.synthetic import splits
from opd.data.video.decoding import probe_duration
from opd.errors import DataError

PROBED_AT_ONCE = 256  # videos, by
PROBING = 8  # threads
PARTS = ("train", "held_out")
SAME_S = 1.0  # by which the durations of one video differ at most


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the sources that a key names.

    `format` is None for our own splits; `weight` is the share of what training draws, relative to
    the other sources' (None: every example as often as any); `part` is what is taken of a file that
    is split by videos, `holdout` of which are held out.
    """

    path: str
    format: str | None
    root: Path
    weight: float | None = None
    part: str | None = None
    holdout: float = 0.1

    @classmethod
    def read(cls, text: str, config: DataConfig) -> "Source":
        """From the text of a key. Raises DataError."""
        head, _, options = text.partition("?")
        name, colon, path = head.partition(":")
        root = Path(config.video_root)
        if colon and name == "synthetic":
            if options:
                raise DataError(f"{text}: synthetic splits have no options")
            splits.split_of(path)
            return cls(path=path, format=None, root=root)
        known = colon and (name in FORMATS or name == "auto")
        format, path = (name, path) if known else (config.format, head)
        pairs = (pair.partition("=") for pair in options.split("&") if pair)
        given: dict[str, str] = {key: value for key, _, value in pairs}
        values: dict[str, Any] = {"root": Path(given.pop("root", config.video_root))}
        for key in ("weight", "holdout"):
            if key in given:
                value = given.pop(key)
                try:
                    values[key] = float(value)
                except ValueError:
                    values[key] = -1.0
                if not 0 < values[key] < (1 if key == "holdout" else float("inf")):
                    raise DataError(f"{text}: {key}={value} is out of range")
        if "part" in given:
            values["part"] = given.pop("part")
            if values["part"] not in PARTS:
                raise DataError(f"{text}: part is one of {', '.join(PARTS)}")
        elif "holdout" in values:
            raise DataError(f"{text}: holdout needs part=train or part=held_out")
        if given:
            known_options = "root, weight, part, holdout"
            raise DataError(f"{text}: no option {next(iter(given))!r}; known: {known_options}")
        if not Path(path).is_file():
            raise DataError(f"{path}: no such annotation file")
        return cls(path=path, format=format, **values)

    @property
    def annotations(self) -> Path:
        """The annotation file; one of our own is written on first use."""
        if self.format is None:
            return splits.ensure_split(self.root, self.path)
        return Path(self.path)

    def examples(self, left_out: list[str]) -> list[Example]:
        """What the file holds, or the part of it; nothing is known of the videos yet."""
        if self.format is None:
            return read_examples(self.annotations, "timerft", self.root, left_out)
        format = self.format
        if format == "auto":
            format = recognise(self.path)
            print(f"{self.path}: read as {format}", file=sys.stderr)
        found = read_examples(self.path, format, self.root, left_out)
        if self.part is not None:
            held_out = self.part == "held_out"
            found = [e for e in found if (_place(e.video.stem) < self.holdout) == held_out]
        return found


def _place(name: str) -> float:
    """In [0, 1), of a video's name alone: all queries of a video fall to one part."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def sources_of(text: str, config: DataConfig) -> list[Source]:
    """The sources that a key names. Raises DataError."""
    found = [Source.read(part.strip(), config) for part in text.split(",")]
    weighted = [source.weight is not None for source in found]
    if any(weighted) and not all(weighted):
        raise DataError(f"{found[weighted.index(False)].path}: has no weight, other sources have")
    return found


def load_examples(
    sources: str,
    config: DataConfig,
    limit: int | None,
    needs: Sequence[str] = (),
    left_out: list[str] | None = None,
) -> list[Example]:
    """The usable examples of one or several sources, as the module says.

    Args:
        limit: the first so many.
        needs: of `spans`, `answer` and `options`; one of them at least must be there.
        left_out: takes a line, naming file and place, for each example that cannot be used: a
            malformed record, an id used before, a video that is no video or shorter than the span
            says. Nothing is decoded yet.

    Returns: examples with a duration: the annotation's, else the file's.

    Raises DataError for a source that cannot be read and where no example is left.
    """
    left_out = [] if left_out is None else left_out
    named = sources_of(sources, config)
    examples: dict[str, Example] = {}
    from_source: Counter[int] = Counter()
    numbers: dict[str, int] = {}
    pool = [(number, e) for number, s in enumerate(named) for e in s.examples(left_out)]
    reports = [checked_path(source.path) for source in named if source.format]
    probed = _probed((example.video for _, example in pool), read_checked(reports))
    for (number, example), duration in zip(pool, probed, strict=True):
        try:
            if example.id in examples:
                before = examples[example.id].source
                raise DataError(f"id {example.id!r} was used at {before} already")
            if needs and not any(getattr(example, name) for name in needs):
                raise DataError(f"no {' or '.join(needs)} in it")
            examples[example.id] = _checked(example, duration)
        except DataError as error:
            left_out.append(f"{example.source}: {error}")
            continue
        numbers[example.id] = number
        from_source[number] += 1
        if limit is not None and len(examples) >= limit:
            break
    if not examples:
        reason = f"; first of {len(left_out)} left out: {left_out[0]}" if left_out else ""
        raise DataError(f"{sources}: no usable example{reason}")
    if named[0].weight is None:
        return list(examples.values())
    total = sum(named[number].weight or 0.0 for number in from_source)
    each = {
        number: (named[number].weight or 0.0) / total * len(examples) / count
        for number, count in from_source.items()
    }
    return [replace(e, weight=each[numbers[name]]) for name, e in examples.items()]


def load_split(
    data: DataConfig, split: str, needs: Sequence[str] = (), left_out: list[str] | None = None
) -> list[Example]:
    """The examples of `data.train` or `data.eval`, up to its limit; errors name the key."""
    try:
        sources, limit = getattr(data, split), getattr(data, f"limit_{split}")
        return load_examples(sources, data, limit, needs, left_out)
    except DataError as error:
        raise DataError(f"data.{split}: {error}") from error


def check_sources(data: DataConfig) -> None:
    """Raise DataError, naming the key, for a source that is not there, before any is written."""
    for split in ("train", "eval"):
        try:
            sources_of(getattr(data, split), data)
        except DataError as error:
            raise DataError(f"data.{split}: {error}") from None


def check_leak(train: Iterable[Example], held_out: Iterable[Example], data: DataConfig) -> None:
    """Raise DataError where both have a video, unless `data.allow_leak`: one file, or two of one
    name whose durations differ by less than a second."""
    if data.allow_leak:
        return
    paths: set[Path] = set()
    durations: dict[str, list[float | None]] = {}
    for example in train:
        if example.video not in paths:
            paths.add(example.video)
            durations.setdefault(example.video.stem, []).append(example.duration_s)
    paths |= {path.resolve() for path in paths}

    def leaks(example: Example) -> bool:
        if example.video in paths or example.video.resolve() in paths:
            return True
        mine = example.duration_s
        return any(
            mine is None or other is None or abs(mine - other) < SAME_S
            for other in durations.get(example.video.stem, [])
        )

    found = list(dict.fromkeys(str(e.video) for e in held_out if leaks(e)))
    if found:
        named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise DataError(
            f"data.eval: {len(found)} of its videos are trained on: {named}; "
            "data.allow_leak=true evaluates on them all the same"
        )


def _checked(example: Example, duration_s: float | DataError) -> Example:
    """The example, with a duration; DataError where its video cannot be read or ends before a span
    starts."""
    if isinstance(duration_s, DataError):
        raise duration_s
    for start_s, _ in example.spans:
        if start_s >= duration_s:
            raise DataError(f"a span starts at {start_s:g} s in a video of {duration_s:g} s")
    return example if example.duration_s else replace(example, duration_s=duration_s)


def _probed(
    videos: Iterable[Path], known: dict[Path, dict[str, Any]]
) -> Iterator[float | DataError]:
    """Each video's duration in seconds, or what is wrong with it; every file is looked at once,
    some ahead of what is asked for."""

    def probe(video: Path) -> float | DataError:
        row = known.get(video.absolute())
        if row is not None and is_of(row, video):
            return DataError(f"{video}: {row['reason']}") if row["reason"] else row["duration_s"]
        try:
            return probe_duration(video)
        except DataError as error:
            return error

    durations: dict[Path, float | DataError] = {}
    ahead = iter(videos)
    with ThreadPoolExecutor(PROBING, thread_name_prefix="probe") as pool:
        while part := list(islice(ahead, PROBED_AT_ONCE)):
            new = [video for video in dict.fromkeys(part) if video not in durations]
            durations.update(zip(new, pool.map(probe, new), strict=True))
            for video in part:
                yield durations[video]


# What `python -m opd.check` left beside an annotation file: a row for each of its videos.

"""Loading examples from annotation files and synthetic splits, checked against their videos.

A source is written `[FORMAT:]PATH[?root=DIR&weight=W&part=train|held_out&holdout=0.1]` or
`synthetic:SPLIT`, a split that is generated on first use. Commas separate several sources.
"""

import hashlib
import itertools
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
from opd.data.checked import checked_path, is_current, read_checked
from opd.data.examples import Example
from opd.data.synthetic import splits
from opd.data.video.backends import check_backend
from opd.data.video.decoding import probe_duration
from opd.errors import DataError
from opd.text.forms import Span

PROBE_CHUNK = 256  # videos probed per round, so that a limit on examples saves the rest
PROBE_THREADS = 8
PARTS = ("train", "held_out")
SAME_S = 1.0  # videos of one name whose durations differ by less are the same


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of examples.

    Attributes:
        path: the annotation file, or the name of a synthetic split.
        format: one of `FORMATS` or "auto"; None for a synthetic split.
        root: the folder that videos are named relative to.
        weight: the share of training batches, relative to other sources; None draws every example
            equally often.
        part: of a file that is divided by videos, "train" or "held_out"; None takes all of it.
        holdout: the fraction of the videos that is held out.
    """

    path: str
    format: str | None
    root: Path
    weight: float | None = None
    part: str | None = None
    holdout: float = 0.1

    @classmethod
    def read(cls, text: str, config: DataConfig) -> "Source":
        """Parse a source as the configuration writes it. Raises DataError."""
        head, _, options = text.partition("?")
        name, colon, path = head.partition(":")
        root = Path(config.video_root)
        if colon and name == "synthetic":
            if options:
                raise DataError(f"{text}: synthetic splits have no options")
            splits.split_of(path)
            return cls(path=path, format=None, root=root)
        names_format = colon and (name in FORMATS or name == "auto")
        format, path = (name, path) if names_format else (config.format, head)
        pairs = (pair.partition("=") for pair in options.split("&") if pair)
        texts: dict[str, str] = {key: value for key, _, value in pairs}
        values: dict[str, Any] = {"root": Path(texts.pop("root", config.video_root))}
        for key in ("weight", "holdout"):
            if key in texts:
                value = texts.pop(key)
                try:
                    values[key] = float(value)
                except ValueError:
                    values[key] = -1.0
                if not 0 < values[key] < (1 if key == "holdout" else float("inf")):
                    allowed = "between 0 and 1" if key == "holdout" else "a positive number"
                    raise DataError(f"{text}: {key}={value} is not {allowed}")
        if "part" in texts:
            values["part"] = texts.pop("part")
            if values["part"] not in PARTS:
                raise DataError(f"{text}: part must be one of {', '.join(PARTS)}")
        elif "holdout" in values:
            raise DataError(f"{text}: holdout needs part=train or part=held_out")
        if texts:
            known_options = "root, weight, part, holdout"
            raise DataError(f"{text}: unknown option {next(iter(texts))!r}; known: {known_options}")
        if not Path(path).is_file():
            raise DataError(f"{path}: no such annotation file")
        return cls(path=path, format=format, **values)

    @property
    def annotations(self) -> Path:
        """Return the path of the annotation file; a synthetic split is generated on first use."""
        if self.format is None:
            return splits.ensure_split(self.root, self.path)
        return Path(self.path)

    def examples(self, left_out: list[str]) -> list[Example]:
        """Read the examples of the source, or of its part; videos need not be readable yet.

        `left_out` and errors are those of `read_examples`.
        """
        if self.format is None:
            return read_examples(self.annotations, "timerft", self.root, left_out)
        format = self.format
        if format == "auto":
            format = recognise(self.path)
            print(f"{self.path}: read as {format}", file=sys.stderr)
        examples = read_examples(self.path, format, self.root, left_out)
        if self.part is not None:
            held_out = self.part == "held_out"
            examples = [e for e in examples if (_draw(e.video.stem) < self.holdout) == held_out]
        return examples


def _draw(name: str) -> float:
    """Return a uniform number in [0, 1) for a video's name; all its queries fall into one part."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def sources_of(text: str, config: DataConfig) -> list[Source]:
    """Parse a comma-separated list of sources. Raises DataError."""
    sources = [Source.read(part.strip(), config) for part in text.split(",")]
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        path = sources[weighted.index(False)].path
        raise DataError(f"{path}: needs a weight, because other sources have one")
    return sources


def load_examples(
    sources: str,
    config: DataConfig,
    limit: int | None,
    needs: Sequence[str] = (),
    left_out: list[str] | None = None,
) -> list[Example]:
    """Load the usable examples of one or several sources. Videos are probed, not decoded.

    Args:
        sources: comma-separated, as described at the top of this module.
        limit: the number of usable examples to load, from the first one on; None loads all.
        needs: names of `spans`, `answer` and `options`; an example must have at least one of them.
        left_out: a list that receives one line, naming file and place, for each unusable example:
            a malformed record, a duplicate id, a video that cannot be read or ends before a span
            starts.

    Returns:
        Examples with a duration, the annotation's or else the file's, and with weights such that
        sources are drawn in proportion to theirs.

    Raises:
        DataError: a source cannot be read, or no example is usable.
    """
    left_out = [] if left_out is None else left_out
    parsed = sources_of(sources, config)
    examples: dict[str, Example] = {}
    from_source: Counter[int] = Counter()
    numbers: dict[str, int] = {}
    pool = [(number, e) for number, s in enumerate(parsed) for e in s.examples(left_out)]
    reports = [checked_path(source.path) for source in parsed if source.format]
    probed = _probed((example.video for _, example in pool), read_checked(reports))
    for (number, example), duration in zip(pool, probed, strict=True):
        try:
            if example.id in examples:
                first_use = examples[example.id].source
                raise DataError(f"duplicate id {example.id!r}, first used at {first_use}")
            if needs and not any(getattr(example, name) for name in needs):
                raise DataError(f"has no {' or '.join(needs)}")
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
    if parsed[0].weight is None:
        return list(examples.values())
    total = sum(parsed[number].weight or 0.0 for number in from_source)
    weights = {
        number: (parsed[number].weight or 0.0) / total * len(examples) / count
        for number, count in from_source.items()
    }
    return [replace(e, weight=weights[numbers[name]]) for name, e in examples.items()]


def load_split(
    data: DataConfig, split: str, needs: Sequence[str] = (), left_out: list[str] | None = None
) -> list[Example]:
    """Load the examples of `data.train` or `data.eval`, up to its limit; errors name the key."""
    try:
        sources, limit = getattr(data, split), getattr(data, f"limit_{split}")
        return load_examples(sources, data, limit, needs, left_out)
    except DataError as error:
        raise DataError(f"data.{split}: {error}") from error


def check_sources(data: DataConfig) -> None:
    """Raise DataError, naming the key, for a source that does not exist, and ConfigError for a
    decoding library that cannot be imported; generate nothing."""
    check_backend(data.backend)
    for split in ("train", "eval"):
        try:
            sources_of(getattr(data, split), data)
        except DataError as error:
            raise DataError(f"data.{split}: {error}") from None


def check_leak(train: Iterable[Example], held_out: Iterable[Example], data: DataConfig) -> None:
    """Raise DataError where training and evaluation share a video, unless `data.allow_leak`.

    Files are the same where they are one file, or have one name and durations that are unknown or
    differ by less than `SAME_S`. Clips of one file share a video where they overlap; the duration
    of a file of which one has a clip is unknown.
    """
    if data.allow_leak:
        return
    of_name: dict[str, list[Example]] = {}
    for example in {e.footage: e for e in train}.values():
        of_name.setdefault(example.video.stem, []).append(example)
    of_file: dict[Path, list[Example]] = {}
    for example in itertools.chain(*of_name.values()):
        for path in {example.video, example.video.resolve()}:
            of_file.setdefault(path, []).append(example)

    def leaks(example: Example) -> bool:
        files = {example.video, example.video.resolve()}
        return any(
            _overlap(example.clip, other.clip) for path in files for other in of_file.get(path, ())
        ) or any(
            _overlap(example.clip, other.clip) and _as_long(example, other)
            for other in of_name.get(example.video.stem, ())
        )

    leaked = list(dict.fromkeys(str(e.video) for e in held_out if leaks(e)))
    if leaked:
        names = ", ".join(leaked[:3]) + (", ..." if len(leaked) > 3 else "")
        raise DataError(
            f"data.eval: {len(leaked)} of its videos are trained on: {names}; "
            "set data.allow_leak=true to evaluate on them anyway"
        )


def _overlap(one: Span | None, other: Span | None) -> bool:
    """Return whether two clips of a file have a part in common; None is the whole file."""
    return one is None or other is None or max(one[0], other[0]) < min(one[1], other[1])


def _as_long(one: Example, other: Example) -> bool:
    """Return whether the files of two examples may be as long as each other."""
    if one.clip or other.clip or one.duration_s is None or other.duration_s is None:
        return True
    return abs(one.duration_s - other.duration_s) < SAME_S


def _checked(example: Example, file_s: float | DataError) -> Example:
    """Return the example with a duration; DataError where its file is unreadable or too short."""
    if isinstance(file_s, DataError):
        raise file_s
    try:
        duration_s = example.length_s(file_s)
    except ValueError as error:
        raise DataError(f"{example.video}: {error}") from error
    for start_s, _ in example.spans:
        if start_s >= duration_s:
            raise DataError(f"a span starts at {start_s:g} s in a video of {duration_s:g} s")
    return example if example.duration_s else replace(example, duration_s=duration_s)


def _probed(
    videos: Iterable[Path], reports: dict[Path, dict[str, Any]]
) -> Iterator[float | DataError]:
    """Yield each video's duration in seconds, or the error about it.

    Every file is probed once, unless `reports` has a current row about it.
    """

    def probe(video: Path) -> float | DataError:
        row = reports.get(video.absolute())
        if row is not None and is_current(row, video):
            return DataError(f"{video}: {row['reason']}") if row["reason"] else row["duration_s"]
        try:
            return probe_duration(video)
        except DataError as error:
            return error

    durations: dict[Path, float | DataError] = {}
    remaining = iter(videos)
    with ThreadPoolExecutor(PROBE_THREADS, thread_name_prefix="probe") as pool:
        while chunk := list(islice(remaining, PROBE_CHUNK)):
            new = [video for video in dict.fromkeys(chunk) if video not in durations]
            durations.update(zip(new, pool.map(probe, new), strict=True))
            for video in chunk:
                yield durations[video]

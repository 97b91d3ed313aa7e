"""Official scores of checkpoints, runs or stored answers on any data set:

    python -m opd.evaluate TARGET [TARGET ...] [dotted.key=value ...]

A target is a run folder (its student on its own held-out split), a checkpoint folder, hub id or
`embedded:NAME`, or a file of stored answers (JSON lines of `id` and `answer`). Answers go to
`run_dir/evaluation.jsonl` while they are made, so that `resume=auto` goes on with them; scores and
everything they depend on to `evaluation.json`, best and worst samples to `evaluation.png`. Several
targets are compared with the first, on the same queries.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd import distributed
from opd.config.command_line import command_line, fail
from opd.config.run import Config, load_config, to_yaml
from opd.data.annotations.formats import recognise
from opd.data.examples import Example
from opd.data.prompts import Prompts
from opd.data.sources import check_leak, load_split, sources_of
from opd.data.synthetic import splits
from opd.distributed import progress_bar, set_up
from opd.errors import ConfigError, DataError, UserError
from opd.files import checksum, read_rows, write_rows
from opd.generation.sampling import Policy
from opd.method.answering import evaluate
from opd.models.load import load_model, load_options, load_processor, resolve
from opd.record.environment import environment
from opd.scoring.evaluation import Evaluation, graded
from opd.scoring.metrics import paired_interval
from opd.scoring.official import score
from opd.scoring.results import BUCKETS, breakdown
from opd.scoring.timeline import timeline

METRICS = {  # of a data set's own scorer, by format; all others are of grounding
    "qvhighlights": "qvhighlights",
    "nextgqa": "nextgqa",
    "rextime": "rextime",
    "mcq": "videoqa",
}


def main(arguments: list[str] | None = None) -> None:
    """The command, as the module says."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        usage = "opd.evaluate TARGET [TARGET ...] [dotted.key=value ...]"
        given = command_line(usage, arguments)
        targets = [a for a in given if "=" not in a]
        keys = [a for a in given if "=" in a]
        if not targets or given[: len(targets)] != targets:
            raise ConfigError(f"usage: python -m {usage}")
        configs = [config_of(target, keys, len(targets) > 1) for target in targets]
        found = [run(target, c) for target, c in zip(targets, configs, strict=True)]
        if distributed.is_first():
            print(json.dumps(found[0], indent=2) if len(found) == 1 else compared(targets, found))
    except UserError as error:
        fail(error)


def config_of(target: str, keys: list[str], several: bool) -> Config:
    """What a target is evaluated with: a run's own configuration or the defaults, under the keys
    that are given. Each of several targets has a folder below `run_dir`."""
    path = Path(target)
    finished = (path / "config.yaml").is_file()
    given = {key.partition("=")[0] for key in keys}
    defaults: dict[str, Any] = {"resume": "never"}
    if not path.is_file():
        defaults["model.student"] = path / "student" if finished else target
    defaults["run_dir"] = path if path.is_dir() and not several else "runs/evaluate"
    added = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    config = load_config([str(path / "config.yaml")] * finished + added + keys)
    if several:
        name = target.strip("./").replace("/", "_").replace(":", "_")
        config = replace(config, run_dir=str(Path(config.run_dir) / name))
    return config


def run(target: str, config: Config) -> dict[str, Any]:
    """Evaluate one target; its scores, with what they depend on, as they are stored."""
    folder = Path(config.run_dir)
    path, part = folder / "evaluation.jsonl", folder / f"evaluation.{distributed.rank()}.part"
    going_on = config.resume == "auto"
    if path.exists() and not config.overwrite and not going_on:
        raise ConfigError(f"{path}: is there already; choose another run_dir or say overwrite=true")
    stored = Path(target) if Path(target).is_file() else None
    if stored is None:
        if target.endswith(".jsonl"):
            raise DataError(f"{target}: no such file of answers")
        resolve(config.model.student)
    device = set_up(config.threads, config.seed)
    distributed.start()
    left_out: list[str] = []
    sized: dict[str, Any] = {}

    def load() -> list[Example]:
        found = load_split(config.data, "eval", ["spans", "options"], left_out)
        if (Path(target) / "config.yaml").is_file():
            _check_trained(config, found)
        return found

    examples = distributed.from_first(load)
    folder.mkdir(parents=True, exist_ok=True)
    if stored is not None:
        rows = [graded(*pair, config) for pair in _stored(stored, examples)]
        if distributed.is_first():
            write_rows(path, rows)
        found = Evaluation.of(rows)
    else:
        known = distributed.from_first(lambda: _known(folder, config, examples))
        done = {row["id"] for row in known}
        processor = load_processor(config.model.student)
        kept = ("size", "patch_size", "merge_size", "cap_pixels_per_frame")
        made = processor.video_processor.to_dict()
        sized["video_processor"] = {key: made.get(key) for key in kept}
        options = load_options(config.model, device)
        lm = load_model(config.model.student, seed=config.seed, **options)
        lm.train_only(config.model.trainable)
        policy = Policy.of(lm, processor.tokenizer, config.sample.temperature)
        prompts = Prompts([e for e in examples if e.id not in done], config.data, processor, lm)
        with part.open("a") as file:

            def store(rows: list[dict[str, Any]]) -> None:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()

            with progress_bar(total=len(prompts), desc="evaluate", unit="query") as bar:
                found = evaluate(lm, prompts, policy, config, path, bar.update, store, known)
        left_out += distributed.gather_dict(prompts.broken).values()
        distributed.barrier()
        part.unlink(missing_ok=True)
    if not distributed.is_first():
        return {}
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    rows = read_rows(path)
    result = {
        **found.summary,
        "ceiling": found.ceiling,
        "best_constant": found.constant,
        "answers": str(path),
        "left_out": len(left_out),
        "official": official(config, rows),
        "by": {key: breakdown(rows, key) for key in ("all", *BUCKETS, "category")},
        "of": made_with(target, config) | sized,
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if any(row["truth"] for row in rows):
        timeline(rows, folder / "evaluation.png")
    return {key: value for key, value in result.items() if key not in ("by", "of")}


def official(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The data set's own scores, `metrics` saying whose; empty where the rows have none of what
    they are about."""
    name = config.eval.metrics
    if name == "auto":
        source = sources_of(config.data.eval, config.data)[0]
        format = recognise(source.path) if source.format == "auto" else source.format or ""
        name = METRICS.get(format, "grounding")
    strict = config.eval.recall == "above"
    try:
        return {"metrics": name, **score(rows, name, strict=strict and name == "grounding")}
    except ValueError as error:
        if config.eval.metrics != "auto":
            raise DataError(f"eval.metrics={name}: {error}") from error
        return {}


def made_with(target: str, config: Config) -> dict[str, Any]:
    """What scores depend on: the whole configuration, the prompt's texts, versions, and a checksum
    of each annotation file and of the weights."""
    files = [Path(source.path) for source in sources_of(config.data.eval, config.data)]
    folder = Path(target) if Path(target).is_file() else Path(resolve(config.model.student))
    weights = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    return {
        "target": target,
        "config": to_yaml(config),
        "prompt": vars(config.template),
        "annotations": {str(file): checksum(file) for file in files if file.is_file()},
        "weights": {file.name: checksum(file) for file in weights},
        **environment(),
    }


def compared(targets: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    """Scores of several targets side by side, with the gain over the first on the queries that
    both answered and its 95% interval, videos resampled."""
    first = {row["id"]: row for row in read_rows(Path(found[0]["answers"]))}
    lines = [f"{'':40} {'mIoU':>7} {'R@0.3':>7} {'R@0.5':>7} {'R@0.7':>7} {'acc':>7}  gain"]
    for target, scores in zip(targets, found, strict=True):
        names = ("miou", "recall@0.3", "recall@0.5", "recall@0.7", "accuracy")
        values = ["-" if scores.get(n) is None else f"{scores[n]:.3f}" for n in names]
        rows = [row for row in read_rows(Path(scores["answers"])) if row["id"] in first]
        gains = []
        for name in ("tiou", "right"):
            both = [row for row in rows if name in row and name in first[row["id"]]]
            if both and target != targets[0]:
                before = [float(first[row["id"]][name]) for row in both]
                after = [float(row[name]) for row in both]
                low, high = paired_interval(before, after, groups=[row["video"] for row in both])
                gain = (sum(after) - sum(before)) / len(both)
                gains.append(f"{name} {gain:+.3f} [{low:+.3f}, {high:+.3f}] of {len(both)}")
        cells = " ".join(f"{value:>7}" for value in values)
        lines.append(f"{target[-40:]:40} {cells}  {'; '.join(gains)}")
    return "\n".join(lines)


def _known(folder: Path, config: Config, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows that an evaluation which was stopped left behind; all are removed unless this one goes
    on with it."""
    parts = [folder / "evaluation.jsonl", *sorted(folder.glob("evaluation.*.part"))]
    note, told = folder / "evaluation.yaml", _settings(config)
    rows: dict[str, dict[str, Any]] = {}
    if config.resume == "auto":
        if note.is_file() and note.read_text() != told:
            raise ConfigError(
                f"resume=auto: {folder} holds answers made with other settings ({note})"
            )
        rows = {row["id"]: row for path in parts for row in read_rows(path)}
    ids = {example.id for example in examples}
    kept = [row for row in rows.values() if row["id"] in ids]
    first = folder / "evaluation.0.part"
    write_rows(first, kept)  # in one file, whatever the number of ranks
    for path in parts:
        if path != first:
            path.unlink(missing_ok=True)
    note.write_text(told)
    return kept


def _settings(config: Config) -> str:
    """What answers depend on."""
    lines = to_yaml(config).splitlines(keepends=True)
    free = ("resume:", "overwrite:", "run_dir:", "threads:")
    return "".join(line for line in lines if not line.startswith(free))


def _stored(path: Path, examples: Sequence[Example]) -> list[tuple[Example, str, list[str]]]:
    """Each example with its stored answers; none is an empty answer."""
    answers: dict[str, tuple[str, list[str]]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            answers[str(row["id"])] = (
                str(row["answer"]),
                [*map(str, row.get("sampled_answers", []))],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: not a row of id and answer: {error}") from error
    ids = {example.id for example in examples}
    if not ids & answers.keys():
        raise DataError(f"{path}: none of its {len(answers)} ids is among data.eval's")
    missing, other = len(ids - answers.keys()), len(answers.keys() - ids)
    if missing or other:
        told = f"{missing} queries have no answer and count as wrong, {other} answers no query"
        print(f"{path}: {told}", file=sys.stderr)
    return [(example, *answers.get(example.id, ("", []))) for example in examples]


def _check_trained(config: Config, held_out: Sequence[Example]) -> None:
    """Raise DataError where a run trained on what it is evaluated on, as far as its sources are
    still there."""
    trained: list[Example] = []
    try:
        for source in sources_of(config.data.train, config.data):
            if source.format is not None or splits.path_of(source.root, source.path).is_file():
                trained += source.examples([])
    except DataError as error:
        print(f"not checked against what was trained on: data.train: {error}", file=sys.stderr)
    check_leak(trained[: config.data.limit_train], held_out, config.data)


if __name__ == "__main__":
    main()

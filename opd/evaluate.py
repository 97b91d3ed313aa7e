"""Evaluate checkpoints, runs or stored answers on any data set, with its official metrics:

    python -m opd.evaluate TARGET [TARGET ...] [dotted.key=value ...] [--explain [key=value ...]]

A target is one of
    a run folder: its student on its own held-out split
    a checkpoint folder, a hub id or `embedded:NAME`
    a file of stored answers: JSON lines of `id` and `answer`

Written to `run_dir`: every answer as it is generated (`evaluation.jsonl`; `resume=auto` continues
from there), the scores and everything they depend on (`evaluation.json`), a plot of the worst and
the best queries (`evaluation.png`), and the answers as TimeLens' own scorer reads them
(`timelens.json`). Several targets are compared with the first one on the queries that both
answered.

`--explain` prints how the scores of one target change under other conventions of reading and
scoring, and with each of the settings behind it alone, for which the target is evaluated again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd import distributed
from opd.config.command_line import command_line, ends_in_one_line
from opd.config.run import Config, load_config, to_yaml
from opd.data.examples import Example
from opd.data.prompts import Prompts
from opd.data.sources import check_leak, load_split, sources_of
from opd.data.synthetic import splits
from opd.distributed import progress_bar, set_up
from opd.errors import ConfigError, DataError, printable
from opd.files import checksum
from opd.generation.policy import Policy
from opd.method.answering import evaluate
from opd.models.load import load_model, load_options, load_processor, resolve
from opd.record.environment import environment
from opd.scoring.conventions import AS_EVALUATED, conventions, explained
from opd.scoring.evaluation import Evaluation, EvaluationRow, read_evaluation, write_evaluation
from opd.scoring.official import official, timelens_answers
from opd.scoring.results import BUCKETS, breakdown, compared
from opd.scoring.timeline import timeline


@ends_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake ends with one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "opd.evaluate TARGET [TARGET ...] [dotted.key=value ...] [--explain [key=value ...]]"
    changes: list[str] | None = None
    if "--explain" in arguments:
        at = arguments.index("--explain")
        arguments, changes = arguments[:at], command_line(usage, arguments[at + 1 :])
    arguments = command_line(usage, arguments)
    targets = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    if not targets or arguments[: len(targets)] != targets:
        raise ConfigError(f"usage: python -m {usage}")
    several = len(targets) > 1
    if changes is not None:
        if several or not all("=" in change for change in changes):
            raise ConfigError(f"--explain: takes one target; usage: python -m {usage}")
        explain(targets[0], overrides, changes)
        return
    configs = [config_of(target, overrides, several) for target in targets]
    results = [run(target, c) for target, c in zip(targets, configs, strict=True)]
    if distributed.is_first():
        shown = {k: v for k, v in results[0].items() if k not in ("by", "conventions", "of")}
        print(compared(targets, results) if several else json.dumps(shown, indent=2))
    distributed.leave_at_exit()


def explain(target: str, overrides: list[str], changes: list[str]) -> None:
    """Evaluate a target, and again with each changed setting alone, in a folder below its own;
    print the scores under all conventions and changes."""
    config = config_of(target, overrides, False)
    configs = [config]
    for change in changes:
        if Path(target).is_file() and not change.startswith(("data.reading=", "eval.recall=")):
            raise ConfigError(f"{printable(change)}: needs a model; {target} is a file of answers")
        folder = Path(config.run_dir) / change.replace("/", "_")
        configs.append(config_of(target, [*overrides, change, f"run_dir={folder}"], False))
    results = [run(target, each) for each in configs]
    if distributed.is_first():
        scores = dict(results[0]["conventions"])
        if not scores:
            raise DataError(f"{target}: has no answer to a query with a true span to explain")
        for change, result in zip(changes, results[1:], strict=True):
            scores[change] = result["conventions"][AS_EVALUATED]
        print(explained(scores))


def config_of(target: str, overrides: list[str], several: bool) -> Config:
    """Configuration of a target's evaluation: that of its run, or the defaults, with the overrides
    applied. Each of several targets gets its own folder below `run_dir`."""
    path = Path(target)
    is_run = (path / "config.yaml").is_file()
    overridden = {override.partition("=")[0] for override in overrides}
    defaults: dict[str, Any] = {"resume": "never"}
    if not path.is_file():
        defaults["model.student"] = path / "student" if is_run else target
    defaults["run_dir"] = path if path.is_dir() and not several else "runs/evaluate"
    added = [f"{key}={value}" for key, value in defaults.items() if key not in overridden]
    config = load_config([str(path / "config.yaml")] * is_run + added + overrides)
    if several:
        name = target.strip("./").replace("/", "_").replace(":", "_")
        config = replace(config, run_dir=str(Path(config.run_dir) / name))
    return config


def run(target: str, config: Config) -> dict[str, Any]:
    """Evaluate one target and write its files; returns its scores, empty on all ranks but the
    first."""
    folder = Path(config.run_dir)
    path, part = folder / "evaluation.jsonl", folder / f"evaluation.{distributed.rank()}.part"
    if path.exists() and not config.overwrite and config.resume != "auto":
        raise ConfigError(f"{path}: exists already; choose another run_dir or set overwrite=true")
    answers_file = Path(target) if Path(target).is_file() else None
    if answers_file is None:
        if target.endswith(".jsonl"):
            raise DataError(f"{target}: no such file of answers")
        resolve(config.model.student)
    device = set_up(config.cpu_threads, config.seed)
    distributed.start()
    left_out: list[str] = []
    frame_settings: dict[str, Any] = {}

    def load() -> list[Example]:
        held_out = load_split(config.data, "eval", ["spans", "options"], left_out)
        if (Path(target) / "config.yaml").is_file():
            _check_trained(config, held_out)
        return held_out

    examples = distributed.from_first(load)
    folder.mkdir(parents=True, exist_ok=True)
    if answers_file is not None:
        stored = _stored_answers(answers_file, examples)
        rows = [EvaluationRow.of(*answers, config) for answers in stored]
        if distributed.is_first():
            write_evaluation(path, rows)
        evaluation = Evaluation.of(rows)
    else:
        earlier = distributed.from_first(lambda: _earlier_rows(folder, config, examples))
        done = {row.id for row in earlier}
        processor = load_processor(config.model.student)
        names = ("size", "patch_size", "merge_size", "cap_pixels_per_frame")
        settings = processor.video_processor.to_dict()
        frame_settings["video_processor"] = {name: settings.get(name) for name in names}
        options = load_options(config.model, device)
        lm = load_model(config.model.student, seed=config.seed, **options)
        lm.train_only(config.model.trainable)
        policy = Policy.of(lm, processor.tokenizer, config.sample)
        prompts = Prompts([e for e in examples if e.id not in done], config.data, processor, lm)
        with part.open("a") as file:

            def store(rows: list[EvaluationRow]) -> None:
                file.write("".join(json.dumps(row.to_json()) + "\n" for row in rows))
                file.flush()

            with progress_bar(total=len(prompts), desc="evaluate", unit="query") as bar:
                evaluation = evaluate(lm, prompts, policy, config, path, bar.update, store, earlier)
        left_out += prompts.left_out()
        distributed.barrier()
        part.unlink(missing_ok=True)
    if not distributed.is_first():
        return {}
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    rows = read_evaluation(path)
    result = {
        **evaluation.summary,
        "ceiling": evaluation.ceiling,
        "best_constant": evaluation.constant,
        "answers": str(path),
        "left_out": len(left_out),
        "official": official(config, rows),
        "by": {key: breakdown(rows, key) for key in ("all", *BUCKETS, "category")},
        "conventions": conventions(rows, examples, config),
        "of": conditions(target, config) | frame_settings,
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if any(row.truth for row in rows):
        timeline(rows, folder / "evaluation.png")
        answers = json.dumps(timelens_answers(rows), indent=1)
        (folder / "timelens.json").write_text(answers + "\n")
    return result


def conditions(target: str, config: Config) -> dict[str, Any]:
    """Everything that the scores depend on: configuration, prompt texts, versions, and checksums of
    the annotation files and of the weights."""
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


def _earlier_rows(folder: Path, config: Config, examples: Sequence[Example]) -> list[EvaluationRow]:
    """Rows that a stopped evaluation left in the folder, for `resume=auto` to continue from;
    otherwise they are removed. ConfigError where they were generated with other settings."""
    parts = [folder / "evaluation.jsonl", *sorted(folder.glob("evaluation.*.part"))]
    settings_file, settings = folder / "evaluation.yaml", _settings(config)
    rows: dict[str, EvaluationRow] = {}
    if config.resume == "auto":
        if settings_file.is_file() and settings_file.read_text() != settings:
            raise ConfigError(
                f"resume=auto: {folder} holds answers generated with other settings "
                f"({settings_file}); use the same settings or another run_dir"
            )
        rows = {row.id: row for path in parts for row in read_evaluation(path)}
    ids = {example.id for example in examples}
    kept = [row for row in rows.values() if row.id in ids]
    first = folder / "evaluation.0.part"
    write_evaluation(first, kept)  # in one file, whatever the number of ranks
    for path in parts:
        if path != first:
            path.unlink(missing_ok=True)
    settings_file.write_text(settings)
    return kept


def _settings(config: Config) -> str:
    """The settings that answers depend on, as YAML."""
    lines = to_yaml(config).splitlines(keepends=True)
    irrelevant = ("resume:", "overwrite:", "run_dir:", "threads:")
    return "".join(line for line in lines if not line.startswith(irrelevant))


def _stored_answers(
    path: Path, examples: Sequence[Example]
) -> list[tuple[Example, str, list[str]]]:
    """Each example with its greedy and sampled answers in the file; a missing answer is empty."""
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
        print(
            f"{path}: {missing} queries have no answer and count as wrong; "
            f"{other} answers belong to no query and are ignored",
            file=sys.stderr,
        )
    return [(example, *answers.get(example.id, ("", []))) for example in examples]


def _check_trained(config: Config, held_out: Sequence[Example]) -> None:
    """Raise DataError where a run was trained on a held-out video, as far as its training sources
    still exist."""
    trained: list[Example] = []
    try:
        for source in sources_of(config.data.train, config.data):
            if source.format is not None or splits.path_of(source.root, source.path).is_file():
                trained += source.examples([])
    except DataError as error:
        print(f"overlap with the training data not checked: data.train: {error}", file=sys.stderr)
    check_leak(trained[: config.data.limit_train], held_out, config.data)


if __name__ == "__main__":
    main()

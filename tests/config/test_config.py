"""Configuration: merging, checks, and the messages of mistakes."""

import contextlib
import json
import math
import re
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import opd.check
import opd.data.convert
import opd.evaluate
import opd.report
import opd.train
from opd.config.help import COMMANDS as HELP
from opd.config.help import help_text
from opd.config.options import keys_of
from opd.config.run import Config, load_config, to_yaml
from opd.data.annotations.formats import FORMATS
from opd.errors import ConfigError
from opd.train import main


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return leaves


DEFAULTS = flat(asdict(Config()))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\noptim: {lr: 1e-5}\nsample.temperature: 2\n")
    config = load_config([str(path), "steps=9", "prefix.recompute=all"])
    assert (config.steps, config.optim.lr, config.prefix.recompute) == (9, 1e-5, "all")
    assert config.sample.temperature == 2.0 and isinstance(config.sample.temperature, float)
    assert config.batch_size == Config().batch_size


def test_a_value_may_name_another_key() -> None:
    assert (
        load_config(["seed=3", "run_dir=runs/seed${seed}-${optim.lr}"]).run_dir
        == "runs/seed3-0.001"
    )


MISTAKES = {
    "stepz=3": "stepz: no such key; the nearest is steps",
    "lr=3": "lr: no such key; the nearest is optim.lr",
    "model.studnt=3": "model.studnt: no such key; the nearest is model.student",
    "steps.a=3": "steps.a: no such key; the nearest is steps",
    "optim={lr: 3, beta3: 4}": "optim.beta3: no such key; the nearest is optim.beta1",
    "optim=3": "optim=3: a section has no value; set optim.KEY",
    "steps=many": "steps=many: not a whole number",
    "steps=3.0": "steps=3.0: not a whole number",
    "steps=true": "steps=True: not a whole number",
    "steps=null": "steps=null: not a whole number",
    "steps=[3]": "steps=[3]: not a whole number",
    "optim.lr=fast": "optim.lr=fast: not a number",
    "eval.before=2": "eval.before=2: not true or false",
    "run_dir=": "run_dir='': must be one line of text",
    'run_dir="a\\nb"': "run_dir='a\\nb': must be one line of text",
    "steps=0": "steps=0: must be 1 or more",
    "seed=-1": "seed=-1: must be in [0, 9223372036854775807]",
    "optim.lr=0": "optim.lr=0.0: must be above 0",
    "optim.lr=.inf": "optim.lr=inf: must be a finite number",
    "optim.warmup=1": "optim.warmup=1.0: must be in [0, 1)",
    "optim.min_lr_ratio=1.5": "optim.min_lr_ratio=1.5: must be in [0, 1]",
    "data.max_frames=3": "data.max_frames=3: must be 4 or more",
    "data.limit_eval=0": "data.limit_eval=0: must be 1 or more",
    "method=ppo": "method=ppo: not one of opd, grpo, sft",
    "objective=kl": "objective=kl: not one of reverse_kl, sampled, jsd, topk, constant",
    "prefix.recompute=some": "prefix.recompute=some: not none, all, auto or a number",
    "data.prompt={query}?": "data.prompt={query}?: must contain {video} exactly once",
    "run_dir=a${": "run_dir: no viable alternative at input '${'",
    "batch_size=6 micro_batch_size=4": "micro_batch_size=4: must divide batch_size=6",
    "method=sft num_rollouts=2": "num_rollouts=2: a prompt has one reference answer; use "
    "num_rollouts=1",
    "opd.completions=reference num_rollouts=2": "num_rollouts=2: a prompt has one "
    "reference answer; use num_rollouts=1",
    "opd.completions=reference objective=sampled": "objective=sampled: needs tokens "
    "sampled from the student; use opd.completions=student",
    "opd.reward_coef=0.1": "num_rollouts=1: opd.reward_coef compares the answers to a prompt; "
    "use 2 or more",
    "method=sft opd.horizon=3": "opd: these keys have no effect with method=sft; leave them at "
    "their defaults",
    "method=grpo": "num_rollouts=1: method=grpo compares the answers to a prompt; use 2 or more",
    "method=grpo num_rollouts=4 reward.tiou=0": "reward: every weight is 0, so all answers have "
    "the same reward; set one above 0",
    "method=grpo num_rollouts=4 objective=sampled": "objective=sampled: method=grpo has an "
    "objective of its own; leave this key out",
    "method=sft objective=sampled": "objective=sampled: method=sft has an objective of its own; "
    "leave this key out",
    "method=sft model.teacher=mine": "model.teacher=mine: method=sft has no teacher; leave this "
    "key out",
    "engine.zero_stage=2": "engine.zero_stage=2: engine.kind=torch has stage 0 only",
    "engine.kind=deepspeed": "engine.zero_stage=0: engine.kind=deepspeed has stages 1, 2 and 3",
    "engine.offload=true": "engine.offload=true: engine.kind=torch cannot offload; use deepspeed",
    "data.min_frame_tokens=4": "data.min_frame_tokens=4: needs data.video_tokens, the limit of the "
    "whole video",
    "keep_best=miou": "keep_best=miou: needs eval.every, which is null",
    "curriculum.rounds=2 steps=1": "curriculum.rounds=2: more than steps=1",
    "steps=${stepz}": "steps: Interpolation key 'stepz' not found",
    "data.format=coco": "data.format=coco: not one of "
    "auto, timerft, charades, activitynet, rextime, qvhighlights, tacos, timelens, timelens_100k, "
    "tvgbench, nextgqa, mcq",
    "overwrite=true resume=auto": "overwrite=true: excludes resume=auto",
    "model.student=./nowhere": "model.student=./nowhere: "
    "not a checkpoint folder (config.json is missing)",
    "model.teacher=runs/none/student": "model.teacher=runs/none/student: "
    "not a checkpoint folder (config.json is missing)",
    "model.student=embedded:nobody": "model.student=embedded:nobody: no such shipped model",
    "data.train=none.json": "data.train: none.json: no such annotation file",
    "data.eval=none.json": "data.eval: none.json: no such annotation file",
    "data.train=synthetic:none": "data.train: synthetic:none: no such split "
    "(known: train, eval, eval_512, tune, mixed, mixed_eval, mixed_tune, mixed_first, names, "
    "words, short, teacher, student)",
    "run_dir=/dev/null/run": "run_dir=/dev/null/run: /dev/null is not a writable folder",
    "missing.yaml": "missing.yaml: no such configuration file",
    "steps": "steps: no such configuration file (to set the key, write steps=VALUE)",
    "a.yaml b.yaml": "b.yaml: only one configuration file can be given",
    "--steps": "--steps: no such flag; use --help or --print-config",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opd.train.load_model", loaded)
    one = "{" in command
    with pytest.raises(SystemExit) as caught:
        main([command] if one else command.split(" "))
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"error: {MISTAKES[command]}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- steps: 3\n", "must consist of `key: value` lines"),
        ("3\n", "not YAML: Invalid loaded object type: int"),
        ("steps: [3\n", "not YAML: while parsing a flow sequence"),
        ("steps: 3\nsteps: 4\n", "not YAML: while constructing a mapping"),
        ("run_dir: 1e3\n", "run_dir=1000.0: not text (put it in quotes)"),
        ("run_dir: true\n", "run_dir=True: not text (put it in quotes)"),
        ("optim:\n", "optim=null: a section has no value; set optim.KEY"),
        ("1: 2\n", "1: no such key; the nearest is"),
    ],
)
def test_an_invalid_file_is_rejected(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([str(path)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_annotation_format_can_be_configured() -> None:
    for name in FORMATS:
        assert load_config([f"data.format={name}"]).data.format == name


def test_every_key_is_described_in_plain_sentences() -> None:
    for key, entry, _ in keys_of(Config):
        doc = entry.metadata["doc"]
        assert doc[:1].isupper() and doc.endswith("."), f"{key}: {doc}"


@pytest.mark.parametrize(
    "name", ["", *(n for n, kind in get_type_hints(Config).items() if is_dataclass(kind))]
)
def test_a_section_checks_itself(name: str) -> None:
    section = getattr(Config(), name) if name else Config()
    for entry in fields(section):
        values = {str: "\n", int: -1, float: math.nan}
        value = values.get(type(getattr(section, entry.name)))
        if value is not None:
            key = f"{name}.{entry.name}".lstrip(".")
            with pytest.raises(ConfigError, match=f"^{re.escape(key)}="):
                replace(section, **{entry.name: value})


@pytest.mark.parametrize("columns", [1, 60, 80, 100, 200])
@pytest.mark.parametrize("usage", ["opd.train [CONFIG.yaml]", "opd.evaluate TARGET"])
def test_help_describes_every_key(
    columns: int, usage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(usage, Config())
    assert max(map(len, text.splitlines())) <= max(40, min(100, columns))
    assert text.startswith(f"usage: python -m {usage}\n")
    words = " ".join(text.split())
    for key, entry, _ in keys_of(Config):
        value = DEFAULTS[key]
        shown = json.dumps(value) if value is None or isinstance(value, bool) else value
        _, _, entry_text = words.partition(f" {key} {entry.metadata['doc']} ")
        assert re.match(rf"[^;]*; default: {re.escape(str(shown))}", entry_text), key


COMMANDS = {
    "opd.train": opd.train.main,
    "opd.evaluate": opd.evaluate.main,
    "opd.check": opd.check.main,
    "opd.report": opd.report.main,
    "opd.data.convert": opd.data.convert.main,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_fits_100_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        COMMANDS[command](["--help"])
    output = "".join(capsys.readouterr())
    assert command in output
    assert max(map(len, output.splitlines())) <= 100


def test_the_examples_of_the_help_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for command, (_, examples) in HELP.items():
        for _, example in examples:
            _, _, rest = example.partition(f"-m {command}")
            arguments = [a for a in rest.split() if command == "opd.train" or "=" in a]
            assert f"-m {command}" in example and load_config(arguments)


def test_the_printed_configuration_repeats_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["steps=3", "run_dir=1e3", "data.prompt={video} {query}: #1", "threads=2"]
    with pytest.raises(SystemExit) as caught:
        main(["--print-config", *arguments])
    assert caught.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config([str(path)]) == load_config(arguments) != Config()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.sampled_from(["1e-4", "auto", "none", "all", "sft", "sampled", "token", "pyav", "no", "~"]),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@st.composite
def keys(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from([*DEFAULTS, *{k.partition(".")[0] for k in DEFAULTS}]))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(key)))
        key = key[:at] + draw(st.text("abs._-", max_size=2)) + key[at + draw(st.integers(0, 1)) :]
    return key


@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(st.tuples(keys(), VALUES), min_size=1, max_size=3, unique_by=lambda e: e[0]),
    in_file=st.booleans(),
)
@pytest.mark.slow
def test_an_edit_is_applied_or_rejected(
    edits: list[tuple[str, Any]], in_file: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if in_file:
        path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
        path.write_text(yaml.safe_dump(dict(edits)))
        arguments = [str(path)]
    else:
        arguments = [f"{key}={value}" for key, value in edits]
    try:
        config = load_config(arguments)
    except ConfigError as error:
        message = str(error)
        assert message and "\n" not in message
        assert in_file or any((key or "''") in message for key, _ in edits), message
        return
    values = flat(asdict(config))
    for key, value in edits:
        if isinstance(value, dict):
            assert not value or key in ("", *DEFAULTS)
            continue
        if in_file:
            value = OmegaConf.to_container(OmegaConf.load(arguments[0]))[key]
        elif not isinstance(values.get(key), str):
            value = OmegaConf.from_dotlist([f"v={value}"]).v
        assert key in DEFAULTS, "a key was ignored"
        if isinstance(values[key], float) and isinstance(value, int):
            value = float(value)  # the nearest, where a float cannot hold it
        assert values[key] in (value, str(value))
    path = tmp_path_factory.getbasetemp() / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config([str(path)]) == config

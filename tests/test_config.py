"""Configuration: what merges, and how a mistake is told."""

from pathlib import Path

import pytest

from opd.config import Config, ConfigError, load_config
from opd.train import main


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\noptim: {lr: 1e-5}\n")
    config = load_config([str(path), "steps=9", "prefix.recompute=all"])
    assert (config.steps, config.optim.lr, config.prefix.recompute) == (9, 1e-5, "all")
    assert config.batch_size == Config().batch_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepz=3"], "stepz"),
        (["steps=many"], "steps"),
        (["steps=0"], "steps=0: must be 1 or more"),
        (["method=ppo"], "method=ppo: not one of opd, sft"),
        (["objective=kl"], "objective=kl: not one of reverse_kl, sampled"),
        (["batch_size=6", "micro_batch_size=4"], "micro_batch_size=4: must divide batch_size=6"),
        (["method=sft", "num_rollouts=2"], "num_rollouts=2: method sft"),
        (["prefix.recompute=some"], "prefix.recompute=some"),
        (["data.prompt=no video here"], "data.prompt"),
        (["missing.yaml"], "missing.yaml: no such configuration file"),
        (["a.yaml", "b.yaml"], "b.yaml: only one configuration file"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["batch_size=0"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: batch_size=0: must be 1 or more\n"


def test_a_run_folder_is_never_overwritten_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(SystemExit) as caught:
        main([f"run_dir={tmp_path}"])
    assert caught.value.code == 2
    assert f"run_dir={tmp_path}: not empty" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "kept"

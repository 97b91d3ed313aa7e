"""Documentation: links lead somewhere, commands parse, examples run, named files exist."""

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import yaml

import opd.check
import opd.evaluate
import opd.train
from opd.scoring.judge import TERMS

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    ROOT / "bench" / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
REGISTRIES = {  # tables that the examples of CONTRIBUTING.md add to
    "opd.method.objectives": "OBJECTIVES",
    "opd.scoring.judge": "TERMS",
    "opd.data.annotations.formats": "FORMATS",
    "opd.models.positions": "POSITIONS",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^()\s]+)\)")
NAMED = re.compile(r"`((?:opd|kernels|bench|configs|tests|docs)/[\w./-]*)`")
KEY = re.compile(r"`([a-z]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`")
WORDS = 900  # of README.md: about two screens
MOST_FILES = 8  # of a walk through the code
SCORES = "miou", "sampled_miou"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks in one of these languages."""
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = FENCE.sub("", page.read_text())
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in kept}


def commands(page: Path) -> list[list[str]]:
    """Commands of the page's bash blocks, each as its arguments; `\\` joins lines."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in [*shlex.split(line, comments=True), "&&"]]
    split: list[list[str]] = [[]]
    for part in parts:
        if part == "&&":
            split.append([])
        else:
            split[-1].append(part)
    return [command for command in split if command]


def modules(page: Path) -> list[tuple[str, list[str]]]:
    """Modules that the page's commands run with `-m`, and their arguments."""
    runs = [(c, c.index("-m") + 1) for c in commands(page) if "-m" in c]
    return [(command[place], command[place + 1 :]) for command, place in runs]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fences_have_a_language(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n```") == 2 * len(FENCE.findall(text)), "a fence is not closed"
    assert all(language for language, _ in FENCE.findall(text))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


COMMANDS = [(page, *run) for page in PAGES for run in modules(page)]


def parse(module: str, arguments: list[str]) -> None:
    """Give a command's arguments to the code that parses them; SystemExit(0) where they are fine.

    Capital letters (PATH, VIDEOS) stand for the user's own files.
    """
    keys = [a for a in arguments if re.match(r"[a-z_.]+=", a)]
    files = [a for a in arguments if a.endswith(".yaml") and not a[0].isupper()]
    if module == "opd.train":
        assert set(arguments) <= {*keys, *files, "CONFIG.yaml", "--help", "--print-config"}
        opd.train.main([*files, *keys, "--print-config"])
    elif module == "opd.evaluate":
        assert len(arguments) > len(keys), "no target"
        opd.evaluate.main([*keys, "--print-config"])
    elif module == "opd.check":
        flags = [a for a in arguments if a not in (*keys, *files)]
        known = {"--ranks", "--memory-gib", "--stages"}
        assert {f for f in flags if f.startswith("--")} <= known
        opd.train.main([*files, *keys, "--print-config"])
    else:
        importlib.import_module(module).main(["--help"])
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("page", "module", "arguments"),
    [run for run in COMMANDS if run[1].startswith("opd.")],
    ids=lambda value: name_of(value) if isinstance(value, Path) else None,
)
def test_commands_parse(
    page: Path,
    module: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    if module == "opd.report":
        assert arguments and not any("=" in a for a in arguments)
        return
    with pytest.raises(SystemExit) as ended:
        parse(module, arguments)
    assert ended.value.code == 0, capsys.readouterr().err


def test_other_commands_are_modules() -> None:
    others = {module for _, module, _ in COMMANDS if not module.startswith("opd.")}
    for module in others:
        path = ROOT.joinpath(*module.split("."))
        known = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert known or module in ("venv", "pytest"), module


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (reads,) = (line for line in lines if line.startswith("mapfile"))
    script = f'{reads}\nprintf "%s\\n" "${{commands[@]}}"'
    out = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    first, second = out.stdout.splitlines()
    assert first.startswith("python3 -m venv ") and first.endswith("-m opd.train")
    assert second.startswith("python3 -m venv ") and "-m pytest" in second


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    for path in NAMED.findall(FENCE.sub("", page.read_text())):
        if not re.search(r"_[A-Z]+\b", path):  # gpu_PART.json
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}: no such file"


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = blocks(ROOT / "README.md", "text")
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [line.split()[0]]
        path = ROOT.joinpath(*parents)
        assert path.exists(), path
        assert path.is_dir() == line.split()[0].endswith("/"), path


def test_walks_are_short() -> None:
    text = (ROOT / "docs" / "development.md").read_text()
    walks = re.split(r"^##+ ", text, flags=re.MULTILINE)
    steps = [re.findall(r"^\d+\. `([\w./]+\.py)`", walk, re.MULTILINE) for walk in walks]
    steps = [files for files in steps if files]
    assert len(steps) == 3
    for files in steps:
        assert len(files) == len(set(files)) <= MOST_FILES


def dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_keys_are_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        opd.train.main(["--print-config"])
    tree = yaml.safe_load(capsys.readouterr().out)
    keys = set(dotted(tree))
    groups = {name for name, value in tree.items() if isinstance(value, dict)}
    for page in PAGES:
        for key in KEY.findall(page.read_text()):
            if key.split(".")[0] in groups and key not in {module for _, module, _ in COMMANDS}:
                assert key in keys, f"{name_of(page)}: {key}: no such key"


def test_every_reward_term_is_described() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    assert re.findall(r"^\| `reward\.(\w+)` \|", text, re.MULTILINE) == list(TERMS)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_default_run_scores_what_was_measured(page: str) -> None:
    text = (ROOT / page).read_text()
    kept = json.loads((ROOT / "bench" / "results" / "embedded_cpu.json").read_text())
    rows = [[arm[seed] for seed in "012"] for arm in kept["seeds"].values()]
    for row in rows:
        greedy, drawn = (", ".join(f"{run['after'][score]:.3f}" for run in row) for score in SCORES)
        assert f"| {greedy} | {drawn} |" in text
    before = [f"{r['after'][s] - r['gain'][s]['mean']:.3f}" for s in SCORES for r in rows[0]]
    assert f"| student before | {before[0]} | {', '.join(before[3:])} |" in text
    teacher = " | ".join(f"{kept['teacher'][score]:.3f}" for score in SCORES)
    assert f"| teacher | {teacher} |" in text


def test_the_methods_score_what_was_measured() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    arms = json.loads((ROOT / "bench" / "results" / "methods.json").read_text())["arms"]
    for arm in arms.values():
        steps, seconds = (
            [arm[score][at] for score in SCORES] for at in ("at_equal_steps", "at_equal_device_s")
        )
        means = [spread["mean"] for spread in (*steps, *seconds)]
        assert f"| {' | '.join(f'{mean:.3f}' for mean in means)} |" in text


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples leave the tables as they were."""
    for module, name in REGISTRIES.items():
        table = getattr(importlib.import_module(module), name)
        for key in ("forward_kl", "centre", "tabbed", "plain_vl"):
            assert key not in table
            monkeypatch.setitem(table, key, None)  # undone by deleting the key again
            del table[key]


EXAMPLES = blocks(ROOT / "CONTRIBUTING.md", "python")  # kernels/README.md has a test of its own


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(code: str, registries: None, tmp_path: Path) -> None:
    tests = run(code)
    assert tests
    for test in tests:
        test(*([tmp_path] if test.__code__.co_argcount else []))


def run(code: str) -> list[Callable[..., None]]:
    """Execute an example; the tests that it defines."""
    module = ModuleType("example")
    exec(compile(code, "example", "exec"), vars(module))
    return [value for name, value in vars(module).items() if name.startswith("test_")]


def test_examples_are_short() -> None:
    assert len(EXAMPLES) == len(REGISTRIES)
    for code in EXAMPLES:
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 30


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The README's record, and another one, with their videos."""
    (record,) = blocks(ROOT / "README.md", "jsonl")
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, split in (("kitchen", "train"), ("garden", "test")):
        line = json.dumps(json.loads(record) | {"video": name})
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
        with av.open(str(folder / f"{name}.mp4"), "w") as video:
            stream = video.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for i in range(24):
                pixels = np.full((64, 64, 3), 8 * i, dtype=np.uint8)
                video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            video.mux(stream.encode())
    return tmp_path


def test_ones_own_videos(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's commands, with the shipped models in place of real ones."""
    monkeypatch.chdir(own)
    given = [run for run in modules(ROOT / "README.md") if "data.video_root=videos" in run[1]]
    (check, checked), (train, trained) = given
    assert (check, train) == ("opd.check", "opd.train")
    opd.check.main(checked)
    assert (own / "train.jsonl.checked.jsonl").is_file()
    small = ["steps=2", "batch_size=2", "eval.draws=0", "eval.teacher=false", "threads=1"]
    opd.train.main([key for key in trained if not key.endswith(".yaml")] + small)
    assert (own / "runs" / "mine" / "student" / "config.json").is_file()


def test_an_objective_of_ones_own_trains(
    own: Path, registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with the example of CONTRIBUTING.md in place of the default objective."""
    monkeypatch.chdir(own)
    run(EXAMPLES[0])
    table = importlib.import_module("opd.method.objectives").OBJECTIVES
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return table["forward_kl"](*arguments)

    monkeypatch.setitem(table, "reverse_kl", counted)
    keys = ["data.train=mcq:train.jsonl", "data.eval=mcq:test.jsonl", "data.video_root=videos"]
    small = ["steps=2", "batch_size=2", "eval.draws=0", "eval.teacher=false", "eval.before=false"]
    opd.train.main([*keys, *small, "threads=1"])
    rows = (own / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    assert len(calls) == len(rows) == 2
    assert all(json.loads(row)["grad_norm"] > 0 for row in rows)

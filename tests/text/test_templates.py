"""Templates: the default's exact text, template files, and references that are parsed back."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError
from opd.text.answers import parse_choice, parse_span, parse_spans
from opd.text.forms import FORMS
from opd.text.templates import Template, load_template, presets

OPTIONS = ("red", "a blue square", "it jumps")
NAMES = (
    *("default", "mcq", "qvhighlights_json", "qwen3_vl", "temporal_r1", "time_r1"),
    *("timelens", "timelens_7b", "tvg_r1", "video_first"),
)


def expected_turn(
    prompt: str, query: str, question: str | None, options: tuple, spans: tuple
) -> str:
    """The user's turn as inline text defines it, with {video} in place of the frames."""
    words = query
    if question is not None:
        words = question + (": " + ", ".join(options) if options else "")
        prompt = "{query}? When?{video}" if spans else "{query}?{video}"
    before, after = (part.replace("{query}", words) for part in prompt.split("{video}"))
    return f"{before}{{video}}{after}"


def whole(template: Template, *arguments, **more) -> str:
    return "{video}".join(template.turn(*arguments, **more))


_WORDS = st.text() | st.sampled_from(["{query}", "{video}", "{options}: {duration}", "a {", "x."])


@given(
    _WORDS,
    st.none() | _WORDS,
    st.none() | st.lists(_WORDS, min_size=2, max_size=4).map(tuple),
    st.sampled_from([(), ((1.0, 2.0),)]),
    st.sampled_from(["{query}. When?{video}", "{video}{query}!", "a {video} b {query} {1}"]),
)
def test_the_turns_of_the_default_and_of_inline_text(query, question, options, spans, prompt):
    expected = expected_turn(prompt, query, question, options or (), spans)
    templates = [load_template(prompt)]
    if prompt == "{query}. When?{video}":
        templates += [load_template("default"), Template()]
    for template in templates:
        words = query if question is None else question
        turn = whole(template, words, options, bool(spans), question is not None, None)
        assert turn == expected


@pytest.mark.parametrize("spans", [(), ((1.0, 2.04),), ((3.0, 4.0), (5.0, 6.0))])
@pytest.mark.parametrize(("answer", "options"), [(None, None), ("red", OPTIONS), ("a dog.", None)])
def test_the_default_reference_is_that_of_the_example(answer, options, spans):
    expected = " ".join(
        ([f"{answer}." if options else answer] if answer else [])
        + [f"From {start:.1f} to {end:.1f} seconds." for start, end in spans[:1]]
    )
    assert load_template("default").reference(spans, answer, options) == expected
    assert load_template("{query}? {video}").reference(spans, answer, options) == expected


def test_all_presets_load():
    assert presets() == tuple(NAMES)
    for name in NAMES:
        template = load_template(name)
        assert template.name == name and template.form in FORMS and template.source


def test_presets_by_hand():
    assert load_template("video_first").turn("a cat runs") == ("", "a cat runs. When?")
    question = whole(load_template("mcq"), "what runs?", ("a cat", "a dog"), False, True)
    assert question.startswith("{video}what runs?\nA. a cat\nB. a dog\n")
    assert "letter" not in whole(load_template("mcq"), "what runs?", None, False, True)
    text = whole(load_template("timelens"), "A cat runs. ")
    assert text.startswith("{video}") and "'A cat runs'" in text
    assert "'The event happens in <start time> - <end time> seconds'" in text
    text = whole(load_template("qvhighlights_json"), "a cat runs", duration_s=150)
    assert "150.0 seconds" in text and "[[3.4, 7.1], [12.0, 15.5]]" in text
    thinking = {name for name in NAMES if load_template(name).thinking}
    assert thinking == {"time_r1", "temporal_r1", "tvg_r1"}


@pytest.mark.parametrize("name", NAMES)
def test_presets_that_begin_with_the_video_share_it(name):
    template = load_template(name)
    kinds = [(None, False, False), (OPTIONS, False, True), (OPTIONS, True, True), ((), False, True)]
    befores = {template.turn("words", *kind, duration_s=9.0)[0] for kind in kinds}
    assert befores == {""} or name == "default"


@pytest.mark.parametrize("name", NAMES)
def test_references_are_read_back_strictly(name):
    template = load_template(name)
    spans = ((1.0, 2.5), (61.0, 62.0))
    count = 2 if template.spans == "all" else 1
    text = template.reference(spans, None, None)
    assert parse_spans(text, template.form) == spans[:count]
    assert parse_choice(template.reference((), "red", OPTIONS), OPTIONS, form="plain") == "red"
    both = template.reference(spans, "a blue square", OPTIONS)
    assert parse_spans(both, template.form, OPTIONS) == spans[:count]
    assert parse_span(both, template.form, OPTIONS) == (1.0, 2.5)
    assert parse_choice(both, OPTIONS) == "a blue square"
    assert "<think>" not in both and template.reference((), None, None) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mcq", "B. it jumps. From 1.0 to 2.0 seconds."),
        ("timelens", "B. it jumps. The event happens in 1.0 - 2.0 seconds."),
        ("time_r1", "<answer>B. it jumps. 1.00 to 2.00</answer>"),
        ("qwen3_vl", 'B. it jumps. {"start_time": 1.0, "end_time": 2.0}'),
        ("qvhighlights_json", "B. it jumps. [[1.0, 2.0], [3.0, 4.0]]"),
        ("video_first", "it jumps.. From 1.0 to 2.0 seconds."),
    ],
)
def test_references_by_hand(name, expected):
    spans = ((1.0, 2.0), (3.0, 4.0))
    assert load_template(name).reference(spans, "it jumps.", ("red", "it jumps.")) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("default", "video_first")])
def test_the_example_answers_of_presets_are_in_their_form(name):
    template = load_template(name)
    for kind in ((None, False, False), (OPTIONS, True, True)):
        text = whole(template, "words", *kind, 9.0)
        example = re.findall(r"(?:form|example|seconds|else): '?(.+?)'?\.?$", text, re.MULTILINE)[
            -1
        ]
        answer = example.replace("<start time>", "3.4").replace("<end time>", "7.1")
        assert parse_span(answer, template.form, OPTIONS) is not None, answer


FILE = """\
# a comment
form: json
thinking: yes

options: letters
source: mine: all of it
--- grounding

{video}Say {"start_time": 1} of {query}
and {duration}.

--- open
{query}{video}
"""


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(FILE)
    template = load_template(str(path))
    assert template == Template(
        name=str(path),
        form="json",
        thinking=True,
        options="letters",
        source="mine: all of it",
        grounding='{video}Say {"start_time": 1} of {query}\nand {duration}.',
        open="{query}{video}",
    )
    after = 'Say {"start_time": 1} of {video} {query}\nand 9.5.'
    assert template.turn("{video} {query}", duration_s=9.46) == ("", after)
    assert template.turn("q", OPTIONS[:2], question=True)[0] == "q\nA. red\nB. a blue square?"
    assert template.turn("q", None, question=True) == ("q", "")
    assert template.turn("q", None, grounded=True, question=True) == ("q? When?", "")
    with pytest.raises(
        ConfigError, match=r"mine.txt: grounding: has \{duration\}, but the video's"
    ):
        template.turn("q")
    with pytest.raises(ValueError, match="27 options"):
        template.turn("q", ["x"] * 27, question=True)
    path.write_bytes(b"\xef\xbb\xbf" + FILE.replace("\n", "\r\n").encode())  # as Windows writes it
    assert load_template(str(path)) == template


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("form: json", "form: jsn", "form jsn: not one of seconds, event,"),
        ("form: json", "form: jsn", "; the nearest is json"),
        ("thinking: yes", "thinking: maybe", "thinking maybe: not one of no, yes;"),
        ("options: letters", "options: lettered", "the nearest is letters"),
        ("options:", "option:", ":5: key option: not one of form, thinking, options,"),
        ("# a", "a", ":1: a comment: neither `key: value` nor `--- text`"),
        ("thinking: yes", "form: yes", ":3: key form: appears twice"),
        ("--- open", "--- grounding", ":12: text grounding: appears twice"),
        ("--- open", "--- opened", ":12: text opened: not one of grounding,"),
        ("--- open", "---", ":12: text '': not one of grounding,"),
        ("--- open", "--- grounded", "grounded: must contain {options} exactly once"),
        ("{query}{video}", "{query}{options}{video}", "open: must not contain {options}"),
        ("{query}{video}", "{query}", "open: must contain {video} exactly once"),
        ("{query}{video}", "{video}{query}{video}", "open: must contain {video} exactly once"),
        ("{query}{video}", "{video}", "open: must contain {query} or {event}"),
        ("{duration}", "{length}", "grounding: field length: not one of video, query,"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, old, new, message):
    path = tmp_path / "mine.txt"
    path.write_text(FILE.replace(old, new, 1) if old in FILE else FILE)
    with pytest.raises(ConfigError) as error:
        load_template(str(path))
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("timelns", "data.prompt=timelns: not one of default, mcq, "),
        ("timelns", "; the nearest is timelens"),
        ("", "data.prompt='': not one of"),
        ("{query}?", "data.prompt={query}?: must contain {video} exactly once"),
        ("{video}?", "data.prompt={video}?: must contain {query} or {event}"),
        ("{video}{query}{video}", "must contain {video} exactly once"),
        ("{video}{query}{optoins}", "field optoins: not one of"),
        ("{video}{query}{options}", "must not contain {options}"),
        ("no/such.txt", "no/such.txt: no such template file"),
        ("no.txt", "no.txt: no such template file"),
        ("/usr", "/usr: not readable: "),
        ("a.\0", "not readable: "),
    ],
)
def test_an_invalid_template_is_rejected(template, message):
    with pytest.raises(ConfigError) as error:
        load_template(template)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_binary_file_is_rejected(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not readable: 'utf-8' codec"):
        load_template(str(path))
    with pytest.raises(ConfigError, match=r"^eval\.prompt=mnie: not one of"):
        load_template("mnie", "eval.prompt")


TASK = """include: common
task: when_of_{number}
"""
COMMON = """doc_to_text: !function utils.prompt
lmms_eval_specific_kwargs: {default: {pre_prompt: "Find: ", post_prompt: " Answer."}}
"""
UTILS = """
def prompt(doc, lmms_eval_specific_kwargs=None):
    k = lmms_eval_specific_kwargs
    return k["pre_prompt"] + doc["caption"] + "." + k["post_prompt"]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "other_eval" / "tasks" / "when"
    folder.mkdir(parents=True)
    (tmp_path / "other_eval" / "__init__.py").write_text("raise ImportError")
    (folder / "common").write_text(COMMON)
    for number in (1, 2):
        (folder / f"{number}.yaml").write_text(TASK.format(number=number))
    (folder / "utils.py").write_text(UTILS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_task_of_an_installed_package(package: Path) -> None:
    template = load_template("other_eval:when_of_2")
    assert template.video_first
    assert template.turn("a dog runs") == ("", "Find: a dog runs. Answer.")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("no_eval:when", "no_eval is not installed (pip install no-eval)"),
        ("other_eval:when", "other_eval has no task when"),
    ],
)
def test_a_package_or_task_that_is_missing(package: Path, prompt: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_template(prompt)
    assert str(caught.value) == f"data.prompt={prompt}: {message}"


def test_a_task_whose_code_fails(package: Path) -> None:
    (package / "utils.py").write_text("import a_package_that_is_not_installed")
    with pytest.raises(ConfigError, match=r"when_of_1: its prompt cannot .*not_installed"):
        load_template("other_eval:when_of_1")


@pytest.mark.parametrize("task", ["timelens_charades", "temporal_grounding_charades"])
def test_tasks_of_lmms_eval(task: str) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    try:
        template = load_template(f"lmms_eval:{task}")
    except ConfigError as error:
        if "No module named" not in str(error):
            raise
        pytest.skip(f"what lmms-eval needs is not installed: {error}")
    before, after = template.turn("a dog runs")
    assert not before and after.count("a dog runs") == 1 and "start" in after


def test_a_system_turn(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("--- system\nAnswer in seconds.\n--- grounding\n{video}{query}")
    assert load_template(str(path)).system == "Answer in seconds."
    assert Template().system == ""

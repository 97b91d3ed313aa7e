"""Prompt templates: the wording of the user's turn, and reference answers in the form it asks for.

A template is a text file: `key: value` lines, then texts, each below a line with its name.

    form: json
    options: letters
    source: whose wording this is
    --- grounding
    {video}When does this happen: {event}? Answer as {"start_time": 3.0, "end_time": 9.5}.
    --- question
    {video}{query}{options}

Keys, with their defaults; all are optional. Lines that begin with # are comments.

    form      form of the answer, a name of `opd.text.forms.FORMS`              [seconds]
    thinking  yes if the answer begins with a <think> block, else no            [no]
    options   how the options of a question are written                         [list]
              list:     ": red, blue" after the question; the answer is "red."
              letters:  "A. red" on a line of its own; the answer is "A. red."
    spans     true moments in a reference answer: first or all                  [first]
    checked   what the reward's term `format` checks                            [answer]
              answer:   all of the answer outside its thinking
              tags:     the tags alone, whatever stands between them
    source    origin of the wording

Texts, all optional too; a missing one is that of the default template.

    grounding  when does an event happen?
    question   a question, with its options if it has any
    open       a question without options; `question` is used if this text is missing
    grounded   a question, and when its answer is visible
    system     the system turn before all of these; no fields

Fields of a text:

    {video}     the frames; exactly once
    {query}     the event's description, or the question
    {event}     the same without surrounding spaces and full stops
    {options}   the options; exactly once in `question` and `grounded`, nowhere else
    {duration}  the length of the video in seconds, with one decimal

Every text but `system` contains {query} or {event}. Other braces, such as those of JSON, stay as
they are. Blank lines at the start and the end of a text are removed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from string import ascii_uppercase

from opd.errors import ConfigError, printable, require
from opd.text.forms import FORMS, Span, format_spans, tag_of
from opd.text.task_prompts import task_prompt

PRESETS = Path(__file__).with_name("presets")
TEXTS = ("grounding", "question", "open", "grounded")  # of the user's turn
KEYS = ("form", "thinking", "options", "spans", "checked", "source")
_VALUES = {
    "form": tuple(FORMS),
    "options": ("list", "letters"),
    "spans": ("first", "all"),
    "checked": ("answer", "tags"),
}
FIELDS = ("video", "query", "event", "options", "duration")
_TASK = re.compile(r"([a-z]\w*):(\w[\w-]*)")
_FIELD = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """The texts of a template and the form of its answers; the module describes each field.

    The defaults are the template that the embedded models were trained with.

    Raises:
        ConfigError: for an invalid text or value, in one line that begins with the name.
    """

    name: str = "default"
    form: str = "seconds"
    thinking: bool = False
    options: str = "list"
    spans: str = "first"
    checked: str = "answer"
    source: str = ""
    grounding: str = "{query}. When?{video}"
    question: str = "{query}{options}?{video}"
    open: str = ""
    grounded: str = "{query}{options}? When?{video}"
    system: str = ""

    def __post_init__(self) -> None:
        for key, choices in _VALUES.items():
            _check_choice(getattr(self, key), choices, f"{self.name}: {key} ")
        require(
            self.checked == "answer" or self.thinking or bool(tag_of(self.form)),
            f"{self.name}: checked tags: an answer has none, neither thinking nor form {self.form}",
        )
        for key in TEXTS:
            text = getattr(self, key)
            if key != "open" or text:
                _check_text(text, key in ("question", "grounded"), f"{self.name}: {key}")

    def turn(
        self,
        query: str,
        options: Sequence[str] | None = None,
        grounded: bool = False,
        question: bool = False,
        duration_s: float | None = None,
    ) -> tuple[str, str]:
        """The user's turn, as the text before and the text after the video.

        Args:
            query: description of the event, or the question.
            options: options of the question, if it has any.
            grounded: whether a question also asks when its answer is visible.
            question: whether `query` is a question.
            duration_s: length of the video in seconds.

        Raises:
            ConfigError: if the text has {duration} and `duration_s` is None.
            ValueError: for more options than there are letters.
        """
        kind = "grounding"
        if question:
            plain = "open" if self.open and not options else "question"
            kind = "grounded" if grounded else plain
        text = getattr(self, kind)
        values = {
            "query": query,
            "event": query.strip(" \t\n."),
            "options": self._options(options or ()),
        }
        if "{duration}" in text:
            require(
                duration_s is not None,
                f"{self.name}: {kind}: has {{duration}}, but the video's length is unknown",
            )
            values["duration"] = f"{duration_s:.1f}"
        # One pass, so that braces in a query are never taken for a field.
        before, after = (
            _FIELD.sub(lambda field: values[field[1]], part) for part in text.split("{video}")
        )
        return before, after

    @property
    def video_first(self) -> bool:
        """Whether no field precedes the video in grounding prompts, so that all queries about a
        video share its prefix."""
        return "{" not in self.grounding.partition("{video}")[0]

    def reference(
        self, spans: Sequence[Span], answer: str | None, options: Sequence[str] | None
    ) -> str:
        """The reference answer, without thinking: the answer or option, then the true moments.

        Args:
            spans: true moments in seconds, possibly none.
            answer: answer to the question, one of its options if it has any; None without one.
            options: options of the question.

        Returns:
            The text, empty without an answer and without spans.

        Raises:
            ValueError: for a span that is not `0 <= start < end < inf`.
        """
        words = answer or ""
        if words and options:
            words = f"{words}."
            if self.options == "letters":
                letter = _letters(options)[list(options).index(answer or "")]
                words = f"{letter}. {words.rstrip('.')}."
        written = spans if self.spans == "all" else spans[:1]
        return format_spans(written, self.form, words) if words or spans else ""

    def _options(self, options: Sequence[str]) -> str:
        if not options:
            return ""
        if self.options == "list":
            return ": " + ", ".join(options)
        pairs = zip(_letters(options), options, strict=True)
        return "".join(f"\n{letter}. {option}" for letter, option in pairs)


def load_template(template: str, key: str = "data.prompt") -> Template:
    """Load a template.

    Args:
        template: name of a preset; path of a file, with a suffix or a folder; `PACKAGE:TASK`, a
            task of an installed package (`task_prompt`); or, if it contains a brace, the text for
            grounding. To the last two the default's texts for questions are added.
        key: configuration key that error messages name.

    Raises:
        ConfigError: if there is no such template or it is invalid, in one line.
    """
    if "{" in template:
        _check_text(template, False, f"{key}={printable(template)}")
        return Template(name="inline", grounding=template)
    if task := _TASK.fullmatch(template):
        try:
            text = task_prompt(task[1], task[2])
        except LookupError as error:
            raise ConfigError(f"{key}={template}: {error}") from error
        return Template(name=template, grounding="{video}" + text, source=task[1])
    path = Path(template)
    if path.suffix or len(path.parts) > 1:
        return _read(path, template)
    _check_choice(template, presets(), f"{key}=")
    return _read(PRESETS / f"{template}.txt", template)


def presets() -> tuple[str, ...]:
    """Names of the shipped templates."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.txt")))


def _read(path: Path, name: str) -> Template:
    """Read a template file; ConfigError with the line of a mistake."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"{printable(path)}: no such template file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{printable(path)}: not readable: {error}") from error
    values: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    text: list[str] | None = None
    for number, line in enumerate(lines, 1):
        where = f"{printable(path)}:{number}"
        if line.startswith("---"):
            key = line.strip("- \t")
            _check_choice(key, (*TEXTS, "system"), f"{where}: text ")
            require(key not in texts, f"{where}: text {key}: appears twice")
            text = texts[key] = []
        elif text is not None:
            text.append(line)
        elif line.strip() and not line.startswith("#"):
            key, colon, value = (part.strip() for part in line.partition(":"))
            require(bool(colon), f"{where}: {printable(line)}: neither `key: value` nor `--- text`")
            _check_choice(key, KEYS, f"{where}: key ")
            require(key not in values, f"{where}: key {key}: appears twice")
            values[key] = value
    thinking = values.pop("thinking", "no")
    _check_choice(thinking, ("no", "yes"), f"{printable(path)}: thinking ")
    written = {key: "\n".join(lines).strip("\n") for key, lines in texts.items()}
    return Template(name=name, thinking=thinking == "yes", **values, **written)


def _check_text(text: str, has_options: bool, where: str) -> None:
    """Raise ConfigError unless a text has its required fields and no unknown ones."""
    require(text.count("{video}") == 1, f"{where}: must contain {{video}} exactly once")
    has_query = "{query}" in text or "{event}" in text
    require(has_query, f"{where}: must contain {{query}} or {{event}}")
    rule = "must contain {options} exactly once" if has_options else "must not contain {options}"
    require(text.count("{options}") == has_options, f"{where}: {rule}")
    for field in _FIELD.findall(text):
        _check_choice(field, FIELDS, f"{where}: field ")


def _check_choice(value: str, choices: Sequence[str], prefix: str) -> None:
    """Raise ConfigError, with the nearest choice, unless the value is one of them."""
    nearest = get_close_matches(value, choices, n=1, cutoff=0)[0]
    require(
        value in choices,
        f"{prefix}{printable(value)}: not one of {', '.join(choices)}; the nearest is {nearest}",
    )


def _letters(options: Sequence[str]) -> str:
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options; at most {len(ascii_uppercase)} can be lettered")
    return ascii_uppercase[: len(options)]


DEFAULT = Template()

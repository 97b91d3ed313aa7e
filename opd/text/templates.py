"""How the user's turn is written, and the reference answer in the form that it asks for.

A template is a file that one can write by hand: `key: value` lines, then the texts, each below a
line with its name.

    form: json
    options: letters
    source: whose wording this is
    --- grounding
    {video}When does this happen: {event}? Answer as {"start_time": 3.0, "end_time": 9.5}.
    --- question
    {video}{query}{options}

Keys, all of them optional (lines that begin with # are comments):

    form      how the answer is written, a name of `opd.text.forms.FORMS`   [seconds]
    thinking  yes where the answer begins with its thinking            [no]
    options   how a question's options are written                     [list]
              list:     ": red, blue" behind the question; the answer is "red."
              letters:  a line each below it, "A. red"; the answer is "A. red."
    spans     first, or all of the true moments in reference answers   [first]
    source    where the wording comes from

Texts, each optional too; the default's stands in for one that is left out:

    grounding  when does this happen
    question   a question, with options if it has some
    open       a question without options, where `question` does not fit it
    grounded   a question and when the answer is to be seen

In a text {video} stands where the frames go, once; {query} for the sentence or question, {event}
for the same without spaces around it and its full stop, {options} for the options (in `question`
and `grounded`, once), {duration} for the video's length in seconds. Other braces are left alone.
Blank lines around a text are not part of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from string import ascii_uppercase

from opd.errors import ConfigError, printable, require
from opd.text.forms import FORMS, Span, format_spans

PRESETS = Path(__file__).with_name("presets")
TEXTS = ("grounding", "question", "open", "grounded")
KEYS = ("form", "thinking", "options", "spans", "source")
_VALUES = {"form": tuple(FORMS), "options": ("list", "letters"), "spans": ("first", "all")}
FIELDS = ("video", "query", "event", "options", "duration")
_FIELD = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """The texts of a user's turn and how it is to be answered, as the module says; by default the
    one that the embedded models were trained on.

    Raises:
        ConfigError: in one line that begins with the name.
    """

    name: str = "default"
    form: str = "seconds"
    thinking: bool = False
    options: str = "list"
    spans: str = "first"
    source: str = ""
    grounding: str = "{query}. When?{video}"
    question: str = "{query}{options}?{video}"
    open: str = ""
    grounded: str = "{query}{options}? When?{video}"

    def __post_init__(self) -> None:
        for key, known in _VALUES.items():
            _known(getattr(self, key), known, f"{self.name}: {key} ")
        for key in TEXTS:
            text = getattr(self, key)
            if key != "open" or text:
                _check(text, key in ("question", "grounded"), f"{self.name}: {key}")

    def turn(
        self,
        query: str,
        options: Sequence[str] | None = None,
        grounded: bool = False,
        question: bool = False,
        duration_s: float | None = None,
    ) -> tuple[str, str]:
        """The text before and after the video.

        Args:
            query: the sentence to localise, or the question.
            options: of the question.
            grounded: whether the question is also about when; plain grounding always is.
            question: whether the query is one.
            duration_s: length of the video in seconds.

        Raises:
            ConfigError: for a text with {duration} where the length is unknown.
            ValueError: for more options than there are letters.
        """
        kind = "grounding"
        if question:
            asked = "open" if self.open and not options else "question"
            kind = "grounded" if grounded else asked
        text = getattr(self, kind)
        values = {
            "query": query,
            "event": query.strip(" \t\n."),
            "options": self._options(options or ()),
        }
        if "{duration}" in text:
            told = f"{self.name}: {kind}: has {{duration}}, and the video's length is not known"
            require(duration_s is not None, told)
            values["duration"] = f"{duration_s:.1f}"
        # One pass: what a query holds is never taken for a field.
        before, after = (
            _FIELD.sub(lambda field: values[field[1]], part) for part in text.split("{video}")
        )
        return before, after

    @property
    def video_first(self) -> bool:
        """Whether the sentence to localise comes after the video, so that what stands before it is
        the same for all of them."""
        return "{" not in self.grounding.partition("{video}")[0]

    def reference(
        self, spans: Sequence[Span], answer: str | None, options: Sequence[str] | None
    ) -> str:
        """What a model is to answer, without thinking: the answer in words or the option, the true
        moments (seconds), or one after the other; empty where neither is known.

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
    """A preset by its name, a file by its path (with a suffix or a folder), or, of text that holds
    a brace, a template with this text for grounding and the default's for questions. `key` is the
    setting that errors name.

    Raises:
        ConfigError: in one line that names the file and the key.
    """
    if "{" in template:
        _check(template, False, f"{key}={printable(template)}")
        return Template(name="inline", grounding=template)
    path = Path(template)
    if path.suffix or len(path.parts) > 1:
        return _read(path, template)
    _known(template, presets(), f"{key}=")
    return _read(PRESETS / f"{template}.txt", template)


def presets() -> tuple[str, ...]:
    """The names of the shipped templates."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.txt")))


def _read(path: Path, name: str) -> Template:
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
            _known(key, TEXTS, f"{where}: text ")
            require(key not in texts, f"{where}: text {key}: is there twice")
            text = texts[key] = []
        elif text is not None:
            text.append(line)
        elif line.strip() and not line.startswith("#"):
            key, colon, value = (part.strip() for part in line.partition(":"))
            require(bool(colon), f"{where}: {printable(line)}: not `key: value` nor `--- text`")
            _known(key, KEYS, f"{where}: key ")
            require(key not in values, f"{where}: key {key}: is there twice")
            values[key] = value
    thinking = values.pop("thinking", "no")
    _known(thinking, ("no", "yes"), f"{printable(path)}: thinking ")
    written = {key: "\n".join(lines).strip("\n") for key, lines in texts.items()}
    return Template(name=name, thinking=thinking == "yes", **values, **written)


def _check(text: str, asks: bool, where: str) -> None:
    """Raise ConfigError unless the text holds the fields that it must, and no others."""
    require(text.count("{video}") == 1, f"{where}: must hold {{video}} once")
    named = "{query}" in text or "{event}" in text
    require(named, f"{where}: must hold {{query}} or {{event}}")
    told = f"{where}: must hold {{options}} " + ("once" if asks else "in no place")
    require(text.count("{options}") == asks, told)
    for field in _FIELD.findall(text):
        _known(field, FIELDS, f"{where}: field ")


def _known(value: str, known: Sequence[str], before: str) -> None:
    nearest = get_close_matches(value, known, n=1, cutoff=0)[0]
    told = f"{before}{printable(value)}: not one of {', '.join(known)}; the nearest is {nearest}"
    require(value in known, told)


def _letters(options: Sequence[str]) -> str:
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"{len(options)} options, which is more than there are letters")
    return ascii_uppercase[: len(options)]


DEFAULT = Template()

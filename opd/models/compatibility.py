"""Whether a teacher can score a student's tokens: told before any weight is loaded."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig

from opd.errors import ModelError
from opd.models.load import load_processor, require_family, resolve
from opd.models.video_lm import end_token_ids

IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
FRAMES = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of itself without its weights."""

    spec: str
    config: Any
    processor: Any
    end_token_ids: frozenset[int]

    @classmethod
    def of(cls, spec: str, key: str) -> "Described":
        """Read it; ModelError, which names the key, where that fails."""
        path = resolve(spec, key)
        try:
            config: Any = AutoConfig.from_pretrained(path)
            require_family(f"{key}={spec}", config.model_type)
            processor = load_processor(spec)
            try:
                generation = GenerationConfig.from_pretrained(path)
            except OSError:  # a checkpoint need not have one
                generation = None
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"{key}={spec}: {str(error).splitlines()[0]}") from error
        return cls(
            spec, config, processor, frozenset(end_token_ids(processor.tokenizer, generation))
        )


def check_pair(student: str, teacher: str) -> None:
    """Raise ModelError, one line with what differs, unless the teacher reads and writes the
    student's tokens: family, tokenizer, special tokens, chat template, end tokens, frames; the
    padded sizes of the vocabulary may differ."""
    if student.startswith("tiny:") or teacher.startswith("tiny:"):
        return  # fresh models, made alike
    one = Described.of(student, "model.student")
    two = Described.of(teacher, "model.teacher")

    def require(what: str, first: Any, second: Any) -> None:
        if first != second:
            told = f"its {what} is {_short(second)}, the student's {_short(first)}"
            raise ModelError(f"model.teacher={teacher}: {told} (model.student={student})")

    require("family", one.config.model_type, two.config.model_type)
    tokens, others = (described.processor.tokenizer for described in (one, two))
    mine, theirs = tokens.get_vocab(), others.get_vocab()
    if mine != theirs:
        word = min(mine.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[0]
        require(f"token id of {word!r}", mine.get(word), theirs.get(word))
    for name in IDS:
        require(name, getattr(one.config, name, None), getattr(two.config, name, None))
    require("pad token", tokens.pad_token_id, others.pad_token_id)
    require("set of end tokens", sorted(one.end_token_ids), sorted(two.end_token_ids))
    templates = (
        d.processor.chat_template or d.processor.tokenizer.chat_template for d in (one, two)
    )
    if len(set(templates)) > 1:
        raise ModelError(f"model.teacher={teacher}: its chat template is not that of {student}")
    for name in FRAMES:
        values = (getattr(d.processor.video_processor, name, None) for d in (one, two))
        require(f"video processor's {name}", *values)
    for key, described in (("student", one), ("teacher", two)):
        rows = described.config.text_config.vocab_size
        if rows < len(tokens):
            told = f"{rows} rows of the vocabulary for {len(tokens)} tokens"
            raise ModelError(f"model.{key}={described.spec}: {told}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

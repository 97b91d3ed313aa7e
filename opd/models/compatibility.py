"""Compatibility of a student and a teacher, checked before any weight is loaded."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from opd.errors import ModelError
from opd.models.load import config_of, load_processor, resolve
from opd.models.video_lm import end_token_ids

SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
VIDEO_SETTINGS = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")


@dataclass(frozen=True)
class Description:
    """A checkpoint without its weights: model config, processor and end tokens."""

    spec: str
    config: Any
    processor: Any
    end_token_ids: frozenset[int]

    @classmethod
    def of(cls, spec: str, key: str) -> "Description":
        """Read the checkpoint that the configuration's `key` names; ModelError where that fails."""
        path = resolve(spec, key)
        config = config_of(spec, f"{key}={spec}")
        try:
            processor = load_processor(spec)
            try:
                generation = GenerationConfig.from_pretrained(path)
            except OSError:  # the file is optional
                generation = None
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise ModelError(f"{key}={spec}: {str(error).splitlines()[0]}") from error
        return cls(
            spec, config, processor, frozenset(end_token_ids(processor.tokenizer, generation))
        )


def check_pair(student: str, teacher: str) -> None:
    """Raise ModelError, one line that says what differs, unless the teacher can score the student's
    tokens.

    Family, tokenizer, special and end tokens, chat template and video processor must agree; the
    padded sizes of the vocabulary may differ.
    """
    if student.startswith("tiny:") or teacher.startswith("tiny:"):
        return  # fresh models share a tokenizer and a processor
    ours = Description.of(student, "model.student")
    theirs = Description.of(teacher, "model.teacher")

    def require_equal(what: str, first: Any, second: Any) -> None:
        if first != second:
            difference = f"its {what} is {_short(second)}, the student's is {_short(first)}"
            raise ModelError(f"model.teacher={teacher}: {difference} (model.student={student})")

    pair = ours, theirs
    require_equal("family", *(each.config.model_type for each in pair))
    tokenizers = [each.processor.tokenizer for each in pair]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if vocabularies[0] != vocabularies[1]:
        differing = vocabularies[0].items() ^ vocabularies[1].items()
        word = min(differing, key=lambda item: (item[1], item[0]))[0]
        require_equal(f"token id of {word!r}", *(ids.get(word) for ids in vocabularies))
    for name in SPECIAL_IDS:
        require_equal(name, *(getattr(each.config, name, None) for each in pair))
    require_equal("pad token", *(tokenizer.pad_token_id for tokenizer in tokenizers))
    require_equal("set of end tokens", *(sorted(each.end_token_ids) for each in pair))
    templates = {
        each.processor.chat_template or each.processor.tokenizer.chat_template for each in pair
    }
    if len(templates) > 1:
        raise ModelError(
            f"model.teacher={teacher}: its chat template differs from that of {student}"
        )
    for name in VIDEO_SETTINGS:
        values = (getattr(each.processor.video_processor, name, None) for each in pair)
        require_equal(f"video processor's {name}", *values)
    num_tokens = len(tokenizers[0])
    for key, description in zip(("student", "teacher"), pair, strict=True):
        rows = description.config.text_config.vocab_size
        if rows < num_tokens:
            raise ModelError(
                f"model.{key}={description.spec}: its vocabulary has {rows} rows, too few for the "
                f"tokenizer's {num_tokens} tokens"
            )


def _short(value: Any) -> str:
    """`repr` in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

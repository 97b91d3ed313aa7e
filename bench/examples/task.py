"""What the examples train: a small student, a wider teacher, and batches of token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the models, and of `steps` batches of completions."""

    vocab_size: int
    student_size: int
    teacher_size: int
    batch_size: int
    min_completion_length: int
    max_completion_length: int
    steps: int
    accumulation_steps: int = 1  # parts of a batch, one after another, in TRL's trainer
    prompt_length: int = 4


# To compare losses and weights: completions of different lengths, which pad each other.
SMALL = Size(
    vocab_size=2000,
    student_size=64,
    teacher_size=96,
    batch_size=4,
    min_completion_length=6,
    max_completion_length=12,
    steps=5,
    accumulation_steps=2,
)
# To measure memory: 512 completion tokens. A hidden size is to its vocabulary about what it is in
# Qwen3-0.6B, so that logits and the head's gradient are to each other as they are there.
LARGE = Size(
    vocab_size=50_000,
    student_size=256,
    teacher_size=384,
    batch_size=4,
    min_completion_length=128,
    max_completion_length=128,
    steps=2,
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A student to be trained, its teacher without gradients, and where a trainer may write."""

    size: Size
    student: Qwen3ForCausalLM
    teacher: Qwen3ForCausalLM
    folder: Path

    @staticmethod
    def of(size: Size, folder: Path) -> "Task":
        """Randomly initialised models, the same ones each time."""
        student = random_model(size.vocab_size, size.student_size, seed=0, tied=True)
        teacher = random_model(size.vocab_size, size.teacher_size, seed=1, tied=False)
        teacher.requires_grad_(False)
        return Task(size=size, student=student, teacher=teacher.eval(), folder=folder)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids `[B, T]` of prompts and completions, and a bool mask `[B, T]` of the tokens of
        completions."""
        size = self.size
        generator = torch.Generator().manual_seed(2)
        place = torch.arange(size.prompt_length + size.max_completion_length)
        for _ in range(size.steps):
            shape = size.batch_size, len(place)
            input_ids = torch.randint(size.vocab_size, shape, generator=generator)
            shortest, longest = size.min_completion_length, size.max_completion_length
            lengths = torch.randint(shortest, longest + 1, (shape[0], 1), generator=generator)
            end = size.prompt_length + lengths
            completion_mask = (place >= size.prompt_length) & (place < end)
            yield input_ids.to(DEVICE), completion_mask.to(DEVICE)


def random_model(vocab_size: int, hidden_size: int, *, seed: int, tied: bool) -> Qwen3ForCausalLM:
    """A Qwen3 model of two layers. `tied` heads are the embedding, as in small published models.
    Logits have a standard deviation of 1.5, so that student and teacher disagree."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        initializer_range=1.5 / hidden_size**0.5,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).to(DEVICE)  # type: ignore[arg-type]

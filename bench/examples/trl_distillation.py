"""TRL's DistillationTrainer, which samples from the student: with its own loss, and with ours."""

from collections.abc import Callable

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer  # type: ignore[attr-defined]

from bench.examples.compare import Example
from bench.examples.task import DEVICE, LEARNING_RATE, Size, Task

END_TOKENS = 64  # any of these ends a completion: the first ids of the vocabulary


def train(task: Task, make_trainer: Callable[[Task], DistillationTrainer]) -> list[float]:
    """The losses of all steps, as TRL logs them."""
    task.student.generation_config.eos_token_id = list(range(END_TOKENS))
    trainer = make_trainer(task)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trl(task: Task) -> DistillationTrainer:
    """Before: the trainer as TRL has it."""
    return DistillationTrainer(
        model=task.student,
        teacher_model=task.teacher,
        args=settings(task),
        train_dataset=prompts(task.size),
        processing_class=tokenizer(task.size),
    )


def with_fused_kl(task: Task) -> DistillationTrainer:
    """After: the trainer with the loss of `fused_kl`, as every other trainer of this process."""
    from trl.trainer import distillation_trainer

    from fused_kl.adapters import chunked_divergence_loss

    distillation_trainer._chunked_divergence_loss = chunked_divergence_loss
    return DistillationTrainer(
        model=task.student,
        teacher_model=task.teacher,
        args=settings(task),
        train_dataset=prompts(task.size),
        processing_class=tokenizer(task.size),
    )


def settings(task: Task) -> DistillationConfig:
    """Reverse KL in fp32, with a line of the log for each step."""
    size = task.size
    return DistillationConfig(
        output_dir=str(task.folder),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch_size // size.accumulation_steps,
        gradient_accumulation_steps=size.accumulation_steps,
        learning_rate=LEARNING_RATE,
        beta=1.0,
        max_completion_length=size.max_completion_length,
        generation_kwargs={"min_new_tokens": size.min_completion_length},
        bf16=False,
        use_cpu=DEVICE == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def prompts(size: Size) -> datasets.Dataset:
    """A prompt for each completion of the training."""
    starts = [END_TOKENS + 7 * i for i in range(size.steps * size.batch_size)]
    words = [[f"w{i}" for i in range(start, start + size.prompt_length)] for start in starts]
    return datasets.Dataset.from_dict({"prompt": [" ".join(prompt) for prompt in words]})


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """Token i is the word `w{i}`, but for the first and the last."""
    words = ["<end>", *(f"w{i}" for i in range(1, size.vocab_size - 1)), "<pad>"]
    ids = {word: i for i, word in enumerate(words)}
    splitter = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


EXAMPLE = Example(before=with_trl, after=with_fused_kl, train=train)

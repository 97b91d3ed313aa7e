"""TRL's own DistillationTrainer and this project's step on the same language models and prompts.

Text alone: the Qwen3 language model inside a Qwen3-VL one, which on text without video is the same
function (its three rotary rows are equal), with the video tokens of each prompt replaced by as many
`<|vision_pad|>`, an ordinary row of the embedding to both. Both write completions of full length:
TRL may not end before it, and for us no token ends; both take the mean reverse KL over completion
tokens and the whole vocabulary, so the two losses are equal without a factor.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer  # type: ignore[attr-defined]

from bench.steps.measure import errors, gradient
from opd.config.run import Config
from opd.data.batch import Prompt, PromptBatch, collate
from opd.method.trainer import Trainer
from opd.models.video_lm import VideoLM

STAND_IN = "<|vision_pad|>"


def text_model(lm: VideoLM) -> Qwen3ForCausalLM:
    """The language model of a Qwen3-VL model by itself, a copy of its weights."""
    text = lm.model.config.text_config
    rope = {key: text.rope_parameters[key] for key in ("rope_type", "rope_theta")}
    own_settings = Qwen3Config().to_dict().keys() - {"architectures", "model_type"}
    shared = {k: v for k, v in text.to_dict().items() if k in own_settings}
    changes = {"rope_parameters": rope, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(**(shared | changes)))
    weights = {f"model.{k}": v for k, v in lm.language_model.state_dict().items()}
    weights["lm_head.weight"] = lm.head.weight
    model.load_state_dict(weights)
    return model.to(lm.head.weight.dtype).to(lm.device).eval()  # type: ignore[arg-type]


def text_only(trainer: Trainer, batch: PromptBatch) -> PromptBatch:
    """The batch with text in the place of its videos, and `trainer` ready for it: any token may be
    sampled and none ends a completion."""
    stand_in = trainer.processor.tokenizer.convert_tokens_to_ids(STAND_IN)
    models = [trainer.student] + ([trainer.teacher.lm] if trainer.teacher else [])
    trainer.policy = replace(
        trainer.policy,
        allowed_columns=torch.ones_like(trainer.policy.allowed_columns),
        eos_token_ids=(-1,),
    )

    def nothing(lm: VideoLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What a vision tower makes of no video."""
        config = lm.model.config.vision_config
        empty = lm.head.weight.new_empty(0, config.out_hidden_size)
        return empty, [empty] * len(config.deepstack_visual_indexes)

    def text(prompt: Prompt) -> Prompt:
        video = prompt.input_ids == trainer.student.model.config.video_token_id
        length = len(prompt.input_ids)
        return replace(
            prompt,
            input_ids=prompt.input_ids.masked_fill(video, stand_in),
            position_ids=torch.arange(length).expand(3, -1),
            next_position=length,
            pixel_values=None,
            grid_thw=(0, 0, 0),
            features={lm: nothing(lm) for lm in models},
        )

    prompts = [text(prompt) for prompt in batch.prompts]
    return collate(prompts, trainer.policy.pad_token_id, batch.input_ids.device)


def peer(trainer: Trainer, batch: PromptBatch, folder: Path) -> DistillationTrainer:
    """TRL's trainer of copies of the same models on the same prompts. Its settings are ours: fp32,
    no gradient checkpointing, AdamW, constant rate."""
    assert trainer.teacher is not None
    config, tokenizer = trainer.config, trainer.processor.tokenizer
    texts = [tokenizer.decode(prompt.input_ids) for prompt in batch.prompts]
    ids = tokenizer(text=texts)["input_ids"]
    assert ids == [p.input_ids.tolist() for p in batch.prompts], "other tokens than ours"
    # TRL reports its use to the hub unless it is told not to.
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True):
        theirs = DistillationTrainer(
            model=text_model(trainer.student),
            teacher_model=text_model(trainer.teacher.lm),
            args=settings(config, folder, len(texts)),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
        )
    theirs.create_optimizer()  # as its loop begins
    theirs.current_gradient_accumulation_steps = 1
    return theirs


def settings(config: Config, folder: Path, batch_size: int) -> DistillationConfig:
    """TRL's names for this configuration."""
    optim, length = config.optim, config.sample.max_completion_length
    return DistillationConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        max_grad_norm=optim.max_grad_norm,
        beta=1.0,  # the reverse KL
        temperature=config.sample.temperature,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        seed=config.seed,
    )


def prove_equal(
    trainer: Trainer, batch: PromptBatch, theirs: DistillationTrainer
) -> dict[str, float]:
    """Errors of our loss and gradient against TRL's on the same completions, both means over
    tokens."""
    assert trainer.config.normalize == "token"
    ((loss, rollouts),), summed = gradient(trainer, lambda: trainer.micro_steps([batch], 0))
    ids = rollouts.completion_ids[:, 0]
    mask = rollouts.completion_mask[:, 0].long().to(ids.device)
    inputs = {
        "prompt_ids": batch.input_ids,
        "prompt_mask": batch.mask.long(),
        "completion_ids": ids,
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
    }
    model: Any = theirs.model
    model.train()
    value = theirs.compute_loss(model, inputs)
    value.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tokens = int(mask.sum())
    ours = float(loss.loss.detach()) / tokens, [g / tokens for g in summed]
    return errors(ours, (float(value.detach()), [grads[name] for name in names(trainer)]))


def names(trainer: Trainer) -> list[str]:
    """The names in `text_model` of the parameters, in the optimizer's order."""
    by_id = {id(p): f"model.{n}" for n, p in trainer.student.language_model.named_parameters()}
    by_id[id(trainer.student.head.weight)] = "lm_head.weight"
    groups = trainer.engine.optimizer.param_groups
    return [by_id[id(p)] for group in groups for p in group["params"]]


def step(theirs: DistillationTrainer, batch: PromptBatch, _: int = 0) -> None:
    """One step of TRL's trainer without the logging and callbacks of its loop: generation, loss,
    backward, update."""
    model: Any = theirs.model
    optimizer: Any = theirs.optimizer
    tokenizer: Any = theirs.processing_class
    texts: Any = [{"prompt": tokenizer.decode(prompt.input_ids)} for prompt in batch.prompts]
    theirs.training_step(model, texts, None)  # type: ignore[arg-type]
    theirs.accelerator.clip_grad_norm_(model.parameters(), theirs.args.max_grad_norm)
    optimizer.step()
    model.zero_grad()

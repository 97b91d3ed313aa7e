"""Steps of many configurations, on as many ranks as it is started with: `torchrun zero_worker.py
OUT CASE ...` leaves what they did in OUT; `tests/test_zero.py` compares."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from opd import world
from opd.config import Config, load_config
from opd.data.batch import collate
from opd.data.examples import Example
from opd.engine import set_up
from opd.models import tiny
from opd.models.load import VideoLM, prepare
from opd.rollout import Rollouts
from opd.teacher import Teacher
from opd.train import Trainer
from opd.zero import load_frozen
from tests.helpers import PAD, build, make_prompt, policy_of

PROMPTS = 6
COMMON = (
    f"batch_size={PROMPTS}",
    "num_rollouts=2",
    "steps=4",
    "model.dtype=float32",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "optim.warmup=0",
    "optim.weight_decay=0.1",
    "sample.max_completion_length=5",
    "engine.persistence_threshold=0",
)
CASES: dict[str, tuple[str, ...]] = {  # name: keys beside those of the engine
    "plain": (),
    "accumulated": ("micro_batch_size=1",),
    "by_token": ("normalize=token", "micro_batch_size=1"),
    "tied": (),
    "sampled": ("objective=sampled",),
    "recomputed": ("prefix.recompute=all",),
    "routed": ("curriculum.routing=on", "curriculum.route_below=0.5"),
    "nothing_routed": ("curriculum.routing=on", "curriculum.route_below=0.5"),
    "grpo": ("method=grpo", "micro_batch_size=1"),
    "sft": ("method=sft", "num_rollouts=1"),
    "lora": ("model.lora_rank=2",),
    "layer_by_layer": ("engine.gather=false",),
    "frozen_head": (),
    "offloaded": ("engine.offload=true",),
    "no_number": (),
    "bf16": ("model.dtype=bfloat16", "normalize=token", "micro_batch_size=1", "optim.lr=1e-5"),
    "teacher_replica": ("curriculum.routing=on", "curriculum.route_below=0.5"),
    "teacher_shard": (
        "curriculum.routing=on",
        "curriculum.route_below=0.5",
        "teacher.placement=shard",
    ),
    "teacher_offload": (
        "curriculum.routing=on",
        "curriculum.route_below=0.5",
        "teacher.placement=offload",
    ),
}


def model(size: str, seed: int, tied: bool = False) -> VideoLM:
    made = build(size, seed=seed, layers=2).to(torch.float32)
    if tied:
        made.lm_head.weight = made.model.language_model.embed_tokens.weight
        made.config.tie_word_embeddings = made.config.text_config.tie_word_embeddings = True
    return prepare(made)


class Watched(Trainer):
    """Remembers rollouts by step and prompt."""

    seen: dict[str, list[list[int]]]

    def rollouts(self, batch: Any, prefix: Any, step: int) -> Rollouts:
        made = super().rollouts(batch, prefix, step)
        for row, example in enumerate(batch.examples):
            ids, masks = made.completion_ids[row], made.completion_mask[row]
            told = [i[m].tolist() for i, m in zip(ids, masks, strict=True)]
            self.seen[f"{step}/{example.id}"] = told
        return made


def grades(case: str) -> Any:
    """Rewards 0 or 1, in the place of `grade`. One answer to a and one to d is wrong: of two ranks,
    and of three, some have nothing to learn from. In case `nothing_routed` none has."""

    def grade(made: Rollouts, examples: list[Example], *_: Any) -> Rollouts:
        rewards = torch.ones(made.truncated.shape)
        for row, example in enumerate(examples):
            if case != "nothing_routed" and example.id in "ad":
                rewards[row, 0] = 0.0
        return replace(made, rewards=rewards)

    return grade


def carry_out(case: str, config: Config) -> dict[str, Any]:
    """Two steps; what a test compares."""
    torch.manual_seed(0)
    student, teacher = model("student", 1, case == "tied"), model("teacher", 2)
    if case.startswith("teacher"):
        where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        teacher = load_frozen("embedded:teacher", config, **where)
    if case == "bf16":
        student.model.to(torch.bfloat16), teacher.model.to(torch.bfloat16)
    # A third of all tokens end an answer: lengths differ.
    policy = replace(policy_of(student), eos_token_ids=tuple(range(0, 384, 3)))
    train_only = VideoLM.train_only

    def frozen(self: VideoLM, trainable: str) -> None:
        train_only(self, trainable)
        self.head.requires_grad_(case != "frozen_head")

    with mock.patch.object(VideoLM, "train_only", frozen):
        trainer = Watched(
            config,
            SimpleNamespace(tokenizer=tiny.tokenizer()),
            student,
            Teacher(teacher) if config.method == "opd" else None,
            policy,
        )
    trainer.seen = {}
    incoming = gradients_of_losses(trainer)
    prompts = [make_prompt(student, name, pairs=1 + i % 3) for i, name in enumerate("abcdef")]
    prompts = [replace(p, pixel_values=p.pixel_values.float()) for p in prompts]
    if case == "no_number":
        prompts[1].pixel_values[0] = torch.nan  # of one rank alone
    before, rows = weights_of(trainer), []
    with mock.patch("opd.train.grade", grades(case)):
        for step in range(2):
            batches = [collate([prompts[i] for i in places], PAD) for places in config.shares]
            rows.append(trainer.step(batches, step))
    kept = ("loss", "grad_norm", "lr", "kl", "completion_length", "trained_share", "skipped")
    return {
        "rows": [{name: row[name] for name in kept} for row in rows],
        "rollouts": world.merged(trainer.seen),
        "before": before,
        "weights": weights_of(trainer),
        "moments": len(trainer.engine.optimizer.state),
        "flops": sum(trainer.ledger.flops.values()),
        "tokens": trainer.ledger.tokens,
        "incoming": sorted(set(incoming)),
    }


def gradients_of_losses(trainer: Trainer) -> list[float]:
    """Filled with the gradient that each micro-batch's loss receives in backward."""
    gradients: list[float] = []
    backward = trainer.engine.backward

    def watched(loss: torch.Tensor) -> None:
        loss.register_hook(lambda gradient: gradients.append(float(gradient)))
        backward(loss)

    trainer.engine.backward = watched  # type: ignore[method-assign]
    return gradients


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """As a checkpoint would have them; on the first rank."""
    return {name: weight.clone() for name, weight in trainer.engine.weights().items()}


def main(out: str, cases: list[str]) -> None:
    """CASE is name:stage."""
    set_up(1, 0)
    world.start(alone_too=True)
    for case in cases:
        name, stage = case.split(":")
        engine = [] if stage == "0" else ["engine.kind=deepspeed", f"engine.zero_stage={stage}"]
        config = load_config([*COMMON, *CASES[name], *engine])
        found = carry_out(name, config)
        if world.is_first():
            torch.save(found, Path(out) / f"{world.size()}_{name}_{stage}.pt")
            print(case, found["rows"][0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

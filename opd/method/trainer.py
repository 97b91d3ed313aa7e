"""The step of Video-OPD: the student answers, a frozen teacher scores it, the student follows.

    p = student, q = teacher, y ~ p( . | video, query).  Minimise KL(p || q) over the tokens of y:
    the gradient pulls the student towards what the teacher would have said after the student's own
    words.

A step forwards the student's prompt once, with its graph kept: completions are sampled from a
detached view of its keys and values, and the training pass continues from the same ones, completion
tokens only. Left out on purpose: a reward, a value model, importance clipping, a reference model.
They are not part of the method; `method=grpo`, to compare it with, has its own, and all else alike.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.schedule import micro_batches
from opd.device import fetch, send
from opd.engine.base import Engine, TorchEngine
from opd.engine.zero import ZeroEngine
from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefilled, Prefix, encode, extend, prefill, recomputed_layers
from opd.generation.sampling import Policy, Rollouts, sample, uniforms
from opd.method.advantages import advantages, all_equal, grade
from opd.method.health import signals
from opd.method.objectives import Loss, Targets, objective_of
from opd.method.teacher import Teacher
from opd.models.lora import add_lora
from opd.models.video_lm import VideoLM
from opd.record.checkpoint import Progress
from opd.record.flops import Cost, step_flops
from opd.record.ledger import Ledger


@dataclass
class Trainer:
    """What a step needs; `micro_step` is the method. Freezes what `model.trainable` leaves out."""

    config: Config
    processor: Any
    student: VideoLM
    teacher: Teacher | None
    policy: Policy

    def __post_init__(self) -> None:
        self.student.train_only(self.config.model.trainable)
        if self.config.model.lora_rank is not None:
            add_lora(self.student, self.config.model.lora_rank, self.config.model.lora_alpha)
        self.ledger = Ledger(self.student.device)
        self.counter = LayerCounter().attach(self.student)
        self.progress = Progress()
        models = [self.student] if self.teacher is None else [self.student, self.teacher.lm]
        self.costs = {lm: Cost.of(lm) for lm in models}
        updates = self.config.steps * self.epochs
        if self.config.engine.kind == "torch":
            self.engine: Engine = TorchEngine(self.student.model, self.config.optim, updates)
        else:
            parts = self.config.engine, len(micro_batches(self.config))
            self.engine = ZeroEngine(self.student, self.config.optim, updates, *parts)

    @property
    def sharded(self) -> bool:
        """Whether all ranks must forward the same number of prompts, because of either model."""
        return any(lm.sharded for lm in self.costs)

    @property
    def epochs(self) -> int:
        """Optimizer steps per batch of rollouts."""
        return self.config.grpo.epochs if self.config.method == "grpo" else 1

    def micro_step(
        self, batch: PromptBatch, step: int, earlier: tuple[Loss, Rollouts] | None = None
    ) -> tuple[Loss, Rollouts]:
        """Add the gradient of one micro-batch. With what an `earlier` epoch returned, learn from
        its rollouts again."""
        prompts = self.prefill(batch)
        rollouts = earlier[1] if earlier else self.sample(batch, prompts, step)
        old_logprobs = earlier[0].student_logprobs if earlier else None
        kept, answers = self.route(prompts, rollouts)
        teacher_hidden = self.score(kept, answers)
        loss = self.learn(kept, answers, teacher_hidden, old_logprobs)
        drawn = None if earlier or self.config.on_references else rollouts.completion_mask
        self.count(prompts, drawn, kept, answers, batch.num_tokens + rollouts.num_tokens)
        return loss, rollouts

    def prefill(self, batch: PromptBatch) -> Prefilled:
        """Forward the student's prompts once, with their graph."""
        config, student = self.config, self.student
        # Where rollouts are routed, every prompt has a graph of its own, and a backward visits
        # those alone that are trained on. Sharded weights are gathered as often on every rank.
        parts = batch.parts(alone=config.routes or self.sharded)
        with self.ledger.phase("vision"):
            videos = [encode(student, part) for part in parts]
        with self.ledger.phase("prefill"):
            prefixes = [
                prefill(student, part, video, config.prefix.recompute, self.counter)
                for part, video in zip(parts, videos, strict=True)
            ]
        return Prefilled(parts, prefixes)

    def sample(self, batch: PromptBatch, prompts: Prefilled, step: int) -> Rollouts:
        """Continue detached prefixes: the student's answers, and their rewards where they are
        compared or routed."""
        with self.ledger.phase("sample"):
            detached = Prefix.join([prefix.detach() for prefix in prompts.prefixes])
            return self.rollouts(batch, detached, step)

    def route(self, prompts: Prefilled, rollouts: Rollouts) -> tuple[Prefilled, Rollouts]:
        """What is learned from: everything, or with routing the prompts and rollouts that are not
        suspended; the others cost neither teacher nor backward."""
        if not self.config.routes:
            return prompts, rollouts
        rows, kept = rollouts.routed(lockstep=self.engine.lockstep or self.sharded)
        return prompts.take(rows), kept

    def score(self, prompts: Prefilled, answers: Rollouts) -> torch.Tensor | None:
        """The teacher's hidden states `[N, H_T]` at the tokens of the loss; None without a teacher
        or a prompt."""
        if self.teacher is None or not prompts.parts:
            return None
        with self.ledger.phase("teacher"):
            prefix = Prefix.join([self.teacher.prefill(part) for part in prompts.parts])
            return answers.in_loss(self.teacher.extend(prefix, answers.completion_ids))

    def learn(
        self,
        prompts: Prefilled,
        answers: Rollouts,
        teacher_hidden: torch.Tensor | None,
        old_logprobs: torch.Tensor | None,
    ) -> Loss:
        """Continue the student's graph through the answers, and add the objective's gradient."""
        phase = self.ledger.phase
        if not prompts.parts:
            return Loss(torch.zeros((), device=self.student.device))
        with phase("extend"):
            prefix = Prefix.join(prompts.prefixes)
            hidden = extend(self.student, prefix, answers.completion_ids, self.counter)
            hidden = answers.in_loss(hidden)
        with phase("loss"):
            loss = self.loss(hidden, answers, teacher_hidden, old_logprobs)
        with phase("backward"):
            self.engine.backward(loss.loss)
        return loss

    def count(
        self,
        prompts: Prefilled,
        drawn: torch.Tensor | None,
        kept: Prefilled,
        answers: Rollouts,
        num_tokens: int,
    ) -> None:
        """Charge a micro-batch's tokens and FLOPs to the ledger; `drawn` is the mask of completions
        that were decoded."""
        again = recomputed_layers(self.config.prefix.recompute, self.counter.num_layers)
        scored = answers.completion_mask
        flops = step_flops(self.costs, prompts.parts, drawn, kept.parts, scored, again)
        tokens, *spent = distributed.all_sum((num_tokens, *flops.values()))
        self.ledger.count(int(tokens), dict(zip(flops, spent, strict=True)))

    @property
    def known_denominator(self) -> int | None:
        """What a loss is divided by where that is known before sampling; it goes into the weights
        of the tokens. All else scales the gradient after the last micro-batch."""
        config = self.config
        if config.normalize == "token" or config.method == "grpo":
            return None
        return config.batch_size * config.num_rollouts

    @property
    def token_weight(self) -> float:
        """The factor of every token's loss, so that backward begins with a gradient of exactly 1
        and the head's gradient needs no further pass."""
        return self.engine.loss_factor / (self.known_denominator or 1)

    def loss(
        self,
        student_hidden: torch.Tensor,
        rollouts: Rollouts,
        teacher_hidden: torch.Tensor | None,
        old_logprobs: torch.Tensor | None,
    ) -> Loss:
        """The objective on the N tokens of the loss, inside the forward of the student's head."""
        config, device = self.config, student_hidden.device
        relative = None
        if config.compares:
            assert rollouts.rewards is not None
            of_rollouts = advantages(rollouts.rewards, config.grpo.advantage)
            relative = of_rollouts.flatten().repeat_interleave(rollouts.loss_lengths.flatten())
            relative = send(relative, device)
        targets = Targets(
            rollouts.in_loss(rollouts.completion_ids),
            self.policy,
            teacher_hidden,
            self.teacher.head_weight if self.teacher is not None else None,
            relative,
            old_logprobs,
            config,
            self.token_weight,
        )
        return self.student.head(student_hidden, loss=partial(objective_of(config), targets))

    def rollouts(self, batch: PromptBatch, prefix: Any, step: int) -> Rollouts:
        """Completions to train on: sampled from the student, or the reference answers."""
        config = self.config
        if config.on_references:
            made = Rollouts.references(batch, self.policy.pad_token_id)
            return replace(made, horizon=config.opd.horizon)
        length = config.sample.max_completion_length
        numbers = uniforms(
            config.seed, step, [e.id for e in batch.examples], config.num_rollouts, length
        )
        with self.engine.gathered_weights():
            made = sample(self.student, prefix, self.policy, length, numbers, self.counter)
        if config.compares or config.routes:
            made = grade(made, batch.examples, self.processor.tokenizer, config)
            assert made.rewards is not None
            if config.method == "grpo":
                told_apart = ~all_equal(made.rewards)
                made = replace(made, trained=told_apart[:, None].expand_as(made.rewards))
            elif config.routes:
                made = replace(made, trained=made.rewards < config.curriculum.route_below)
        return replace(made, horizon=config.opd.horizon)

    def step(self, micro_batches: list[PromptBatch], step: int) -> dict[str, Any]:
        """One batch of rollouts, and an optimizer step per epoch over it; returns the row of
        metrics of the first. A loss or gradient that is not finite changes no weight, and the row
        names the examples."""
        lr = self.engine.lr
        made = [self.micro_step(batch, step) for batch in micro_batches]
        updates = [self.update(made)]
        for _ in range(1, self.epochs):
            pairs = zip(micro_batches, made, strict=True)
            updates.append(self.update([self.micro_step(b, step, earlier) for b, earlier in pairs]))
        loss, grad_norm = updates[0]
        finite = all(math.isfinite(number) for update in updates for number in update)
        made = [
            (loss.cpu(), rollouts.cpu(), batch.examples, batch.num_tokens)
            for (loss, rollouts), batch in zip(made, micro_batches, strict=True)
        ]
        made = [micro for rank in distributed.all_gather(made) for micro in rank]
        losses, rollouts, examples, num_tokens = zip(*made, strict=True)
        examples = [example for found in examples for example in found]
        tokenizer = self.processor.tokenizer if self.processor is not None else None
        health = signals(losses, rollouts, examples, tokenizer, self.config)
        drawn = [] if self.config.on_references else rollouts
        self.progress.count(
            finite,
            prompt_tokens=sum(num_tokens),
            rollouts=sum(r.truncated.numel() for r in drawn),
            generated_tokens=sum(r.num_tokens for r in drawn),
            trained_rollouts=sum(int((r.loss_lengths > 0).sum()) for r in drawn),
            equal_groups=health.get("equal_groups") or 0,
        )
        return {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": lr,
            **health,
            "skipped": None if finite else [example.id for example in examples],
        }

    def update(self, made: list[tuple[Loss, Rollouts]]) -> tuple[float, float]:
        """Step on the gradients of these micro-batches; the loss, and the gradient's norm before
        clipping. Where no token takes part, neither weights nor optimizer change."""
        lengths = torch.cat([rollouts.loss_lengths.flatten() for _, rollouts in made])
        losses = fetch(torch.stack([result.loss.detach() for result, _ in made]))
        tokens, answers, loss = distributed.all_sum(
            [int(lengths.sum()), int((lengths > 0).sum()), sum(losses.tolist())]
        )
        count = tokens if self.config.normalize == "token" else answers
        known = self.known_denominator
        loss /= self.engine.loss_factor * (1 if known else max(1, count))
        with self.ledger.phase("optimizer"):
            if not tokens:
                self.engine.skip()
                return 0.0, 0.0
            scale = 1.0 if known else 1 / count
            return loss, self.engine.step(scale if math.isfinite(loss) else math.nan)

    def save(self, folder: Path) -> None:
        """Write what a resumed run goes on from, this rank's part of it; everything else follows
        from seed and step."""
        state = {
            "ledger": self.ledger.state(),
            "counter": dict(self.counter.tokens),
            "progress": asdict(self.progress),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, folder / f"rank_{distributed.rank()}.pt")
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        path = folder / f"rank_{distributed.rank()}.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.engine.load(folder)
        self.ledger.load_state(state["ledger"])
        self.counter.tokens = dict(state["counter"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])

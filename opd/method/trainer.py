"""The step of Video-OPD: the student answers, a frozen teacher scores it, the student follows.

    p = student, q = teacher, y ~ p( . | video, query):  minimise KL(p || q) over the tokens of y

The gradient pulls the student towards what the teacher would have said after the student's own
words. The method is `Trainer.micro_steps`, in four parts:

    prefill   forward the student's prompts once, and keep the graph of their keys and values
    sample    continue a detached view of the same keys and values into completions
    score     forward prompts and completions through the teacher, without a graph
    learn     continue the student's graph through the completion tokens alone, compare the hidden
              states of both models in the objective, and call backward

`Trainer.step` runs it on all micro-batches and then steps the optimizer. Those that fit into memory
beside each other are sampled together: decoding reads every weight once per token, whatever the
number of prompts.

Left out on purpose: a reward, a value model, importance clipping, a reference model. The method
needs none of them; `method=grpo`, the baseline, adds its own and shares everything else.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd import distributed
from opd.config.run import Config
from opd.data.batch import PromptBatch
from opd.data.schedule import micro_batches, split
from opd.device import fetch, send
from opd.engine.base import Engine, TorchEngine
from opd.engine.zero import ZeroEngine
from opd.generation.extend import extend
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import Policy, uniforms
from opd.generation.prefilled import Prefilled
from opd.generation.prefix import Prefix, encode, prefill
from opd.generation.sampling import Rollouts, sample
from opd.method.advantages import advantages, for_loss
from opd.method.health import gather_step, signals
from opd.method.objectives import Loss, Targets, objective_of
from opd.method.teacher import Teacher
from opd.models.lora import add_lora
from opd.models.video_lm import VideoLM
from opd.record.checkpoint import Progress
from opd.record.flops import Cost, step_flops
from opd.record.ledger import Ledger


@dataclass
class Trainer:
    """Models, optimizer and ledger of a run, and the step that uses them. Creating one freezes the
    weights that `model.trainable` leaves out."""

    config: Config
    processor: Any
    student: VideoLM
    teacher: Teacher | None
    policy: Policy

    def __post_init__(self) -> None:
        config = self.config
        self.student.train_only(config.model.trainable)
        if config.model.lora_rank is not None:
            add_lora(self.student, config.model.lora_rank, config.model.lora_alpha)
        self.ledger = Ledger(self.student.device)
        self.counter = LayerCounter().attach(self.student)
        self.progress = Progress()
        models = [self.student] if self.teacher is None else [self.student, self.teacher.lm]
        self.costs = {lm: Cost.of(lm) for lm in models}
        updates = config.steps * self.epochs
        if config.engine.kind == "torch":
            self.engine: Engine = TorchEngine(self.student.model, config.optim, updates)
        else:
            parts = config.engine, len(micro_batches(config))
            self.engine = ZeroEngine(self.student, config.optim, updates, *parts)

    def micro_steps(
        self, batches: list[PromptBatch], step: int, earlier: tuple[Loss, Rollouts] | None = None
    ) -> list[tuple[Loss, Rollouts]]:
        """Add the gradients of micro-batches, which are sampled together and then learned from one
        after the other; returns the loss and the rollouts of each. With the result of an `earlier`
        epoch, learn from the rollouts of the only micro-batch again."""
        waiting = [self.prefill(batch) for batch in batches]
        rollouts = [earlier[1]] if earlier else self.sample(batches, waiting, step)
        old_logprobs = earlier[0].student_logprobs if earlier else None
        losses = []
        for batch, sampled in zip(batches, rollouts, strict=True):
            prompts = waiting.pop(0)  # so that its graph is freed before the next one's backward
            kept, answers = self.route(prompts, sampled)
            teacher_hidden = self.score(kept, answers)
            losses.append(self.learn(kept, answers, teacher_hidden, old_logprobs))
            decoded = None if earlier or self.config.on_references else sampled.lengths
            self.count(prompts, decoded, kept, answers, batch.num_tokens + sampled.num_tokens)
        return [*zip(losses, rollouts, strict=True)]

    def prefill(self, batch: PromptBatch) -> Prefilled:
        """Forward the student's prompts once, with their graph."""
        if self.sharded:  # weights are gathered as often on every rank
            batch = batch.divided(distributed.all_max(len(batch.groups)))
        # With routing, every group has a graph of its own: backward visits those trained on.
        parts = batch.parts(alone=self.config.routes or self.sharded)
        with self.ledger.phase("vision"):
            videos = [encode(self.student, part) for part in parts]
        with self.ledger.phase("prefill"):
            options = self.config.prefix.recompute, self.counter
            pairs = zip(parts, videos, strict=True)
            prefixes = [prefill(self.student, part, video, *options) for part, video in pairs]
        return Prefilled.of(parts, prefixes)

    def sample(
        self, batches: list[PromptBatch], prompts: list[Prefilled], step: int
    ) -> list[Rollouts]:
        """Continue the detached prompts of all micro-batches into completions."""
        with self.ledger.phase("sample"):
            prefixes = [prefix.detach() for some in prompts for prefix in some.prefixes]
            return self.rollouts(batches, Prefix.join(prefixes, by_layer=True), step)

    def rollouts(self, batches: list[PromptBatch], prefix: Prefix, step: int) -> list[Rollouts]:
        """Completions to train on: sampled from the student, or the reference answers."""
        config, length, policy = self.config, self.config.sampled_length, self.policy
        if config.on_references:
            drawn = [Rollouts.references(batch, policy.pad_token_id) for batch in batches]
        else:
            prompt_ids = [example.id for batch in batches for example in batch.examples]
            draws = uniforms(config.seed, step, prompt_ids, config.num_rollouts, length)
            with self.engine.gathered_weights():
                every = sample(self.student, prefix, policy, length, draws, self.counter)
            drawn = every.divided([len(batch.prompts) for batch in batches])
        pairs = zip(drawn, batches, strict=True)
        return [for_loss(own, batch.examples, self.processor, config) for own, batch in pairs]

    def route(self, prompts: Prefilled, rollouts: Rollouts) -> tuple[Prefilled, Rollouts]:
        """Prompts and rollouts to learn from: all of them, or with routing those that are not good
        enough yet. The others cost neither a teacher forward nor a backward."""
        if not self.config.routes:
            return prompts, rollouts
        rows, kept = rollouts.routed(prompts.counts, self.engine.lockstep or self.sharded)
        return prompts.take(rows), kept

    def score(self, prompts: Prefilled, answers: Rollouts) -> torch.Tensor | None:
        """Teacher's hidden states `[N, H_T]` at the N tokens of the loss; None without a teacher or
        without a prompt to learn from."""
        if self.teacher is None or not prompts.parts:
            return None
        with self.ledger.phase("teacher"):
            prefix = prompts.forwarded_by(self.teacher.prefill)
            ids, lengths = answers.completion_ids, answers.loss_lengths
            return answers.in_loss(self.teacher.extend(prefix, ids, lengths))

    def learn(
        self,
        prompts: Prefilled,
        answers: Rollouts,
        teacher_hidden: torch.Tensor | None,
        old_logprobs: torch.Tensor | None,
    ) -> Loss:
        """Continue the student's graph through the answers, and add the objective's gradient.
        `old_logprobs`, fp32 `[N]`, are the first epoch's; None where this is the first."""
        if not prompts.parts:
            return Loss(torch.zeros((), device=self.student.device))
        with self.ledger.phase("extend"):
            prefix, ids = Prefix.join(prompts.prefixes), answers.completion_ids
            options = self.counter, self.config.prefix.recompute, answers.loss_lengths
            hidden = answers.in_loss(extend(self.student, prefix, ids, *options))
        with self.ledger.phase("loss"):
            loss = self.loss(hidden, answers, teacher_hidden, old_logprobs)
        with self.ledger.phase("backward"):
            self.engine.backward(loss.loss)
        return loss

    def loss(
        self,
        student_hidden: torch.Tensor,
        rollouts: Rollouts,
        teacher_hidden: torch.Tensor | None,
        old_logprobs: torch.Tensor | None,
    ) -> Loss:
        """The objective at the N tokens of the loss, computed inside the student's head."""
        config, token_advantages = self.config, None
        if config.compares:
            assert rollouts.rewards is not None
            of_rollouts = advantages(rollouts.rewards, config.grpo.advantage).flatten()
            token_advantages = of_rollouts.repeat_interleave(rollouts.loss_lengths.flatten())
            token_advantages = send(token_advantages, student_hidden.device)
        ids = rollouts.in_loss(rollouts.completion_ids)
        teacher_head = None if self.teacher is None else self.teacher.head_weight
        compared = teacher_hidden, teacher_head, token_advantages, old_logprobs
        targets = Targets(ids, self.policy, *compared, config, self.token_weight)
        return self.student.head(student_hidden, loss=partial(objective_of(config), targets))

    # The optimizer step, over all micro-batches.

    def step(self, batches: list[PromptBatch], step: int) -> dict[str, Any]:
        """Train on the micro-batches of one step, with an optimizer step per epoch over the same
        rollouts; returns the row of metrics. A loss or gradient that is not finite changes no
        weight, and the row names the examples."""
        lr = self.engine.lr
        together = split(batches, self.config.together)
        results = [result for some in together for result in self.micro_steps(some, step)]
        updates = [self.update(results)]
        for _ in range(1, self.epochs):
            pairs = zip(batches, results, strict=True)
            again = [self.micro_steps([batch], step, earlier) for batch, earlier in pairs]
            updates.append(self.update([result for (result,) in again]))
        return {"step": step} | self.metrics(batches, results, updates, lr)

    def update(self, results: list[tuple[Loss, Rollouts]]) -> tuple[float, float]:
        """Step the optimizer on the gradients of these micro-batches; returns the loss and the
        gradient's norm before clipping. Without a token in the loss nothing changes."""
        lengths = torch.cat([rollouts.loss_lengths.flatten() for _, rollouts in results])
        losses = fetch(torch.stack([loss.loss.detach() for loss, _ in results]))
        sums = int(lengths.sum()), int((lengths > 0).sum()), sum(losses.tolist())
        tokens, answers, loss = distributed.all_sum(sums)
        count = tokens if self.config.normalize == "token" else answers
        count = 1 if self.preset_denominator else count
        loss /= self.engine.loss_factor * max(1, count)
        with self.ledger.phase("optimizer"):
            if not tokens:
                self.engine.skip()
                return 0.0, 0.0
            return loss, self.engine.step(1 / count if math.isfinite(loss) else math.nan)

    @property
    def token_weight(self) -> float:
        """Factor of every token's loss. With it inside the loss, backward begins with a gradient of
        exactly 1, and the gradient of the head needs no further pass."""
        return self.engine.loss_factor / (self.preset_denominator or 1)

    @property
    def preset_denominator(self) -> int | None:
        """Denominator of the loss where it does not depend on what is sampled; it is part of
        `token_weight`. Otherwise None: the gradient is scaled after the last micro-batch."""
        if self.config.normalize == "token" or self.config.method == "grpo":
            return None
        return self.config.batch_size * self.config.num_rollouts

    @property
    def epochs(self) -> int:
        """Number of optimizer steps per batch of rollouts."""
        return self.config.grpo.epochs if self.config.method == "grpo" else 1

    @property
    def sharded(self) -> bool:
        """Whether either model is sharded; then all ranks must forward as many prompts."""
        return any(lm.sharded for lm in self.costs)

    # Accounts and saved states.

    def count(
        self,
        prompts: Prefilled,
        decoded: torch.Tensor | None,
        kept: Prefilled,
        answers: Rollouts,
        num_tokens: int,
    ) -> None:
        """Charge a micro-batch to the ledger; `decoded` has the lengths that it sampled."""
        options = answers.loss_lengths, self.config.prefix.recompute
        flops = step_flops(self.costs, prompts.parts, decoded, kept, *options)
        tokens, *spent = distributed.all_sum((num_tokens, *flops.values()))
        self.ledger.count(int(tokens), dict(zip(flops, spent, strict=True)))

    def metrics(
        self,
        batches: list[PromptBatch],
        results: list[tuple[Loss, Rollouts]],
        updates: list[tuple[float, float]],
        lr: float,
    ) -> dict[str, Any]:
        """Count the step of all ranks in the progress; returns the metrics of its first epoch."""
        losses, rollouts, examples, counts = gather_step(results, batches, self.config)
        tokenizer = self.processor.tokenizer if self.processor is not None else None
        health = signals(losses, rollouts, examples, tokenizer, self.config)
        finite = all(math.isfinite(number) for update in updates for number in update)
        self.progress.count(finite, **counts, equal_groups=health.get("equal_groups") or 0)
        loss, grad_norm = updates[0]
        return {
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": lr,
            "prompt_tokens_per_query": counts["prompt_tokens"] / counts["prompts"],
            **health,
            "skipped": None if finite else [example.id for example in examples],
        }

    def save(self, folder: Path) -> None:
        """Write a state for any number of ranks; all else follows from seed and step."""
        state = {
            "ledger": self.ledger.state(),
            "counter": self.counter.totals(),
            "progress": asdict(self.progress),
            "rng": torch.get_rng_state(),
        }
        if distributed.is_first():
            torch.save(state, folder / "trainer.pt")
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.engine.load(folder)
        self.ledger.load_state(state["ledger"])
        self.counter.tokens = state["counter"] if distributed.is_first() else {}  # of all ranks
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])

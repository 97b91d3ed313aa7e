"""The step as other trainers do it: answers are generated, and then the stock model forwards prompt
and answer together, vision tower included, as often as the trainer asks for it. The loss follows
its definition on full logits `[tokens, V]` of the answers.

    trl_style         generate; one training forward of the student, one of the teacher
    published_style   the same, and before it a forward of the student without gradients for the
                      old log-probabilities, and one whose result is thrown away

Both use, in their favour, what this project has otherwise: its prefill and sampler to generate
with (so that both sides train on the same rollouts), its batched vision attention, its grouped
attention, its optimizer. Both pad prompts to the longest, as such trainers do.
"""

from collections.abc import Callable

import torch

from opd.data.batch import PromptBatch
from opd.generation.prefix import forward
from opd.generation.sampling import Rollouts
from opd.method.advantages import advantages
from opd.method.objectives import Loss
from opd.method.trainer import Trainer
from opd.models.video_lm import VideoLM

Loop = Callable[[Trainer, PromptBatch, int], tuple[Loss, Rollouts]]


def full_logits(lm: VideoLM, batch: PromptBatch, rollouts: Rollouts) -> torch.Tensor:
    """Logits `[B, R, T, V]` that predict each completion token: one call of the stock Qwen3-VL
    forward on B * R rows, R copies of each prompt with a completion each."""
    shape = rollouts.completion_ids.shape
    prompts, mask = (x.repeat_interleave(shape[1], 0) for x in (batch.input_ids, batch.mask))
    ids = torch.cat([prompts, rollouts.completion_ids.flatten(0, 1)], dim=1)
    mask = torch.cat([mask, rollouts.completion_mask.flatten(0, 1).to(mask.device)], dim=1)
    pixels = torch.cat([p for p in batch.pixels for _ in range(shape[1])])
    out = lm.model(
        input_ids=ids,
        attention_mask=mask.long(),
        pixel_values_videos=pixels.to(lm.device),
        video_grid_thw=batch.video_grid_thw.repeat_interleave(shape[1], 0).to(lm.device),
        mm_token_type_ids=2 * (ids == lm.model.config.video_token_id),  # 2 is video
        logits_to_keep=shape[2] + 1,
        use_cache=False,
    )
    return out.logits[:, :-1].unflatten(0, shape[:2])


def chosen(log_probs: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """Of `[N, V]`, those of the N tokens of the loss."""
    ids = rollouts.in_loss(rollouts.completion_ids)
    return log_probs.gather(-1, ids[:, None])[:, 0]


def dense_loss(
    trainer: Trainer,
    log_probs: torch.Tensor,
    rollouts: Rollouts,
    teacher_log_probs: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
) -> torch.Tensor:
    """The sum over N tokens of what `trainer` minimises, by definition (`opd.method.objectives`).

    Args: log_probs and teacher_log_probs: `[N, V]`; old_logprobs: `[N]`, without them the student's
        own. Raises ValueError for an objective that has no definition here.
    """
    config, mask = trainer.config, rollouts.loss_mask
    name = config.objective if config.method == "opd" else config.method
    logprobs = chosen(log_probs, rollouts)
    ratio = (logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)).exp()
    if name == "reverse_kl":
        assert teacher_log_probs is not None
        gap = (log_probs - teacher_log_probs).masked_fill(~trainer.policy.allowed_columns, 0)
        return (log_probs.exp() * gap).sum()
    if name == "sampled":
        assert teacher_log_probs is not None
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        return -(ratio * (chosen(teacher_log_probs, rollouts) - old)).sum()
    if name == "sft":
        return -logprobs.sum()
    if name == "grpo" and not config.grpo.regularised:
        assert rollouts.rewards is not None
        relative = advantages(rollouts.rewards, config.grpo.advantage)
        relative = relative[..., None].expand_as(mask)[mask].to(ratio.device)
        clipped = ratio.clamp(1 - config.grpo.clip, 1 + config.grpo.clip)
        return -torch.minimum(ratio * relative, clipped * relative).sum()
    raise ValueError(f"no definition of {name} here")


def generate(trainer: Trainer, batch: PromptBatch, step: int) -> Rollouts:
    """The rollouts that the single pass trains on in this step."""
    with torch.no_grad():
        return trainer.rollouts([batch], forward(trainer.student, batch), step)[0]


def train_on(
    trainer: Trainer,
    batch: PromptBatch,
    rollouts: Rollouts,
    old_logprobs: torch.Tensor | None = None,
) -> Loss:
    """Add the gradient of one full forward; the teacher, if there is one, forwards as much."""
    teacher = None
    if trainer.teacher is not None:
        with torch.no_grad():
            logits = rollouts.in_loss(full_logits(trainer.teacher.lm, batch, rollouts))
            teacher = trainer.policy.log_probs(logits)
    logits = rollouts.in_loss(full_logits(trainer.student, batch, rollouts))
    log_probs = trainer.policy.log_probs(logits)
    loss = dense_loss(trainer, log_probs, rollouts, teacher, old_logprobs) * trainer.token_weight
    trainer.engine.backward(loss)
    return Loss(loss.detach())


def trl_style(trainer: Trainer, batch: PromptBatch, step: int) -> tuple[Loss, Rollouts]:
    """Adds the gradient of one batch of rollouts."""
    rollouts = generate(trainer, batch, step)
    return train_on(trainer, batch, rollouts), rollouts


def published_style(trainer: Trainer, batch: PromptBatch, step: int) -> tuple[Loss, Rollouts]:
    """Adds the gradient of one batch of rollouts."""
    rollouts = generate(trainer, batch, step)
    with torch.no_grad():
        logits = rollouts.in_loss(full_logits(trainer.student, batch, rollouts))
        old_logprobs = chosen(trainer.policy.log_probs(logits), rollouts)
        full_logits(trainer.student, batch, rollouts)  # thrown away
    return train_on(trainer, batch, rollouts, old_logprobs), rollouts


def loop_step(loop: Loop, trainer: Trainer, batch: PromptBatch, step: int) -> None:
    """A loop's gradient and the update from it."""
    trainer.update([loop(trainer, batch, step)])

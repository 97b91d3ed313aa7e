"""The step as other trainers do it: generate, then forward the whole sequence again to train on it.

It shares this project's sampler, models, vision call and fused loss, so that what differs is the
second forward alone.
"""

import torch

from opd.data.batch import PromptBatch
from opd.models.load import Video, VideoLM
from opd.prefix import Prefix, encode, join, prefill
from opd.rollout import Rollouts, sample, uniforms
from opd.train import Trainer


def full_forward(
    lm: VideoLM, batch: PromptBatch, video: Video, completion_ids: torch.Tensor
) -> torch.Tensor:
    """Hidden states `[B, T, H]` that predict each token of one completion per prompt, `[B, T]`.

    One stock forward of prompt and completion together, as a training loop without a kept prefix
    does it.
    """
    embeds, deepstack = video
    ids = torch.cat([batch.input_ids, completion_ids[:, :-1]], dim=1)
    length = completion_ids.shape[1]
    mask = torch.nn.functional.pad(batch.mask, (0, length - 1), value=True)
    steps = batch.next_position[:, None] + torch.arange(length - 1, device=ids.device)
    positions = torch.cat([batch.position_ids, steps.expand(3, -1, -1)], dim=2)
    language_model = lm.language_model
    hidden = language_model.embed_tokens(ids)
    is_video = ids == lm.model.config.video_token_id
    hidden = hidden.masked_scatter(is_video[..., None], embeds.to(hidden.dtype))
    levels = (
        {"visual_pos_masks": is_video, "deepstack_visual_embeds": deepstack} if deepstack else {}
    )
    out = language_model(
        inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False, **levels
    )
    return out.last_hidden_state[:, -length:]


def conventional_step(trainer: Trainer, batch: PromptBatch, step: int) -> Rollouts:
    """Generate without gradients, one full training forward, one full teacher forward, the same
    loss, one update."""
    assert trainer.teacher is not None
    config, student, teacher = trainer.config, trainer.student, trainer.teacher.lm
    parts = batch.parts()
    videos = [encode(student, part) for part in parts]
    video = join(videos)
    length = config.sample.max_completion_length
    numbers = uniforms(config.seed, step, [e.id for e in batch.examples], 1, length)
    with torch.no_grad():
        pairs = zip(parts, videos, strict=True)
        prefix = Prefix.join([prefill(student, part, video) for part, video in pairs])
        rollouts = sample(student, prefix, trainer.policy, length, numbers)
        ids, mask = rollouts.completion_ids[:, 0], rollouts.completion_mask[:, 0]
        teacher_video = encode(teacher, batch)
        teacher_hidden = full_forward(teacher, batch, teacher_video, ids)[mask]
    hidden = full_forward(student, batch, video, ids)[mask]
    loss = trainer.loss(hidden, rollouts, teacher_hidden, None)
    trainer.engine.backward(loss.loss / config.batch_size)
    trainer.engine.step()
    return rollouts

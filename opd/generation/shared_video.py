"""One forward of a video for all queries about it.

Where the chat template puts the video before the query, the prompts of one video begin with the
same tokens. These are forwarded once, and each query's own tokens against their keys and values.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from opd.data.batch import Prompt, PromptBatch, collate
from opd.device import send
from opd.generation.prefix import Prefix, encode, forward, forward_against, prefill
from opd.models.video_lm import VideoLM


def shared_tokens(prompts: Sequence[Prompt], video_token_id: int) -> int:
    """Number of leading tokens that the prompts have in common, at most one less than the shortest
    has; 0 unless these contain the whole video, decoded to the same frames."""
    first = prompts[0]
    width = min(len(prompt.input_ids) for prompt in prompts) - 1
    if any(prompt.frame_indices != first.frame_indices for prompt in prompts):
        return 0
    same = torch.ones(width, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt.input_ids[:width] == first.input_ids[:width]
    shared = int(same.cumprod(0).sum())
    is_video = first.input_ids == video_token_id
    return shared if int(is_video[:shared].sum()) == int(is_video.sum()) else 0


def groups_of(batch: PromptBatch, video_token_id: int) -> list[tuple[int, list[Prompt]]]:
    """Consecutive prompts of one video, with the number of tokens that they share (0 for a single
    prompt)."""
    groups = []
    for _, same_video in groupby(batch.prompts, key=lambda prompt: prompt.example.video):
        prompts = list(same_video)
        shared = shared_tokens(prompts, video_token_id) if len(prompts) > 1 else 0
        groups.append((shared, prompts))
    return groups


@torch.no_grad()
def forward_by_video(lm: VideoLM, batch: PromptBatch) -> Prefix:
    """Same prefix as `forward`, without gradients, but the tokens that consecutive prompts of one
    video share are forwarded once."""
    groups = groups_of(batch, lm.model.config.video_token_id)
    if lm.sharded or not any(shared for shared, _ in groups):
        return forward(lm, batch)
    pad, parts = 0, []  # any token id: padding is cut off before a forward
    for shared, prompts in groups:
        if not shared:
            parts.append(forward(lm, collate(prompts, pad, lm.device)))
            continue
        shared_prompt = replace(
            prompts[0],
            input_ids=prompts[0].input_ids[:shared],
            position_ids=prompts[0].position_ids[:, :shared],
        )
        shared_batch = collate([shared_prompt], pad, lm.device)
        prefix = prefill(lm, shared_batch, encode(lm, shared_batch))
        for _, same_length in groupby(prompts, key=lambda prompt: len(prompt.input_ids)):
            parts.append(_continue(lm, prefix, list(same_length), shared))
    return Prefix.join(parts)


def _continue(lm: VideoLM, prefix: Prefix, prompts: Sequence[Prompt], shared: int) -> Prefix:
    """Prefix of N prompts of equal length, from the prefix of their first `shared` tokens."""
    device, count = lm.device, len(prompts)
    ids = send(torch.stack([prompt.input_ids[shared:] for prompt in prompts]), device)
    positions = torch.stack([prompt.position_ids[:, shared:] for prompt in prompts], 1)
    positions = send(positions, device)
    width = ids.shape[1]
    causal = torch.ones(width, shared + width, dtype=torch.bool, device=device).tril(shared)
    past = [
        (key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1))
        for key, value in prefix.layers
    ]
    hidden, new = forward_against(lm, past, ids, positions, causal.expand(count, 1, -1, -1))
    joined = [
        (torch.cat([past_key, key], 2), torch.cat([past_value, value], 2))
        for (past_key, past_value), (key, value) in zip(past, new, strict=True)
    ]
    keys, values = map(list, zip(*joined, strict=True))
    mask = torch.ones(count, shared + width, dtype=torch.bool, device=device)
    next_position = send(torch.tensor([prompt.next_position for prompt in prompts]), device)
    return Prefix(keys, values, mask, hidden[:, -1], next_position)

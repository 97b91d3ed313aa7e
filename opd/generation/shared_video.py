"""Several prompts about one video behind one forward of it.

Where the template puts the video before the query, the prompts of one video begin with the same
tokens: these are forwarded once, and each query's own tokens against their keys and values.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from opd.data.batch import Prompt, PromptBatch, collate
from opd.device import send
from opd.generation.prefix import Prefix, encode, forward, prefill, run_behind
from opd.models.video_lm import VideoLM


def shared_tokens(prompts: Sequence[Prompt], video_token_id: int) -> int:
    """How many leading tokens several prompts of one video share, at least one short of the
    shortest; 0 where their video is not wholly among these."""
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
    """Neighbours of one video, each with the number of tokens that they share; no group of one
    shares any."""
    found = []
    for _, same in groupby(batch.prompts, key=lambda prompt: prompt.example.video):
        prompts = list(same)
        shared = shared_tokens(prompts, video_token_id) if len(prompts) > 1 else 0
        found.append((shared, prompts))
    return found


@torch.no_grad()
def forward_by_video(lm: VideoLM, batch: PromptBatch) -> Prefix:
    """`forward`, with one pass over the tokens that neighbours of one video share; a padded batch
    of the same order comes out, without a graph."""
    groups = groups_of(batch, lm.model.config.video_token_id)
    if lm.sharded or not any(shared for shared, _ in groups):
        return forward(lm, batch)
    pad, parts = 0, []  # `forward` cuts padding off again
    for shared, prompts in groups:
        if not shared:
            parts.append(forward(lm, collate(prompts, pad, lm.device)))
            continue
        head = replace(
            prompts[0],
            input_ids=prompts[0].input_ids[:shared],
            position_ids=prompts[0].position_ids[:, :shared],
        )
        start = collate([head], pad, lm.device)
        prefix = prefill(lm, start, encode(lm, start))
        for _, run in groupby(prompts, key=lambda prompt: len(prompt.input_ids)):
            parts.append(_branch(lm, prefix, list(run), shared))
    return Prefix.join(parts)


def _branch(lm: VideoLM, prefix: Prefix, prompts: Sequence[Prompt], shared: int) -> Prefix:
    """The prefixes of prompts of one length, from that of the tokens that they share."""
    device, count = lm.device, len(prompts)
    ids = send(torch.stack([prompt.input_ids[shared:] for prompt in prompts]), device)
    positions = torch.stack([prompt.position_ids[:, shared:] for prompt in prompts], 1)
    positions = send(positions, device)
    width = ids.shape[1]
    causal = torch.ones(width, shared + width, dtype=torch.bool, device=device).tril(shared)
    before = [
        (key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1))
        for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    hidden, new = run_behind(lm, before, ids, positions, causal.expand(count, 1, -1, -1))
    joined = [
        (torch.cat([key, own], 2), torch.cat([value, mine], 2))
        for (key, value), (own, mine) in zip(before, new, strict=True)
    ]
    keys, values = map(list, zip(*joined, strict=True))
    mask = torch.ones(count, shared + width, dtype=torch.bool, device=device)
    ends = send(torch.tensor([prompt.next_position for prompt in prompts]), device)
    return Prefix(keys, values, mask, hidden[:, -1], ends)

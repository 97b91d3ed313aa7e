"""Forward completions behind a prefix, so that one backward also reaches the prompts.

Tokens that matter are packed, and attend in parts (`Branches`); few of them are as fast in a padded
batch, with one mask over prompts and completions.
"""

from functools import partial

import torch

from opd.device import send
from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.branches import Branches, are_cheaper
from opd.models.layers import forward_layers
from opd.models.video_lm import VideoLM


def extend(
    lm: VideoLM,
    prefix: Prefix,
    completion_ids: torch.Tensor,
    counter: LayerCounter | None = None,
    recompute: str = "none",
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forward completions against a prefix and return the hidden states that predict each of their
    tokens, after the final norm.

    Args:
        completion_ids: int64 `[N, R, T]`, R completions per prompt, right-padded.
        recompute: see `forward_layers`.
        lengths: int64 `[N, R]`, on the host: how many leading tokens of each completion matter. The
            hidden states of the others may be anything. None is all T.

    Returns: `[N, R, T, H]`. Position 0 is the prompt's last hidden state, so only the first T - 1
        tokens of each completion run through the layers.
    """
    _, rollouts, length = completion_ids.shape
    first = prefix.last_hidden[:, None, None].expand(-1, rollouts, 1, -1)
    if length == 1:
        if not lm.sharded:
            return first
        # Another rank may have longer completions, for which this one must gather weights, too.
        return extend(lm, prefix, completion_ids.expand(-1, -1, 2), counter, recompute)[:, :, :1]
    tokens = prefix.width * rollouts * (length - 1)
    counter = counter or LayerCounter()
    if are_cheaper(tokens, lm.device_type):
        if lengths is None:
            lengths = torch.full(completion_ids.shape[:2], length)
        hidden = _packed(lm, prefix, completion_ids, lengths, counter, recompute)
    else:
        hidden = _padded(lm, prefix, completion_ids, counter, recompute)
    return torch.cat([first, hidden], dim=2)


def _packed(
    lm: VideoLM,
    prefix: Prefix,
    completion_ids: torch.Tensor,
    lengths: torch.Tensor,
    counter: LayerCounter,
    recompute: str,
) -> torch.Tensor:
    """Hidden states behind all tokens of the completions but the last, `[N, R, T - 1, H]`; tokens
    that do not matter are left out."""
    shape, device = completion_ids[:, :, :-1].shape, completion_ids.device
    counts = (lengths - 1).clamp_min(0)
    if not counts.any():
        counts[0, 0] = 1  # the layers run on at least one token
    chosen = (torch.arange(shape[2]) < counts[..., None]).flatten().nonzero().flatten()
    index = send(torch.stack([chosen, chosen // (shape[1] * shape[2]), chosen % shape[2]]), device)
    rows, prompts, offsets = index
    inputs = completion_ids[:, :, :-1].flatten()[rows]
    positions = prefix.next_position[prompts] + offsets
    layout = Branches.of(prefix.paths, prefix.mask.shape[1], counts.tolist(), device)
    hidden = _behind(lm, prefix, inputs[None], positions[None], layout, counter, recompute)[0]
    every = hidden.new_zeros(shape.numel(), hidden.shape[-1])
    return every.index_copy(0, rows, hidden).unflatten(0, shape)


def _padded(
    lm: VideoLM,
    prefix: Prefix,
    completion_ids: torch.Tensor,
    counter: LayerCounter,
    recompute: str,
) -> torch.Tensor:
    """The same with one mask over prompts and completions, and padding like any token."""
    _, rollouts, steps = completion_ids[:, :, :-1].shape
    inputs = prefix.by_group(completion_ids[:, :, :-1]).flatten(1)
    device, branches = inputs.device, prefix.width * rollouts
    offsets = torch.arange(steps, device=device).repeat(branches)

    def of_tokens(values: torch.Tensor) -> torch.Tensor:
        """Repeat `[N, ...]` of the prompts for each token of their completions."""
        grouped = prefix.by_group(values)[:, :, None]
        return grouped.expand(-1, -1, rollouts * steps, *grouped.shape[3:]).flatten(1, 2)

    branch = torch.arange(branches, device=device).repeat_interleave(steps)
    own = (branch[:, None] == branch) & (offsets[:, None] >= offsets)
    mask = torch.cat([of_tokens(prefix.mask), own.expand(len(inputs), -1, -1)], dim=2)[:, None]
    positions = of_tokens(prefix.next_position) + offsets
    hidden = _behind(lm, prefix, inputs, positions, mask, counter, recompute)
    return prefix.by_prompt(hidden.unflatten(1, (prefix.width, rollouts, steps)))


def _behind(
    lm: VideoLM,
    prefix: Prefix,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    attention_mask: torch.Tensor | Branches,
    counter: LayerCounter,
    recompute: str,
) -> torch.Tensor:
    """Forward tokens `[G, T]` behind a prefix, to `[G, T, H]` after the final norm."""
    language_model = lm.language_model
    with counter.label("completion"):
        hidden, _ = forward_layers(
            language_model,
            language_model.embed_tokens(input_ids),
            positions.expand(3, -1, -1),
            attention_mask,
            prefix.layers,
            recompute,
            partial(counter.label, "completion recompute"),
        )
    return language_model.norm(hidden)

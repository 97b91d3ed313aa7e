"""Sampling completions from a prefix.

Rollouts  sampled completions, and which of their tokens are in the loss
sample    the decoding loop
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch

from opd import distributed
from opd.data.batch import PromptBatch
from opd.device import fetch, send
from opd.generation.decoder import Decoder
from opd.generation.layer_counter import LayerCounter
from opd.generation.policy import Policy, choose
from opd.generation.prefix import Prefix
from opd.generation.recorded import RECORDERS, Repeated
from opd.models.video_lm import VideoLM

# Tokens between checks whether every completion has ended: each check waits for the device.
CHECK_EVERY = {"cuda": 8}
# Finished completions leave the batch, which copies the caches of the others, when at most this
# share of it is left.
KEEP_BELOW = 0.75


@dataclass(frozen=True, eq=False)
class Rollouts:
    """R completions for each of B prompts, right-padded to T tokens.

    On the device, `[B, R, T]`: `completion_ids`, and `rollout_logprobs`, the sampler's fp32
    log-probability of each token under the policy (0 after the end). On the host, `[B, R]`:

        lengths    tokens of each completion, its first end token included
        truncated  whether the length limit was reached before an end token
        rewards    reward of each completion; None where none is needed
        trained    whether a completion takes part in the loss; None if all do

    `horizon` is the number of leading tokens of each completion that are in the loss; None for all.
    """

    completion_ids: torch.Tensor
    lengths: torch.Tensor
    rollout_logprobs: torch.Tensor
    truncated: torch.Tensor
    rewards: torch.Tensor | None = None
    trained: torch.Tensor | None = None
    horizon: int | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all completions."""
        return int(self.lengths.sum())

    @property
    def loss_lengths(self) -> torch.Tensor:
        """Number of leading tokens of each completion in the loss: int64 `[B, R]`, on the host."""
        lengths = self.lengths
        if self.trained is not None:
            lengths = lengths * self.trained
        return lengths if self.horizon is None else lengths.clamp_max(self.horizon)

    @property
    def completion_mask(self) -> torch.Tensor:
        """True at tokens of completions, False at padding: boolean `[B, R, T]`, on the host."""
        return self._first(self.lengths)

    @property
    def loss_mask(self) -> torch.Tensor:
        """True at tokens that are in the loss: boolean `[B, R, T]`, on the host."""
        return self._first(self.loss_lengths)

    def _first(self, lengths: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.completion_ids.shape[2]) < lengths[..., None]

    @cached_property
    def loss_rows(self) -> torch.Tensor:
        """Indices into `completion_ids.flatten()` of the N tokens in the loss: int64 `[N]`, on the
        device."""
        rows = self.loss_mask.flatten().nonzero().flatten()
        return send(rows, self.completion_ids.device)

    def in_loss(self, values: torch.Tensor) -> torch.Tensor:
        """Select the N tokens in the loss: `values` `[B, R, T, ...]` become `[N, ...]`."""
        return values.flatten(0, 2).index_select(0, self.loss_rows)

    def cpu(self) -> "Rollouts":
        """Copy everything to the host; waits for the device."""
        ids, logprobs = fetch(self.completion_ids), fetch(self.rollout_logprobs)
        return replace(self, completion_ids=ids, rollout_logprobs=logprobs)

    def divided(self, sizes: Sequence[int]) -> list["Rollouts"]:
        """The rollouts of consecutive prompts, so many in each part; T shrinks to what they need.
        For rollouts as they were sampled."""
        if len(sizes) == 1:
            return [self]
        tensors = self.completion_ids, self.lengths, self.rollout_logprobs, self.truncated
        parts = []
        for ids, lengths, logprobs, truncated in zip(
            *(values.split(list(sizes)) for values in tensors), strict=True
        ):
            longest = int(lengths.max())
            cut = ids[..., :longest].contiguous(), lengths, logprobs[..., :longest].contiguous()
            parts.append(Rollouts(*cut, truncated))
        return parts

    def routed(self, counts: Sequence[int], lockstep: bool = False) -> tuple[list[int], "Rollouts"]:
        """Keep the prompts with a trained completion, and of their rollouts the trained ones.

        R and T shrink to what these need; the tokens in the loss keep their order. With `lockstep`
        every rank keeps as many groups of prompts as the rank with the most, at least one, and
        fills up with prompts that have no trained completion.

        Args:
            counts: number of prompts in each group.

        Returns: the indices of the kept prompts, and their rollouts.
        """
        assert self.trained is not None
        group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        rows = self.trained.any(1).nonzero().flatten()
        if lockstep:
            kept = set(group[rows].tolist())
            missing = max(1, distributed.all_max(len(kept))) - len(kept)
            starts = [0, *accumulate(counts)]
            others = [starts[number] for number in range(len(counts)) if number not in kept]
            rows = torch.cat([rows, torch.tensor(others[:missing], dtype=torch.long)])
        width = max(1, int(self.trained[rows].sum(1).max())) if len(rows) else 0
        # A stable sort puts each prompt's trained completions first, in their order.
        first = (~self.trained[rows]).byte().argsort(dim=1, stable=True)[:, :width]
        chosen = rows[:, None], first
        lengths = self.lengths[chosen]
        longest = max(1, int((lengths * self.trained[chosen]).max())) if len(rows) else 0
        # A single index for the device, into `[B * R]`.
        indices = send(rows[:, None] * self.lengths.shape[1] + first, self.completion_ids.device)

        def select(values: torch.Tensor) -> torch.Tensor:
            return values.flatten(0, 1)[indices][..., :longest]

        return rows.tolist(), replace(
            self,
            completion_ids=select(self.completion_ids),
            lengths=lengths.clamp_max(longest),
            rollout_logprobs=select(self.rollout_logprobs),
            truncated=self.truncated[chosen],
            rewards=None if self.rewards is None else self.rewards[chosen],
            trained=self.trained[chosen],
        )

    @classmethod
    def references(cls, batch: PromptBatch, pad_token_id: int) -> "Rollouts":
        """Reference answers instead of sampled ones, one per prompt; their `rollout_logprobs` are
        NaN, because no sampler drew them."""
        ids, lengths = batch.references(pad_token_id)
        unknown = torch.full_like(ids, torch.nan, dtype=torch.float32)
        return cls(ids, lengths, unknown, torch.zeros_like(lengths, dtype=torch.bool))


@torch.no_grad()
def sample(
    lm: VideoLM,
    prefix: Prefix,
    policy: Policy,
    max_completion_length: int,
    draws: torch.Tensor | None,
    counter: LayerCounter | None = None,
) -> Rollouts:
    """Sample R completions for each prompt of a prefix, up to an end token or the length limit.

    Args:
        prefix: detached, since no gradient passes through sampling.
        draws: `[B, R, T]` from `uniforms`; None decodes one completion per prompt greedily.
    """
    device, num_prompts = prefix.last_hidden.device, len(prefix.last_hidden)
    num_rollouts = 1 if draws is None else draws.shape[1]
    decoder = Decoder(lm, prefix, num_rollouts, max_completion_length - 1)
    growing = _Growing(prefix, policy, decoder, draws, num_rollouts, max_completion_length)
    hidden = prefix.by_group(prefix.last_hidden).repeat_interleave(num_rollouts, 1)
    growing.append(lm.head(hidden))
    every, window, length = CHECK_EVERY.get(device.type, 1), 0, 1
    record = None if lm.sharded else RECORDERS.get(device.type)
    next_token = Repeated(lambda: None)
    while length < max_completion_length:
        changed = window != decoder.window(length)
        if length % every == 0:
            going_on = ~fetch(growing.done)
            unfinished = int(going_on.any())
            # With sharded weights, all ranks decode until the last has finished.
            if not (distributed.all_max(unfinished) if lm.sharded else unfinished):
                break
            if decoder.is_long and (kept := _fewer(going_on)):
                groups, branches = (send(index, device) for index in kept)
                growing.keep(groups, branches, length - 1)
                changed = True
        if changed:
            window = decoder.window(length)
            next_token = Repeated(partial(growing.step, window, counter), record, counter)
        next_token()
        length += 1
    # Padding behind the first end token may be one, too.
    is_end = torch.isin(growing.ids[:length], growing.ends)
    ended = is_end.any(0)
    lengths = torch.where(ended, is_end.byte().argmax(0) + 1, length)
    shape = num_prompts, num_rollouts
    both = torch.stack([lengths, ended.long()]).view(2, *shape)
    lengths, ended = fetch(both).unbind()
    longest = int(lengths.max())  # columns after the last end token are cut off
    completion_ids, rollout_logprobs = (
        values[:longest].t().contiguous().unflatten(0, shape)
        for values in (growing.ids, growing.logprobs)
    )
    return Rollouts(completion_ids, lengths, rollout_logprobs, truncated=ended == 0)


class _Growing:
    """Completions while they are sampled, all on the device.

    `ids` and `logprobs` are `[T, B * R]` by prompt; everything that goes on is arranged by group,
    `[G, B]`, and `places` are its next tokens' places in them. A step changes tensors in place, so
    that the same kernels on the same memory are the next step, too.
    """

    def __init__(
        self,
        prefix: Prefix,
        policy: Policy,
        decoder: Decoder,
        draws: torch.Tensor | None,
        rollouts: int,
        length: int,
    ) -> None:
        device, self.count = prefix.last_hidden.device, len(prefix.last_hidden) * rollouts
        self.policy, self.decoder, self.head = policy, decoder, decoder.lm.head
        self.draws = None
        if draws is not None:
            self.draws = send(draws.flatten(0, 1).t().contiguous(), device).flatten()  # [T * B * R]
        self.ids = torch.full((length, self.count), policy.pad_token_id, device=device)
        self.logprobs = torch.zeros(length, self.count, device=device)
        places = torch.arange(self.count, device=device).view(-1, rollouts)
        self.places = prefix.by_group(places).flatten(1)
        self.done = torch.zeros_like(self.places, dtype=torch.bool)
        self.token = torch.zeros_like(self.places)
        self.ends = send(torch.tensor(policy.eos_token_ids), device)

    def step(self, window: int, counter: LayerCounter | None) -> None:
        """Forward the last token and append the next one."""
        self.append(self.head(self.decoder.step(self.token, window, counter)))

    def append(self, logits: torch.Tensor) -> None:
        """Append a token to each completion, drawn from logits `[G, B, V]`; padding to those that
        have ended."""
        policy, log_probs = self.policy, self.policy.log_probs(logits)
        places = self.places.flatten()
        if self.draws is None:
            token = choose(log_probs, None)
        else:
            draws = self.draws.index_select(0, places).view_as(self.places)
            token = choose(policy.likely(log_probs), draws)
        logprob = log_probs.gather(-1, token[..., None])[..., 0].masked_fill(self.done, 0.0)
        self.token.copy_(token.masked_fill(self.done, policy.pad_token_id))
        self.ids.view(-1).index_copy_(0, places, self.token.flatten())
        self.logprobs.view(-1).index_copy_(0, places, logprob.flatten())
        self.done |= (token[..., None] == self.ends).any(-1)
        self.places += self.count

    def keep(self, groups: torch.Tensor, branches: torch.Tensor, filled: int) -> None:
        """Go on with these completions alone, as `Decoder.keep`."""
        chosen = groups[:, None], branches
        self.token, self.places, self.done = (
            values[chosen] for values in (self.token, self.places, self.done)
        )
        self.decoder.keep(groups, branches, filled)


def _fewer(going_on: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `Decoder.keep` takes, if at most `KEEP_BELOW` of the completions remain with it.

    Args:
        going_on: whether each completion goes on, boolean `[G, B]`, on the host.
    """
    groups = going_on.any(1).nonzero().flatten()
    width = int(going_on.sum(1).max())
    if not 0 < len(groups) * width <= KEEP_BELOW * going_on.numel():
        return None
    # A stable sort puts what goes on first, in its order.
    return groups, (~going_on[groups]).byte().argsort(dim=1, stable=True)[:, :width]


def decode_answers(rollouts: Rollouts, tokenizer: Any) -> list[list[str]]:
    """Text of each completion without special tokens: R answers for each of the B prompts."""
    answers = []
    for ids, lengths in zip(
        fetch(rollouts.completion_ids).tolist(), rollouts.lengths.tolist(), strict=True
    ):
        kept = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        answers.append(tokenizer.batch_decode(kept, skip_special_tokens=True))
    return answers

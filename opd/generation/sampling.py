"""Sampling completions from a prefix.

Policy    the distribution of a token, shared by the sampler and every loss
Rollouts  sampled completions, and which of their tokens are in the loss
uniforms  random numbers, one per token, independent of batching and world size
sample    the decoding loop
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from opd import distributed
from opd.config.method import SampleConfig
from opd.data.batch import PromptBatch
from opd.device import fetch, send
from opd.generation.decoder import Decoder
from opd.generation.layer_counter import LayerCounter
from opd.generation.prefix import Prefix
from opd.models.video_lm import VideoLM, end_token_ids

VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Tokens between checks whether every completion has ended: each check waits for the device.
CHECK_EVERY = {"cuda": 8}


@dataclass(frozen=True, eq=False)
class Policy:
    """The distribution that completions are sampled from; the sampler and every loss use this one
    object, so that both see the same probabilities.

    p(v) = softmax over allowed columns of logits / temperature. `allowed_columns` is boolean `[V]`,
    False for vision tokens (one sampled makes the next forward fail) and for rows of the embedding
    that no token of the tokenizer uses.

    With `top_k` or `top_p` the sampler alone leaves out unlikely tokens (`likely`); losses do not.
    """

    allowed_columns: torch.Tensor
    temperature: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    top_k: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, lm: VideoLM, tokenizer: Any, config: SampleConfig) -> "Policy":
        """The policy of a checkpoint: its tokenizer's vocabulary without vision tokens, and the end
        tokens of tokenizer and generation config."""
        allowed = torch.zeros(lm.head.weight.shape[0], dtype=torch.bool, device=lm.device)
        allowed[: len(tokenizer)] = True
        allowed[
            [i for i in tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) if i is not None]
        ] = False
        ends = end_token_ids(tokenizer, lm.model.generation_config)
        pad, limits = tokenizer.pad_token_id, (config.top_k, config.top_p)
        return cls(allowed, config.temperature, ends, pad, *limits)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[..., V]` in fp32 for logits of any dtype; -inf at columns that are
        not allowed."""
        logits = logits.float() / self.temperature
        return logits.masked_fill(~self.allowed_columns, -torch.inf).log_softmax(-1)

    def likely(self, log_probs: torch.Tensor) -> torch.Tensor:
        """What the sampler draws from: log-probabilities `[..., V]`, -inf at unlikely tokens.

        Of the `top_k` most likely tokens, renormalised, it keeps the fewest whose probabilities add
        up to at least `top_p`. Of equally likely tokens the first counts as more likely.
        """
        if self.top_k is None and self.top_p >= 1:
            return log_probs
        count = min(self.top_k or log_probs.shape[-1], log_probs.shape[-1])
        values, columns = log_probs.sort(dim=-1, descending=True, stable=True)
        values, columns = values[..., :count], columns[..., :count]
        probs = values.softmax(-1, dtype=torch.float64)
        before = probs.cumsum(-1) - probs  # mass of the more likely tokens
        values = values.masked_fill(before >= self.top_p, -torch.inf)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, columns, values)


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


def uniforms(
    seed: int, step: int, prompt_ids: Sequence[str], num_rollouts: int, length: int
) -> torch.Tensor:
    """Uniform random numbers, one per token: fp64 `[B, R, T]` in [0, 1).

    Each is a function of (seed, step, prompt id, rollout, position) alone, so that batching,
    padding, world size and resuming do not change a rollout.
    """
    rows = []
    for prompt_id in prompt_ids:
        for rollout in range(num_rollouts):
            digest = hashlib.blake2b(
                f"{seed}/{step}/{prompt_id}/{rollout}".encode(), digest_size=16
            ).digest()
            generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
            rows.append(generator.random(length))
    return torch.from_numpy(np.stack(rows).reshape(len(prompt_ids), num_rollouts, length))


def choose(log_probs: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
    """Choose token ids `[...]` from log-probabilities `[..., V]`: by inverting the cumulative
    distribution at `draws` `[...]`, or greedily where `draws` is None."""
    if draws is None:
        return log_probs.argmax(-1)
    cumulative = log_probs.double().exp().cumsum(-1)
    points = draws[..., None] * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, points, right=True)[..., 0]
    return ids.clamp_max(log_probs.shape[-1] - 1)


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
    batch, device = len(prefix.last_hidden), prefix.last_hidden.device
    num_rollouts = 1 if draws is None else draws.shape[1]
    if draws is not None:
        draws = send(draws, device)
    ends = send(torch.tensor(policy.eos_token_ids), device)
    decoder = Decoder(lm, prefix, num_rollouts, max_completion_length - 1)
    hidden = prefix.last_hidden[:, None].expand(-1, num_rollouts, -1)
    done = torch.zeros(batch, num_rollouts, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, num_rollouts, dtype=torch.long, device=device)
    ids, logprobs = [], []
    every = CHECK_EVERY.get(device.type, 1)
    for position in range(max_completion_length):
        log_probs = policy.log_probs(lm.head(hidden))
        if draws is None:
            token = choose(log_probs, None)
        else:
            token = choose(policy.likely(log_probs), draws[:, :, position])
        lengths += ~done
        ids.append(torch.where(done, policy.pad_token_id, token))
        logprobs.append(log_probs.gather(-1, token[..., None])[..., 0].masked_fill(done, 0.0))
        done = done | torch.isin(token, ends)
        if position + 1 == max_completion_length:
            break
        if (position + 1) % every == 0:
            unfinished = int(not fetch(done).all())
            # With sharded weights, all ranks decode until the last has finished.
            if not (distributed.all_max(unfinished) if lm.sharded else unfinished):
                break
        hidden = decoder.step(ids[-1], counter)
    lengths, ended = fetch(torch.stack([lengths, done.long()])).unbind()
    longest = int(lengths.max())  # columns after the last end token are cut off
    completion_ids, rollout_logprobs = (
        torch.stack(values, 2)[..., :longest] for values in (ids, logprobs)
    )
    return Rollouts(completion_ids, lengths, rollout_logprobs, truncated=ended == 0)


def decode_answers(rollouts: Rollouts, tokenizer: Any) -> list[list[str]]:
    """Text of each completion without special tokens: R answers for each of the B prompts."""
    answers = []
    for ids, lengths in zip(
        fetch(rollouts.completion_ids).tolist(), rollouts.lengths.tolist(), strict=True
    ):
        kept = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        answers.append(tokenizer.batch_decode(kept, skip_special_tokens=True))
    return answers

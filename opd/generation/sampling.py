"""Rollouts: completions sampled from a prefix, under one policy that the loss shares."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from opd import distributed
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

CHECK_EVERY = {"cuda": 8}  # tokens: asking whether all have ended waits for the device


@dataclass(frozen=True, eq=False)
class Policy:
    """What a completion may consist of, and how its distribution is made; the sampler and every
    loss use this one object.

    p(v) = softmax over allowed columns of logits / temperature. `allowed_columns` is boolean `[V]`,
    False for vision tokens (one sampled makes the next forward fail) and for rows of the embedding
    that the tokenizer does not have.
    """

    allowed_columns: torch.Tensor
    temperature: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @classmethod
    def of(cls, lm: VideoLM, tokenizer: Any, temperature: float) -> "Policy":
        """The policy of a checkpoint: its tokenizer's vocabulary less vision tokens; its generation
        config's end tokens."""
        allowed = torch.zeros(lm.head.weight.shape[0], dtype=torch.bool, device=lm.device)
        allowed[: len(tokenizer)] = True
        allowed[
            [i for i in tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) if i is not None]
        ] = False
        ends = end_token_ids(tokenizer, lm.model.generation_config)
        return cls(allowed, temperature, ends, tokenizer.pad_token_id)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """fp32 log-probabilities `[..., V]` of logits; -inf at columns that are not allowed."""
        logits = logits.float() / self.temperature
        return logits.masked_fill(~self.allowed_columns, -torch.inf).log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Completions `[B, R, T]`, right-padded, with the sampler's log-probability of each token.

    `completion_ids` and `rollout_logprobs` (fp32, 0 behind the end) are on the device. What decides
    about them is on the host, `[B, R]`: `lengths`, the number of tokens with the first end token;
    `truncated`, whether the length limit came before an end token; `rewards`, where answers are
    compared or routed; `trained`, where some completions take no part in the loss; and `horizon`,
    the number of tokens of each that do.
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
        """Tokens of all completions."""
        return int(self.lengths.sum())

    @property
    def loss_lengths(self) -> torch.Tensor:
        """`[B, R]`, on the host: how many tokens of each completion, from its first, are in the
        loss."""
        lengths = self.lengths
        if self.trained is not None:
            lengths = lengths * self.trained
        return lengths if self.horizon is None else lengths.clamp_max(self.horizon)

    @property
    def completion_mask(self) -> torch.Tensor:
        """Boolean `[B, R, T]`, on the host: tokens of completions."""
        return self._first(self.lengths)

    @property
    def loss_mask(self) -> torch.Tensor:
        """Boolean `[B, R, T]`, on the host: tokens of the loss."""
        return self._first(self.loss_lengths)

    def _first(self, lengths: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.completion_ids.shape[2]) < lengths[..., None]

    @cached_property
    def loss_rows(self) -> torch.Tensor:
        """int64 `[N]`, on the device: the tokens of the loss among `completion_ids.flatten()`."""
        rows = self.loss_mask.flatten().nonzero().flatten()
        return send(rows, self.completion_ids.device)

    def in_loss(self, values: torch.Tensor) -> torch.Tensor:
        """The entries `[N, ...]` of `values` `[B, R, T, ...]` at the tokens of the loss."""
        return values.flatten(0, 2).index_select(0, self.loss_rows)

    def cpu(self) -> "Rollouts":
        """The same on the host; waits for the device."""
        ids, logprobs = fetch(self.completion_ids), fetch(self.rollout_logprobs)
        return replace(self, completion_ids=ids, rollout_logprobs=logprobs)

    def routed(self, lockstep: bool = False) -> tuple[list[int], "Rollouts"]:
        """The prompts with a completion that is trained on, and of their rollouts those alone, as
        narrow and as short as they fit. The tokens of the loss keep their order. In `lockstep` each
        rank takes as many prompts as the busiest, at least one, some of them without such a
        completion."""
        assert self.trained is not None
        rows = self.trained.any(1).nonzero().flatten()
        if lockstep:
            others = (~self.trained.any(1)).nonzero().flatten()
            rows = torch.cat([rows, others[: max(1, distributed.all_max(len(rows))) - len(rows)]])
        width = max(1, int(self.trained[rows].sum(1).max())) if len(rows) else 0
        # The trained ones of each prompt come first, in their order.
        first = (~self.trained[rows]).byte().argsort(dim=1, stable=True)[:, :width]
        kept = rows[:, None], first
        lengths = self.lengths[kept]
        longest = max(1, int((lengths * self.trained[kept]).max())) if len(rows) else 0
        # One index for the device: places in `[B * R]`.
        places = send(rows[:, None] * self.lengths.shape[1] + first, self.completion_ids.device)

        def gathered(values: torch.Tensor) -> torch.Tensor:
            return values.flatten(0, 1)[places][..., :longest]

        return rows.tolist(), replace(
            self,
            completion_ids=gathered(self.completion_ids),
            lengths=lengths.clamp_max(longest),
            rollout_logprobs=gathered(self.rollout_logprobs),
            truncated=self.truncated[kept],
            rewards=None if self.rewards is None else self.rewards[kept],
            trained=self.trained[kept],
        )

    @classmethod
    def references(cls, batch: PromptBatch, pad_token_id: int) -> "Rollouts":
        """The reference answers in the place of sampled ones, one per prompt; nobody knows the
        probability with which they were written."""
        ids, lengths = batch.references(pad_token_id)
        unknown = torch.full_like(ids, torch.nan, dtype=torch.float32)
        return cls(ids, lengths, unknown, torch.zeros_like(lengths, dtype=torch.bool))


def uniforms(
    seed: int, step: int, prompt_ids: Sequence[str], num_rollouts: int, length: int
) -> torch.Tensor:
    """fp64 `[B, R, T]` in [0, 1): one number per token, a function of (seed, step, prompt id,
    rollout, position) alone.

    So batching, padding, world size and resuming do not change what a prompt's rollout draws.
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
    """Token ids from `[..., V]` log-probabilities: the most likely, or the inverse of the
    cumulative distribution at `draws` `[...]`."""
    if draws is None:
        return log_probs.argmax(-1)
    cumulative = log_probs.double().exp().cumsum(-1)
    points = draws[..., None] * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, points, right=True)[..., 0]
    return ids.clamp_max(log_probs.shape[-1] - 1)


def decode_answers(rollouts: Rollouts, tokenizer: Any) -> list[list[str]]:
    """The text of each completion, special tokens left out: one list of R answers per prompt."""
    answers = []
    for ids, lengths in zip(
        fetch(rollouts.completion_ids).tolist(), rollouts.lengths.tolist(), strict=True
    ):
        kept = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        answers.append(tokenizer.batch_decode(kept, skip_special_tokens=True))
    return answers


@torch.no_grad()
def sample(
    lm: VideoLM,
    prefix: Prefix,
    policy: Policy,
    max_completion_length: int,
    draws: torch.Tensor | None,
    counter: LayerCounter | None = None,
) -> Rollouts:
    """Continue each prompt of a (detached) prefix until an end token or the length limit.

    Args:
        draws: `[B, R, T]` from `uniforms`, R completions per prompt; None decodes one greedily.
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
        token = choose(log_probs, None if draws is None else draws[:, :, position])
        lengths += ~done
        ids.append(torch.where(done, policy.pad_token_id, token))
        logprobs.append(log_probs.gather(-1, token[..., None])[..., 0].masked_fill(done, 0.0))
        done = done | torch.isin(token, ends)
        if position + 1 == max_completion_length:
            break
        if (position + 1) % every == 0:
            left = int(not fetch(done).all())
            if not (distributed.all_max(left) if lm.sharded else left):
                break
        hidden = decoder.step(ids[-1], counter)
    lengths, ended = fetch(torch.stack([lengths, done.long()])).unbind()
    longest = int(lengths.max())  # without what came after the last end token
    tokens, drawn = (torch.stack(values, 2)[..., :longest] for values in (ids, logprobs))
    return Rollouts(tokens, lengths, drawn, ended == 0)

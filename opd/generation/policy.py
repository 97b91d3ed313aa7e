"""The distribution of a token, and how tokens are drawn from it.

Policy    shared by the sampler and every loss
uniforms  random numbers, one per token, independent of batching and world size
choose    the tokens at these numbers
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opd.config.method import SampleConfig
from opd.models.video_lm import VideoLM, end_token_ids

VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


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

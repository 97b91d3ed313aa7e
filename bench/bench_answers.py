"""Long answers behind a prompt of 1,500 tokens: attention in parts against one mask over all.

`extend` forwards eight answers of 512 tokens and goes backward through them to the prompt's keys.
Its memory is compared beyond what the same call takes without attention: activations of everything
else are the same on both sides. `packed` extends answers whose lengths are log-normal, as those of
reasoning are: half of them below 190 tokens, at most 512; packed against padded to the longest, in
parts on both sides. `decode` samples such answers. Finished ones leave the batch where attention is
in parts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from bench.bench_evaluate import queries_of, settings
from bench.timing import interleaved, peak_bytes, ratio
from opd.config.method import SampleConfig
from opd.config.run import load_config
from opd.data.loader import batches
from opd.distributed import set_up
from opd.generation.extend import extend
from opd.generation.policy import Policy, uniforms
from opd.generation.prefix import Prefix, forward
from opd.generation.sampling import Rollouts, sample
from opd.models.branches import FEWEST_TOKENS, Branches
from opd.models.video_lm import VideoLM

ROUNDS, ROLLOUTS, LENGTH, MEDIAN = 5, 8, 512, 190
SIDES = {"in parts": 1, "one mask": 10**9}  # and the fewest tokens that attend in parts
TARGETS = {"seconds": 0.5, "memory": 0.4, "decode": 0.6}


@contextmanager
def side(name: str) -> Iterator[None]:
    """Context in which completions attend as the side of this name does."""
    with mock.patch.dict(FEWEST_TOKENS, cpu=SIDES[name]):
        yield


@pytest.fixture(scope="module")
def case() -> tuple[VideoLM, Prefix, Policy]:
    """The embedded student in fp32, a prompt of 1,500 tokens after its forward, and its policy."""
    set_up(1, 0)
    config = load_config([*settings("1500"), "data.cache_mb=0"])
    prompts = queries_of(config)
    (batch,) = batches(prompts, [[0]])
    policy = Policy.of(prompts.lm, prompts.tokenizer, SampleConfig())
    return prompts.lm, forward(prompts.lm, batch).detach(), policy


def lengths_drawn() -> torch.Tensor:
    """Lengths of the answers, `[ROLLOUTS]`."""
    drawn = torch.empty(ROLLOUTS).log_normal_(0.0, 0.8, generator=torch.Generator().manual_seed(1))
    return (MEDIAN * drawn).long().clamp(1, LENGTH)


def extended(
    lm: VideoLM,
    prefix: Prefix,
    ids: torch.Tensor,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Gradients of the squared sum of an extension, or of its masked tokens: of the weights, and of
    the prompt's keys."""
    keys = [key.clone().requires_grad_() for key in prefix.keys]
    hidden = extend(lm, replace(prefix, keys=keys), ids, lengths=lengths)
    hidden = hidden if mask is None else hidden[mask]
    weights = [weight for weight in lm.language_model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(hidden.square().sum(), [*keys, *weights], allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """Fail unless both sides have the same gradients, up to fp32's rounding."""
    for one, other in zip(first, second, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_extend(benchmark: Any, case: tuple[VideoLM, Prefix, Policy]) -> None:
    lm, prefix, _ = case
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (1, ROLLOUTS, LENGTH), generator=generator)

    def call(name: str, _: int) -> list[torch.Tensor]:
        with side(name):
            return extended(lm, prefix, ids)

    calls: dict[str, Callable[[int], Any]] = {name: partial(call, name) for name in SIDES}
    assert_equal(*(call(0) for call in calls.values()))

    def peak(name: str) -> int:
        return min(peak_bytes(partial(call, name, i)) for i in range(2))

    peaks = {name: peak(name) for name in SIDES}
    with mock.patch.object(Branches, "attend", lambda _, query, *__: query):
        peaks["no attention"] = peak("in parts")
    more = {name: peaks[name] - peaks["no attention"] for name in SIDES}
    times = interleaved(benchmark, calls, ROUNDS, warmup=1)
    seconds = ratio(times["in parts"], times["one mask"])
    memory = more["in parts"] / more["one mask"]
    benchmark.extra_info["seconds"] = seconds | {"better": "lower", "target": TARGETS["seconds"]}
    benchmark.extra_info["memory"] = {"ratio": memory, "target": TARGETS["memory"]} | peaks
    print(f"\nextend, in parts by one mask: {seconds}, memory {memory:.3f} {peaks}")


def test_packed(benchmark: Any, case: tuple[VideoLM, Prefix, Policy]) -> None:
    lm, prefix, _ = case
    lengths = lengths_drawn()[None]
    longest = int(lengths.max())
    ids = torch.randint(300, (1, ROLLOUTS, longest), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(longest) < lengths[..., None]

    def call(packed: bool, _: int) -> list[torch.Tensor]:
        with side("in parts"):
            return extended(lm, prefix, ids, lengths if packed else None, mask)

    calls = {"packed": partial(call, True), "padded": partial(call, False)}
    assert_equal(*(call(0) for call in calls.values()))
    times = interleaved(benchmark, calls, ROUNDS, warmup=1)
    seconds = ratio(times["packed"], times["padded"])
    share = int(lengths.sum()) / (ROLLOUTS * longest)
    benchmark.extra_info["packed"] = seconds | {"better": "lower", "share of tokens": share}
    print(f"\nextend, packed by padded: {seconds}, {share:.2f} of the tokens")


def with_lengths(policy: Policy, rollouts: int, lengths: list[int]) -> tuple[Policy, torch.Tensor]:
    """A policy whose only end token is the last one that it allows, and random numbers that draw
    this token first where an answer of the given length ends."""
    last = int(policy.allowed_columns.nonzero().max())
    draws = 0.99 * uniforms(0, 0, ["a"], rollouts, LENGTH)
    for rollout, length in enumerate(lengths):
        draws[0, rollout, length - 1] = 1 - 2**-53
    return replace(policy, eos_token_ids=(last,)), draws


def test_decode(benchmark: Any, case: tuple[VideoLM, Prefix, Policy]) -> None:
    lm, prefix, policy = case
    policy, draws = with_lengths(policy, ROLLOUTS, lengths_drawn().tolist())

    def call(name: str, _: int) -> Rollouts:
        with side(name):
            return sample(lm, prefix, policy, LENGTH, draws)

    calls: dict[str, Callable[[int], Any]] = {name: partial(call, name) for name in SIDES}
    first, second = (call(0) for call in calls.values())
    assert first.lengths.flatten().tolist() == second.lengths.flatten().tolist()
    same = float((first.completion_ids == second.completion_ids).float().mean())
    times = interleaved(benchmark, calls, ROUNDS, warmup=1)
    seconds = ratio(times["in parts"], times["one mask"])
    benchmark.extra_info["decode"] = seconds | {"better": "lower", "target": TARGETS["decode"]}
    benchmark.extra_info["lengths"] = first.lengths.flatten().tolist()
    print(f"\ndecode, in parts by one mask: {seconds}, {first.lengths.tolist()}, same {same:.4f}")

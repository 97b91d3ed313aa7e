"""Two losses of sampled tokens by all who compute them: the mean product of log-probabilities with
advantages, and the clipped policy loss, mean over tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels.problems import Loss, Problem, student_gemms
from bench.kernels.providers import Peer, Task
from fused_kl import linear_logprobs, linear_policy_loss, reference

CLIP = 0.2


def weighted(found: Tensor, problem: Problem) -> Tensor:
    """Given log-probabilities `[N]` by their advantages."""
    return (found * problem.tokens.advantages).mean()


def logprobs_fast(problem: Problem) -> Tensor:
    """fused_kl."""
    found = linear_logprobs(*problem.sides[:2], problem.tokens.ids).logprobs
    return weighted(found, problem)


def logprobs_allowed(problem: Problem) -> Tensor:
    """fused_kl over the allowed columns, as the trainer calls it."""
    found = linear_logprobs(
        *problem.sides[:2], problem.tokens.ids, allowed_columns=problem.allowed_columns
    )
    return weighted(found.logprobs, problem)


def logprobs_allowed_truth(problem: Problem) -> Tensor:
    """The definition over the allowed columns, in fp64."""
    exact, _ = reference.linear_logprobs(
        *problem.sides[:2], problem.tokens.ids, allowed_columns=problem.allowed_columns
    )
    return weighted(exact, problem)


def dense_logprobs(problem: Problem) -> Tensor:
    """`[N]`, from logits and log-softmax."""
    logits = (problem.student_hidden @ problem.student_lm_head.T).float()
    return torch.log_softmax(logits, -1).gather(-1, problem.tokens.ids[:, None])[:, 0]


def logprobs_dense(problem: Problem) -> Tensor:
    """PyTorch as one writes it."""
    return weighted(dense_logprobs(problem), problem)


def logprobs_truth(problem: Problem) -> Tensor:
    """The definition, in fp64."""
    exact, _ = reference.linear_logprobs(*problem.sides[:2], problem.tokens.ids)
    return weighted(exact, problem)


def policy_fast(problem: Problem, allowed_columns: Tensor | None = None) -> Tensor:
    """fused_kl, with the denominator in the weights."""
    tokens = problem.tokens
    return linear_policy_loss(
        *problem.sides[:2],
        tokens.ids,
        advantages=tokens.advantages,
        old_logprobs=tokens.old_logprobs,
        token_weights=torch.full_like(tokens.advantages, 1 / len(tokens.ids)),
        clip=CLIP,
        allowed_columns=allowed_columns,
    ).loss


def policy_allowed(problem: Problem) -> Tensor:
    """fused_kl over the allowed columns, as the trainer calls it."""
    return policy_fast(problem, problem.allowed_columns)


def surrogate(found: Tensor, problem: Problem) -> Tensor:
    """The loss of given log-probabilities `[N]`."""
    advantages = problem.tokens.advantages
    ratio = (found - problem.tokens.old_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def policy_dense(problem: Problem) -> Tensor:
    """PyTorch as one writes it."""
    return surrogate(dense_logprobs(problem), problem)


def policy_truth(problem: Problem, allowed_columns: Tensor | None = None) -> Tensor:
    """The definition, in fp64."""
    tokens = problem.tokens
    exact, *_ = reference.linear_policy_loss(
        *problem.sides[:2],
        tokens.ids,
        advantages=tokens.advantages,
        old_logprobs=tokens.old_logprobs,
        clip=CLIP,
        allowed_columns=allowed_columns,
    )
    return exact / len(tokens.ids)


def policy_allowed_truth(problem: Problem) -> Tensor:
    """The definition over the allowed columns, in fp64."""
    return policy_truth(problem, problem.allowed_columns)


def _trl(loss: Callable[[Tensor, Problem], Tensor], trl: Any) -> Loss:
    """A loss of TRL's log-probabilities, with the columns at once that its trainers take."""

    def found(problem: Problem) -> Tensor:
        hidden, head, *_ = problem.sides
        logprobs, *_ = trl.ChunkedLogProbFunction.apply(
            hidden, head, None, problem.tokens.ids, 1.0, 32_768, None, 1.0, ()
        )
        return loss(logprobs, problem)

    return found


def _liger_policy(liger: Any) -> Loss:
    """All completions at once: its own tiles bound the memory, and one completion at a time, its
    default, is slower."""

    def loss(problem: Problem) -> Tensor:
        tokens, (hidden, head, *_) = problem.tokens, problem.sides
        shape = len(tokens.ids) // tokens.sequence_length, tokens.sequence_length
        module = liger.LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, chunk_size=shape[0], loss_type="dapo"
        )
        value, _ = module(
            hidden.view(*shape, -1),
            head,
            tokens.ids.view(shape),
            torch.ones(shape, device=hidden.device),
            tokens.advantages.view(shape)[:, 0],
            old_per_token_logps=tokens.old_logprobs.view(shape),
        )
        return value

    return loss


TRL = "trl.kernels.chunked_logprob"
LOGPROBS = Task(
    name="logprobs",
    truth=logprobs_truth,
    gemms=student_gemms,
    ours={"fast": logprobs_fast},
    masked=(logprobs_allowed, logprobs_allowed_truth),
    dense=logprobs_dense,
    peers={"trl": Peer(TRL, partial(_trl, weighted))},
    needs_tokens=True,
)
POLICY_LOSS = replace(
    LOGPROBS,
    name="policy_loss",
    truth=policy_truth,
    ours={"fast": policy_fast},
    masked=(policy_allowed, policy_allowed_truth),
    dense=policy_dense,
    peers={
        "trl": Peer(TRL, partial(_trl, surrogate)),
        "liger_chunked": Peer("liger_kernel.chunked_loss", _liger_policy, compiled=True),
    },
)

"""Three losses and everyone who computes them: ours, plain PyTorch and its compiler, TRL, Liger,
orda-kernel, Cut Cross-Entropy.

    reverse_kl    mean KL(student || teacher) of two heads
    policy_loss   clipped policy loss of sampled tokens, mean over tokens
    logprobs      mean product of sampled tokens' log-probabilities and their advantages

Each provider takes the same tensors and leaves the gradients in `student_hidden.grad` and
`student_lm_head.grad`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from bench.kernels.problems import Loss, Problem
from fused_kl import linear_logprobs, linear_policy_loss, linear_reverse_kl, reference

CLIP = 0.2
# On a GPU each shape for itself: kernels for any shape are slower. On a CPU they are as fast and
# take a third of the memory.
compiler = partial(torch.compile, dynamic=False if torch.cuda.is_available() else None)


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An implementation of a loss.

    Attributes:
        library: another project's package that it needs.
        needs_gpu: whether it cannot run on a CPU.
        compiled: whether the first call compiles, which takes memory of its own.
        masked: whether it is over the allowed columns alone, as the trainer calls the loss.
    """

    loss: Loss
    library: str | None = None
    needs_gpu: bool = False
    compiled: bool = False
    masked: bool = False

    def step(self, problem: Problem) -> Tensor:
        """Forward and backward; the loss, detached."""
        loss = self.loss(problem)
        loss.backward()
        return loss.detach()

    def lacks(self) -> str | None:
        """Why this machine cannot run it."""
        if self.library is not None and find_spec(self.library) is None:
            return f"{self.library} is not installed"
        return "needs a GPU" if self.needs_gpu and not torch.cuda.is_available() else None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A loss: its definition in fp64, over the allowed columns or with None over all of them, and
    its providers by name."""

    name: str
    truth: Callable[[Problem, Tensor | None], Tensor]
    providers: dict[str, Provider]
    teacher: bool = False

    def available(self) -> tuple[dict[str, Provider], dict[str, str]]:
        """Providers that this machine can run, and why it cannot run the others."""
        lacking = {name: provider.lacks() for name, provider in self.providers.items()}
        skipped = {name: reason for name, reason in lacking.items() if reason}
        return {n: p for n, p in self.providers.items() if n not in skipped}, skipped


# The reverse KL.


def kl(problem: Problem, mode: Literal["fast", "lowmem"] = "fast") -> Tensor:
    """fused_kl."""
    return linear_reverse_kl(*problem.both, token_weights=problem.token_weights, mode=mode).loss


def kl_allowed(problem: Problem) -> Tensor:
    """fused_kl as the trainer calls it: with sampled tokens, over the allowed columns."""
    return linear_reverse_kl(
        *problem.both,
        token_ids=problem.token_ids,
        token_weights=problem.token_weights,
        allowed_columns=problem.allowed_columns,
    ).loss


def kl_truth(problem: Problem, allowed: Tensor | None) -> Tensor:
    total, *_ = reference.linear_reverse_kl(*problem.both, allowed_columns=allowed)
    return total / len(problem.student_hidden)


def kl_dense(problem: Problem) -> Tensor:
    """PyTorch as one writes it: logits, log-softmax, KL."""
    hidden, head, teacher_hidden, teacher_head = problem.both
    student = torch.log_softmax((hidden @ head.T).float(), -1)
    teacher = torch.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return torch.nn.functional.kl_div(teacher, student, reduction="batchmean", log_target=True)


def kl_trl(problem: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, *teacher = problem.both
    tokens, _ = ChunkedDivergenceFunction.apply(hidden, head, None, *teacher, None, 1.0, 1.0)
    return tokens.mean()


def kl_liger_chunked(problem: Problem) -> Tensor:
    """Its logits have the inputs' dtype: bf16 inputs are rounded before the softmax."""
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0}
    module = liger("chunked_loss", "LigerFusedLinearJSDLoss", **options)
    return module(*problem.both, torch.zeros_like(problem.token_ids))


def kl_liger_fused(problem: Problem) -> Tensor:
    """Since 0.8.5 its products give fp32 logits on a GPU; by default it sums the head's gradient in
    the head's dtype."""
    module = liger("transformers.fused_linear_jsd", "LigerFusedLinearJSD", jsd_beta=1.0)
    return module(*problem.both)


def kl_orda(problem: Problem) -> Tensor:
    """orda-kernel's reverse KL, without its cross-entropies; on a CPU it is plain torch."""
    orda: Any = import_module("orda_kernel")
    hidden, head, *sides = problem.both
    rules = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
    call = hidden, head, problem.token_ids, orda.SeparateTeacher(*sides)
    return orda.distillation_loss(*call, **rules, kl_divergence="reverse").loss


@cache
def liger(module: str, name: str, **options: Any) -> Any:
    """One of Liger's modules."""
    return getattr(import_module(f"liger_kernel.{module}"), name)(**options)


# Losses of sampled tokens, from their log-probabilities `[N]`.


def weighted(logprobs: Tensor, problem: Problem) -> Tensor:
    return (logprobs * problem.advantages).mean()


def clipped(logprobs: Tensor, problem: Problem) -> Tensor:
    ratio = (logprobs - problem.old_logprobs).exp()
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * problem.advantages, bounded * problem.advantages).mean()


def logprobs(problem: Problem, masked: bool = False) -> Tensor:
    """fused_kl."""
    allowed = problem.allowed_columns if masked else None
    result = linear_logprobs(*problem.student, problem.token_ids, allowed_columns=allowed)
    return weighted(result.logprobs, problem)


def logprobs_truth(problem: Problem, allowed: Tensor | None) -> Tensor:
    ids = problem.token_ids
    exact, _ = reference.linear_logprobs(*problem.student, ids, allowed_columns=allowed)
    return weighted(exact, problem)


def policy(problem: Problem, masked: bool = False) -> Tensor:
    """fused_kl."""
    return linear_policy_loss(
        *problem.student,
        problem.token_ids,
        advantages=problem.advantages,
        old_logprobs=problem.old_logprobs,
        token_weights=problem.token_weights,
        clip=CLIP,
        allowed_columns=problem.allowed_columns if masked else None,
    ).loss


def policy_truth(problem: Problem, allowed: Tensor | None) -> Tensor:
    total, *_ = reference.linear_policy_loss(
        *problem.student,
        problem.token_ids,
        advantages=problem.advantages,
        old_logprobs=problem.old_logprobs,
        clip=CLIP,
        allowed_columns=allowed,
    )
    return total / len(problem.token_ids)


def dense(problem: Problem, loss: Callable[[Tensor, Problem], Tensor]) -> Tensor:
    """PyTorch as one writes it: logits, log-softmax, the tokens' columns."""
    logits = (problem.student_hidden @ problem.student_lm_head.T).float()
    ids = problem.token_ids[:, None]
    return loss(torch.log_softmax(logits, -1).gather(-1, ids)[:, 0], problem)


def trl(problem: Problem, loss: Callable[[Tensor, Problem], Tensor]) -> Tensor:
    """With the columns at once that TRL's trainers take."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = 1.0, 32_768, None, 1.0, ()
    ids = problem.token_ids
    logprobs, *_ = ChunkedLogProbFunction.apply(*problem.student, None, ids, *options)
    return loss(logprobs, problem)


def cce(problem: Problem, loss: Callable[[Tensor, Problem], Tensor]) -> Tensor:
    """Cut Cross-Entropy's log-probabilities; on a CPU it is compiled torch."""
    entropy: Any = import_module("cut_cross_entropy").linear_cross_entropy
    implementation = "cce" if torch.cuda.is_available() else "torch_compile"
    options = {"reduction": "none", "impl": implementation}
    return loss(-entropy(*problem.student, problem.token_ids, **options), problem)


def policy_liger(problem: Problem) -> Tensor:
    """All completions at once: its own tiles bound the memory, and one completion at a time, its
    default, is slower."""
    shape = -1, problem.completion_length
    ids = problem.token_ids.view(shape)
    options = {"beta": 0.0, "use_ref_model": False, "chunk_size": len(ids), "loss_type": "dapo"}
    value, _ = liger("chunked_loss", "LigerFusedLinearGRPOLoss", **options)(
        problem.student_hidden.view(*ids.shape, -1),
        problem.student_lm_head,
        ids,
        torch.ones_like(ids, dtype=torch.float32),
        problem.advantages.view(shape)[:, 0],
        old_per_token_logps=problem.old_logprobs.view(shape),
    )
    return value


def token_task(name: str, ours: Any, truth: Any, loss: Any, **peers: Provider) -> Task:
    plain = partial(dense, loss=loss)
    providers = {
        "fast": Provider(loss=ours),
        "fast_allowed_columns": Provider(loss=partial(ours, masked=True), masked=True),
        "dense": Provider(loss=plain),
        "compiled": Provider(loss=compiler(plain), compiled=True),
        "trl": Provider(loss=partial(trl, loss=loss), library="trl"),
        "cce": Provider(loss=partial(cce, loss=loss), library="cut_cross_entropy", needs_gpu=True),
    }
    return Task(name=name, truth=truth, providers=providers | peers)


LIGER = {"library": "liger_kernel", "compiled": True}
REVERSE_KL = Task(
    name="reverse_kl",
    truth=kl_truth,
    teacher=True,
    providers={
        "fast": Provider(loss=kl),
        "fast_allowed_columns": Provider(loss=kl_allowed, masked=True),
        "lowmem": Provider(loss=partial(kl, mode="lowmem")),
        "dense": Provider(loss=kl_dense),
        "compiled": Provider(loss=compiler(kl_dense), compiled=True),
        "trl": Provider(loss=kl_trl, library="trl"),
        "liger_chunked": Provider(loss=kl_liger_chunked, **LIGER),
        "liger_fused": Provider(loss=kl_liger_fused, needs_gpu=True, **LIGER),
        "orda": Provider(loss=kl_orda, library="orda_kernel", needs_gpu=True),
    },
)
POLICY_LOSS = token_task(
    "policy_loss", policy, policy_truth, clipped, liger_chunked=Provider(loss=policy_liger, **LIGER)
)
LOGPROBS = token_task("logprobs", logprobs, logprobs_truth, weighted)
TASKS = (REVERSE_KL, POLICY_LOSS, LOGPROBS)

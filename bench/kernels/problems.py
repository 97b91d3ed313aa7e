"""Inputs of the kernel benchmarks, and the products that no exact loss can do without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fused_kl import linear_logprobs

# What the policy has moved by since it sampled, in nats: with a clip of 0.2 the first and the last
# are cut, and no rounding carries another over the edge.
MOVED = (-0.5, -0.1, 0.0, 0.1, 0.5)
ADVANTAGES = (2.0, -1.0)  # of completions, in turn: their losses do not cancel


@dataclass(frozen=True)
class Shape:
    """N tokens, and the heads of a pair of models."""

    name: str
    num_rows: int
    vocab: int
    student_size: int
    teacher_size: int

    @property
    def completion_length(self) -> int:
        """Tokens of one completion: short answers, or long ones with thinking."""
        return math.gcd(self.num_rows, 32 if self.num_rows <= 1024 else 2048)


def allowed_columns(vocab: int, device: str | torch.device) -> Tensor:
    """Boolean `[V]`, as the trainer's policy has it for Qwen3-VL: without the rows that pad the
    head (267 of 151,936) and without four vision tokens near the last real one."""
    allowed = torch.ones(vocab, dtype=torch.bool, device=device)
    real = vocab - max(1, vocab * 267 // 151_936)
    allowed[real:] = False
    allowed[real - 17 : real - 13] = False
    return allowed


@dataclass(eq=False, kw_only=True)
class Problem:
    """Hidden states and heads of both models, and sampled tokens `[N]` with what the policy loss
    needs of them. The student's tensors are leaves with gradients; without a teacher its tensors
    are empty."""

    student_hidden: Tensor
    student_lm_head: Tensor
    teacher_hidden: Tensor
    teacher_lm_head: Tensor
    token_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    completion_length: int

    @staticmethod
    @torch.no_grad()
    def of(
        shape: Shape,
        *,
        dtype: torch.dtype,
        device: str,
        logit_std: float = 3.0,
        gap: float | None = None,
        teacher: bool = True,
    ) -> "Problem":
        """Random tensors whose logits have standard deviation `logit_std`; with `gap` the teacher's
        logits are the student's plus noise of that size."""
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        hidden = randn(shape.num_rows, shape.student_size)
        head = randn(shape.vocab, shape.student_size) * (logit_std / shape.student_size**0.5)
        teacher_size = shape.teacher_size if teacher else 0
        teacher_hidden = randn(shape.num_rows, teacher_size)
        teacher_head = randn(shape.vocab, teacher_size)
        if gap is None:
            teacher_head *= logit_std / max(1, teacher_size) ** 0.5
        else:
            teacher_head *= gap / (teacher_size - shape.student_size) ** 0.5
            teacher_hidden[:, : shape.student_size] = hidden
            teacher_head[:, : shape.student_size] = head
        hidden, head = hidden.to(dtype), head.to(dtype)
        allowed = allowed_columns(shape.vocab, device).float()
        ids = torch.multinomial(allowed, shape.num_rows, replacement=True, generator=generator)

        def in_turn(values: Sequence[float], times: int = 1) -> Tensor:
            places = torch.arange(shape.num_rows, device=device) // times
            return torch.tensor(values, device=device)[places % len(values)]

        length = shape.completion_length
        return Problem(
            student_hidden=hidden.requires_grad_(),
            student_lm_head=head.requires_grad_(),
            teacher_hidden=teacher_hidden.to(dtype),
            teacher_lm_head=teacher_head.to(dtype),
            token_ids=ids,
            old_logprobs=linear_logprobs(hidden, head, ids).logprobs - in_turn(MOVED),
            advantages=in_turn(ADVANTAGES, length),
            completion_length=length,
        )

    @staticmethod
    @torch.no_grad()
    def predictable(shape: Shape, nats: float, *, dtype: torch.dtype, device: str) -> "Problem":
        """Rows whose mean entropy is so many nats. Each row is about one of 64 topics, whose tokens
        fall off by rank as in Zipf's law; all others are Gaussian, some 30 nats below the best. The
        teacher sees the same and disagrees by half a nat."""
        problem = Problem.of(shape, dtype=torch.float32, device=device, logit_std=2.0, gap=0.5)
        hidden, head, teacher_hidden, teacher_head = (side.detach() for side in problem.both)
        generator = torch.Generator(device).manual_seed(1)
        topics = torch.randn(64, shape.student_size, generator=generator, device=device)
        topics /= topics.norm(dim=1, keepdim=True)
        order = torch.randperm(shape.vocab, generator=generator, device=device)
        ranks = (order // len(topics) + 1).float().log()
        of_rows = torch.arange(shape.num_rows, device=device) % len(topics)
        noise, hidden = head, hidden + 30 * topics[of_rows]

        def head_at(slope: float) -> Tensor:
            """Tokens of a topic, less of it the higher their rank."""
            strength = (1 - slope * ranks).clamp_min(0)
            return noise + strength[:, None] * topics[order % len(topics)]

        def entropy(slope: float) -> float:
            log_probs = (hidden @ head_at(slope).t()).log_softmax(-1)
            return float(-(log_probs.exp() * log_probs).sum(-1).mean())

        low, high = 0.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy(middle) > nats else (low, middle)
        head = head_at(high)
        teacher_hidden[:, : shape.student_size] = hidden
        teacher_head[:, : shape.student_size] = head
        return replace(
            problem,
            student_hidden=hidden.to(dtype).requires_grad_(),
            student_lm_head=head.to(dtype).requires_grad_(),
            teacher_hidden=teacher_hidden.to(dtype),
            teacher_lm_head=teacher_head.to(dtype),
        )

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_lm_head

    @property
    def both(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.student, self.teacher_hidden, self.teacher_lm_head

    @property
    def token_weights(self) -> Tensor:
        """`[N]` of 1/N: the loss's denominator where it costs nothing."""
        return torch.full_like(self.advantages, 1 / len(self.advantages))

    @cached_property
    def allowed_columns(self) -> Tensor:
        """Boolean `[V]`; what is sampled is among them."""
        return allowed_columns(len(self.student_lm_head), self.student_lm_head.device)

    def wide(self) -> "Problem":
        """The same values in fp64, with gradients of their own."""
        hidden, head, *teacher = (side.detach().double() for side in self.both)
        return replace(
            self,
            student_hidden=hidden.requires_grad_(),
            student_lm_head=head.requires_grad_(),
            teacher_hidden=teacher[0],
            teacher_lm_head=teacher[1],
        )

    def clear(self) -> None:
        """Forget the gradients."""
        self.student_hidden.grad = self.student_lm_head.grad = None


Loss = Callable[[Problem], Tensor]


@torch.no_grad()
def bare_products(problem: Problem) -> None:
    """The products that every exact loss needs, and nothing else: the student's logits and both of
    its gradients, and the teacher's logits if there is one."""
    hidden, head = problem.student
    logits = torch.mm(hidden, head.T)
    torch.mm(logits, head)
    torch.mm(logits.T, hidden)
    if problem.teacher_hidden.numel():
        torch.mm(problem.teacher_hidden, problem.teacher_lm_head.T)


def gradient_error(problem: Problem, exact: Problem) -> float:
    """The larger relative error of the two gradients against those of `exact`."""
    errors = []
    for tensor, right in zip(problem.student, exact.student, strict=True):
        assert tensor.grad is not None and right.grad is not None
        errors.append(float((tensor.grad.double() - right.grad).norm() / right.grad.norm()))
    return max(errors)

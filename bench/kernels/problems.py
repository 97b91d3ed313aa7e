"""What the kernel benchmarks are about: shapes of heads, tensors on them, and the products that no
exact loss can do without."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice

import torch
from torch import Tensor

from fused_kl.tiles import slices

ROWS = 256  # of logits at once, where constants are made
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
    def sequence_length(self) -> int:
        """Tokens of one completion: short answers, or long ones with thinking."""
        return math.gcd(self.num_rows, 32 if self.num_rows <= 1024 else 2048)

    def __str__(self) -> str:
        return f"{self.num_rows} x {self.vocab} from {self.student_size} and {self.teacher_size}"


def allowed_columns(vocab: int, device: str | torch.device) -> Tensor:
    """Boolean `[V]`, as the trainer's policy has it for Qwen3-VL: without the rows that pad the
    head (267 of 151,936) and without four vision tokens near the last real one."""
    allowed = torch.ones(vocab, dtype=torch.bool, device=device)
    real = vocab - max(1, vocab * 267 // 151_936)
    allowed[real:] = False
    allowed[real - 17 : real - 13] = False
    return allowed


@dataclass(frozen=True)
class Tokens:
    """What the losses of sampled tokens need beside a model, `[N]` each; all are constants."""

    ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor  # one value for each completion
    sequence_length: int


@dataclass(eq=False)
class Problem:
    """Hidden states and heads whose logits have standard deviation `logit_std`; with `gap`, the
    teacher's logits are the student's plus noise of that size; with `tokens`, sampled tokens in the
    teacher's place."""

    student_hidden: Tensor
    student_lm_head: Tensor
    teacher_hidden: Tensor
    teacher_lm_head: Tensor
    sampled: Tokens | None = None

    @staticmethod
    @torch.no_grad()  # parts of the student are copied into the teacher
    def of(
        shape: Shape,
        *,
        dtype: torch.dtype,
        device: str,
        logit_std: float = 3.0,
        gap: float | None = None,
        tokens: bool = False,
    ) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        hidden = randn(shape.num_rows, shape.student_size)
        head = randn(shape.vocab, shape.student_size) * (logit_std / shape.student_size**0.5)
        student = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        if tokens:
            sampled = _sample(*student, shape.sequence_length, generator)
            none = student[0].new_empty(0)
            return Problem(*student, none, none, sampled)
        teacher_hidden = randn(shape.num_rows, shape.teacher_size)
        teacher_head = randn(shape.vocab, shape.teacher_size)
        if gap is None:
            teacher_head *= logit_std / shape.teacher_size**0.5
        else:
            extra = shape.teacher_size - shape.student_size
            teacher_hidden[:, : shape.student_size] = hidden
            teacher_head *= gap / extra**0.5
            teacher_head[:, : shape.student_size] = head
        return Problem(*student, teacher_hidden.to(dtype), teacher_head.to(dtype))

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student_hidden,
            self.student_lm_head,
            self.teacher_hidden,
            self.teacher_lm_head,
        )

    @property
    def tokens(self) -> Tokens:
        """The sampled tokens of a problem that has them."""
        assert self.sampled is not None
        return self.sampled

    def wide(self) -> "Problem":
        """The same values in fp64, with gradients of their own."""
        hidden, head, *teacher = (side.detach().double() for side in self.sides)
        sides = hidden.requires_grad_(), head.requires_grad_(), *teacher
        return Problem(*sides, sampled=self.sampled)

    @cached_property
    def allowed_columns(self) -> Tensor:
        """Boolean `[V]` of the function of that name; what is sampled is among them."""
        return allowed_columns(len(self.student_lm_head), self.student_lm_head.device)

    def clear(self) -> None:
        """Forget the gradients."""
        self.student_hidden.grad = self.student_lm_head.grad = None


@torch.no_grad()
def _sample(hidden: Tensor, head: Tensor, length: int, generator: torch.Generator) -> Tokens:
    """Tokens drawn from the student's allowed columns, as a policy that has moved by `MOVED`
    since."""
    allowed = allowed_columns(len(head), head.device)
    drawn = []
    for rows in slices(len(hidden), ROWS):
        log_probs = (hidden[rows] @ head.T).float().log_softmax(-1)
        ids = torch.multinomial(log_probs.exp() * allowed, 1, generator=generator)
        drawn.append((ids[:, 0], log_probs.gather(-1, ids)[:, 0]))
    ids, logprobs = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    def in_turn(values: tuple[float, ...], count: int) -> Tensor:
        return torch.tensor(list(islice(cycle(values), count)), device=ids.device)

    old_logprobs = logprobs - in_turn(MOVED, len(ids))
    advantages = in_turn(ADVANTAGES, len(ids) // length).repeat_interleave(length)
    return Tokens(ids, old_logprobs, advantages, length)


Loss = Callable[[Problem], Tensor]


@torch.no_grad()
def student_gemms(problem: Problem) -> None:
    """The three products of the student's head: logits and both gradients."""
    hidden, head, *_ = problem.sides
    logits = torch.mm(hidden, head.T)
    torch.mm(logits, head)
    torch.mm(logits.T, hidden)


@torch.no_grad()
def bare_gemms(problem: Problem) -> None:
    """The four products that every exact divergence needs, and nothing else."""
    student_gemms(problem)
    torch.mm(problem.teacher_hidden, problem.teacher_lm_head.T)


def relative_errors(problem: Problem, exact: Problem) -> dict[str, float]:
    """Of both gradients, against those of `exact`."""
    errors = {}
    for name in ("student_hidden", "student_lm_head"):
        found, right = (getattr(p, name).grad for p in (problem, exact))
        errors[name] = float((found.double() - right).norm() / right.norm())
    return errors

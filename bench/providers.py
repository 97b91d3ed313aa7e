"""One loss, many implementations: the mean reverse KL of two heads, and its gradients.

Each provider takes the same tensors and leaves the gradients in `student_hidden.grad` and
`student_lm_head.grad`. Those whose library is missing are left out, and said so.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fused_kl import linear_reverse_kl, reference, torch_kernels, walk


@dataclass(frozen=True)
class Shape:
    """N tokens, and the heads of a pair of models."""

    name: str
    num_rows: int
    vocab: int
    student_size: int
    teacher_size: int


@dataclass(eq=False)
class Problem:
    """Hidden states and heads whose logits have standard deviation `logit_std`; with `gap`, the
    teacher's logits are the student's plus noise of that size."""

    student_hidden: Tensor
    student_lm_head: Tensor
    teacher_hidden: Tensor
    teacher_lm_head: Tensor

    @staticmethod
    def of(
        shape: Shape,
        *,
        dtype: torch.dtype,
        device: str,
        logit_std: float = 3.0,
        gap: float | None = None,
    ) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        hidden = randn(shape.num_rows, shape.student_size)
        head = randn(shape.vocab, shape.student_size) * (logit_std / shape.student_size**0.5)
        teacher_hidden = randn(shape.num_rows, shape.teacher_size)
        teacher_head = randn(shape.vocab, shape.teacher_size)
        if gap is None:
            teacher_head *= logit_std / shape.teacher_size**0.5
        else:
            extra = shape.teacher_size - shape.student_size
            teacher_hidden[:, : shape.student_size] = hidden
            teacher_head *= gap / extra**0.5
            teacher_head[:, : shape.student_size] = head
        return Problem(
            hidden.to(dtype).requires_grad_(),
            head.to(dtype).requires_grad_(),
            teacher_hidden.to(dtype),
            teacher_head.to(dtype),
        )

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student_hidden,
            self.student_lm_head,
            self.teacher_hidden,
            self.teacher_lm_head,
        )

    def wide(self) -> "Problem":
        """The same values in fp64, with gradients of their own."""
        hidden, head, *teacher = (side.detach().double() for side in self.sides)
        return Problem(hidden.requires_grad_(), head.requires_grad_(), *teacher)

    def clear(self) -> None:
        """Forget the gradients."""
        self.student_hidden.grad = self.student_lm_head.grad = None


Loss = Callable[[Problem], Tensor]


def bare_gemms(problem: Problem) -> None:
    """The four products that every exact loss needs, and nothing else."""
    with torch.no_grad():
        hidden, head, teacher_hidden, teacher_head = problem.sides
        logits = torch.mm(hidden, head.T)
        torch.mm(teacher_hidden, teacher_head.T)
        torch.mm(logits, head)
        torch.mm(logits.T, hidden)


def fast(problem: Problem, mode: Literal["fast", "lowmem"] = "fast") -> Tensor:
    """fused_kl, with the denominator in the weights, where it costs nothing."""
    num_rows = len(problem.student_hidden)
    weights = problem.teacher_hidden.new_full((num_rows,), 1 / num_rows, dtype=torch.float32)
    return linear_reverse_kl(*problem.sides, token_weights=weights, mode=mode).loss


def lowmem(problem: Problem) -> Tensor:
    """fused_kl, mode lowmem."""
    return fast(problem, "lowmem")


def fast_torch(problem: Problem) -> Tensor:
    """fused_kl, mode fast, with row programs in plain torch on a GPU too."""
    kept = walk.row_programs
    walk.row_programs = lambda like: torch_kernels
    try:
        return fast(problem)
    finally:
        walk.row_programs = kept


def dense(problem: Problem) -> Tensor:
    """PyTorch as one writes it: logits, log-softmax, KL."""
    hidden, head, teacher_hidden, teacher_head = problem.sides
    student = torch.log_softmax((hidden @ head.T).float(), -1)
    teacher = torch.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return torch.nn.functional.kl_div(teacher, student, reduction="batchmean", log_target=True)


def truth(problem: Problem) -> Tensor:
    """The definition, in fp64."""
    return reference.linear_reverse_kl(*problem.sides)[0] / len(problem.student_hidden)


def providers(device: str) -> dict[str, Loss]:
    """All that this machine can run, by name."""
    found: dict[str, Loss] = {"fast": fast, "lowmem": lowmem, "dense": dense}
    if device == "cuda":
        found["fast_torch"] = fast_torch
    found["compiled"] = torch.compile(dense)
    trl = _optional("trl.kernels.chunked_divergence")
    if trl is not None:
        function = trl.ChunkedDivergenceFunction

        def trl_chunked(problem: Problem) -> Tensor:
            hidden, head, teacher_hidden, teacher_head = problem.sides
            tokens, _ = function.apply(
                hidden, head, None, teacher_hidden, teacher_head, None, 1.0, 1.0
            )
            return tokens.mean()

        found["trl"] = trl_chunked
    liger = _optional("liger_kernel.chunked_loss")
    if liger is not None:
        chunked = liger.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True
        )

        def liger_chunked(problem: Problem) -> Tensor:
            labels = torch.zeros(
                len(problem.student_hidden), dtype=torch.int64, device=problem.student_hidden.device
            )
            return chunked(*problem.sides, labels)

        found["liger_chunked"] = liger_chunked
    fused = _optional("liger_kernel.transformers.fused_linear_jsd")
    if fused is not None and device == "cuda":
        module = fused.LigerFusedLinearJSD(jsd_beta=1.0)
        found["liger_fused"] = lambda problem: module(*problem.sides)
    return found


def _optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"{module} left out: {error}")
        return None


def relative_errors(problem: Problem, exact: Problem) -> dict[str, float]:
    """Of both gradients, against those of `exact`."""
    errors = {}
    for name in ("student_hidden", "student_lm_head"):
        found, right = (getattr(p, name).grad for p in (problem, exact))
        errors[name] = float((found.double() - right).norm() / right.norm())
    return errors

"""The Triton row programs alone, on random logits, with their definitions in fp64."""

from typing import Any

import torch

from bench.kernels.measure import DEVICE, DTYPE
from fused_kl import reference


class Rows:
    """Row programs on random logits: divergence and token loss of each row, with gradients."""

    def __init__(self, num_rows: int, columns: int) -> None:
        from fused_kl import triton_rows  # needs Triton

        generator = torch.Generator(DEVICE).manual_seed(0)

        def randn() -> torch.Tensor:
            return 3 * torch.randn(num_rows, columns, generator=generator, device=DEVICE)

        self.student, self.teacher = randn(), randn()
        self.ids = torch.randint(columns, (num_rows,), generator=generator, device=DEVICE)
        self.grad = torch.empty(num_rows, columns, dtype=DTYPE, device=DEVICE)
        self.scale = torch.ones(num_rows, device=DEVICE)
        self.programs: Any = triton_rows

    def divergence(self, beta: float = 1.0) -> torch.Tensor:
        """`[N]`; its gradient goes into `grad`."""
        rules: dict[str, Any] = {"beta": beta, "banned": None, "grad": self.grad}
        kl, *_ = self.programs.divergence_rows_(
            self.student, self.teacher, **rules, scale=self.scale
        )
        return kl

    def logprobs(self) -> torch.Tensor:
        """`[N]`; its gradient goes into `grad`."""
        rules: dict[str, Any] = {"banned": None, "grad": self.grad}
        found = self.programs.token_rows_(
            self.student, self.ids, **rules, scale=lambda rows, _: self.scale[rows]
        )
        return found.logprobs

    def error(self) -> float:
        """The largest relative error of values and gradients against the definitions in fp64."""
        worst = 0.0
        for beta in (1.0, 0.3, None):
            student = self.student.double().requires_grad_()
            log_p = student.log_softmax(-1)
            if beta is None:
                found, right = self.logprobs(), log_p.gather(-1, self.ids[:, None])[:, 0]
            else:
                right = reference.divergence(log_p, self.teacher.double().log_softmax(-1), beta)
                found = self.divergence(beta)
            (exact,) = torch.autograd.grad(right.sum(), student)
            for a, b in ((found, right.detach()), (self.grad, exact)):
                worst = max(worst, float((a.double() - b).norm() / b.norm()))
        return worst

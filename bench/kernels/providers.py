"""A loss and many implementations of it: ours, plain PyTorch and its compiler, TRL, Liger. Here the
mean reverse KL of two heads; `bench.kernels.token_losses` has those of sampled tokens.

Each provider takes the same tensors and leaves the gradients in `student_hidden.grad` and
`student_lm_head.grad`. Those that this machine cannot run are named with the reason.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from bench.kernels.problems import Loss, Problem, bare_gemms
from fused_kl import head, linear_reverse_kl, reference, torch_rows

MASKED = "fast_allowed_columns"
PIP = {"trl": "trl==1.16.0", "liger_kernel": "liger-kernel==0.8.5"}


@dataclass(frozen=True)
class Provider:
    """A loss, whether it is compiled when first called, what it and its backward run inside, and
    its own definition in fp64 where it computes another loss than the task's."""

    loss: Loss
    compiled: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    truth: Loss | None = None

    def step(self, problem: Problem) -> Tensor:
        """Forward and backward; the loss, detached."""
        with self.around():
            value = self.loss(problem)
            value.backward()
        return value.detach()


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation, made from a module that need not be there."""

    module: str
    make: Callable[[Any], Loss]
    needs_gpu: bool = False
    compiled: bool = False

    def provider(self, device: str) -> Provider | str:
        """It, or why not."""
        if self.needs_gpu and device != "cuda":
            return "needs a CUDA device"
        library = self.module.partition(".")[0]
        if find_spec(library) is None:
            return f"not installed (pip install {PIP[library]})"
        try:
            return Provider(self.make(importlib.import_module(self.module)), self.compiled)
        except ImportError as error:
            return f"cannot be imported: {error} (pip install {PIP[library]})"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A loss and all who compute it."""

    name: str
    truth: Loss  # in fp64
    gemms: Callable[[Problem], None]
    ours: dict[str, Loss]
    masked: tuple[Loss, Loss]  # ours with `allowed_columns`, as the trainer calls it, and its truth
    dense: Loss
    peers: dict[str, Peer] = field(default_factory=dict)
    needs_tokens: bool = False

    def find(self, device: str) -> tuple[dict[str, Provider], dict[str, str]]:
        """All that this machine can run, by name, and why it cannot run the others."""
        found = {name: Provider(loss) for name, loss in self.ours.items()}
        masked, masked_truth = self.masked
        found[MASKED] = Provider(masked, truth=masked_truth)
        found["dense"] = Provider(self.dense)
        if device == "cuda":
            found["torch"] = Provider(self.ours["fast"], around=torch_row_programs)
        # On a GPU each shape for itself: kernels for any shape are slower. On a CPU they are as
        # fast and take a third of the memory.
        each_alone = False if device == "cuda" else None
        found["compiled"] = Provider(torch.compile(self.dense, dynamic=each_alone), True)
        skipped = {}
        for name, peer in self.peers.items():
            made = peer.provider(device)
            if isinstance(made, str):
                skipped[name] = made
            else:
                found[name] = made
        return found, skipped


@contextmanager
def torch_row_programs() -> Iterator[None]:
    """Row programs in plain torch on a GPU too."""
    with patch.object(head, "row_programs", lambda like: torch_rows):
        yield


def fast(problem: Problem, mode: Literal["fast", "lowmem"] = "fast") -> Tensor:
    """fused_kl, with the denominator in the weights, where it costs nothing."""
    num_rows = len(problem.student_hidden)
    weights = problem.teacher_hidden.new_full((num_rows,), 1 / num_rows, dtype=torch.float32)
    return linear_reverse_kl(*problem.sides, token_weights=weights, mode=mode).loss


def fast_allowed_columns(problem: Problem) -> Tensor:
    """fused_kl as the trainer calls it: over the allowed columns, with sampled tokens' values."""
    num_rows = len(problem.student_hidden)
    weights = problem.teacher_hidden.new_full((num_rows,), 1 / num_rows, dtype=torch.float32)
    ids = torch.arange(num_rows, device=weights.device) % (len(problem.student_lm_head) // 2)
    return linear_reverse_kl(
        *problem.sides,
        token_ids=ids,
        token_weights=weights,
        allowed_columns=problem.allowed_columns,
    ).loss


def lowmem(problem: Problem) -> Tensor:
    """fused_kl, mode lowmem."""
    return fast(problem, "lowmem")


def dense(problem: Problem) -> Tensor:
    """PyTorch as one writes it: logits, log-softmax, KL."""
    hidden, head, teacher_hidden, teacher_head = problem.sides
    student = torch.log_softmax((hidden @ head.T).float(), -1)
    teacher = torch.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    return torch.nn.functional.kl_div(teacher, student, reduction="batchmean", log_target=True)


def truth(problem: Problem) -> Tensor:
    """The definition, in fp64."""
    return reference.linear_reverse_kl(*problem.sides)[0] / len(problem.student_hidden)


def truth_allowed_columns(problem: Problem) -> Tensor:
    """The definition over the allowed columns, in fp64."""
    total, *_ = reference.linear_reverse_kl(*problem.sides, allowed_columns=problem.allowed_columns)
    return total / len(problem.student_hidden)


def _trl_divergence(trl: Any) -> Loss:
    function = trl.ChunkedDivergenceFunction

    def loss(problem: Problem) -> Tensor:
        hidden, head, teacher_hidden, teacher_head = problem.sides
        tokens, _ = function.apply(hidden, head, None, teacher_hidden, teacher_head, None, 1.0, 1.0)
        return tokens.mean()

    return loss


def _liger_chunked(liger: Any) -> Loss:
    """Its logits have the inputs' dtype: bf16 inputs are rounded before the softmax."""
    chunked = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=True
    )

    def loss(problem: Problem) -> Tensor:
        hidden = problem.student_hidden
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return chunked(*problem.sides, labels)

    return loss


def _liger_fused(liger: Any) -> Loss:
    """From 0.8.5 on its products give fp32 logits on a GPU, where it rounded them to bf16 before;
    by default it still sums the head's gradient in the head's dtype."""
    module = liger.LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda problem: module(*problem.sides)


REVERSE_KL = Task(
    name="reverse_kl",
    truth=truth,
    gemms=bare_gemms,
    ours={"fast": fast, "lowmem": lowmem},
    masked=(fast_allowed_columns, truth_allowed_columns),
    dense=dense,
    peers={
        "trl": Peer("trl.kernels.chunked_divergence", _trl_divergence),
        "liger_chunked": Peer("liger_kernel.chunked_loss", _liger_chunked, compiled=True),
        "liger_fused": Peer(
            "liger_kernel.transformers.fused_linear_jsd",
            _liger_fused,
            needs_gpu=True,
            compiled=True,
        ),
    },
)

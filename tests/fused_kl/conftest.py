from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: a read before a write cannot pass unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Student and teacher whose logits have standard deviation `logit_std` and differ by `gap`."""

    num_rows: int = 13
    vocab: int = 1187
    teacher_vocab: int | None = None
    student_size: int = 16
    teacher_size: int = 24
    logit_std: float = 3.0
    gap: float | None = None
    dtype: torch.dtype = torch.float64
    bias: bool = False
    seed: int = 0

    def build(self, **changes) -> SimpleNamespace:
        case = replace(self, **changes)
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        teacher_vocab = case.teacher_vocab or case.vocab
        student_hidden = randn(case.num_rows, case.student_size)
        student_lm_head = randn(case.vocab, case.student_size)
        student_lm_head *= case.logit_std / case.student_size**0.5
        teacher_hidden = randn(case.num_rows, case.teacher_size)
        teacher_lm_head = randn(teacher_vocab, case.teacher_size)
        teacher_lm_head *= case.logit_std / case.teacher_size**0.5
        if case.gap is not None:
            # The teacher sees the student's features, and its other features make the difference.
            extra = case.teacher_size - case.student_size
            shared = min(case.vocab, teacher_vocab)
            teacher_hidden[:, : case.student_size] = student_hidden
            teacher_lm_head[:shared, : case.student_size] = student_lm_head[:shared]
            teacher_lm_head[:, case.student_size :] = randn(teacher_vocab, extra)
            teacher_lm_head[:, case.student_size :] *= case.gap / extra**0.5
        return SimpleNamespace(
            student_hidden=student_hidden.to(case.dtype).requires_grad_(),
            student_lm_head=student_lm_head.to(case.dtype).requires_grad_(),
            teacher_hidden=teacher_hidden.to(case.dtype),
            teacher_lm_head=teacher_lm_head.to(case.dtype),
            student_bias=randn(case.vocab).to(case.dtype).requires_grad_() if case.bias else None,
            teacher_bias=randn(teacher_vocab).to(case.dtype) if case.bias else None,
            token_ids=torch.randint(case.vocab, (case.num_rows,), generator=generator),
            token_weights=torch.rand(case.num_rows, generator=generator) + 0.5,
            advantages=torch.randn(case.num_rows, generator=generator),
            allowed_columns=torch.rand(case.vocab, generator=generator) > 0.3,
        )


@pytest.fixture
def case() -> Case:
    return Case()


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        known = {x.untyped_storage().data_ptr() for x in inputs}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # A view or an in-place result is not an allocation.
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()

"""The Triton row programs: under the interpreter what the torch ones compute, and compiled."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from fused_kl import linear, logprobs, reference, torch_kernels
from fused_kl.torch_kernels import Banned

triton_kernels = pytest.importorskip("fused_kl.triton_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, the interpreter: tests/conftest.py
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
F32, F64 = torch.float32, torch.float64


def logits(num_rows: int, num_columns: int, std: float, gap: float | None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def randn() -> torch.Tensor:
        return torch.randn(num_rows, num_columns, generator=generator, dtype=F64)

    student = std * randn()
    teacher = std * randn() if gap is None else student + gap * randn()
    return student.to(F32), teacher.to(F32)


def banned_of(num_columns: int, share: float, seed: int = 1) -> Banned | None:
    if not share:
        return None
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(num_columns, generator=generator) > share
    allowed[: num_columns // 3] = False  # whole blocks, the first among them
    return Banned.outside(allowed, F32)


def place(banned: Banned | None) -> Banned | None:
    return None if banned is None else Banned(*(part.to(DEVICE) for part in banned))


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("gap", [None, 1e-3])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(("num_columns", "std"), [(7, 1.0), (4096, 10.0), (9001, 3.0)])
def test_divergence_rows(beta, gap, share, num_columns, std):
    student, teacher = logits(3, num_columns, std, gap)
    banned = banned_of(num_columns, share)
    ids = torch.randint(num_columns, (3,), generator=torch.Generator().manual_seed(2))
    wide = None if banned is None else Banned(banned.columns, banned.value.double())
    expected_grad = student.double()
    expected = torch_kernels.divergence_rows_(
        expected_grad, teacher.double(), ids, beta=beta, banned=wide, with_grad=True
    )
    grad = student.to(DEVICE, copy=True)
    found = triton_kernels.divergence_rows_(
        grad, teacher.to(DEVICE), ids.to(DEVICE), beta=beta, banned=place(banned), with_grad=True
    )
    for value, truth in zip(found, expected, strict=True):
        assert_close(value.cpu().double(), truth, rtol=1e-4, atol=3e-6)
    # A JSD between strangers has gradients of 1e-8, which no fp32 program can tell from 0.
    error = (grad.cpu().double() - expected_grad).norm()
    assert error < (2e-3 if gap else 1e-5) * expected_grad.norm() + 1e-7
    kept = student.to(DEVICE, copy=True)
    without = triton_kernels.divergence_rows_(
        kept, teacher.to(DEVICE), beta=beta, banned=place(banned), with_grad=False
    )
    assert torch.equal(kept.cpu(), student)
    assert len(without) == 3
    for value, again in zip(without, found[:3], strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(("num_columns", "std"), [(7, 1.0), (4096, 10.0), (9001, 3.0)])
def test_token_rows(share, num_columns, std):
    values, _ = logits(4, num_columns, std, None)
    values[0, num_columns // 2] = 40 + values.max()  # near-certain
    banned = banned_of(num_columns, share)
    ids = torch.randint(num_columns, (4,), generator=torch.Generator().manual_seed(2))
    ids[0] = num_columns // 2
    wide = None if banned is None else Banned(banned.columns, banned.value.double())
    expected_grad = values.double()
    expected = torch_kernels.token_rows_(expected_grad, ids, banned=wide, with_grad=True)
    grad = values.to(DEVICE, copy=True)
    found = triton_kernels.token_rows_(grad, ids.to(DEVICE), banned=place(banned), with_grad=True)
    for value, truth in zip(found, expected, strict=True):
        assert_close(value.cpu().double(), truth, rtol=1e-4, atol=3e-6)
    for row, truth in zip(grad.cpu().double(), expected_grad, strict=True):
        assert (row - truth).norm() < 1e-4 * truth.norm()


def test_no_allowed_column_is_never_silent():
    student, teacher = logits(2, 50, 1.0, None)
    banned = place(Banned.outside(torch.zeros(50, dtype=torch.bool), F32))
    kl, *_ = triton_kernels.divergence_rows_(
        student.to(DEVICE), teacher.to(DEVICE), beta=1.0, banned=banned, with_grad=True
    )
    assert kl.isnan().all()


def test_no_rows():
    student, teacher = logits(0, 50, 1.0, None)
    found = triton_kernels.divergence_rows_(
        student.to(DEVICE), teacher.to(DEVICE), beta=1.0, banned=None, with_grad=True
    )
    assert [len(values) for values in found] == [0, 0, 0]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fused_kl import triton_kernels
from fused_kl.tiles import row_program_shape

block, warps = row_program_shape(151_936)
common = {"HAS_BANNED": True, "WITH_GRAD": True, "BLOCK": block}
pointers = {n: "*fp32" for n in ("student", "teacher", "logits", "floor", "kl_out", "entropy_out",
    "student_entropy_out", "teacher_entropy_out", "logprob_out")}
types = pointers | {"allowed": "*u8", "token_ids": "*i64", "num_columns": "i32", "beta": "fp32",
    "student_stride": "i32", "teacher_stride": "i32", "stride": "i32"}
for kernel, more in (
    (triton_kernels._divergence_row, {"HAS_IDS": True, "KIND": 0}),
    (triton_kernels._divergence_row, {"HAS_IDS": True, "KIND": 1}),
    (triton_kernels._divergence_row, {"HAS_IDS": True, "KIND": 2}),
    (triton_kernels._token_row, {}),
):
    constants = common | more
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    made = compile(ASTSource(kernel, signature, places), target, {"num_warps": warps})
    print(kernel.__name__, constants.get("KIND"), made.metadata.shared)
    assert made.asm["cubin"] and made.metadata.shared <= 1024 and "ld.local" not in made.asm["ptx"]
"""


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_they_compile_without_a_gpu(architecture):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
)
@pytest.mark.parametrize("beta", [1.0, 0.0, 0.4])
def test_the_losses_through_them(device, beta, case, monkeypatch):
    # On a GPU they are the default; on a CPU they are put in place of torch's.
    if device == "cpu" and DEVICE == "cuda":
        pytest.skip("the interpreter is not on")
    if device == "cpu":
        for module in (linear, logprobs):
            monkeypatch.setattr(module, "row_programs", lambda _: triton_kernels)
    truth = case.build(teacher_vocab=1201, bias=True)
    names = ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head")
    rules = {
        "token_weights": truth.token_weights,
        "allowed_columns": truth.allowed_columns,
        "temperature": 0.7,
    }
    biases = {"student_bias": truth.student_bias, "teacher_bias": truth.teacher_bias}
    leaves = [truth.student_hidden, truth.student_lm_head, truth.student_bias]
    expected, *details = reference.linear_reverse_kl(
        *(getattr(truth, name) for name in names), beta=beta, **rules, **biases
    )
    gradients = torch.autograd.grad(expected, leaves)

    def single(tensor: torch.Tensor) -> torch.Tensor:
        dtype = F32 if tensor.is_floating_point() else tensor.dtype
        made = tensor.detach().to(device, dtype)
        return made.requires_grad_() if tensor.requires_grad else made

    sides = [single(getattr(truth, name)) for name in names]
    options = {
        name: single(value) for name, value in (rules | biases).items() if name != "temperature"
    }
    out = linear.linear_reverse_kl(*sides, beta=beta, temperature=0.7, chunk_size=5, **options)
    found = torch.autograd.grad(out.loss, [sides[0], sides[1], options["student_bias"]])
    assert_close(out.loss.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    for value, true in zip((out.token_kl, out.student_entropy), details, strict=False):
        assert_close(value.double().cpu(), true, rtol=1e-4, atol=1e-5)
    for value, true in zip(found, gradients, strict=True):
        assert (value.double().cpu() - true).norm() < 1e-5 * true.norm()
    chosen = logprobs.linear_logprobs(
        *sides[:2], truth.token_ids.to(device), allowed_columns=options["allowed_columns"]
    )
    same = reference.linear_logprobs(
        truth.student_hidden,
        truth.student_lm_head,
        truth.token_ids,
        allowed_columns=truth.allowed_columns,
    )
    assert_close(chosen.logprobs.detach().double().cpu(), same[0].detach(), rtol=1e-5, atol=1e-5)

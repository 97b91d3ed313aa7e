"""The Triton row programs: under the interpreter what the torch ones compute, and compiled."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from fused_kl import (
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    reference,
    tiles,
    torch_rows,
)
from fused_kl.head import row_programs
from fused_kl.rows import Banned, RowPrograms, TokenNorms, merge_tokens

triton_rows = pytest.importorskip("fused_kl.triton_rows")
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


SHAPES = pytest.mark.parametrize(
    ("num_columns", "std", "splits"), [(7, 1.0, 1), (4096, 10.0, 1), (9001, 3.0, 1), (9001, 3.0, 3)]
)


@pytest.fixture
def split_rows(monkeypatch, splits):
    """How many programs share a row of 3 or 4."""
    monkeypatch.setattr("fused_kl.tiles.GPU_PROGRAMS", {"gpu": 4 * splits})


def test_both_modules_fulfil_the_contract():
    functions = inspect.getmembers(RowPrograms, inspect.isfunction)
    contract = [(name, function) for name, function in functions if not name.startswith("_")]
    assert len(contract) == 10
    for name, function in contract:
        _, *expected = inspect.signature(function).parameters.values()  # without self
        for module in (torch_rows, triton_rows):
            assert list(inspect.signature(getattr(module, name)).parameters.values()) == expected


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
@pytest.mark.parametrize("gap", [None, 1e-3])
@pytest.mark.parametrize("share", [0.0, 0.5])
@SHAPES
def test_divergence_rows(beta, gap, share, num_columns, std, splits, split_rows):
    student, teacher = logits(3, num_columns, std, gap)
    banned = banned_of(num_columns, share)
    ids = torch.randint(num_columns, (3,), generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([0.25, 1.0, -2.0])
    wide = None if banned is None else Banned(banned.columns, banned.value.double())
    expected_grad = student.double()
    expected = torch_rows.divergence_rows_(
        expected_grad,
        teacher.double(),
        ids,
        beta=beta,
        banned=wide,
        scale=scale.double(),
        grad=expected_grad,
    )
    grad = student.to(DEVICE, copy=True)
    actual = triton_rows.divergence_rows_(
        grad,
        teacher.to(DEVICE),
        ids.to(DEVICE),
        beta=beta,
        banned=place(banned),
        scale=scale.to(DEVICE),
        grad=grad,
    )
    for value, truth in zip(actual, expected, strict=True):
        assert_close(value.cpu().double(), truth, rtol=1e-4, atol=3e-6)
    # A JSD between strangers has gradients of 1e-8, which no fp32 program can tell from 0.
    error = (grad.cpu().double() - expected_grad).norm()
    assert error < (2e-3 if gap else 1e-5) * expected_grad.norm() + 1e-7
    kept = student.to(DEVICE, copy=True)
    without = triton_rows.divergence_rows_(
        kept, teacher.to(DEVICE), beta=beta, banned=place(banned)
    )
    assert torch.equal(kept.cpu(), student)
    assert len(without) == 3
    for value, again in zip(without, actual[:3], strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("with_entropy", [False, True])
@SHAPES
def test_token_rows(share, with_entropy, num_columns, std, splits, split_rows):
    values, _ = logits(4, num_columns, std, None)
    values[0, num_columns // 2] = 40 + values.max()  # near-certain
    banned = banned_of(num_columns, share)
    ids = torch.randint(num_columns, (4,), generator=torch.Generator().manual_seed(2))
    ids[0] = num_columns // 2
    wide = None if banned is None else Banned(banned.columns, banned.value.double())

    def scale(rows, logprobs):
        return logprobs.masked_fill(logprobs.isneginf(), 0) + 2

    of_entropy = torch.tensor([-0.5, 0.0, -3.0, 0.25]) if with_entropy else None
    expected_grad = values.double()
    expected = torch_rows.token_rows_(
        expected_grad,
        ids,
        banned=wide,
        scale=scale,
        entropy_scale=None if of_entropy is None else of_entropy.double(),
        grad=expected_grad,
    )
    grad = values.to(DEVICE, copy=True)
    actual = triton_rows.token_rows_(
        grad,
        ids.to(DEVICE),
        banned=place(banned),
        scale=scale,
        entropy_scale=None if of_entropy is None else of_entropy.to(DEVICE),
        grad=grad,
    )
    for value, truth in zip(actual, expected, strict=True):
        assert_close(value.cpu().double(), truth, rtol=1e-4, atol=3e-6)
    for row, truth in zip(grad.cpu().double(), expected_grad, strict=True):
        assert (row - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("with_entropy", [False, True])
@SHAPES
def test_tokens_of_a_row_in_tiles(with_entropy, num_columns, std, splits, split_rows):
    # What the ranks of a group do: states of parts, merged, and then gradients part by part.
    values, _ = logits(3, num_columns, std, None)
    banned = banned_of(num_columns, 0.5)
    ids = torch.tensor([0, num_columns // 2, num_columns - 1])
    scale, entropy_scale = torch.tensor([0.25, 1.0, -2.0]), torch.tensor([-0.5, 0.0, 3.0])
    middle = num_columns // 2
    tiles = (slice(0, middle), slice(middle, num_columns))
    results = []
    for programs, dtype, device in ((torch_rows, F64, "cpu"), (triton_rows, F32, DEVICE)):
        parts = []
        for columns in tiles:
            ban = banned.part(columns)
            ban = Banned(ban.columns.to(device), ban.value.to(device, dtype))
            place = ids - columns.start
            place = place.masked_fill((place < 0) | (ids >= columns.stop), -1).to(device)
            parts.append((values[:, columns].to(device, dtype, copy=True), place, ban))
        states = [
            merge_tokens(programs.token_statistics(z, place, banned=ban)) for z, place, ban in parts
        ]
        norms = TokenNorms.of(merge_tokens(torch.stack(states)))
        grads = [torch.empty_like(z) for z, _, _ in parts]
        of_entropy = entropy_scale.to(device, dtype) if with_entropy else None
        for (z, place, ban), grad in zip(parts, grads, strict=True):
            programs.token_gradient_(
                z,
                place,
                norms,
                banned=ban,
                scale=scale.to(device, dtype),
                entropy_scale=of_entropy,
                grad=grad,
            )
        results.append([*norms, torch.cat(grads, 1)])
    wide = values.double()
    whole = torch_rows.token_rows_(
        wide,
        ids,
        banned=Banned(banned.columns, banned.value.double()),
        scale=lambda rows, _: scale[rows].double(),
        entropy_scale=entropy_scale.double() if with_entropy else None,
        grad=wide,
    )
    assert_close(results[0][3], whole.entropy, rtol=1e-10, atol=1e-12)
    assert_close(results[0][4], wide, rtol=1e-9, atol=1e-12)
    for truth, actual in zip(*results, strict=True):
        assert_close(actual.cpu().double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.3])
@SHAPES
def test_a_row_in_tiles(beta, num_columns, std, splits, split_rows):
    # What lowmem does: states of tiles, merged, and then values and gradients tile by tile.
    student, teacher = logits(3, num_columns, std, None)
    student[1, : num_columns // 2] -= 50  # its maximum is in a later tile
    banned = banned_of(num_columns, 0.5)
    scale = torch.tensor([0.25, 1.0, -2.0])
    middle = num_columns // 2
    tiles = (slice(0, middle), slice(middle, num_columns))
    results = []
    for programs, dtype, device in ((torch_rows, F64, "cpu"), (triton_rows, F32, DEVICE)):
        part = [banned.part(columns) for columns in tiles]
        part = [Banned(x.columns.to(device), x.value.to(device, dtype)) for x in part]

        def pair(columns, dtype=dtype, device=device):
            return [x[:, columns].to(device, dtype, copy=True) for x in (student, teacher)]

        states = [
            programs.divergence_statistics(*pair(columns), banned=ban)
            for columns, ban in zip(tiles, part, strict=True)
        ]
        summary = programs.summarise(torch.cat(states))
        parts = sum(
            programs.jsd_parts(*pair(columns), summary.norms, beta=0.3, banned=ban)
            for columns, ban in zip(tiles, part, strict=True)
        )
        grads = []
        for columns, ban in zip(tiles, part, strict=True):
            s, t = pair(columns)
            programs.divergence_gradient_(
                s,
                t,
                summary.norms,
                beta=beta,
                student_part=parts[1],
                banned=ban,
                scale=scale.to(device, dtype),
                grad=s,
            )
            grads.append(s)
        results.append([*summary[1:], *parts, torch.cat(grads, -1)])
    for truth, actual in zip(*results, strict=True):
        assert (actual.cpu().double() - truth).norm() <= 1e-5 * truth.norm() + 1e-7


# One block, less than one, a ragged end, and more blocks than programs.
@pytest.mark.parametrize("numel", [1, 37, 64, 1000, 4096])
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [-0.5, torch.nan])
def test_scale(numel, dtype, factor, monkeypatch):
    monkeypatch.setattr(triton_rows, "SCALE_BLOCK", 64)
    monkeypatch.setattr(triton_rows, "num_multiprocessors", lambda: 2)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    beyond = torch.full((64,), 7.0, device=DEVICE, dtype=dtype)
    memory = torch.cat([values, beyond])
    triton_rows.scale_(memory[:numel], torch.tensor(factor, device=DEVICE))
    assert_close(memory[:numel], values * factor, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(memory[numel:], beyond)


def test_a_factor_of_one_writes_nothing():
    # Bits of a signalling NaN, which a product by 1 would make quiet.
    bits = torch.full((9000,), 0x7FA00000, dtype=torch.int32, device=DEVICE)
    for factor, kept in ((1.0, True), (2.0, False)):
        memory = bits.clone()
        triton_rows.scale_(memory.view(F32), torch.tensor(factor, device=DEVICE))
        assert torch.equal(memory, bits) is kept


@pytest.mark.parametrize(("numel", "programs"), [(1, 1), (8193, 2), (10**6, 12), (10**10, 12)])
def test_scale_starts_few_programs(numel, programs, monkeypatch):
    grids = []
    monkeypatch.setattr(triton_rows, "num_multiprocessors", lambda: 3)
    monkeypatch.setattr(triton_rows, "_start", lambda _, grid, *args, **flags: grids.append(grid))
    triton_rows.scale_(torch.empty(1).expand(numel), torch.ones(()))
    assert grids == [(programs,)]


def test_scale_of_nothing():
    triton_rows.scale_(torch.empty(0, 5, device=DEVICE), torch.ones((), device=DEVICE))


def test_no_allowed_column_is_never_silent():
    student, teacher = logits(2, 50, 1.0, None)
    banned = place(Banned.outside(torch.zeros(50, dtype=torch.bool), F32))
    kl, *_ = triton_rows.divergence_rows_(
        student.to(DEVICE), teacher.to(DEVICE), beta=1.0, banned=banned
    )
    assert kl.isnan().all()


def test_no_rows():
    student, teacher = logits(0, 50, 1.0, None)
    actual = triton_rows.divergence_rows_(
        student.to(DEVICE), teacher.to(DEVICE), beta=1.0, banned=None
    )
    assert [len(values) for values in actual] == [0, 0, 0]


COMPILE = """
import re, subprocess, sys, tempfile
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from fused_kl import triton_divergence, triton_shared, triton_tokens
from fused_kl.tiles import ROW_BLOCKS
from tests.fused_kl.triton_variants import REGISTERS, compiled, other_variants, row_variants

arch = sys.argv[1]
amd = arch.startswith("gfx")
target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
shapes = {shape for blocks in ROW_BLOCKS.values() for shape in blocks.items()}
variants = [*other_variants(), *(variant for shape in shapes for variant in row_variants(shape))]

functions = {
    name: function
    for module in (triton_divergence, triton_shared, triton_tokens)
    for name, function in vars(module).items()
    if isinstance(function, JITFunction)
}
# The others are parts of programs.
programs = {name for name, function in functions.items() if "tl.program_id" in function.src}
assert programs == {v.kernel.__name__ for v in variants}, "a program is not compiled here"

for variant in variants:
    kernel = compiled(variant, target)
    if amd:
        text = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\\.vgpr_{what}_?count: +(\\d+)", text)[1])
            for what in ("", "spill_"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spills = (
            int(re.search(rf"{what}:(\\d+)", text)[1]) for what in ("REG", "STACK")
        )
    # The row index leaves 32 bits before anything multiplies it.
    ttir = kernel.asm["ttir"]
    index, rest = re.search(r"(%\\S+) = tt.get_program_id x(.*)", ttir, re.S).groups()
    uses = re.findall(rf"^.*[ (]{index}[ ,)].*$", rest, re.M)
    assert registers <= REGISTERS and spills == 0, (variant, registers, spills)
    # Fp32 gradients under a ban exchange a block of logits between threads.
    assert kernel.metadata.shared <= 8192, variant
    assert uses and all("arith.extsi" in use and "i32 to i64" in use for use in uses), uses
"""


def test_sizes_are_those_of_the_gpu(monkeypatch):
    monkeypatch.setattr("fused_kl.tiles.gpu_name", lambda: "GPU X")
    rules = dict(bytes_per_logit=8, device_type="cuda", chunk_size=0)
    for mode, name in {"fast": "FAST_BYTES", "lowmem": "LOWMEM_BYTES"}.items():
        held = []
        for table in ({"gpu": 800_000}, {"gpu": 800_000, "GPU X": 400_000}):
            monkeypatch.setattr(f"fused_kl.tiles.{name}", table)
            plan = tiles.make_plan(mode, 1000, 10_000, **rules)
            held.append(8 * plan.rows * plan.columns)
        assert 700_000 < held[0] <= 800_000 and 350_000 < held[1] <= 400_000
    assert tiles.row_program(4, 100_000)[:2] == (1024, 8)
    blocks = {"gpu": {2048: 8}, "GPU X": {1024: 2, 4096: 16}}
    monkeypatch.setattr("fused_kl.tiles.ROW_BLOCKS", blocks)
    monkeypatch.setattr("fused_kl.tiles.GPU_PROGRAMS", {"gpu": 4, "GPU X": 12})
    assert tiles.row_program(4, 9001) == (4096, 16, 3, 4096)
    assert tiles.row_program(4, 1025)[:2] == (4096, 16)
    assert tiles.row_program(4, 1000)[:2] == (1024, 2)


def test_sizes_break_no_graph(monkeypatch):
    """A plan is made inside of what torch.compile traces, and on a GPU it asks for its name."""

    def name() -> str:
        with open(os.devnull):  # as opaque to a trace as a driver
            return "GPU X"

    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=name)
    monkeypatch.setattr("fused_kl.tiles.torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr("fused_kl.tiles.FAST_BYTES", {"gpu": 8, "GPU X": 3 * 8 * 50})

    def planned(x):
        rules = dict(bytes_per_logit=8, device_type="cuda", chunk_size=0)
        return x + tiles.make_plan("fast", len(x), 50, **rules).rows

    compiled = torch.compile(planned, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(compiled(torch.zeros(9)), torch.full((9,), 3.0))


@pytest.mark.parametrize("architecture", ["80", "90", "100", "gfx942"])
def test_every_program_compiles_without_a_gpu(architecture):
    """Every program in every variant: no spill, few enough registers, 8 KB of shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],  # tests is imported from there
    )
    assert done.returncode == 0, done.stderr[-2000:]


# The losses through them: on a GPU they are the default, on a CPU they stand in for torch's.


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def device(request, monkeypatch):
    if request.param == "cpu":
        if DEVICE == "cuda":
            pytest.skip("the interpreter is not on")
        monkeypatch.setattr("fused_kl.head.row_programs", lambda _: triton_rows)
    return request.param


NAMES = ("student_hidden", "student_lm_head", "teacher_hidden", "teacher_lm_head")
ERRORS = {F32: 1e-5, torch.bfloat16: 1e-2}


def sides(tensors, device, dtype):
    """Leaves on the device, and the same values in fp64 on the CPU."""
    leaves, exact = [], []
    for name in NAMES:
        tensor = getattr(tensors, name).detach().to(dtype)
        trained = name.startswith("student")
        leaves.append(tensor.to(device, copy=True).requires_grad_(trained))
        exact.append(tensor.to(F64, copy=True).requires_grad_(trained))
    return leaves, exact


def rules_of(tensors, device, dtype):
    return {
        "token_weights": tensors.token_weights.to(device, dtype),
        "allowed_columns": tensors.allowed_columns.to(device),
        "temperature": 0.7,
        "softcap": 30.0,
    }


def assert_near(actual, exact, error):
    assert (actual.double().cpu() - exact).norm() <= error * exact.norm() + 1e-12


dtypes = pytest.mark.parametrize("dtype", ERRORS, ids=str)


@dtypes
@pytest.mark.parametrize("mode", ["fast", "lowmem"])
@pytest.mark.parametrize("beta", [1.0, 0.0, 0.4])
def test_divergences_through_them(device, dtype, mode, beta, case, monkeypatch):
    monkeypatch.setattr("fused_kl.tiles.LOWMEM_BYTES", {"cpu": 60_000, "gpu": 60_000})
    tensors = case.build(teacher_vocab=1201)
    leaves, exact = sides(tensors, device, dtype)
    out = linear_reverse_kl(
        *leaves, **rules_of(tensors, device, F32), beta=beta, mode=mode, chunk_size=5
    )
    truth, kl, *_ = reference.linear_reverse_kl(*exact, **rules_of(tensors, "cpu", F64), beta=beta)
    assert_near(out.token_kl, kl.detach(), 1e-5)
    gradients = torch.autograd.grad(truth, exact[:2])
    for actual, wanted in zip(
        torch.autograd.grad(out.loss * 2, leaves[:2]), gradients, strict=True
    ):
        assert actual.dtype == dtype
        assert_near(actual / 2, wanted, ERRORS[dtype])


@dtypes
def test_token_losses_through_them(device, dtype, case):
    tensors = case.build()
    leaves, exact = sides(tensors, device, dtype)
    ids, advantages = tensors.token_ids.to(device), tensors.advantages.to(device)
    rules, wide = rules_of(tensors, device, F32), rules_of(tensors, "cpu", F64)
    rules["allowed_columns"] = wide["allowed_columns"] = None
    sampled = linear_reverse_kl(*leaves, **rules, token_ids=ids, estimator="sampled", chunk_size=5)
    policy = linear_policy_loss(*leaves[:2], ids, advantages=advantages, **rules, chunk_size=5)
    weights = rules.pop("token_weights")
    plain, ahead = (linear_logprobs(*leaves[:2], ids, **rules, chunk_size=n) for n in (5, "auto"))
    dense, *_ = reference.linear_policy_loss(
        *exact[:2], tensors.token_ids, advantages=tensors.advantages, **wide
    )
    wide.pop("token_weights")
    log_p, _ = reference.linear_logprobs(*exact[:2], tensors.token_ids, **wide)
    log_q, _ = reference.linear_logprobs(*exact[2:], tensors.token_ids, **wide)
    exact_weights = tensors.token_weights.double()
    pairs = (
        (sampled.loss, (exact_weights * (log_p - log_q).detach() * log_p).sum()),
        (policy.loss, dense),
        ((weights * plain.logprobs).sum(), (exact_weights * log_p).sum()),
        ((weights * ahead.logprobs).sum(), (exact_weights * log_p).sum()),
    )
    for actual, truth in pairs:
        wanted = torch.autograd.grad(truth, exact[:2], retain_graph=True)
        for gradient, right in zip(torch.autograd.grad(actual, leaves[:2]), wanted, strict=True):
            assert_near(gradient, right, ERRORS[dtype])
    assert_near(plain.logprobs.detach(), log_p.detach(), 1e-5)


@dtypes
def test_an_entropy_bonus_through_them(device, dtype, case):
    tensors = case.build()
    trained, exact = (leaves[:2] for leaves in sides(tensors, device, dtype))
    columns = tensors.allowed_columns.nonzero().squeeze(-1)
    ids = columns[tensors.token_ids % len(columns)]
    tensors.token_weights[4] = 0
    rules, wide = rules_of(tensors, device, F32), rules_of(tensors, "cpu", F64)
    advantages = 0 * tensors.advantages  # the bonus alone
    out = linear_policy_loss(
        *trained,
        ids.to(device),
        advantages=advantages.to(device),
        entropy_coef=0.5,
        chunk_size=5,
        **rules,
    )
    truth, *_ = reference.linear_policy_loss(
        *exact, ids, advantages=advantages, entropy_coef=0.5, **wide
    )
    assert_near(out.loss.detach(), truth.detach(), 1e-5)
    wanted = torch.autograd.grad(truth, exact)
    for gradient, right in zip(torch.autograd.grad(out.loss, trained), wanted, strict=True):
        assert_near(gradient, right, ERRORS[dtype])


def test_without_triton_torch_does_the_work_and_says_so(monkeypatch):
    class OnGPU:
        is_cuda, dtype = True, F32

    assert row_programs(OnGPU()) is triton_rows  # pyright: ignore
    monkeypatch.delattr("fused_kl.triton_rows")
    monkeypatch.setitem(sys.modules, "fused_kl.triton_rows", None)
    with pytest.warns(UserWarning, match="plain torch does its work"):
        assert row_programs(OnGPU()) is torch_rows  # pyright: ignore

"""What a call asks of a GPU, found without one: tensors without memory on "cuda", no launch, and
every operation that would read a value on the host raises.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_kl import (
    jsd,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_loss,
    linear_reverse_kl,
    tiles,
    topk_reverse_kl,
)
from tests.fake import shape_of
from tests.fused_kl.triton_variants import SUMMARY_SPLITS, Variant, other_variants, row_variants

triton_rows = pytest.importorskip("fused_kl.triton_rows")
V, TEACHER_V, HS, HT = 151_936, 152_064, 2048, 4096
BF16 = torch.bfloat16
POINTERS = {torch.float32: "*fp32", BF16: "*bf16"}
# Kernels that an operation starts, where that is not one.
NO_KERNEL = {"empty", "new_empty", "empty_like", "detach", "empty_strided", "lift_fresh"}
TWO_KERNELS = {"masked_fill"}  # a copy, and the fill


class HostCopyError(Exception):
    """A copy from pageable memory of the host, which waits for the device."""


class Launches(TorchDispatchMode):
    """Counts kernels, by the name of the operation or of the Triton program."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.programs: set[tuple] = set()
        self.logit_bytes: Counter[str] = Counter()  # that kernels read and write, by name

    def count_bytes(self, name: str, read: Any, written: Any) -> None:
        """Count what a kernel moves of tensors with a value for each row and column."""
        sides = [
            {
                x.untyped_storage()._cdata: x.numel() * x.element_size()
                for x in tree_leaves(side)
                if isinstance(x, Tensor)
                and x.dim() == 2
                and min(V, TEACHER_V) in x.shape
                # Heads have as many rows, and a hidden size instead of rows of logits.
                and not {HS, HT} & set(x.shape)
            }
            for side in (read, written)
        ]
        # What is overwritten is not read.
        self.logit_bytes[name] += sum((sides[0] | sides[1]).values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = shape_of(func, args, kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in tree_leaves(out))
        if on_gpu and not func.is_view and name not in NO_KERNEL:
            self.names[name] += 2 if name in TWO_KERNELS else 1
            self.count_bytes(name, (args, kwargs), out)
        sources = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        from_host = any(x.device.type == "cpu" for x in sources)
        if on_gpu and from_host and name in ("_to_copy", "copy_"):
            raise HostCopyError(name)
        return out

    def start(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
        """In place of `triton_rows._start`."""
        names = kernel.arg_names
        known = dict(zip(names, arguments, strict=False)) | flags
        assert set(known) == {*names, "num_warps"} and all(size > 0 for size in grid)
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.device.type == "cuda"
                assert argument.ndim == 0 or argument.stride(-1) == 1
        constants = {name: known[name] for name in names if name.isupper()}
        pointers = {}
        if kernel.fn.__name__ == "scale_in_place":
            pointers = {"values": POINTERS[known["values"].dtype]}
        elif "grad" in names and constants.get("WITH_GRAD", True):
            pointers = {"grad": POINTERS[known["grad"].dtype]}
        self.names[kernel.fn.__name__] += 1
        inputs = [known[name] for name in ("student", "teacher", "logits") if name in names]
        inputs = [] if kernel.fn.__name__ == "chosen_logprobs" else inputs  # one of each row
        written = [known["grad"]] if "grad" in names and constants.get("WITH_GRAD", True) else []
        self.count_bytes(kernel.fn.__name__, inputs, [])
        self.count_bytes(kernel.fn.__name__, [], written)
        self.programs.add(variant_key(kernel, constants, flags["num_warps"], pointers))


def variant_key(kernel: Any, constants: dict, num_warps: int, types: dict) -> tuple:
    return (
        kernel.fn.__name__,
        tuple(sorted(constants.items())),
        num_warps,
        tuple(types.items()),
    )


def key_of(variant: Variant) -> tuple:
    return variant_key(variant.kernel, variant.constants, variant.num_warps, variant.types)


@pytest.fixture
def launches(monkeypatch) -> Iterator[Launches]:
    # Deterministic mode, in which other tests run, would fill empty tensors.
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tiles, "gpu_name", lambda: "gpu")
    counted = Launches()
    monkeypatch.setattr(triton_rows, "_start", counted.start)
    with FakeTensorMode(), counted:
        yield counted


def build(num_rows: int, dtype: torch.dtype = BF16, device: str = "cuda") -> SimpleNamespace:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    numbers = ("token_weights", "advantages", "old_logprobs", "reference_logprobs")
    return SimpleNamespace(
        student=(
            empty(num_rows, HS).requires_grad_(),
            empty(V, HS).requires_grad_(),
        ),
        teacher=(empty(num_rows, HT), empty(TEACHER_V, HT)),
        token_ids=empty(num_rows, dtype=torch.int64),
        allowed_columns=empty(V, dtype=torch.bool),
        **{name: empty(num_rows, dtype=torch.float32) for name in numbers},
    )


def backward(loss: Tensor) -> None:
    """`loss.backward()` node by node: autograd's engine asks for the device, which is not there."""
    assert loss.grad_fn is not None
    order: list[Any] = []

    def visit(node: Any) -> None:
        if node is not None and node not in order:
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(loss.grad_fn)
    gradients: dict[Any, list[Tensor | None]] = {
        node: [None] * len(node._input_metadata) for node in order
    }
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(order):
        if hasattr(node, "variable"):
            (node.variable.grad,) = gradients[node]
            continue
        if hasattr(node, "apply"):  # of autograd.Function, which answers for constants too
            results = node.apply(*gradients[node])
            results = [
                x for x, needed in zip(results, node.needs_input_grad, strict=True) if needed
            ]
        else:
            results = node(*gradients[node])
            results = results if isinstance(results, tuple) else [results]
            results = [x for x, (n, _) in zip(results, node.next_functions, strict=True) if n]
        following = [(n, place) for n, place in node.next_functions if n is not None]
        for (next_node, place), result in zip(following, results, strict=True):
            sofar = gradients[next_node][place]
            gradients[next_node][place] = result if sofar is None else sofar + result


def divergence(function: Callable, *, ids: bool = True, **options: Any):
    def loss(tensors: SimpleNamespace) -> Tensor:
        return function(
            *tensors.student,
            *tensors.teacher,
            token_weights=tensors.token_weights,
            allowed_columns=tensors.allowed_columns,
            token_ids=tensors.token_ids if ids else None,
            **options,
        ).loss.sum()

    return loss


def token_loss(function: Callable, names: tuple[str, ...], **options: Any):
    def loss(tensors: SimpleNamespace) -> Tensor:
        values = {name: getattr(tensors, name) for name in names}
        out = function(
            *tensors.student,
            tensors.token_ids,
            allowed_columns=tensors.allowed_columns,
            **values,
            **options,
        )
        return out.logprobs.sum() if function is linear_logprobs else out.loss

    return loss


def of_logits(tensors: SimpleNamespace) -> Tensor:
    student, teacher = (side[0] @ side[1].T for side in (tensors.student, tensors.teacher))
    return jsd(
        student,
        teacher.detach(),
        beta=0.5,
        token_weights=tensors.token_weights,
        allowed_columns=tensors.allowed_columns,
        token_ids=tensors.token_ids,
    ).loss


ALL_CONSTANTS = ("token_weights", "advantages", "old_logprobs", "reference_logprobs")
LOSSES: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    "reverse": divergence(linear_reverse_kl),
    "reverse, no ids": divergence(linear_reverse_kl, ids=False),
    "forward": divergence(linear_reverse_kl, beta=0.0),
    "jsd": divergence(linear_reverse_kl, beta=0.3),
    "options": divergence(linear_reverse_kl, temperature=0.7, softcap=30.0, logit_scale=1.3),
    "chunks": divergence(linear_reverse_kl, chunk_size=16),
    "sampled": divergence(linear_reverse_kl, estimator="sampled"),
    "lowmem": divergence(linear_reverse_kl, mode="lowmem"),
    "lowmem forward": divergence(linear_reverse_kl, mode="lowmem", beta=0.0),
    "lowmem jsd": divergence(linear_reverse_kl, mode="lowmem", beta=0.3),
    "per row": divergence(linear_reverse_kl, reduction="none"),
    "topk": divergence(topk_reverse_kl, k=50),
    "topk tail": divergence(topk_reverse_kl, k=50, support="student", tail=True),
    "logits": of_logits,
    "policy": token_loss(linear_policy_loss, ("advantages", "token_weights")),
    "clip": token_loss(linear_policy_loss, ALL_CONSTANTS, clip=0.2, kl_coef=0.1),
    "bonus": token_loss(linear_policy_loss, ("advantages", "token_weights"), entropy_coef=1e-3),
    "cross entropy": token_loss(linear_cross_entropy, ("token_weights",)),
    "logprobs": token_loss(linear_logprobs, ()),
    "logprobs in chunks": token_loss(linear_logprobs, (), chunk_size=16),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_rows", [40])
def test_the_host_never_waits(launches, name, num_rows):
    tensors = build(num_rows)
    backward(LOSSES[name](tensors))
    for leaf in tensors.student:
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == BF16
    with torch.no_grad():
        LOSSES[name](tensors)
    assert sum(launches.names.values()) > 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensors: tensors.token_weights.sum().item(),
        lambda tensors: tensors.teacher[0][tensors.token_weights != 0],
        lambda tensors: tensors.token_weights.nonzero(),
        lambda tensors: torch.zeros(3).to("cuda"),
        lambda tensors: tensors.token_weights.copy_(torch.zeros(32)),
    ],
)
def test_a_host_that_waits_is_seen(launches, wait):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, HostCopyError)):
        wait(build(32))


@pytest.mark.slow
def test_every_launch_is_of_a_variant_with_a_register_limit(launches):
    for dtype in (BF16, torch.float32):
        for num_rows in (1, 40):
            for loss in LOSSES.values():
                backward(loss(build(num_rows, dtype)))
    shapes = tiles.ROW_BLOCKS["gpu"].items()
    variants = [*other_variants(), *(v for shape in shapes for v in row_variants(shape))]
    limited = {key_of(variant) for variant in variants}
    assert launches.programs and launches.programs <= limited
    assert {name for name, *_ in launches.programs} == {name for name, *_ in limited}
    assert tiles.GPU_PROGRAMS["gpu"] > SUMMARY_SPLITS[-1] > V // min(tiles.ROW_BLOCKS["gpu"])


# Kernels of forward and backward, four or three products among them; 32 rows are split.
@pytest.mark.parametrize(
    ("name", "num_rows", "limit"),
    [
        ("reverse", 32, 30),
        ("reverse", 640, 29),
        ("sampled", 32, 40),
        ("policy", 32, 37),
        ("bonus", 32, 40),
    ],
)
def test_a_call_starts_few_kernels(launches, name, num_rows, limit):
    backward(LOSSES[name](build(num_rows)))
    assert launches.names["scale_in_place"] == 2, "one for each gradient"
    assert launches.names.total() <= limit, launches.names


# Bytes for each pair of a student's and a teacher's logit: two products write them in fp32, two
# programs read them, the second writes a gradient in bf16, and two products read that.
@pytest.mark.parametrize(
    ("name", "total", "programs"),
    [("reverse", 8 + 8 + 10 + 4, 3), ("jsd", 8 + 8 + 8 + 10 + 4, 4), ("policy", 4 + 4 + 6 + 4, 3)],
)
def test_what_a_call_moves(launches, name, total, programs):
    num_rows = 640
    backward(LOSSES[name](build(num_rows)))
    moved = {key: count / (num_rows * V) for key, count in launches.logit_bytes.items() if count}
    assert sum(moved.values()) == pytest.approx(total), moved
    of_rows = ("divergence_", "token_")
    started = {key: n for key, n in launches.names.items() if key.startswith(of_rows)}
    assert sum(started.values()) == programs, started


@pytest.mark.parametrize("num_rows", [32, 640])
def test_the_entropy_bonus_starts_no_further_program(launches, num_rows):
    started = {}
    for name in ("policy", "bonus"):
        launches.names.clear()
        launches.programs.clear()
        backward(LOSSES[name](build(num_rows)))
        programs = {program for program, *_ in launches.programs}
        started[name] = {program: launches.names[program] for program in programs}
        flags = [dict(key[1]) for key in launches.programs if key[0] == "token_gradient"]
        assert [flag["WITH_ENTROPY"] for flag in flags] == [name == "bonus"]
    assert started["bonus"] == started["policy"]

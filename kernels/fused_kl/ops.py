"""Custom ops, which `torch.compile` sees as one node each; eager code runs the same functions.

`fast` returns its gradients beside the loss, and its backward scales copies of them. `lowmem` is
differentiable per row, and its backward is an op of its own. The schemas derive from the fields of
`DivergenceInputs`, `DivergenceOptions` and `NeedsGrad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kl import divergence
from fused_kl.arguments import DivergenceInputs, DivergenceOptions, NeedsGrad, Shard
from fused_kl.divergence import RowDivergences
from fused_kl.gradients import HeadGradients, cast_to_inputs
from fused_kl.head import compute_dtype

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    bool: "bool",
    str: "str",
}


def schema_of(*definitions: type) -> str:
    """The arguments of an op that takes the fields of these named tuples one by one."""
    fields = [
        f"{SCHEMA_TYPES[annotation]} {name}"
        for definition in definitions
        for name, annotation in get_type_hints(definition).items()
    ]
    return ", ".join(fields)


NUM_INPUTS = len(DivergenceInputs._fields)
NUM_ARGUMENTS = NUM_INPUTS + len(DivergenceOptions._fields)


def _split(
    arguments: Sequence[Any],
) -> tuple[DivergenceInputs, DivergenceOptions, Sequence[Any]]:
    """Inputs, options, and the arguments after them."""
    return (
        DivergenceInputs(*arguments[:NUM_INPUTS]),
        DivergenceOptions(*arguments[NUM_INPUTS:NUM_ARGUMENTS]),
        arguments[NUM_ARGUMENTS:],
    )


def _needed(gradients: HeadGradients, inputs: DivergenceInputs) -> list[Tensor]:
    """The gradients that are needed, each in the dtype of its input."""
    return [grad for grad in cast_to_inputs(gradients, inputs.student) if grad is not None]


def _empty_gradients(inputs: DivergenceInputs, needs_grad: Sequence[bool]) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `_needed`."""
    pairs = zip(inputs.student, needs_grad, strict=True)
    return [torch.empty_like(leaf) for leaf, needed in pairs if needed and leaf is not None]


def _per_input(gradients: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """One entry per input of the head: its gradient, or None where none is needed."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs_grad]


@torch.library.custom_op(
    "fused_kl::fast",
    mutates_args=(),
    schema=f"({schema_of(DivergenceInputs, DivergenceOptions, NeedsGrad)}) -> Tensor[]",
)
def fast(*arguments):
    """Loss and details of `divergence.fast`, then the gradients that are needed."""
    inputs, options, needs_grad = _split(arguments)
    loss, details, gradients = divergence.fast(inputs, options, NeedsGrad(*needs_grad))
    # Details are views of one tensor, and the results of an op must not share memory.
    return [loss, *(detail.clone() for detail in details), *_needed(gradients, inputs)]


@fast.register_fake
def _(*arguments):
    inputs, _, needs_grad = _split(arguments)
    new_empty = inputs.student_hidden.new_empty
    dtype = compute_dtype(*inputs.student, *inputs.teacher)
    num_details = 3 + (inputs.token_ids is not None)
    details = [new_empty(inputs.num_rows, dtype=dtype) for _ in range(num_details)]
    return [new_empty((), dtype=dtype), *details, *_empty_gradients(inputs, needs_grad)]


def _save_fast(ctx, inputs, output):
    *_, ctx.needs_grad = _split(inputs)
    ctx.save_for_backward(*output[len(output) - sum(ctx.needs_grad) :])


def _backward_fast(ctx, grads):
    scaled = [gradient * grads[0].to(gradient.dtype) for gradient in ctx.saved_tensors]
    return *_per_input(scaled, ctx.needs_grad), *[None] * NUM_ARGUMENTS


fast.register_autograd(_backward_fast, setup_context=_save_fast)


@torch.library.custom_op(
    "fused_kl::lowmem",
    mutates_args=(),
    schema=f"({schema_of(DivergenceInputs, DivergenceOptions)}) -> "
    f"({', '.join(['Tensor'] * len(RowDivergences._fields))})",
)
def lowmem(*arguments):
    """`divergence.lowmem`, differentiable by its first result, `[N]`."""
    inputs, options, _ = _split(arguments)
    return tuple(divergence.lowmem(inputs, options))


@lowmem.register_fake
def _(*arguments):
    inputs, *_ = _split(arguments)
    new_empty, num_rows = inputs.student_hidden.new_empty, inputs.num_rows
    dtype = compute_dtype(*inputs.student, *inputs.teacher)
    values = [new_empty(num_rows, dtype=dtype) for _ in range(3)]
    logprobs = new_empty(0 if inputs.token_ids is None else num_rows, dtype=dtype)
    return *values, logprobs, new_empty(6, num_rows, dtype=dtype)


@torch.library.custom_op(
    "fused_kl::lowmem_gradients",
    mutates_args=(),
    schema=f"({schema_of(DivergenceInputs, DivergenceOptions, NeedsGrad)}, Tensor saved, "
    "Tensor grad_kl) -> Tensor[]",
)
def lowmem_gradients(*arguments):
    """`divergence.lowmem_gradients`, the gradients that are needed."""
    inputs, options, (*needs_grad, saved, grad_kl) = _split(arguments)
    gradients = divergence.lowmem_gradients(inputs, options, NeedsGrad(*needs_grad), saved, grad_kl)
    return _needed(gradients, inputs)


@lowmem_gradients.register_fake
def _(*arguments):
    inputs, _, (*needs_grad, _, _) = _split(arguments)
    return _empty_gradients(inputs, needs_grad)


def _save_lowmem(ctx, inputs, output):
    tensors, ctx.options, _ = _split(inputs)
    ctx.save_for_backward(*tensors, RowDivergences(*output).saved)


def _backward_lowmem(ctx, grad_kl, *_):
    *tensors, saved = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad[: len(NeedsGrad._fields)]
    gradients = lowmem_gradients(*tensors, *ctx.options, *needs_grad, saved, grad_kl)
    return *_per_input(gradients, needs_grad), *[None] * (NUM_ARGUMENTS - len(needs_grad))


lowmem.register_autograd(_backward_lowmem, setup_context=_save_lowmem)


class ShardedLowmem(torch.autograd.Function):
    """`lowmem` of a part of the vocabulary: not an op, because a group is no argument of one."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        inputs: DivergenceInputs,
        options: DivergenceOptions,
        shard: Shard,
    ):
        results = divergence.lowmem(inputs, options, shard)
        ctx.save_for_backward(*inputs, results.saved)
        ctx.options, ctx.shard = options, shard
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, *_: Any):  # pyright: ignore
        *tensors, saved = ctx.saved_tensors
        inputs, needs_grad = DivergenceInputs(*tensors), NeedsGrad(*ctx.needs_input_grad[:3])
        rows = saved, grad_kl, ctx.shard
        gradients = divergence.lowmem_gradients(inputs, ctx.options, needs_grad, *rows)
        return *cast_to_inputs(gradients, inputs.student), None, None, None

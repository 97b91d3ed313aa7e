"""Custom ops: what `torch.compile` sees as one node each. Eager code runs the same functions.

`fast` returns its gradients beside the loss, and its backward scales copies of them; `lowmem` is
differentiable per row, and its backward is an op of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_kl import divergence
from fused_kl.chunks import Needs, compute_dtype
from fused_kl.divergence import Rowwise
from fused_kl.walk import Inputs, Rules

ARGUMENTS = (
    "Tensor student_hidden, Tensor student_lm_head, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_lm_head, Tensor? teacher_bias, Tensor? token_weights, Tensor? token_ids, "
    "Tensor? allowed_columns, float temperature, float? softcap, float logit_scale, float beta, "
    "bool sampled, int topk, bool student_support, bool tail, str mode, SymInt chunk_size"
)
NEEDS = "bool needs_hidden, bool needs_lm_head, bool needs_bias"
NUM_INPUTS, NUM_RULES = len(Inputs._fields), len(Rules._fields)


def _split(arguments: Sequence) -> tuple[Inputs, Rules, Sequence]:
    end = NUM_INPUTS + NUM_RULES
    return Inputs(*arguments[:NUM_INPUTS]), Rules(*arguments[NUM_INPUTS:end]), arguments[end:]


def _cast(gradients: Sequence[Tensor | None], inputs: Inputs) -> list[Tensor]:
    """Those that are needed, each in the dtype of its input."""
    leaves = zip(gradients, inputs[:3], strict=True)
    return [grad.to(leaf.dtype) for grad, leaf in leaves if grad is not None and leaf is not None]


def _gradients_like(inputs: Inputs, needs: Sequence[bool]) -> list[Tensor]:
    leaves = zip(inputs[:3], needs, strict=True)
    return [torch.empty_like(leaf) for leaf, needed in leaves if needed and leaf is not None]


def _hand_out(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    left = iter(gradients)
    return [next(left) if needed else None for needed in needs]


@torch.library.custom_op(
    "fused_kl::fast", mutates_args=(), schema=f"({ARGUMENTS}, {NEEDS}) -> Tensor[]"
)
def fast(*arguments):
    """Loss, statistics (see `divergence.fast`), then the gradients that are needed."""
    inputs, rules, needs = _split(arguments)
    loss, stats, gradients = divergence.fast(inputs, rules, Needs(*needs))
    # Details are views of one tensor, and results of an op must not share memory.
    return [loss, *(stat.clone() for stat in stats), *_cast(gradients.take(), inputs)]


@fast.register_fake
def _(*arguments):
    inputs, _, needs = _split(arguments)
    make, dtype = inputs.student_hidden.new_empty, compute_dtype(*inputs[:6])
    num_stats = 3 + (inputs.token_ids is not None)
    stats = [make(inputs.student_hidden.shape[0], dtype=dtype) for _ in range(num_stats)]
    return [make((), dtype=dtype), *stats, *_gradients_like(inputs, needs)]


def _keep_fast(ctx, inputs, output):
    *_, ctx.needs = _split(inputs)
    ctx.save_for_backward(*output[len(output) - sum(ctx.needs) :])


def _backward_fast(ctx, grads):
    scaled = [gradient * grads[0].to(gradient.dtype) for gradient in ctx.saved_tensors]
    return *_hand_out(scaled, ctx.needs), *[None] * (NUM_INPUTS + NUM_RULES)


fast.register_autograd(_backward_fast, setup_context=_keep_fast)


@torch.library.custom_op(
    "fused_kl::lowmem",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def lowmem(*arguments):
    """`divergence.lowmem`, differentiable by its first result, `[N]`."""
    inputs, rules, _ = _split(arguments)
    return tuple(divergence.lowmem(inputs, rules))


@lowmem.register_fake
def _(*arguments):
    inputs, *_ = _split(arguments)
    make, dtype = inputs.student_hidden.new_empty, compute_dtype(*inputs[:6])
    num_rows = inputs.student_hidden.shape[0]
    values = [make(num_rows, dtype=dtype) for _ in range(3)]
    logprobs = make(0 if inputs.token_ids is None else num_rows, dtype=dtype)
    return *values, logprobs, make(6, num_rows, dtype=dtype)


@torch.library.custom_op(
    "fused_kl::lowmem_gradients",
    mutates_args=(),
    schema=f"({ARGUMENTS}, {NEEDS}, Tensor saved, Tensor grad_kl) -> Tensor[]",
)
def lowmem_gradients(*arguments):
    """`divergence.lowmem_gradients`, those that are needed."""
    inputs, rules, (*needs, saved, grad_kl) = _split(arguments)
    gradients = divergence.lowmem_gradients(inputs, rules, Needs(*needs), saved, grad_kl)
    return _cast(gradients.take(), inputs)


@lowmem_gradients.register_fake
def _(*arguments):
    inputs, _, (*needs, _, _) = _split(arguments)
    return _gradients_like(inputs, needs)


def _keep_lowmem(ctx, inputs, output):
    tensors, ctx.rules, _ = _split(inputs)
    ctx.save_for_backward(*tensors, Rowwise(*output).saved)


def _backward_lowmem(ctx, grad_kl, *_):
    *tensors, saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = lowmem_gradients(*tensors, *ctx.rules, *needs, saved, grad_kl)
    return *_hand_out(gradients, needs), *[None] * (NUM_INPUTS + NUM_RULES - 3)


lowmem.register_autograd(_backward_lowmem, setup_context=_keep_lowmem)

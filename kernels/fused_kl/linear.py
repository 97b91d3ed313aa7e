"""Divergences between student and teacher over the vocabulary, from hidden states."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fused_kl import checks, divergence, ops
from fused_kl.arguments import (
    DivergenceInputs,
    DivergenceOptions,
    LinearKLOutput,
    NeedsGrad,
    PerSide,
    Shard,
    Support,
    counted,
    under_autocast,
)
from fused_kl.gradients import LossWithGradients
from fused_kl.pair import plan_of
from fused_kl.sharded import agree
from fused_kl.sparse import sparse


def linear_reverse_kl(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    token_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: PerSide[float] = 1.0,
    beta: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerSide[float | None] = None,
    logit_scale: PerSide[float] = 1.0,
    estimator: Literal["full", "sampled"] = "full",
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | Literal["auto"] = "auto",
    mode: Literal["auto", "fast", "lowmem", "sparse"] = "auto",
    tolerance: float = 1e-4,
    capacity: int | None = None,
    exact_value: bool = False,
    group: ProcessGroup | None = None,
    check: bool = False,
) -> LinearKLOutput:
    """loss = sum_n w_n KL(p_S || p_T)_n, p = softmax((hidden @ lm_head.T + bias) / temperature).

    The `[N, V]` logits are never held at once. Mode "fast" computes the gradients with the loss, in
    chunks of tokens: 4 GEMM units, and a single backward. Mode "lowmem" goes over tiles of the
    vocabulary and recomputes them in backward: 6 GEMM units (JSD: 8), a fifth of the memory. Mode
    "sparse" (the reverse KL, summed) is "fast" on the columns in which the student has probability,
    1 GEMM unit and a share of 3: gradients within `support.gradient_bound`, values a lower bound.

    Args:
        student_hidden: `[N, Hs]` fp16, bf16, fp32 or fp64, after the final norm.
        student_lm_head: `[V, Hs]`; its gradient is skipped when it does not require grad.
        teacher_hidden: `[N, Ht]`, without grad.
        teacher_lm_head: `[V', Ht]`, without grad; if V' differs from V, both heads are cut to the
            smaller.
        token_weights: `[N]`, default ones: factors of each row's loss and gradient. A row of weight
            0 is left out and may hold NaN. If they include 1/denominator, the loss needs no
            division, and backward makes no pass over the head's gradient.
        token_ids: `[N]` int, below both vocabulary sizes; the result then has their
            log-probabilities under the student, at no further product.
        allowed_columns: `[V]` bool; other columns get probability 0 on both sides before
            normalisation.
        temperature: divides both logits; the loss is not multiplied by its square. A pair has the
            student's and the teacher's; so have `softcap` and `logit_scale`.
        beta: 1 is the reverse KL, 0 the forward KL KL(p_T || p_S), and between them
            beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = (1 - beta) p_S + beta p_T.
        student_bias: `[V]`, may require grad.
        teacher_bias: `[V']`, without grad.
        softcap: c > 0 replaces both logits z by c tanh(z / c), before the temperature.
        logit_scale: multiplies both logits, before softcap and temperature.
        estimator: "sampled" gives the loss sum_n w_n (log p_S(y) - log p_T(y)) on `token_ids` y
            drawn from p_S, with the policy gradient, whose expectation is the gradient of the
            reverse KL. Banned tokens count 0. All other values stay those of the whole vocabulary.
        reduction: "none" gives w_n KL_n, `[N]`, differentiable, in mode "lowmem".
        chunk_size: tokens at once; "auto" keeps to a memory budget (`fused_kl.tiles`).
        mode: "auto" is "fast" for a sum and "lowmem" without reduction.
        tolerance: of mode "sparse", in [0, 1): the probability mass that may be left out of a row;
            0 is mode "fast".
        capacity: of mode "sparse": the number of columns of each chunk, whatever they leave out;
            None is as many as `tolerance` needs, or on a GPU a sixteenth of the vocabulary.
        exact_value: of mode "sparse": loss and values of the whole vocabulary instead of a lower
            bound, for one more GEMM unit; gradients stay as they are.
        group: process group whose ranks divide the vocabulary in their order: heads, biases and
            `allowed_columns` are this rank's part, as many columns of both models; everything else
            is the same on all ranks, `token_ids` of the whole vocabulary among it. Padding is not
            allowed. The hidden states' gradient is complete on every rank. Not in mode "sparse".
        check: look for NaN and inf in the inputs first; on a GPU the host waits for the answer.

    Raises:
        ValueError: on a wrong shape, dtype, device or range, or a teacher that requires grad; on
            all ranks of a group that do not agree.
        RuntimeError: on a second backward.

    Source: the generalised JSD of GKD (arXiv 2306.13649), with beta as in TRL and Liger-Kernel; the
    sampled estimator of Video-OPD (arXiv 2602.02994).
    """
    checks.check_choice("estimator", estimator, ("full", "sampled"))
    checks.check_choice("reduction", reduction, ("sum", "none"))
    checks.check_choice("mode", mode, ("auto", "fast", "lowmem", "sparse"))
    checks.check_sparse(tolerance, capacity)
    if mode == "sparse" and (reduction == "none" or beta != 1.0 or estimator != "full"):
        raise ValueError("mode is 'sparse', expected beta 1, reduction 'sum' and estimator 'full'")
    if mode == "sparse" and tolerance == 0.0:
        mode = "fast"
    checks.check_beta(beta)
    if mode == "fast" and reduction == "none":
        raise ValueError("mode is 'fast' and reduction is 'none', expected mode 'lowmem' or 'auto'")
    if estimator == "sampled" and (
        mode == "lowmem" or reduction == "none" or beta != 1.0 or token_ids is None
    ):
        raise ValueError(
            "estimator is 'sampled', expected token_ids, beta 1, reduction 'sum' and not mode "
            "'lowmem'"
        )
    options = DivergenceOptions(
        **_of_both(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        beta=float(beta),
        estimator=estimator,
        mode="lowmem" if reduction == "none" else "fast" if mode == "auto" else mode,
        chunk_size=checks.chunk_rows(chunk_size),
        tolerance=float(tolerance),
        capacity=capacity or 0,
        exact_value=exact_value,
    )
    inputs = under_autocast(
        DivergenceInputs(
            student_hidden,
            student_lm_head,
            student_bias,
            teacher_hidden,
            teacher_lm_head,
            teacher_bias,
            token_weights,
            token_ids,
            allowed_columns,
        )
    )
    if group is not None:
        return _sharded(inputs, options, reduction, group, check)
    checks.check_divergence(inputs, options, check)
    return _divergence(inputs, options, reduction)


def topk_reverse_kl(
    student_hidden: Tensor,
    student_lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    k: int,
    support: Literal["teacher", "student"] = "teacher",
    tail: bool = False,
    token_weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    allowed_columns: Tensor | None = None,
    temperature: PerSide[float] = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: PerSide[float | None] = None,
    logit_scale: PerSide[float] = 1.0,
    chunk_size: int | Literal["auto"] = "auto",
    check: bool = False,
) -> LinearKLOutput:
    """loss = sum_n w_n KL(p_S || p_T)_n on the k columns S_n that one side finds likeliest.

    Without `tail` both sides are renormalised on S_n; with it, all other columns are one more
    outcome. `token_kl` is the KL on S_n, whereas the entropies are those of the whole vocabulary.
    k = 1 without a tail gives 0, and k = V gives `linear_reverse_kl`. 4 GEMM units.

    Args:
        k: in [1, number of columns]; ties are broken as `torch.topk` breaks them.
        support: the side whose likeliest columns are taken; the gradient treats S_n as constant.
        tail: keep the mass outside S_n, as one outcome.

    All other arguments, and the errors, are those of `linear_reverse_kl`.
    """
    checks.check_choice("support", support, ("teacher", "student"))
    options = DivergenceOptions(
        **_of_both(temperature=temperature, softcap=softcap, logit_scale=logit_scale),
        k=k,
        support=support,
        tail=tail,
        chunk_size=checks.chunk_rows(chunk_size),
    )
    inputs = under_autocast(
        DivergenceInputs(
            student_hidden,
            student_lm_head,
            student_bias,
            teacher_hidden,
            teacher_lm_head,
            teacher_bias,
            token_weights,
            token_ids,
            allowed_columns,
        )
    )
    checks.check_divergence(inputs, options, check)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= inputs.num_columns:
        raise ValueError(f"k is {k!r}, expected an integer in [1, {inputs.num_columns}]")
    return _divergence(inputs, options, "sum")


def _of_both(**logit_options: Any) -> dict[str, Any]:
    """Options of the student's and the teacher's logits, from values for both or pairs."""
    options = {}
    for name, value in logit_options.items():
        pair = value if isinstance(value, tuple) else (value, value)
        if len(pair) != 2:
            raise ValueError(f"{name} is {value}, expected a number or a pair of two")
        for side in pair:
            checks.check_positive(name, side)
        options |= {name: pair[0], f"teacher_{name}": pair[1]}
    return options


def _divergence(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    reduction: str,
    shard: Shard | None = None,
) -> LinearKLOutput:
    needs_grad = NeedsGrad.of(inputs.student)
    num_details, support = 3 + (inputs.token_ids is not None), None
    if options.mode == "lowmem":
        if shard is None:
            token_kl, *others = ops.lowmem(*inputs, *options)
        else:
            token_kl, *others = ops.ShardedLowmem.apply(*inputs.student, inputs, options, shard)
        details = [token_kl, *others][:num_details]
        loss = token_kl
        if inputs.token_weights is not None:
            loss = loss * inputs.token_weights.to(loss.dtype)
        if reduction == "sum":
            loss = loss.sum()
    elif options.mode == "sparse":
        loss, details, support = _sparse(inputs, options, needs_grad)
    elif torch.compiler.is_compiling():
        loss, *results = ops.fast(*inputs, *options, *needs_grad)
        details = results[:num_details]
    else:
        computed = divergence.fast(inputs, options, needs_grad, shard)
        loss, *details = LossWithGradients.apply(computed, *inputs.student)
    token_kl, student_entropy, teacher_entropy, *logprobs = (value.detach() for value in details)
    return LinearKLOutput(
        loss=loss,
        token_kl=token_kl,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_logprobs=logprobs[0] if logprobs else None,
        plan=plan_of(inputs, options, needs_grad, shard),
        support=support,
    )


def _sparse_loss(
    inputs: DivergenceInputs, options: DivergenceOptions, needs_grad: NeedsGrad
) -> tuple[Tensor, list[Tensor], Support]:
    """Loss, details and support."""
    computed, support = sparse(inputs, options, needs_grad)
    loss, *details = LossWithGradients.apply(computed, *inputs.student)
    return loss, details, support


# Sizes depend on data, so that torch.compile breaks the graph here.
_sparse: Any = torch.compiler.disable(_sparse_loss)


def _sharded_divergence(
    inputs: DivergenceInputs,
    options: DivergenceOptions,
    reduction: str,
    group: ProcessGroup,
    check: bool,
) -> LinearKLOutput:
    if options.mode == "sparse":
        raise ValueError("mode is 'sparse', expected 'fast' or 'lowmem' with a group")
    ids = inputs.token_ids
    shard = agree(
        group,
        {"student_": inputs.student, "teacher_": inputs.teacher},
        inputs.allowed_columns,
        None if ids is None else counted(ids, inputs.token_weights),
        (options, reduction),
        lambda: checks.check_divergence(inputs, options, check, sharded=True),
    )
    return _divergence(inputs, options, reduction, shard)


_sharded: Any = torch.compiler.disable(_sharded_divergence)

"""Attention in two parts against the definition, in fp64, and its calls of a GPU's kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opd.models import fused_attention
from opd.models.branches import Branches, attend_branches

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, PREFIX = 4, 2, 8, 11
# groups, prompts, rollouts, new tokens of a branch, all tokens of a branch, differ in what they see
CASES = [
    (1, 1, 3, 5, 5, False),
    (2, 3, 2, 4, 4, True),
    (3, 1, 2, 6, 6, True),
    (2, 2, 2, 1, 7, True),
    (1, 1, 4, 1, 3, False),
    (1, 1, 1, 9, 9, False),
]


def inputs_of(
    case: tuple[Any, ...], dtype: torch.dtype, device: torch.device = CPU
) -> tuple[list[Tensor], Branches]:
    """Query, the prefix's key and value, the branches' key and value; and the layout."""
    groups, prompts, rollouts, steps, tokens, differ = case
    generator = torch.Generator().manual_seed(len(case) + steps)
    branch = groups * prompts * rollouts, KV_HEADS, tokens, DIM
    prefix = groups, KV_HEADS, PREFIX, DIM
    query = groups, HEADS, prompts * rollouts * steps, DIM
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for shape in (query, prefix, prefix, branch, branch)
    ]
    seen = torch.rand(groups, prompts, PREFIX, generator=generator) > 0.4
    seen[..., 3] = True
    return tensors, Branches(prompts, rollouts, steps, seen.to(device) if differ else None)


def in_two_parts(tensors: list[Tensor], layout: Branches, scale: float | None = None) -> Tensor:
    query, past_key, past_value, own_key, own_value = tensors
    prepared = layout.prepared(query.dtype, HEADS // KV_HEADS)
    return attend_branches(query, (past_key, own_key), (past_value, own_value), prepared, scale)


def by_definition(tensors: list[Tensor], layout: Branches, scale: float | None = None) -> Tensor:
    """One token after the other: softmax over the columns that it sees."""
    query, past_key, past_value, own_key, own_value = tensors
    earlier = own_key.shape[2] - layout.steps
    out = torch.empty_like(query)
    for group in range(len(query)):
        for row in range(query.shape[2]):
            branch, position = divmod(row, layout.steps)
            sees = torch.ones(PREFIX, dtype=torch.bool)
            if layout.seen is not None:
                sees = layout.seen[group, branch // layout.rollouts]
            own = group * layout.count + branch, slice(None), slice(earlier + position + 1)
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                key = torch.cat([past_key[group, kv_head][sees], own_key[own][kv_head]])
                value = torch.cat([past_value[group, kv_head][sees], own_value[own][kv_head]])
                scores = key @ query[group, head, row] * (DIM**-0.5 if scale is None else scale)
                out[group, head, row] = scores.softmax(0) @ value
    return out


def gradients_of(
    attention: Any, case: tuple[Any, ...], dtype: torch.dtype, device: torch.device = CPU
) -> list[Tensor]:
    """The output and every gradient, for a fixed cotangent."""
    tensors, layout = inputs_of(case, dtype, device)
    out = attention(tensors, layout)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(device, dtype)
    return [out, *torch.autograd.grad(out, tensors, cotangent)]


def errors(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(
        float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max()) for a, b in pairs
    )


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_definition(case: tuple[Any, ...]) -> None:
    expected = gradients_of(by_definition, case, torch.float64)
    assert errors(gradients_of(in_two_parts, case, torch.float64), expected) < 1e-13
    rounded = gradients_of(in_two_parts, case, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in rounded)
    assert errors(rounded, expected) < 0.15
    tensors, layout = inputs_of(case, torch.float64)
    actual = in_two_parts(tensors, layout, 0.7)
    assert errors([actual], [by_definition(tensors, layout, 0.7)]) < 1e-13


@pytest.mark.parametrize("case", CASES[:4])
def test_gradients_equal_differences(case: tuple[Any, ...]) -> None:
    tensors, layout = inputs_of(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *some: in_two_parts([*some], layout), tensors, fast_mode=True
    )


def test_the_prefix_is_never_copied() -> None:
    """Prompts that see the same: what is kept for the backward shares the prefix's memory."""
    tensors, layout = inputs_of(CASES[0], torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        in_two_parts(tensors, layout)
    sources = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    new = [x for x in kept if x.untyped_storage().data_ptr() not in sources]
    assert sorted(x.shape for x in new) == sorted([tensors[0].shape, tensors[0].shape[:3]])


class OfAGPU:
    """torch's fused kernels of CUDA in plain torch, called as their schemas say."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch.ops.aten, name).default._schema
        backward = name.endswith("_backward")

        def call(*args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            positional = [a for a in real.arguments if not a.kwarg_only]
            assert len(args) <= len(positional)
            named = dict(zip((a.name for a in positional), args, strict=False)) | kwargs
            assert named.keys() <= {a.name for a in real.arguments}
            assert {a.name for a in real.arguments if not a.has_default_value()} <= named.keys()
            return (self.backward if backward else self.forward)("efficient" in name, **named)

        return call

    @staticmethod
    def scores(query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, float]:
        scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        scores = query @ key.transpose(2, 3) * scale
        if options.get("attn_bias") is not None:
            assert options["attn_bias"].shape == scores.shape
            scores = scores + options["attn_bias"]
        if options["is_causal"]:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return scores, scale

    def forward(self, efficient: bool, query: Any, key: Any, value: Any, **options: Any) -> Any:
        scores, _ = self.scores(query, key, **options)
        out, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
        if not efficient:
            return out, lse, None, None, 0, 0, None, None, None
        assert options["compute_log_sumexp"] or options["compute_logsumexp"]
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)), None, None

    def backward(self, efficient: bool, **named: Any) -> Any:
        query, key, value, out = (named.pop(name) for name in ("query", "key", "value", "out"))
        grad, lse = named.pop("grad_out_" if efficient else "grad_out"), named.pop("logsumexp")
        assert lse.shape[-1] % 32 == 0 if efficient else lse.is_contiguous()
        scores, scale = self.scores(query, key, **named)
        probs = (scores - lse[..., : query.shape[2], None]).exp()
        inner = probs * (grad @ value.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) * scale
        gradients = inner @ key, inner.transpose(2, 3) @ query, probs.transpose(2, 3) @ grad
        return (*gradients, None) if efficient else gradients


@pytest.mark.parametrize("case", CASES)
def test_the_calls_of_a_gpus_kernels(
    case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients_of(by_definition, case, torch.float64)
    stand_in = OfAGPU()
    monkeypatch.setattr(fused_attention, "aten", stand_in)
    monkeypatch.setattr(fused_attention, "_is_cuda", lambda _: True)
    assert errors(gradients_of(in_two_parts, case, torch.float64), expected) < 1e-13
    flash, efficient = (f"_scaled_dot_product_{x}_attention" for x in ("flash", "efficient"))
    past = efficient if case[-1] else flash
    parts = [past, flash]
    assert stand_in.called == parts + [f"{name}_backward" for name in parts]

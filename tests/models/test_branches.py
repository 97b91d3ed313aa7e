"""Attention in parts against the definition, in fp64, and its calls of a GPU's kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.models import fused_attention
from opd.models.branches import Branches, NextTokens, Paths

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 11


@dataclass(frozen=True)
class Tree:
    """Groups of prompts, left-padded to `WIDTH`, and the tokens of each prompt's completions."""

    paths: tuple[Paths, ...]
    lengths: tuple[tuple[int, ...], ...]


def alone(length: int) -> Paths:
    return Paths(length, length, ((length, length),))


CASES = {
    "one prompt": Tree((alone(WIDTH),), ((5, 5, 5),)),
    "one completion": Tree((alone(WIDTH),), ((9,),)),
    "lengths": Tree((alone(WIDTH),), ((1, 6, 0, 3),)),
    "padding": Tree((alone(WIDTH), alone(7), alone(1)), ((2, 3), (4, 1), (0, 5))),
    "queries": Tree((Paths(11, 4, ((4, 7), (7, 8), (8, 11))),), ((2, 3), (1, 1), (4, 2))),
    "groups": Tree(
        (Paths(9, 4, ((4, 7), (7, 9))), Paths(11, 6, ((6, 9), (9, 11)))),
        ((3, 3), (3, 3), (3, 3), (3, 3)),
    ),
    # Of five queries two are left; beside them a prompt alone, and one that nothing continues.
    "taken": Tree(
        (Paths(11, 2, ((3, 5), (8, 9))), alone(6), Paths(10, 5, ((5, 6),))),
        ((2, 0), (3, 1), (1, 4), (0, 0)),
    ),
}


def inputs_of(tree: Tree, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    """Query, the prompts' key and value, the completions' key and value."""
    generator = torch.Generator().manual_seed(len(tree.lengths))
    tokens, groups = sum(map(sum, tree.lengths)), len(tree.paths)
    prompts, own = (groups, KV_HEADS, WIDTH, DIM), (1, KV_HEADS, tokens, DIM)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for shape in ((1, HEADS, tokens, DIM), prompts, prompts, own, own)
    ]


def in_parts(tensors: Sequence[Tensor], tree: Tree, scale: float | None = None) -> Tensor:
    query, past_key, past_value, own_key, own_value = tensors
    layout = Branches.of(tree.paths, WIDTH, tree.lengths, query.device)
    return layout.attend(query, (past_key, own_key), (past_value, own_value), scale)


def seen_by(tree: Tree, prompt: int) -> tuple[int, list[int]]:
    """The group of a prompt, and the columns of its padded sequence that it sees."""
    places = [(group, own) for group, paths in enumerate(tree.paths) for own in paths.own]
    group, (start, stop) = places[prompt]
    padding = WIDTH - tree.paths[group].length
    columns = [*range(tree.paths[group].shared), *range(start, stop)]
    return group, [padding + column for column in columns]


def by_definition(tensors: Sequence[Tensor], tree: Tree, scale: float | None = None) -> Tensor:
    """One token after the other: softmax over the columns that it sees."""
    query, past_key, past_value, own_key, own_value = tensors
    out, scale = torch.empty_like(query), DIM**-0.5 if scale is None else scale
    edges = pairwise([0, *accumulate(length for row in tree.lengths for length in row)])
    for number, (start, stop) in enumerate(edges):
        group, columns = seen_by(tree, number // len(tree.lengths[0]))
        for row in range(start, stop):
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                key = torch.cat([past_key[group, kv][columns], own_key[0, kv, start : row + 1]])
                value = torch.cat(
                    [past_value[group, kv][columns], own_value[0, kv, start : row + 1]]
                )
                scores = key @ query[0, head, row] * scale
                out[0, head, row] = scores.softmax(0) @ value
    return out


def gradients_of(
    attention: Any, tree: Tree, dtype: torch.dtype, device: torch.device = CPU
) -> list[Tensor]:
    """The output and every gradient, for a fixed cotangent."""
    tensors = inputs_of(tree, dtype, device)
    out = attention(tensors, tree)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, tensors, cotangent.to(device, dtype))]


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(
        float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max()) for a, b in pairs
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_output_and_gradients_equal_the_definition(name: str) -> None:
    tree = CASES[name]
    expected = gradients_of(by_definition, tree, torch.float64)
    assert errors(gradients_of(in_parts, tree, torch.float64), expected) < 1e-13
    rounded = gradients_of(in_parts, tree, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in rounded)
    assert errors(rounded, expected) < 0.15
    tensors = inputs_of(tree, torch.float64)
    assert errors([in_parts(tensors, tree, 0.7)], [by_definition(tensors, tree, 0.7)]) < 1e-13


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_differences(name: str) -> None:
    tensors = inputs_of(CASES[name], torch.float64)
    assert torch.autograd.gradcheck(
        lambda *some: in_parts(some, CASES[name]), tensors, fast_mode=True
    )


def test_keys_are_never_copied() -> None:
    """What is kept for the backward shares memory with keys and values as a model makes them, each
    token's heads beside each other."""
    tree = CASES["padding"]
    tensors = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in inputs_of(tree, torch.float64)
    ]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        in_parts(tensors, tree)
    sources = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    new = [x for x in kept if x.untyped_storage().data_ptr() not in sources]
    tokens = tensors[0].shape[2]
    assert sorted(x.shape for x in new) == [(tokens, HEADS), (tokens, HEADS, DIM)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("filled", [3, 5])
def test_next_tokens_equal_the_definition(whole: bool, filled: int) -> None:
    """The last token of completions in two groups, of whose cache of 5 tokens 3 are filled."""
    groups, count = 2, 3
    generator = torch.Generator().manual_seed(0)
    own = groups * count, KV_HEADS, 5, DIM
    query, past_key, past_value, own_key, own_value = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((groups, HEADS, count, DIM), *[(groups, KV_HEADS, WIDTH, DIM)] * 2, own, own)
    )
    seen = torch.rand(groups, count, WIDTH, generator=generator) > 0.4
    seen[..., 3] = True
    layout = NextTokens(count, None if whole else seen).prepared(query.dtype, HEADS // KV_HEADS)
    hidden = torch.arange(5) < filled
    if filled < 5:
        mask = fused_attention.added_to_scores(hidden[None, None, None], query.dtype)
        layout = replace(layout, own=mask)
    actual = layout.attend(query, (past_key, own_key), (past_value, own_value))
    for group, branch, head in torch.cartesian_prod(*map(torch.arange, (groups, count, HEADS))):
        columns = torch.ones(WIDTH, dtype=torch.bool) if whole else seen[group, branch]
        kv, row = head // (HEADS // KV_HEADS), group * count + branch
        key = torch.cat([past_key[group, kv][columns], own_key[row, kv, :filled]])
        value = torch.cat([past_value[group, kv][columns], own_value[row, kv, :filled]])
        scores = key @ query[group, head, branch] * DIM**-0.5
        assert errors([actual[group, head, branch]], [scores.softmax(0) @ value]) < 1e-14


class OfAGPU:
    """torch's fused kernels of CUDA in plain torch, called as their schemas say."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch.ops.aten, name).default._schema

        def call(*args: Any, **kwargs: Any) -> Any:
            positional = [a for a in real.arguments if not a.kwarg_only]
            assert len(args) <= len(positional)
            named = dict(zip((a.name for a in positional), args, strict=False)) | kwargs
            assert named.keys() <= {a.name for a in real.arguments}
            assert {a.name for a in real.arguments if not a.has_default_value()} <= named.keys()
            packed = named.get("cum_seq_q") is not None
            self.called.append(name + " packed" * packed)
            backward = name.endswith("_backward")
            if "efficient" in name:
                return self.efficient_backward(**named) if backward else self.efficient(**named)
            assert named["dropout_p"] == 0
            run = self.flash_backward if backward else self.flash
            return self.each(run, **named) if packed else self.whole(run, **named)

        return call

    @staticmethod
    def scores(query: Tensor, key: Tensor, **options: Any) -> tuple[Tensor, float]:
        """Of `[..., L, D]` and `[..., n, D]`."""
        scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        scores = query @ key.transpose(-2, -1) * scale
        if options.get("attn_bias") is not None:
            assert options["attn_bias"].shape == scores.shape
            scores = scores + options["attn_bias"]
        if options["is_causal"]:
            assert scores.shape[-1] == scores.shape[-2]
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return scores, scale

    def efficient(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        scores, _ = self.scores(query, key, **options)
        assert options["compute_log_sumexp"] or options["compute_logsumexp"]
        lse = scores.logsumexp(-1)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
        return scores.softmax(-1) @ value, padded, None, None

    def gradients(self, grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, **o: Any):
        scores, scale = self.scores(query, key, **o)
        probs = (scores - lse[..., None]).exp()
        inner = probs * (grad @ value.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True))
        inner = inner * scale
        return inner @ key, inner.transpose(-2, -1) @ query, probs.transpose(-2, -1) @ grad

    def efficient_backward(self, query: Any, logsumexp: Any, grad_out_: Any, **named: Any) -> Any:
        assert logsumexp.shape[-1] % 32 == 0
        sides = (named.pop(name) for name in ("key", "value", "out"))
        lse = logsumexp[..., : query.shape[2]]
        return *self.gradients(grad_out_, query, *sides, lse, **named), None

    # FlashAttention: `[L, heads, D]`, of one sequence; query heads may share keys.

    def flash(self, query: Any, key: Any, value: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not len(key):  # as the real kernel: nothing, and +inf, which must not be merged
            nothing = query.new_full(query.shape, torch.nan)
            return nothing, query.new_full(query.shape[1::-1], torch.inf)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        scores, _ = self.scores(query.transpose(0, 1), key, **options)
        return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1)

    def flash_backward(
        self, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, **o: Any
    ) -> tuple[Tensor, ...]:
        groups = query.shape[1] // key.shape[1]
        repeated = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        rows = [x.transpose(0, 1) for x in (grad_out, query)]
        own = self.gradients(*rows, *repeated, out.transpose(0, 1), logsumexp, **o)
        d_query, d_key, d_value = (x.transpose(0, 1) for x in own)
        d_key, d_value = (x.unflatten(1, (-1, groups)).sum(2) for x in (d_key, d_value))
        return d_query, d_key, d_value

    @staticmethod
    def whole(run: Any, **named: Any) -> Any:
        """`[1, L, heads, D]`: the first result alone has rows to check."""
        assert (named["max_q"], named["max_k"]) == (named["query"].shape[1], named["key"].shape[1])
        if "logsumexp" in named:
            assert named["logsumexp"].is_contiguous()
        sides = {name: x[0] for name, x in named.items() if isinstance(x, Tensor) and x.dim() > 2}
        return tuple(x[None] for x in run(**named | sides))

    @staticmethod
    def each(run: Any, **named: Any) -> Any:
        """Packed sequences: each by itself, into memory that nothing has written."""
        rows, keys = named["cum_seq_q"], named["cum_seq_k"]
        assert rows.dtype == keys.dtype == torch.int32 and rows.shape == keys.shape
        assert rows[-1] == len(named["query"]) and keys[-1] == len(named["key"])
        pairs = [*zip(pairwise(rows.tolist()), pairwise(keys.tolist()), strict=True)]
        longest = [max(b - a for a, b in some) for some in zip(*pairs, strict=True)]
        assert longest == [named["max_q"], named["max_k"]]
        backward = "logsumexp" in named
        of_rows = ("query", "grad_out", "out") if backward else ("query",)
        shapes = (
            [named[name].shape for name in ("query", "key", "value")]
            if backward
            else [named["query"].shape, named["query"].shape[1::-1]]
        )
        results = [named["query"].new_full(shape, torch.nan) for shape in shapes]
        for (first, last), (start, stop) in pairs:
            sides = {name: named[name][first:last] for name in of_rows}
            sides |= {name: named[name][start:stop] for name in ("key", "value")}
            if backward:
                sides["logsumexp"] = named["logsumexp"][:, first:last]
            own = run(**named | sides)
            results[0][first:last] = own[0]
            if backward:
                results[1][start:stop], results[2][start:stop] = own[1:]
            else:
                results[1][:, first:last] = own[1]
        return tuple(results)


@pytest.fixture
def of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> OfAGPU:
    stand_in = OfAGPU()
    monkeypatch.setattr(fused_attention, "aten", stand_in)
    monkeypatch.setattr(fused_attention, "_is_cuda", lambda _: True)
    return stand_in


@pytest.mark.parametrize("name", CASES)
def test_the_calls_of_a_gpus_kernels(name: str, of_a_gpu: OfAGPU) -> None:
    tree = CASES[name]
    expected = gradients_of(by_definition, tree, torch.float64)
    assert errors(gradients_of(in_parts, tree, torch.float64), expected) < 1e-13
    # Trunk, completions and, with several queries, these; packed where there are several ranges.
    packed = {"one completion": [False, False], "one prompt": [False, True]}
    packed |= {"lengths": [False, True], "padding": [True, True], "queries": [False, True, True]}
    parts = packed.get(name, [True, True, True])
    forward = ["_flash_attention_forward" + " packed" * several for several in parts]
    backward = ["_flash_attention_backward" + " packed" * several for several in parts]
    assert sorted(of_a_gpu.called) == sorted(forward + backward)


@pytest.mark.parametrize("name", CASES)
def test_fp32_on_a_gpu(name: str, of_a_gpu: OfAGPU) -> None:
    """Its FlashAttention does not take fp32: one call of another kernel for each range."""
    tree = CASES[name]
    expected = gradients_of(by_definition, tree, torch.float64)
    assert errors(gradients_of(in_parts, tree, torch.float32), expected) < 1e-5
    assert all("efficient" in called for called in of_a_gpu.called)

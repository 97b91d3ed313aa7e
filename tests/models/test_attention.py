"""Both attention functions against the definition and against the stock modules, in fp64."""

import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import modeling_flash_attention_utils as flash

from opd.config.models import ModelConfig
from opd.distributed import announce
from opd.errors import ModelError
from opd.models import liger
from opd.models.attention import PACKAGES, attend, choose, not_importable, vision_attention
from opd.models.attention import fails as on_gpu
from opd.models.load import load_options, prepare
from tests.helpers import (
    FAMILIES,
    batch_of,
    build,
    gradients,
    ours,
    prefill_of,
    relative,
    stock,
    unequal_prompts,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WITHIN = 1e-13


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention `[B, L, heads, D]` by definition, head by head."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].transpose(1, 2) * scale
        if mask is not None:
            low = torch.full_like(scores, -torch.inf)
            scores = (
                torch.where(mask[:, 0], scores, low)
                if mask.dtype == torch.bool
                else scores + mask[:, 0]
            )
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, head // groups])
    return torch.stack(heads, 2)


def inputs(length: int, keys: int, heads: int, kv_heads: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value that require grad, and a cotangent of the output."""
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)

    leaves = [randn(heads, length), randn(kv_heads, keys), randn(kv_heads, keys)]
    return [x.requires_grad_() for x in leaves], randn(heads, length).transpose(1, 2)


def check(
    leaves: list[Tensor], cotangent: Tensor, mask: Tensor | None, expected_mask: Tensor | None
) -> None:
    actual, weights = attend(nn.Module(), *leaves, mask, scaling=0.7)
    expected = naive(*leaves, expected_mask, 0.7)
    assert weights is None
    assert actual.is_contiguous()
    assert relative(actual, expected) < WITHIN
    for grad, truth in zip(
        torch.autograd.grad(actual, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        assert relative(grad, truth) < WITHIN


HEADS = [(4, 4), (4, 2), (6, 2), (3, 1)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_without_mask_it_is_causal(heads, kv_heads):
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    check(*inputs(7, 7, heads, kv_heads), None, causal)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_one_query_without_mask_sees_every_key(heads, kv_heads):
    check(*inputs(1, 7, heads, kv_heads), None, None)


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("additive", [False, True])
def test_mask_of_each_row_of_the_batch(heads, kv_heads, additive):
    # Fewer queries than keys, as in extend; no row is empty.
    mask = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    if additive:
        mask = torch.where(mask, 0.3 * torch.arange(9.0).double(), -torch.inf)
    check(*inputs(5, 9, heads, kv_heads), mask, mask)


def test_keys_and_values_are_not_repeated_for_a_group(monkeypatch):
    shapes = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        shapes.append((query.shape, key.shape, key.data_ptr(), options.get("enable_gqa", False)))
        return real(query, key, value, **options)

    monkeypatch.setattr("opd.models.attention.scaled_dot_product_attention", spy)
    (query, key, value), _ = inputs(5, 9, 6, 2)
    attend(nn.Module(), query, key, value, torch.ones(2, 1, 5, 9, dtype=torch.bool))
    assert shapes == [((2, 2, 15, 8), (2, 2, 9, 8), key.data_ptr(), False)]


def segments(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(8, 8, 8), (8,), (4, 8, 4, 12, 8), (1, 3)])
@pytest.mark.usefixtures("exact_modules")
def test_vision_attention_equals_the_stock_module(family, lengths):
    attention = stock("student", family, trainable="all").model.visual.blocks[0].attn
    size, head_dim = sum(lengths), attention.head_dim
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size, attention.qkv.in_features, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    angles = torch.rand(size, head_dim // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
    rotary = angles.cos(), angles.sin()
    cotangent = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    expected = attention(hidden, cu_seqlens=segments(*lengths), position_embeddings=rotary)
    actual = vision_attention(attention, hidden, segments(*lengths), rotary)
    assert relative(actual, expected) < WITHIN
    leaves = [hidden, *attention.parameters()]
    for grad, truth in zip(
        torch.autograd.grad(actual, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        # In segments of one token, queries and keys get no gradient to compare with.
        assert float((grad - truth).abs().max()) < WITHIN * max(1.0, float(truth.abs().max()))


def grids(family: str) -> list[tuple[int, int, int]]:
    """Videos of unequal size, in patches; Qwen2.5-VL cuts 6 x 10 into windows of 16, 8 and 4."""
    return [(2, 4, 4), (1, 6, 10)] if family == "qwen2_5_vl" else [(2, 4, 4), (3, 2, 6)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("exact_modules")
def test_vision_tower_equals_the_stock_tower_on_ragged_videos(family):
    lm, model = ours("student", family), stock("student", family)
    grid = torch.tensor(grids(family))
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(grid.prod(1).sum()), width, generator=generator, dtype=torch.float64)
    embeds, deepstack = lm.encode_video(pixels, grid)
    expected = model.model.visual(pixels, grid_thw=grid)
    assert relative(embeds, expected.pooler_output) < WITHIN
    levels = getattr(expected, "deepstack_features", None) or []
    assert len(deepstack) == len(levels) == (1 if family == "qwen3_vl" else 0)
    for level, truth in zip(deepstack, levels, strict=True):
        assert relative(level, truth) < WITHIN
    sizes = grid.prod(1).tolist()
    for video, patches, together in zip(
        grid, pixels.split(sizes), embeds.split([size // 4 for size in sizes]), strict=True
    ):
        assert relative(together, lm.encode_video(patches, video[None])[0]) < WITHIN


def test_windows_of_the_ragged_video_are_ragged(monkeypatch):
    # Otherwise the test above would not reach the grouping by length.
    lm = ours("student", "qwen2_5_vl")
    seen = []
    block = lm.visual.blocks[0].attn

    def spy(hidden, cu_seqlens, **options):
        seen.extend((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
        return vision_attention(block, hidden, cu_seqlens, **options)

    monkeypatch.setattr(block, "forward", spy)
    pixels = torch.zeros(92, 3 * 2 * 14 * 14, dtype=torch.float64)
    lm.encode_video(pixels, torch.tensor(grids("qwen2_5_vl")))
    assert seen == [16, 16, 16, 16, 8, 8, 8, 4]


def test_one_call_for_each_distinct_length(monkeypatch):
    attention = build("student").model.visual.blocks[0].attn
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append(tuple(query.shape[::2]))
        return real(query, key, value, **options)

    monkeypatch.setattr("opd.models.attention.scaled_dot_product_attention", spy)
    hidden = torch.ones(36, attention.qkv.in_features, dtype=torch.float64)
    rotary = torch.ones(36, attention.head_dim), torch.zeros(36, attention.head_dim)
    vision_attention(attention, hidden, segments(4, 8, 4, 12, 8), rotary)
    assert sorted(calls) == [(1, 12), (2, 4), (2, 8)]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("length", [1, 5])
def test_backends_without_a_mask_are_the_definition(
    backend: str, heads: int, kv_heads: int, length: int
) -> None:
    leaves, cotangent = inputs(length, length, heads, kv_heads)
    actual, _ = attend(nn.Module(), *leaves, None, scaling=0.7, backend=backend)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    expected = naive(*leaves, causal, 0.7)
    assert relative(actual, expected) < WITHIN
    for grad, truth in zip(
        torch.autograd.grad(actual, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        assert relative(grad, truth) < WITHIN or truth.abs().max() < WITHIN


CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend that FlashAttention packages are installed: stand-in modules, whose innermost
    functions compute in plain torch, behind transformers' own dispatch."""

    def install(*backends: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(flash, "_loaded_implementation", None)
        not_importable.cache_clear()
        on_gpu.cache_clear()
        names = [PACKAGES[backend] for backend in backends]

        def version(name: str) -> str:
            if name == "transformers":
                return transformers.__version__
            if name in names:
                return "9.9"
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr("opd.models.attention.metadata.version", version)
        for backend, (path, *others) in MODULES.items():
            check = f"is_flash_attn_{backend[-1]}_available"
            for owner in (transformers.utils, flash):
                monkeypatch.setattr(owner, check, lambda there=backend in backends: there)
            if backend in backends:
                for name in (path, *others):
                    monkeypatch.setitem(sys.modules, name, stand_in(name))

    # What a GPU would run, the stand-ins run on the CPU; for torch's own function there is none.
    on_cpu = lambda backend, _: None if backend == "varlen" else on_gpu(backend, CPU)  # noqa: E731
    monkeypatch.setattr("opd.models.attention.fails", on_cpu)
    announce.cache_clear()
    yield install
    not_importable.cache_clear()
    on_gpu.cache_clear()


MODULES = {
    "flash_attention_2": ("flash_attn", "flash_attn.bert_padding"),
    "flash_attention_3": ("flash_attn_interface",),
    "flash_attention_4": ("flash_attn.cute", "flash_attn"),
}
CALLS: list[tuple[str, bool]] = []  # of the stand-ins: function, whether causal


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """The package's function for batches `[B, L, heads, D]`."""
    CALLS.append(("dense", causal))
    rows = q.shape[1]
    mask = torch.ones(rows, k.shape[1], dtype=torch.bool)
    mask = (mask.tril() if causal else mask)[None, None]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return naive(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The package's function for packed `[S, heads, D]`; rejects what the CUDA kernel rejects."""
    CALLS.append(("varlen", causal))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    parts = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        sides = (x[start:end][None] for x in (q, k, v))
        parts.append(flash_attn_func(*sides, softmax_scale=softmax_scale, causal=causal)[0])
        CALLS.pop()
    return torch.cat(parts)


def stand_in(name: str) -> ModuleType:
    """Stand-in for a module of a FlashAttention package."""
    module = ModuleType(name)
    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(module, function.__name__, function)
    for unused in ("flash_attn_with_kvcache", "pad_input", "unpad_input"):
        setattr(module, unused, lambda *_, **__: pytest.fail("called"))
    return module


def test_auto_takes_the_first_usable_backend(installed, capsys) -> None:
    assert choose("model.attention", "auto", CPU, torch.float32) == "sdpa"
    installed("flash_attention_2", "flash_attention_4")
    assert choose("model.attention", "auto", GPU, BF16) == "flash_attention_4"
    installed("flash_attention_2", "flash_attention_4", capability=(8, 0))
    assert choose("model.attention", "auto", GPU, BF16) == "flash_attention_2"
    installed()
    assert choose("model.attention", "auto", GPU, BF16) == "varlen"
    # FlashAttention has no fp32 kernels.
    assert choose("model.attention", "auto", GPU, torch.float32) == "sdpa"
    assert capsys.readouterr().err == ""


def test_the_reason_for_an_unusable_backend_is_named(installed) -> None:
    message = (
        "^model.attention=flash_attention_2: needs a CUDA device, this is cpu; "
        "usable here: sdpa, eager$"
    )
    with pytest.raises(ValueError, match=message):
        choose("model.attention", "flash_attention_2", CPU, torch.float32)
    with pytest.raises(ModelError, match=r"^model.vision_attention=varlen: needs a CUDA"):
        load_options(ModelConfig(vision_attention="varlen"), CPU)
    installed("flash_attention_2", "flash_attention_4", capability=(8, 0))
    with pytest.raises(ValueError, match="flash_attention_4: needs Hopper or later; usable here"):
        choose("model.attention", "flash_attention_4", GPU, BF16)
    with pytest.raises(ValueError, match=r"not installed \(pip install flash-attn-3\)"):
        choose("model.attention", "flash_attention_3", GPU, BF16)
    with pytest.raises(ValueError, match="flash_attention_2: needs bfloat16"):
        choose("model.attention", "flash_attention_2", GPU, torch.float32)


def test_a_broken_package_is_named_with_its_error(installed, monkeypatch, capsys) -> None:
    """Installed, but built for another torch: `auto` reports it and falls back."""
    installed("flash_attention_2")
    monkeypatch.delitem(sys.modules, "flash_attn.bert_padding")
    broken = r"flash_attention_2 is broken: flash-attn 9.9 raises ModuleNotFoundError: No module"
    for _ in range(2):
        assert choose("model.attention", "auto", GPU, BF16) == "varlen"
    message = capsys.readouterr().err
    assert re.match(rf"^model.attention=auto: {broken} .*; using varlen\n$", message)
    with pytest.raises(ValueError, match=r"^model.attention=flash_attention_2: broken: flash-attn"):
        choose("model.attention", "flash_attention_2", GPU, BF16)


def test_a_package_without_a_backward_is_named(installed, monkeypatch, capsys) -> None:
    installed("flash_attention_2")

    def forward_only(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                raise RuntimeError("This flash attention build does not support backward.")

        return Attention.apply(q)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", forward_only)
    assert choose("model.attention", "auto", GPU, BF16) == "varlen"
    error = capsys.readouterr().err
    assert "broken: a forward and backward raise RuntimeError: This flash attention" in error
    with pytest.raises(ValueError, match=r"^model.attention=flash_attention_2: broken: a forward"):
        choose("model.attention", "flash_attention_2", GPU, BF16)


def test_a_package_that_transformers_refuses_is_named(installed, monkeypatch, capsys) -> None:
    installed("flash_attention_2")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    not_importable.cache_clear()
    assert choose("model.attention", "auto", GPU, BF16) == "varlen"
    assert "flash-attn 9.9 is installed, which transformers" in capsys.readouterr().err


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_through_the_dispatch_of_transformers(
    backend: str, family: str, installed
) -> None:
    """Each FlashAttention backend equals sdpa on prompts and videos, gradients included."""
    installed(backend)
    CALLS.clear()
    plain = ours("student", family, trainable="all")
    batch = batch_of(unequal_prompts(plain))
    packed = prepare(build("student", family), backend, backend)
    packed.train_only("all")
    prefixes = [prefill_of(lm, batch) for lm in (packed, plain)]
    assert set(CALLS) == {("varlen", True), ("varlen", False)}
    actual, expected = prefixes
    assert relative(actual.last_hidden, expected.last_hidden) < 1e-11
    assert relative(actual.keys[-1], expected.keys[-1]) < 1e-11
    for prefix in prefixes:
        (prefix.last_hidden.square().sum() + prefix.keys[-1].square().sum()).backward()
    expected_grads = gradients(plain.model)
    for name, grad in gradients(packed.model).items():
        assert relative(grad, expected_grads[name]) < 1e-9, name


@pytest.mark.parametrize("takes_groups", [True, False])  # torch 2.11 does not
@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_packed_attention(takes_groups: bool, family: str, monkeypatch) -> None:
    calls: list[bool] = []

    def varlen(*args: Any, scale: float, window_size: Any) -> Tensor:
        query, key, _, edges, others, longest, also = args
        assert others is edges and also == longest == int(edges.diff().max())
        calls.append({(-1, 0): True, (-1, -1): False}[window_size])
        assert takes_groups or query.shape[1] == key.shape[1]
        return flash_attn_varlen_func(*args, softmax_scale=scale, causal=calls[-1])

    def with_groups(*args: Any, scale: float, window_size: Any, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
        return varlen(*args, scale=scale, window_size=window_size)

    function = with_groups if takes_groups else varlen
    monkeypatch.setattr("opd.models.attention._varlen", lambda: function)
    plain = ours("student", family)
    batch = batch_of(unequal_prompts(plain))
    expected = prefill_of(plain, batch)
    packed = prepare(build("student", family), "varlen", "varlen")
    packed.train_only("language")
    actual = prefill_of(packed, batch)
    assert set(calls) == {True, False}
    assert relative(actual.last_hidden, expected.last_hidden) < 1e-11
    assert relative(actual.keys[-1], expected.keys[-1]) < 1e-11


def test_masked_attention_never_reaches_cudnn(monkeypatch) -> None:
    """cuDNN would build a plan for every key length of a decode loop."""
    enabled = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*sides: Tensor, **options: Any) -> Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*sides, **options)

    monkeypatch.setattr("opd.models.attention.scaled_dot_product_attention", spy)
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 16, device="cuda", dtype=BF16)
        keys = torch.empty(2, 2, 9, 16, device="cuda", dtype=BF16)
        mask = torch.ones(2, 1, 5, 9, dtype=torch.bool, device="cuda")
        out, _ = attend(nn.Module(), query, keys, keys, mask)
    assert out.shape == (2, 5, 4, 16)
    assert enabled == [False]


def test_liger_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not liger.is_enabled("auto", cpu) and not liger.is_enabled("off", gpu)
    with pytest.raises(ModelError, match=r"^model.liger=on: needs a CUDA device, this is cpu$"):
        load_options(ModelConfig(liger="on"), cpu)
    monkeypatch.setattr(liger, "find_spec", lambda _: object())
    monkeypatch.setattr(liger, "_modules", lambda: None)
    assert liger.is_enabled("auto", gpu) and liger.is_enabled("on", gpu)
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    assert not liger.is_enabled("auto", gpu)
    with pytest.raises(ValueError, match=r"not installed \(pip install liger-kernel\)$"):
        liger.is_enabled("on", gpu)


def test_a_broken_liger_is_named_with_its_error(monkeypatch, capsys) -> None:
    def broken() -> None:
        raise ImportError("cannot import name 'x' from 'triton'\nmore")

    announce.cache_clear()
    monkeypatch.setattr(liger, "find_spec", lambda _: object())
    monkeypatch.setattr(liger, "_modules", broken)
    assert not liger.is_enabled("auto", GPU) and not liger.is_enabled("off", GPU)
    reason = "broken: importing it raises ImportError: cannot import name 'x' from 'triton'"
    message = f"model.liger=auto: liger-kernel is {reason}; using the stock modules\n"
    assert capsys.readouterr().err == message
    with pytest.raises(ValueError, match=f"^model.liger=on: {reason}$"):
        liger.is_enabled("on", GPU)

"""Memory accounting on the meta device: the bytes of live tensors, and their peak.

`Live` counts tensors as they are allocated and freed. Attention and loss are stand-ins that
allocate what the fused kernels allocate.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from opd.models.attention import attend

MASKS = "attention masks"
JOINED = "keys and values, joined"
GRADIENTS = "gradients in the model's dtype"
# Bytes of logits and their gradient that a loss keeps at once, as in `fused_kl.tiles`.
LOGIT_BYTES = {"cpu": 160_000_000, "cuda": 2_400_000_000}


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """All values in nested tuples and lists."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def _description(value: Any) -> Any:
    """What the shape of a function's result depends on: hashable, for a tensor its metadata."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    return type(value), value


class Live(TorchDispatchMode):
    """Context that counts the bytes of meta tensors allocated inside it, while they are alive.

    `now` has the bytes by label. `peaks` has for each moment (`moment`) the bytes by label at the
    time when their sum was largest. A tensor's label is that of the `label` context in which it was
    allocated, or else that of the moment. Storages of `weights` are not counted.
    """

    def __init__(self, weights: Iterable[torch.Tensor], device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        weights = list(weights)
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._shapes = {tuple(sorted(weight.shape)) for weight in weights if weight.ndim > 1}
        self._alive: dict[int, tuple[str, int, Any]] = {}
        self._total = self._largest = 0
        self._results: dict[Any, Any] = {}  # of function calls: shape, stride and dtype
        self._moment = self._label = ""

    @contextmanager
    def moment(self, name: str, label: str = "") -> Iterator[None]:
        """Context of one part of a step, with a peak of its own; `label` is for new tensors."""
        self._moment, self._label = name, label
        self._largest = -1
        self.note(0)
        yield
        self._moment = ""

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Context in which new tensors are counted under this name."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def note(self, scratch: int) -> None:
        """Update the moment's peak from the live tensors and a kernel's `scratch` bytes."""
        if self._moment and self._total + scratch > self._largest:
            self._largest = self._total + scratch
            self.peaks[self._moment] = dict(self.now)
            if scratch:
                self.peaks[self._moment]["kernels' scratch"] = scratch

    def rename(self, tensor: torch.Tensor, label: str) -> None:
        """Count a live tensor under another label from now on."""
        key = tensor.untyped_storage()._cdata
        before, size, reference = self._alive[key]
        self._alive[key] = label, size, reference
        self.now[before] -= size
        self.now[label] += size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out: Any = self._run(function, args, kwargs or {})
        joins = function is torch.ops.aten.cat.default and out.dim() == 4 and args[1:] == (2,)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor, JOINED if joins else self._label)
        return out

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Result of a function, from the cache of earlier calls with the same shapes.

        Layers repeat the same calls, and torch is slow in inferring shapes. Only results that are
        new tensors, or the first argument changed in place, are cached.
        """
        leaves = list(_leaves((*args, *kwargs.values())))
        key = (function, *(_description(leaf) for leaf in leaves))
        if key in self._results:
            result = self._results[key]
            if result is None:
                return args[0]  # changed in place
            shape, stride, dtype = result
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        out = function(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_meta:
            storages = {x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor)}
            if args and out is args[0] and _description(out) == key[1]:
                self._results[key] = None
            elif out.untyped_storage()._cdata not in storages:
                self._results[key] = out.shape, out.stride(), out.dtype
        return out

    def _count(self, tensor: torch.Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._weights or not size:
            return
        if tensor.dtype == torch.bool or tensor.dim() == 5:  # before and after `prepared_mask`
            label = MASKS
        elif self._moment == "backward" and tuple(sorted(tensor.shape)) in self._shapes:
            label = GRADIENTS
        self._alive[key] = label, size, weakref.ref(storage, partial(self._freed, key))
        self.now[label] += size
        self._total += size
        self.note(0)

    def _freed(self, key: int, _: Any) -> None:
        label, size, _reference = self._alive.pop(key)
        self.now[label] -= size
        self._total -= size


def current() -> Live:
    """The innermost active `Live` context."""
    live = _get_current_dispatch_mode()
    assert isinstance(live, Live)
    return live


class FusedAttention(TorchFunctionMode):
    """Context that replaces torch's attention by `_Fused`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args
        return _Fused.apply(query, key, value, (kwargs or {}).get("attn_mask"))


def stand_in_attention(*args: Any, **kwargs: Any) -> Any:
    """The language model's attention, with a stand-in for torch's kernels."""
    with FusedAttention():
        return attend(*args, **kwargs)


def stand_in_vision_attention(
    self: Any, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any
) -> torch.Tensor:
    """Vision attention without segments, which do not change the sizes of its tensors."""
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
    size = len(hidden_states)
    query, key, value = self.qkv(hidden_states).reshape(size, 3, self.num_heads, -1).unbind(1)
    query, key = rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    with FusedAttention():
        out = scaled_dot_product_attention(query, key, value)
    return self.proj(out[0].transpose(0, 1).reshape(size, -1))


class _Fused(torch.autograd.Function):
    """Saves for backward what a fused attention saves: inputs, output and one number per row.

    On a GPU, its backward accumulates in fp32, and keys and values once per query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:  # pyright: ignore
        out = torch.empty_like(query)
        rows = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, mask, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        query, key, value, mask, *_ = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        live = current()
        if live.device_type == "cuda":
            scratch = 4 * query.numel()
            if mask is not None:
                scratch += 4 * (key.numel() + value.numel())
            elif (groups := query.shape[1] // key.shape[1]) > 1:
                scratch += groups * (key.nbytes + value.nbytes)
            live.note(scratch)
        return *gradients, None


def logit_rows(tokens: int, vocab: int, hidden: int, heads: int, half: bool, device: str) -> int:
    """Number of tokens whose logits a loss of `heads` models keeps at once (`fused_kl.tiles`).

    `hidden` is 0 for a frozen head; `half` says that products take bf16 inputs without a copy.
    """
    bytes_per_logit = 4 * heads + 2 * half
    budget = LOGIT_BYTES[device]
    few = hidden * (2 if half else 4) // 4
    if heads == 2 and tokens <= min(few, budget // (vocab * (bytes_per_logit - 4))):
        return tokens
    limit = max(1, budget // (vocab * bytes_per_logit))
    if tokens > limit > 128:
        return limit // 128 * 128
    return -(-tokens // -(-tokens // limit))


class FusedLoss(torch.autograd.Function):
    """Allocates what a fused loss allocates: blocks of logits of `heads` models, and gradients in
    forward, which backward rounds to the model's dtype."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, heads: int
    ) -> torch.Tensor:
        live = current()
        tokens, (vocab, size) = len(hidden), weight.shape
        half = live.device_type == "cuda" and weight.dtype == torch.bfloat16
        trained = weight.requires_grad
        rows = logit_rows(tokens, vocab, size if trained else 0, heads, half, live.device_type)

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        with live.label("logits"):
            logits = [make(rows, vocab) for _ in range(heads)]
            if half:
                logits.append(make(rows, vocab, dtype=torch.bfloat16))
        single = rows >= tokens
        if single and heads == 2:
            del logits[1]
        head_dtype = torch.bfloat16 if half and single else torch.float32
        ctx.gradients = [make(tokens, size), None]
        with live.label("head's gradient (fp32)"):
            ctx.gradients[1] = make(vocab, size, dtype=head_dtype) if trained else None
        ctx.dtype = weight.dtype
        return make()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:  # pyright: ignore
        gradients, ctx.gradients = ctx.gradients, None
        with current().label(GRADIENTS):
            return *(None if g is None else g.to(ctx.dtype) for g in gradients), None

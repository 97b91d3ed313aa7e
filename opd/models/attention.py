"""Attention of the language model and of the vision tower, on the configured backends.

    prompts                      causal attention on the backend
    completions (with a mask)    sdpa with query groups folded: FlashAttention takes no such mask
    completions (as branches)    in parts, without a mask over all of them (`branches`)
    vision                       packed segments on the backend; with sdpa, equal lengths batched

`choose` picks a backend; `auto` announces an installed one that is broken.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash
from transformers import utils as transformers_utils
from transformers.masking_utils import sdpa_mask

from opd.config.models import BACKENDS
from opd.distributed import announce
from opd.errors import raised
from opd.models.branches import Branches, NextTokens
from opd.models.tower import Segments

PACKAGES = {
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_2": "flash-attn",
}
# Without cuDNN, which builds a plan for every shape and stride: tens of milliseconds on the host
# for each key length of a decode loop. The math kernel is the last resort, for fp64.
MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why a backend cannot be used on this device with this dtype; None if it can."""
    if backend in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16, model.dtype is {str(dtype).removeprefix('torch.')}"
    if backend == "varlen":
        if not _varlen():
            return f"torch {torch.__version__} has no varlen_attn with a scale and a window"
        return fails(backend, device)
    capable = torch.cuda.get_device_capability(device) >= (9, 0)
    if (reason := not_importable(backend)) is not None:
        return reason
    if not capable and backend != "flash_attention_2":
        return "needs Hopper or later"
    return fails(backend, device)


@lru_cache
def fails(backend: str, device: torch.device) -> str | None:
    """Reason why a backend cannot be trained with: what eight tokens raise in forward or backward;
    None if they do not. Packages are also built without a backward."""
    try:
        x = torch.zeros(8, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        edges = torch.tensor([0, 8], dtype=torch.int32, device=device)
        packed(backend, x, x, x, edges, 8, None, True).sum().backward()
    except Exception as error:  # of any kind, as in `not_importable`
        return f"broken: a forward and backward raise {raised(error)}"
    return None


@lru_cache
def not_importable(backend: str) -> str | None:
    """Reason why transformers cannot import the package of a FlashAttention backend; None if it
    can. Cached, because transformers 5.17 reports success on a second attempt."""
    package = PACKAGES[backend]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install {package})"
    is_accepted = getattr(transformers_utils, f"is_flash_attn_{backend[-1]}_available", bool)
    if not is_accepted():
        accepted_by = f"transformers {metadata.version('transformers')}"
        return f"broken: {package} {version} is installed, which {accepted_by} does not accept"
    try:
        flash.lazy_import_flash_attention(backend)
    except Exception as error:  # a package compiled for another torch raises almost anything
        return f"broken: {package} {version} raises {raised(error)}"
    return None


def choose(key: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Backend for the configuration's `key`: the requested one, or for `auto` the first usable one,
    announcing those before it that are installed but broken.

    Raises ValueError, one line that names the key, if the requested backend is unusable.
    """
    reasons = {backend: unusable(backend, device, dtype) for backend in BACKENDS}
    usable = [backend for backend, reason in reasons.items() if reason is None]
    if requested == "auto":
        for backend in BACKENDS[: BACKENDS.index(usable[0])]:
            reason = reasons[backend]
            if reason is not None and reason.startswith("broken"):
                announce(f"{key}=auto: {backend} is {reason}; using {usable[0]}")
        return usable[0]
    if (reason := reasons[requested]) is not None:
        raise ValueError(f"{key}={requested}: {reason}; usable here: {', '.join(usable)}")
    return requested


def _varlen() -> Callable[..., torch.Tensor] | None:
    """torch's own variable-length FlashAttention; None where it takes no scale or no window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= parameters.keys() else None  # type: ignore[return-value]


def packed(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    edges: torch.Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """FlashAttention over sequences packed one after the other.

    Args:
        query: `[S, heads, D]`; key and value: `[S, kv_heads, D]`, bf16 or fp16.
        edges: int32 `[sequences + 1]`, the boundaries of the sequences.
        longest: length of the longest sequence.

    Returns: `[S, heads, D]`.
    """
    if backend == "varlen":
        attention = _varlen()
        assert attention is not None
        options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1), "scale": scale}
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in inspect.signature(attention).parameters:
            options["enable_gqa"] = True
        elif groups > 1:  # torch 2.11
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return attention(query, key, value, edges, edges, longest, longest, **options)
    # transformers' public `flash_attention_forward` takes the kernel from the module's
    # configuration, which names our function; this one takes it as an argument.
    forward: Any = flash._flash_attention_forward
    out = forward(
        *(x[None] for x in (query, key, value)),
        attention_mask=None,
        query_length=len(query),
        is_causal=causal,
        softmax_scale=scale,
        cu_seq_lens_q=edges,
        cu_seq_lens_k=edges,
        max_length_q=longest,
        max_length_k=longest,
        attn_implementation=backend,
    )
    return out[0]


def dense(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """Attention over `[B, heads, L, D]` without a mask: torch's fastest kernel, or the plain
    formula (`eager`)."""
    grouped = query.shape[1] != key.shape[1]
    if backend != "eager":
        options: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
        return scaled_dot_product_attention(query, key, value, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return (
        scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        @ value
    )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | Branches | NextTokens | None,
    scaling: float | None = None,
    backend: str = "sdpa",
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function registered with transformers: softmax(q k' scale + mask) v.

    Query heads may share key/value heads, which are never repeated in memory.

    Args:
        query: `[B, heads, L, D]`; key and value: `[B, kv_heads, K, D]`, for branches a pair of
            tensors each.
        attention_mask: `[B, 1, L, K]`, boolean (True attends) or added to the scores, or
            `[B, 1, groups, L, K]` from `prepared_mask`; None is causal where L = K. A mask with
            fewer rows is for the last of the L = K tokens; those before them are causal.

    Returns: `[B, L, heads, D]` and None, as transformers expects.
    """
    if isinstance(attention_mask, Branches | NextTokens):
        out = attention_mask.attend(query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None:
        causal = length == key.shape[2] and length > 1
        if backend in ("sdpa", "eager") or not causal:
            out = dense(backend, query, key, value, scaling, causal)
            return out.transpose(1, 2).contiguous(), None
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        edges = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=query.device)
        out = packed(backend, q, k, v, edges, length, scaling, True)
        return out.view(batch, length, heads, dim), None
    if unmasked := length - attention_mask.shape[-2]:
        q, k, v = (x[:, :, :unmasked] for x in (query, key, value))
        first = attend(module, q, k, v, None, scaling, backend)[0]
        last = attend(module, query[:, :, unmasked:], key, value, attention_mask, scaling)[0]
        return torch.cat([first, last], 1), None
    # Query groups fold into the length: every key/value head is read once and never repeated.
    folded = query.reshape(batch, heads // groups, groups * length, dim)
    mask = attention_mask
    if mask.dim() == 5:
        mask = mask.flatten(2, 3)
    elif groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    with masked_kernels(query.device):
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, length, dim).transpose(1, 2).contiguous(), None


def masked_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """The context of masked attention: on a GPU every kernel of sdpa but cuDNN's."""
    return sdpa_kernel(MASKED_KERNELS) if device.type == "cuda" else nullcontext()


def vision_attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    backend: str = "sdpa",
    segments: Sequence[Segments] = (),
    **_: Any,
) -> torch.Tensor:
    """Vision attention over packed segments, in place of the stock modules' forward.

    One call where the backend takes packed segments, else one batched call per distinct segment
    length. The stock module calls sdpa once per segment: hundreds of calls per layer and batch.

    Args:
        hidden_states: `[S, H]`, segments one after the other.
        cu_seqlens: int32, the boundaries of the segments.
        segments: boundaries whose lengths the host knows; if `cu_seqlens` is not among them, its
            lengths are fetched from the device.
    """
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb_vision
    size = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(size, 3, self.num_heads, -1).unbind(1)
    query, key = rotate(query, key, *position_embeddings)
    own = next((each for each in segments if each.edges is cu_seqlens), None)
    own = own or Segments.of(cu_seqlens)
    if backend not in ("sdpa", "eager"):
        longest = max(own.lengths)
        out = packed(backend, query, key, value, own.edges, longest, self.scaling, False)
        return self.proj(out.reshape(size, -1))
    out = torch.empty_like(query) if len(own.rows_by_length) > 1 else None
    for length, rows in own.rows_by_length.items():
        q, k, v = (
            (x if rows is None else x[rows])
            .view(-1, length, self.num_heads, x.shape[-1])
            .transpose(1, 2)
            for x in (query, key, value)
        )
        part = dense(backend, q, k, v, self.scaling, False).transpose(1, 2).flatten(0, 1)
        out = part if rows is None or out is None else out.index_copy(0, rows, part)
    assert out is not None
    return self.proj(out.reshape(size, -1))


def install(model: PreTrainedModel, text: str = "sdpa", vision: str = "sdpa") -> None:
    """Make `model` use `attend` in its language model and `vision_attention` in its vision tower,
    on the backends `text` and `vision`."""
    name = f"opd{BACKENDS.index(text)}"  # transformers reserves names that contain "flash"
    AttentionInterface.register(name, partial(attend, backend=text))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    for block in model.model.visual.blocks:
        block.attn.forward = partial(vision_attention.__get__(block.attn), backend=vision)

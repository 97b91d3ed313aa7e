"""Liger's RMSNorm, RoPE and SwiGLU (Triton) in the place of the stock modules' forwards, on CUDA.

Bound to the modules one by one: the names in Liger's own patch functions follow other versions of
transformers.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch

from opd.models.attention import announce


def wanted(asked: str, device: torch.device) -> bool:
    """Whether to use them: `auto` says yes where they can be imported and there is a GPU, and
    announces a broken package. ValueError, one line, for `on` where they cannot be used."""
    reason = None if asked == "off" else _unusable(device)
    if asked == "on" and reason is not None:
        raise ValueError(f"model.liger=on: {reason}")
    if reason is not None and reason.startswith("broken"):
        announce(f"model.liger=auto: liger-kernel is {reason}; using the stock modules")
    return asked != "off" and reason is None


def _unusable(device: torch.device) -> str | None:
    """The reason why Liger's modules cannot be used; None if they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if find_spec("liger_kernel") is None:
        return "not installed (pip install liger-kernel)"
    try:
        _modules()
    except Exception as error:  # of a version for another Triton or transformers
        first_line = (str(error).splitlines() or [""])[0]
        return f"broken: importing it raises {type(error).__name__}: {first_line}"
    return None


def _modules() -> tuple[Any, Any, Any]:
    """Liger's RMSNorm, SwiGLU and rotary embedding."""
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    return LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb


def install(language_model: Any) -> None:
    """Make the layers of a Qwen-VL language model use them."""
    rms_norm, swiglu, rotary = _modules()
    # The layers look the function up in their module; it is for all models of the family.
    sys.modules[type(language_model).__module__].apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]
    for name, module in language_model.named_modules():
        if name.endswith("norm"):
            module.offset, module.casting_mode = 0.0, "llama"
            module.in_place, module.row_mode = False, None  # gradients that others may hold
            module.forward = MethodType(rms_norm.forward, module)
        elif name.endswith(".mlp"):
            module.forward = MethodType(swiglu.forward, module)

"""Liger's Triton kernels for RMSNorm, RoPE and SwiGLU in the layers of a language model, on CUDA.

They are bound to the modules one by one: Liger's own patch functions expect the module names of
other versions of transformers.
"""

import sys
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch

from opd.distributed import announce
from opd.errors import raised


def is_enabled(setting: str, device: torch.device) -> bool:
    """Whether `model.liger` (`on`, `off`, `auto`) selects Liger: `auto` does on a GPU where the
    package imports, and announces a broken one.

    Raises ValueError, one line, for `on` where Liger cannot be used.
    """
    reason = None if setting == "off" else _unusable(device)
    if setting == "on" and reason is not None:
        raise ValueError(f"model.liger=on: {reason}")
    if reason is not None and reason.startswith("broken"):
        announce(f"model.liger=auto: liger-kernel is {reason}; using the stock modules")
    return setting != "off" and reason is None


def _unusable(device: torch.device) -> str | None:
    """Reason why Liger cannot be used on this device; None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if find_spec("liger_kernel") is None:
        return "not installed (pip install liger-kernel)"
    try:
        _modules()
    except Exception as error:  # a version for another Triton or transformers raises anything
        return f"broken: importing it raises {raised(error)}"
    return None


def _modules() -> tuple[Any, Any, Any]:
    """Liger's RMSNorm and SwiGLU classes, and its rotary embedding function."""
    from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    return LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb


def install(language_model: Any) -> None:
    """Replace the norms, MLPs and rotary embedding of a Qwen-VL language model by Liger's."""
    rms_norm, swiglu, rotary = _modules()
    # Layers look this function up in their Python module, so all models of the family get it.
    sys.modules[type(language_model).__module__].apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]
    for name, module in language_model.named_modules():
        if name.endswith("norm"):
            module.offset, module.casting_mode = 0.0, "llama"
            module.in_place, module.row_mode = False, None  # others may hold the gradients
            module.forward = MethodType(rms_norm.forward, module)
        elif name.endswith(".mlp"):
            module.forward = MethodType(swiglu.forward, module)

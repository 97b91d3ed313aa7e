"""Loading: a checkpoint folder, hub id, shipped or fresh tiny model, seen through one small
interface."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from opd.config.models import ModelConfig
from opd.errors import ModelError
from opd.files import checksum
from opd.models import attention, liger, tiny
from opd.models.video_lm import Head, VideoLM

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
CHECKSUMS = "checksums.json"
EMBEDDED = Path(__file__).parent / "checkpoints"


def resolve(spec: str, key: str = "") -> str:
    """The folder or hub id that a spec names; ModelError, which names the key, for an unknown
    shipped model or a missing folder."""
    told = f"{key}={spec}" if key else spec
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        if not (EMBEDDED / name / "config.json").is_file():
            raise ModelError(f"{told}: no such shipped model")
        return str(EMBEDDED / name)
    # A hub id is NAME or OWNER/NAME, and no folder here is called OWNER.
    path = Path(spec)
    local = spec.startswith((".", "/")) or len(path.parts) > 2 or path.is_dir()
    local = local or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not (path / "config.json").is_file():
        raise ModelError(f"{told}: no checkpoint folder there (config.json is missing)")
    return spec


def load_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Where, as what and on which kernels `load_model` puts a model: `auto` is bfloat16 on a GPU,
    float32 else."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    try:
        backends = (
            attention.choose("model.attention", config.attention, device, dtype),
            attention.choose("model.vision_attention", config.vision_attention, device, dtype),
        )
        fused = liger.wanted(config.liger, device)
    except ValueError as error:
        raise ModelError(str(error)) from None
    return {"dtype": dtype, "device": device, "backends": backends, "fused": fused}


def require_family(told: str, family: str) -> None:
    """Raise ModelError, `told` first, for a family that is not one of `FAMILIES`."""
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{told}: family {family} is not supported (known: {known})")


def checksums(folder: Path) -> dict[str, str]:
    """Of a checkpoint's weights, by the names of their files."""
    return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def write_checksums(folder: Path) -> None:
    """Leave beside a checkpoint's weights what tells whether they are as they were written."""
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=1) + "\n")


def check_files(folder: Path) -> None:
    """Raise ModelError for a folder with checksums and weights that are not theirs."""
    if not (folder / CHECKSUMS).is_file():
        return
    told, found = json.loads((folder / CHECKSUMS).read_text()), checksums(folder)
    for name in sorted(told.keys() | found.keys()):
        if told.get(name) != found.get(name):
            what = "missing" if name not in found else f"not as {CHECKSUMS} says: damaged"
            raise ModelError(f"{folder / name}: {what}")


def load_processor(spec: str) -> Any:
    """The processor (chat template, tokenizer, video processor) of a checkpoint."""
    if spec.startswith("tiny:"):
        return tiny.processor()
    return AutoProcessor.from_pretrained(resolve(spec))


def load_model(
    spec: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    backends: tuple[str, str] = ("sdpa", "sdpa"),
    fused: bool = False,
) -> VideoLM:
    """Load a model for training or scoring: our attention, our head, no dropout, evaluation mode.

    `tiny:SIZE` is a fresh model whose weights follow from `seed`. Raises ModelError for an unusable
    checkpoint.
    """
    if spec.startswith("tiny:"):
        model: Any = tiny.build(spec.removeprefix("tiny:"), seed).to(dtype)
    else:
        path = resolve(spec)
        check_files(Path(path))
        try:
            require_family(spec, AutoConfig.from_pretrained(path).model_type)
            load: Any = AutoModelForImageTextToText.from_pretrained
            model, found = load(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{spec}: {str(error).splitlines()[0]}") from error
        for told in ("missing", "unexpected", "mismatched"):
            keys = [k if isinstance(k, str) else k[0] for k in found[f"{told}_keys"]]
            if keys:  # else they would be random, or left out, without a word
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ModelError(f"{spec}: {told} weights: {min(keys)}{more}")
    lm = prepare(model.to(device), *backends)
    if fused:
        liger.install(lm.language_model)
    return lm


def prepare(model: Any, text: str = "sdpa", vision: str = "sdpa") -> VideoLM:
    """Our attention (on these backends) and head on an already built model, in evaluation mode
    (every dropout is off)."""
    attention.install(model, text, vision)
    model.lm_head.__class__ = Head
    return VideoLM(model.eval())

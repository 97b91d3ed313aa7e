"""Loading models: a checkpoint folder, a hub id, a shipped model or a fresh tiny one."""

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
from opd.models.positions import POSITIONS
from opd.models.video_lm import Head, VideoLM

CHECKSUMS = "checksums.json"  # file beside a checkpoint's weights
EMBEDDED = Path(__file__).parent / "checkpoints"


def resolve(spec: str, key: str = "") -> str:
    """Folder or hub id of a model spec; ModelError for an unknown shipped model or a folder without
    a checkpoint, naming the configuration's `key` if there is one."""
    setting = f"{key}={spec}" if key else spec
    kind, _, name = spec.partition(":")
    if kind == "embedded":
        if not (EMBEDDED / name / "config.json").is_file():
            raise ModelError(f"{setting}: no such shipped model")
        return str(EMBEDDED / name)
    # Anything but NAME or OWNER/NAME is a path, and so is OWNER/NAME if a folder OWNER exists.
    path = Path(spec)
    local = spec.startswith((".", "/")) or len(path.parts) > 2 or path.is_dir()
    local = local or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not (path / "config.json").is_file():
        raise ModelError(f"{setting}: not a checkpoint folder (config.json is missing)")
    return spec


def load_options(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments for `load_model` from the configuration: dtype (`auto` is bfloat16 on a GPU, else
    float32), device, attention backends, and whether to use Liger.

    Raises ModelError, one line, for a backend that cannot be used.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    try:
        backends = (
            attention.choose("model.attention", config.attention, device, dtype),
            attention.choose("model.vision_attention", config.vision_attention, device, dtype),
        )
        fused = liger.is_enabled(config.liger, device)
    except ValueError as error:
        raise ModelError(str(error)) from None
    return {"dtype": dtype, "device": device, "backends": backends, "fused": fused}


def require_family(setting: str, family: str) -> None:
    """Raise ModelError, which begins with `setting`, unless the model family is supported."""
    if family not in POSITIONS:
        supported = ", ".join(POSITIONS)
        raise ModelError(f"{setting}: family {family} is not supported (supported: {supported})")


def checksums(folder: Path) -> dict[str, str]:
    """Checksum of each weight file of a checkpoint, by file name."""
    return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint's weights beside them."""
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=1) + "\n")


def check_files(folder: Path) -> None:
    """Raise ModelError if a checkpoint's weights differ from the checksums beside them, if any."""
    if not (folder / CHECKSUMS).is_file():
        return
    expected, actual = json.loads((folder / CHECKSUMS).read_text()), checksums(folder)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise ModelError(f"{folder / name}: missing, but listed in {CHECKSUMS}")
        if expected.get(name) != actual[name]:
            raise ModelError(f"{folder / name}: damaged (its checksum is not that of {CHECKSUMS})")


def load_processor(spec: str) -> Any:
    """Load the processor of a checkpoint: chat template, tokenizer and video processor."""
    if spec.startswith("tiny:"):
        return tiny.processor()
    return AutoProcessor.from_pretrained(resolve(spec))


def config_of(spec: str, setting: str) -> Any:
    """The configuration of a checkpoint, of a supported family; ModelError, which begins with
    `setting`, where it cannot be read."""
    path = resolve(spec)
    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{setting}: {str(error).splitlines()[0]}") from error
    require_family(setting, config.model_type)
    return config


def text_config_of(spec: str) -> Any:
    """The configuration of a model's language model, without its weights; ModelError where it
    cannot be read."""
    if spec.startswith("tiny:"):
        return tiny.build(spec.removeprefix("tiny:"), 0).config.text_config
    return config_of(spec, spec).text_config


def load_model(
    spec: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    backends: tuple[str, str] = ("sdpa", "sdpa"),
    fused: bool = False,
) -> VideoLM:
    """Load a model for training or scoring, in evaluation mode, with our attention and head.

    Args:
        spec: a folder, a hub id, `embedded:NAME`, or `tiny:SIZE` (initialised from `seed`).
        backends: of the language model's and of the vision tower's attention.
        fused: use Liger's kernels in the language model.

    Raises ModelError, one line, for a checkpoint that cannot be loaded completely.
    """
    if spec.startswith("tiny:"):
        model: Any = tiny.build(spec.removeprefix("tiny:"), seed).to(dtype)
    else:
        path = resolve(spec)
        check_files(Path(path))
        try:
            require_family(spec, AutoConfig.from_pretrained(path).model_type)
            load: Any = AutoModelForImageTextToText.from_pretrained
            model, loading_info = load(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{spec}: {str(error).splitlines()[0]}") from error
        for problem in ("missing", "unexpected", "mismatched"):
            keys = [k if isinstance(k, str) else k[0] for k in loading_info[f"{problem}_keys"]]
            if keys:  # transformers would go on with random weights
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ModelError(f"{spec}: {problem} weights: {min(keys)}{more}")
    lm = prepare(model.to(device), *backends)
    if fused:
        liger.install(lm.language_model)
    return lm


def prepare(model: Any, text: str = "sdpa", vision: str = "sdpa") -> VideoLM:
    """Put our attention (on these backends) and head into a model, in evaluation mode: every
    dropout is off."""
    attention.install(model, text, vision)
    model.lm_head.__class__ = Head
    return VideoLM(model.eval())

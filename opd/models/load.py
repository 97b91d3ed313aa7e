"""Loading: a checkpoint folder, hub id, shipped or fresh tiny model, seen through one small
interface."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from opd.device import send
from opd.models import attention, liger, tiny
from opd.models.positions import qwen2_5_vl_positions, qwen3_vl_positions
from opd.models.tower import tower_arguments
from opd.settings import ModelConfig

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
CHECKSUMS = "checksums.json"
EMBEDDED = Path(__file__).parent / "checkpoints"


Video = tuple[
    torch.Tensor, list[torch.Tensor]
]  # vision tokens [tokens, H], and one such tensor per deepstack level


class ModelError(ValueError):
    """A checkpoint that cannot be used, told in one line."""


class Head(nn.Linear):
    """The language-model head. With `loss`, computes it here, so that a sharding engine has
    gathered the weight."""

    def forward(self, hidden: torch.Tensor, loss: Any = None) -> Any:
        """`hidden @ weight.T`, or `loss(hidden, weight)` without ever building the logits."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight)


@dataclass(frozen=True)
class VideoLM:
    """A Qwen-VL model and its parts by one set of names, whatever the family."""

    model: Any

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    @property
    def language_model(self) -> Any:
        return self.model.model.language_model

    @property
    def head(self) -> Any:
        return self.model.lm_head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def trains_vision(self) -> bool:
        return any(p.requires_grad for p in self.visual.parameters())

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 gathers its weights layer by layer: then all ranks must go through the
        same forwards, as many times."""
        return getattr(self.model, "is_sharded", False)

    def video_bytes(self, grid_thw: tuple[int, int, int]) -> int:
        """Memory of what `encode_video` makes of one video."""
        config = self.model.config.vision_config
        tokens = math.prod(grid_thw) // config.spatial_merge_size**2
        levels = 1 + len(getattr(config, "deepstack_visual_indexes", ()))
        return tokens * levels * config.out_hidden_size * self.head.weight.element_size()

    def encode_video(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Video:
        """One call of the vision tower for a batch of videos; no graph where the tower is frozen.

        Args:
            pixel_values: `[patches, patch_dim]`, on the host or the device; grid_thw: int64 `[B,
                3]` on the host, in patches.

        Returns: Embeddings `[vision tokens, H]`, and one such tensor per deepstack level (none for
            Qwen2.5-VL).
        """
        pixels = send(pixel_values, self.device).to(self.head.weight.dtype)
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            out = self.visual(pixels, **tower_arguments(self.visual, grid_thw, self.device))
        return out.pooler_output, list(getattr(out, "deepstack_features", None) or [])

    def positions(
        self, input_ids: torch.Tensor, grid_thw: tuple[int, int, int], seconds_per_pair: float
    ) -> tuple[torch.Tensor, int]:
        """Position ids `[3, P]` of one unpadded prompt, and the position of its first completion
        token."""
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        grid = (grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge)
        if self.family == "qwen3_vl":
            return qwen3_vl_positions(input_ids, config.video_token_id, grid)
        step = config.vision_config.tokens_per_second * seconds_per_pair
        return qwen2_5_vl_positions(input_ids, config.video_token_id, grid, step)

    def train_only(self, trainable: str) -> None:
        """Freeze everything but the language model and its head (`language`), or nothing
        (`all`)."""
        self.model.requires_grad_(trainable == "all")
        self.language_model.requires_grad_(True)
        self.head.requires_grad_(True)


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


def place(config: ModelConfig, device: torch.device) -> dict[str, Any]:
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


def checksum(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


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


def end_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The tokenizer's end token and those of a checkpoint's generation config, if it has one."""
    ends = getattr(generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return tuple({tokenizer.eos_token_id, *ends})


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

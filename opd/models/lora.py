"""LoRA adapters (arXiv 2106.09685) on the language model, by peft: injected into the loaded model,
so that everything else sees it as it was."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from opd.config.models import ModelConfig
from opd.models.load import write_checksums
from opd.models.video_lm import VideoLM

if TYPE_CHECKING:
    from peft import LoraConfig  # only runs with adapters import it

ADAPTER = "default"  # peft's name for the only one
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _config(rank: int, alpha: float) -> "LoraConfig":
    from peft import LoraConfig

    layers = rf".*language_model\.layers\..*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)  # type: ignore[arg-type]


def add_lora(lm: VideoLM, rank: int, alpha: float) -> None:
    """Freeze the model and give every linear layer of its language model an adapter of this rank,
    scaled by `alpha / rank`, that changes nothing yet."""
    from peft import inject_adapter_in_model

    lm.model.requires_grad_(False)
    inject_adapter_in_model(_config(rank, alpha), lm.model)


def save_adapter(
    weights: dict[str, torch.Tensor], folder: Path, rank: int, alpha: float, base: str
) -> None:
    """Write the adapters of a state dict as peft does, for `PeftModel.from_pretrained`; `base` is
    the checkpoint that they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    # peft names an adapter's weights by their place below its own wrapper, and without its name.
    found = {
        f"base_model.model.{n.replace(f'.{ADAPTER}.', '.')}": w.contiguous()
        for n, w in weights.items()
        if ".lora_" in n
    }
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = _config(rank, alpha)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def merged(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A state dict of the plain architecture: `scale` times every adapter is added to its layer's
    weight."""
    found = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in [name for name in found if name.endswith(".base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        down, up = (weights[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
        found[name] = found[name] + (scale * up @ down).to(found[name].dtype)
    return {name.replace(".base_layer.", "."): weight for name, weight in found.items()}


def save_student(
    lm: VideoLM,
    weights: dict[str, torch.Tensor],
    processor: Any,
    folder: Path,
    config: ModelConfig,
) -> None:
    """Write a state dict of the model as a plain checkpoint: frozen weights too, adapters merged,
    processor and template beside it."""
    weights = merged(weights, config.lora_alpha / (config.lora_rank or 1))
    if config.save_dtype != "auto":
        dtype = getattr(torch, config.save_dtype)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    lm.model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    write_checksums(folder)

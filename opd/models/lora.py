"""LoRA adapters (arXiv 2106.09685) in the language model, by peft.

They are injected into the loaded model, so that all other code works on it unchanged.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from opd.config.models import ModelConfig
from opd.models.load import write_checksums
from opd.models.video_lm import VideoLM

if TYPE_CHECKING:
    from peft import LoraConfig  # imported at run time only by runs with adapters

ADAPTER = "default"  # peft's name for a model's only adapter
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _config(rank: int, alpha: float) -> "LoraConfig":
    from peft import LoraConfig

    layers = rf".*language_model\.layers\..*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)  # type: ignore[arg-type]


def add_lora(lm: VideoLM, rank: int, alpha: float) -> None:
    """Freeze the model and add an adapter to every linear layer of its language model.

    Its output is scaled by `alpha / rank`, and is zero at first.
    """
    from peft import inject_adapter_in_model

    lm.model.requires_grad_(False)
    inject_adapter_in_model(_config(rank, alpha), lm.model)


def save_adapter(
    weights: dict[str, torch.Tensor], folder: Path, rank: int, alpha: float, base: str
) -> None:
    """Write the adapters of a state dict in peft's format, for `PeftModel.from_pretrained`; `base`
    is the checkpoint that they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    # In peft's files weights are named from its own wrapper down, without the adapter's name.
    adapters = {
        f"base_model.model.{n.replace(f'.{ADAPTER}.', '.')}": w.contiguous()
        for n, w in weights.items()
        if ".lora_" in n
    }
    save_file(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
    config = _config(rank, alpha)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def merged(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """State dict of the plain architecture: each layer's weight plus `scale` times its adapter's
    product."""
    plain = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name in [name for name in plain if name.endswith(".base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        down, up = (weights[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
        plain[name] = plain[name] + (scale * up @ down).to(plain[name].dtype)
    return {name.replace(".base_layer.", "."): weight for name, weight in plain.items()}


def save_student(
    lm: VideoLM,
    weights: dict[str, torch.Tensor],
    processor: Any,
    folder: Path,
    config: ModelConfig,
) -> None:
    """Write a state dict of the model as a plain checkpoint: all weights, adapters merged, in
    `model.save_dtype`, with processor, chat template and checksums."""
    weights = merged(weights, config.lora_alpha / (config.lora_rank or 1))
    if config.save_dtype != "auto":
        dtype = getattr(torch, config.save_dtype)
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    lm.model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    write_checksums(folder)

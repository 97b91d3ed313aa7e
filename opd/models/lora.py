"""LoRA adapters (arXiv 2106.09685) on the language model, by peft: injected into the loaded model,
so that everything else sees it as it was."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from opd.models.load import VideoLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _config(rank: int, alpha: float) -> LoraConfig:
    layers = rf".*language_model\.layers\..*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)  # type: ignore[arg-type]


def add_lora(lm: VideoLM, rank: int, alpha: float) -> None:
    """Freeze the model and give every linear layer of its language model an adapter of this rank,
    scaled by `alpha / rank`, that changes nothing yet."""
    lm.model.requires_grad_(False)
    inject_adapter_in_model(_config(rank, alpha), lm.model)


def save_adapter(lm: VideoLM, folder: Path, rank: int, alpha: float, base: str) -> None:
    """Write the adapter as peft does, for `PeftModel.from_pretrained`; `base` is the checkpoint
    that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    # peft names an adapter's weights by their place below its own wrapper.
    found = get_peft_model_state_dict(lm.model)
    weights = {f"base_model.model.{k}": v.contiguous() for k, v in found.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = _config(rank, alpha)
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))


def merge_lora(lm: VideoLM) -> None:
    """Add every adapter to its weight and take it away: the plain architecture again."""
    found: list[tuple[Any, str, Any]] = [
        (module, name, child)
        for module in lm.model.modules()
        for name, child in module.named_children()
        if isinstance(child, LoraLayer)
    ]
    for module, name, child in found:
        child.merge()
        setattr(module, name, child.get_base_layer())

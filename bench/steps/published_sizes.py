"""Configurations of the published checkpoints, as their folders hold them: shapes, no weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

# hidden, MLP, layers, heads, key/value heads, tied; vision: layers, hidden, MLP, deepstack
QWEN3: dict[str, Any] = {
    "Qwen/Qwen3-VL-2B-Instruct": ((2048, 6144, 28, 16, 8, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen/Qwen3-VL-4B-Instruct": ((2560, 9728, 36, 32, 8, True), (24, 1024, 4096, [5, 11, 17])),
    "Qwen/Qwen3-VL-8B-Instruct": ((4096, 12288, 36, 32, 8, False), (27, 1152, 4304, [8, 16, 24])),
    "Qwen/Qwen3-VL-32B-Instruct": ((5120, 25600, 64, 64, 8, False), (27, 1152, 4304, [8, 16, 24])),
}
QWEN2_5: dict[str, Any] = {  # and rows of the vocabulary
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, True, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, False, 152064),
}


def text(sizes: Sequence[int], rows: int, **rope: Any) -> dict[str, Any]:
    """What the language models of both families have; `sizes` are the five that both name."""
    hidden, mlp, layers, heads, kv_heads = sizes
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": rows,
        "rope_parameters": {"rope_type": "default", **rope},
    }


def write(folder: Path) -> dict[str, str]:
    """A folder with `config.json` for each; where they are, by hub id."""
    configs: dict[str, Any] = {}
    for name, ((*sizes, tied), (depth, width, mlp, levels)) in QWEN3.items():
        rope: dict[str, Any] = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
        more = {"head_dim": 128, "max_position_embeddings": 262144}
        configs[name] = Qwen3VLConfig(
            text_config=text(sizes, 151936, rope_theta=5e6, **rope) | more,
            vision_config={
                "depth": depth,
                "hidden_size": width,
                "intermediate_size": mlp,
                "num_heads": 16,
                "out_hidden_size": sizes[0],
                "deepstack_visual_indexes": levels,
            },
            tie_word_embeddings=tied,
        )
    for name, (*sizes, tied, rows) in QWEN2_5.items():
        more = {"max_position_embeddings": 128000}
        configs[name] = Qwen2_5_VLConfig(
            text_config=text(sizes, rows, rope_theta=1e6, mrope_section=[16, 24, 24]) | more,
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": sizes[0],
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            tie_word_embeddings=tied,
        )
    for name, config in configs.items():
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}

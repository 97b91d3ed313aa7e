"""The embedded models: real Qwen-VL architectures with tiny configurations, and a tokenizer trained
on the embedded task.

`tiny:teacher` and `tiny:student` are freshly initialised models. The shipped `embedded:teacher` and
`embedded:student` were trained from them by `python -m opd.train configs/tiny_teacher.yaml` and
`configs/tiny_student.yaml`.
"""

import json
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from opd.data.synthetic.clips import SIZE
from opd.data.synthetic.splits import corpus

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# In Qwen-VL's format: role headers, and each vision item as start, pad and end tokens in its place.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ item.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

# hidden size, layers, MLP width, query heads, key/value heads, vision width, vision layers
SIZES = {
    "teacher": (128, 6, 384, 4, 2, 64, 2),
    "student": (96, 6, 256, 3, 1, 48, 2),
}
INIT_STD = 0.08  # about 1 / sqrt(width); the usual 0.02 is too small for models of this width
# Initial weight of query and key norms. At 1.0, scores of 32 normalised dimensions are at most 5.7:
# too little to select one of 300 keys.
QK_NORM = 2.0
VOCABULARY = 384  # rows of the embedding; padded beyond the tokenizer, as in Qwen's checkpoints


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE tokenizer with Qwen's pre-tokenizer, which keeps digits single tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chat = ["system\n", "user\n", "assistant\n"]
    trained.train_from_iterator(list(corpus()) + chat * 50, trainer)
    model = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]
    result = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )
    result.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return result


def processor(family: str = "qwen3_vl") -> Qwen3VLProcessor | Qwen2_5_VLProcessor:
    """Processor of a family for clips of 64x64 pixels: patches of 2 frames, and vision tokens of 32
    pixels (Qwen3-VL, without resizing) or 28 (Qwen2.5-VL, resized to 56x56)."""
    if family == "qwen3_vl":
        side: Any = {
            "patch_size": 16,
            "size": {"shortest_edge": SIZE * SIZE, "longest_edge": 768 * SIZE * SIZE},
        }
        images = Qwen2VLImageProcessor(merge_size=2, **side)
        videos = Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **side)
        return Qwen3VLProcessor(images, tokenizer(), videos, chat_template=CHAT_TEMPLATE)
    side: Any = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}
    videos = Qwen2VLVideoProcessor(merge_size=2, **side)
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(merge_size=2, **side),
        tokenizer(),
        videos,
        chat_template=CHAT_TEMPLATE,
    )


def _special_ids() -> dict[str, Any]:
    """Special token ids, as the models' configurations name them."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {key: tokenizer().convert_tokens_to_ids(token) for key, token in names.items()}


def build(size: str, seed: int, family: str = "qwen3_vl") -> Any:
    """Build a randomly initialised model in fp32; the same seed gives the same weights.

    Args:
        size: a key of `SIZES`.
        family: qwen3_vl or qwen2_5_vl.

    Raises ValueError for an unknown size or family.
    """
    if size not in SIZES:
        raise ValueError(f"unknown tiny model {size!r} (known: {', '.join(SIZES)})")
    hidden, layers, mlp, heads, kv_heads, vision, vision_layers = SIZES[size]
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": INIT_STD,
        "pad_token_id": tokenizer().pad_token_id,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen3_vl":
            text |= {
                "head_dim": 32,
                "rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
            }
            config = Qwen3VLConfig(
                text_config=text,
                vision_config={
                    "depth": vision_layers,
                    "hidden_size": vision,
                    "intermediate_size": 2 * vision,
                    "initializer_range": INIT_STD,
                    "num_heads": 2,
                    "out_hidden_size": hidden,
                    "num_position_embeddings": (SIZE // 16) ** 2,
                    "deepstack_visual_indexes": [0],
                },
                tie_word_embeddings=False,
                **_special_ids(),
            )
            model = Qwen3VLForConditionalGeneration(config)
        elif family == "qwen2_5_vl":
            text |= {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}}
            config = Qwen2_5_VLConfig(
                text_config=text,
                vision_config={
                    "depth": vision_layers,
                    "hidden_size": vision,
                    "intermediate_size": 2 * vision,
                    "initializer_range": INIT_STD,
                    "num_heads": 2,
                    "out_hidden_size": hidden,
                    "window_size": 56,
                    "fullatt_block_indexes": [vision_layers - 1],
                    "tokens_per_second": 2,
                },
                tie_word_embeddings=False,
                **_special_ids(),
            )
            model = Qwen2_5_VLForConditionalGeneration(config)
        else:
            raise ValueError(f"unknown family {family!r} (known: qwen3_vl, qwen2_5_vl)")
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, QK_NORM)
    model.generation_config.eos_token_id = [tokenizer().eos_token_id, tokenizer().pad_token_id]
    model.generation_config.pad_token_id = tokenizer().pad_token_id
    return model

"""Models of published shapes with random weights, and the prompts that they are given: synthetic
video tokens in the places where Qwen3-VL's processor puts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from opd.config.run import Config
from opd.data.batch import Prompt
from opd.data.examples import Example
from opd.generation.sampling import Policy
from opd.models import liger
from opd.models.load import load_options, prepare
from opd.models.video_lm import VideoLM
from opd.planning.memory import STAMP, TEXT
from opd.text.forms import format_spans

WORDS = 1000  # of the vocabulary, in prompts
NEVER = -1  # an end token that is never drawn
DURATION_S = 128.0
TRUTH = (20.0, 120.0)  # in seconds
MORE_WORDS = 3  # of each prompt than of the one before it


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Models, by folders with a `config.json` each, and what they are asked."""

    student: str
    teacher: str
    pairs: int = 128  # of frames
    rows: int = 8  # of vision tokens in a pair
    columns: int = 8
    prompts: int = 4  # in a batch, one at a time
    length: int = 32  # tokens of a completion
    rollouts: int = 8  # of GRPO
    steps: int = 10
    short: int = 3  # steps of the other recompute modes

    @property
    def video_tokens(self) -> int:
        return self.pairs * self.rows * self.columns


class AnyTokens:
    """Stands for a tokenizer: whatever the tokens, they name a part of the true moment."""

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        start, end = TRUTH
        parts = ((1 + sum(row) % 997) / 997 for row in rows)
        return [format_spans([(start, start + part * (end - start))]) for part in parts]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"<{token}>" for token in ids]


def random_model(folder: str, config: Config, device: torch.device) -> VideoLM:
    """A model of the folder's shapes, made where it is to be."""
    where = load_options(config.model, device)
    load: Any = AutoModelForImageTextToText.from_config
    with torch.device(device):
        model = load(AutoConfig.from_pretrained(folder), dtype=where["dtype"])
    lm = prepare(model, *where["backends"])
    if where["fused"]:
        liger.install(lm.language_model)
    return lm


def make_prompt(lm: VideoLM, scale: Scale, number: int) -> Prompt:
    """A prompt as Qwen3-VL's processor lays it out: `STAMP` tokens for each frame pair beside its
    vision tokens, and `TEXT` in all. Prompt 0 has the scale's frame pairs; each further one has a
    pair less and `MORE_WORDS` words more, because real prompts differ in length, and what plans
    once for each shape would otherwise look free."""
    pairs, more_words = max(1, scale.pairs - number), MORE_WORDS * number
    generator = torch.Generator().manual_seed(number)
    config = lm.model.config
    known = min(WORDS, config.vision_start_token_id)

    def words(count: int) -> list[int]:
        return torch.randint(known, (count,), generator=generator).tolist()

    ids = words(TEXT // 2)
    for _ in range(pairs):
        seen = [config.video_token_id] * (scale.rows * scale.columns)
        ids += words(STAMP - 2)
        ids += [config.vision_start_token_id, *seen, config.vision_end_token_id]
    tokens = torch.tensor(ids + words(TEXT - TEXT // 2 + more_words))
    vision = config.vision_config
    merge = vision.spatial_merge_size
    grid = pairs, scale.rows * merge, scale.columns * merge
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    seconds = DURATION_S / pairs
    positions, next_position = lm.positions(tokens, grid, seconds)
    return Prompt(
        example=Example(
            id=str(number),
            video=Path("none.mp4"),
            query="q",
            spans=(TRUTH,),
            duration_s=DURATION_S,
        ),
        input_ids=tokens,
        position_ids=positions,
        next_position=next_position,
        pixel_values=torch.randn(grid[0] * grid[1] * grid[2], patch, generator=generator),
        grid_thw=grid,
        frame_indices=tuple(range(2 * pairs)),
        timestamps_s=tuple(seconds * pair for pair in range(pairs)),
        completion_ids=torch.tensor([0]),
    )


def policy_of(lm: VideoLM) -> Policy:
    """Everything but vision tokens, and no end."""
    config = lm.model.config
    allowed = torch.ones(len(lm.head.weight), dtype=torch.bool, device=lm.device)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    allowed[[getattr(config, name) for name in names]] = False
    return Policy(allowed, 1.0, (NEVER,), 0)

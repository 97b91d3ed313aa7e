"""Models of published shapes with random weights, and prompts of synthetic video tokens in the
places where Qwen3-VL's processor puts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from opd.config.run import Config, load_config
from opd.data.batch import Prompt
from opd.data.examples import Example
from opd.generation.policy import Policy
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
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
VISION = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


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

    def config(self, method: str, run_dir: Path) -> Config:
        """The configuration of a run with these sizes."""
        models = {"opd": f"model.teacher={self.teacher}", "grpo": f"num_rollouts={self.rollouts}"}
        return load_config(
            [
                f"method={method}",
                f"model.student={self.student}",
                models[method],
                f"data.video_tokens={self.pairs * self.rows * self.columns}",
                f"data.max_frames={2 * self.pairs}",
                f"batch_size={self.prompts}",
                "micro_batch_size=1",
                f"sample.max_completion_length={self.length}",
                "prefix.recompute=auto",
                "optim.lr=1e-6",
                f"run_dir={run_dir}",
            ]
        )


class AnyTokens:
    """Stands for a tokenizer: whatever the tokens, they name a part of the true moment. So answers
    to one prompt differ in reward, and GRPO trains on all of them."""

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        start, end = TRUTH
        parts = ((1 + sum(row) % 997) / 997 for row in rows)
        return [format_spans([(start, start + part * (end - start))]) for part in parts]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"<{token}>" for token in ids]


def random_trainer(config: Config, device: torch.device) -> Trainer:
    """The trainer of random models; `config` has no `auto` left. Completions have their full
    length: no token ends them."""
    torch.manual_seed(config.seed)
    student = random_model(config.model.student, config, device)
    teacher = None
    if config.method == "opd":
        teacher = Teacher(random_model(config.model.teacher, config, device))
    allowed = torch.ones(len(student.head.weight), dtype=torch.bool, device=device)
    allowed[[getattr(student.model.config, name) for name in VISION]] = False
    processor = SimpleNamespace(tokenizer=AnyTokens())
    return Trainer(config, processor, student, teacher, Policy(allowed, 1.0, (NEVER,), 0))


def random_model(folder: str, config: Config, device: torch.device) -> VideoLM:
    """A model of the folder's shapes, made where it is to be."""
    options = load_options(config.model, device)
    load: Any = AutoModelForImageTextToText.from_config
    with torch.device(device):
        model = load(AutoConfig.from_pretrained(folder), dtype=options["dtype"])
    lm = prepare(model, *options["backends"])
    if options["fused"]:
        liger.install(lm.language_model)
    return lm


def make_prompt(lm: VideoLM, scale: Scale, number: int) -> Prompt:
    """A prompt with `STAMP` tokens for each frame pair beside its vision tokens, and `TEXT` in all.
    Prompt 0 has the scale's frame pairs; each further one has a pair less and `MORE_WORDS` words
    more, because real prompts differ in length, and what plans once for each shape would otherwise
    look free."""
    pairs = max(1, scale.pairs - number)
    generator = torch.Generator().manual_seed(number)
    config = lm.model.config

    def words(count: int) -> list[int]:
        highest = min(WORDS, config.vision_start_token_id)
        return torch.randint(highest, (count,), generator=generator).tolist()

    ids = words(TEXT // 2)
    for _ in range(pairs):
        vision = [config.video_token_id] * (scale.rows * scale.columns)
        ids += words(STAMP - 2)
        ids += [config.vision_start_token_id, *vision, config.vision_end_token_id]
    tokens = torch.tensor(ids + words(TEXT - TEXT // 2 + MORE_WORDS * number))
    tower = config.vision_config
    merge = tower.spatial_merge_size
    grid = pairs, scale.rows * merge, scale.columns * merge
    patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
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

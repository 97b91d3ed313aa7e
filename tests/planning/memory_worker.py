"""Two real steps of a model large enough to measure; prints the process's peak memory, less what it
used before the models, in bytes: `python memory_worker.py FOLDER [key=value ...]`.

Completions never end before their limit, and prompts differ in length by a token or two.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from opd import distributed
from opd.config.run import Config, load_config
from opd.data.batch import collate
from opd.data.schedule import micro_batches
from opd.distributed import reuse_freed_memory, set_up
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.models.load import prepare
from opd.models.video_lm import VideoLM
from opd.planning.memory import STAMP, TEXT
from opd.planning.shapes import on_meta
from tests.helpers import PAD, make_prompt, policy_of

SIZES = {  # hidden, MLP, layers, heads, key/value heads
    "student": (384, 1152, 6, 6, 2),
    "teacher": (512, 1536, 8, 8, 2),
}
VOCABULARY = 32_000


def write(folder: Path) -> None:
    """Write checkpoint folders without weights: configurations only."""
    for name, (hidden, wide, layers, heads, kv_heads) in SIZES.items():
        config: Any = tiny.build("student", 0).config
        text = config.text_config
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, wide, layers
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = heads, kv_heads, 64
        text.rope_parameters["mrope_section"] = [12, 10, 10]
        text.vocab_size, config.vision_config.out_hidden_size = VOCABULARY, hidden
        config.save_pretrained(folder / name)


def memory(name: str) -> int:
    """This process's `VmRSS` (now) or `VmHWM` (peak since `forget_peak`), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(folder: Path, keys: list[str]) -> None:
    set_up(1, 0)
    reuse_freed_memory(False)
    config: Config = load_config([f"model.{n}={folder / n}" for n in SIZES] + keys)
    distributed.start(alone_too=config.engine.kind == "deepspeed")
    if config.engine.kind == "deepspeed":
        import deepspeed  # noqa: F401

    def build(name: str) -> VideoLM:
        load: Any = AutoModelForImageTextToText.from_config
        return prepare(load(AutoConfig.from_pretrained(folder / name), dtype=dtype))

    small = torch.ones(64, 64, requires_grad=True)
    (small @ small).sum().backward()
    video = config.data.video_tokens or 0
    pairs = config.data.max_frames // 2
    dtype = getattr(torch, config.model.dtype)
    shapes = on_meta(str(folder / "student"), dtype)
    prompts = []
    for i in range(config.batch_size):
        more = {"pairs": pairs, "rows": 1, "columns": video // pairs, "text": TEXT // 2 + i}
        prompt = make_prompt(shapes, f"p{i}", **more)
        assert prompt.pixel_values is not None
        object.__setattr__(prompt, "pixel_values", prompt.pixel_values.to(dtype))
        prompts.append(prompt)
    assert abs(len(prompts[0].input_ids) - (video + STAMP * pairs + TEXT)) < 0.3 * video
    reuse_freed_memory(False)
    before = memory("VmRSS")
    forget_peak()
    student = build("student")
    teacher = Teacher(build("teacher")) if config.method == "opd" else None
    policy = replace(policy_of(student), eos_token_ids=(-1,))
    processor = SimpleNamespace(tokenizer=tiny.tokenizer())
    trainer = Trainer(config, processor, student, teacher, policy)
    for step in range(2):
        trainer.step([collate([prompts[i] for i in p], PAD) for p in micro_batches(config)], step)
    peak = distributed.all_max(memory("VmHWM") - before)
    if distributed.rank() == 0:  # lines of several ranks would run into each other
        print(len(prompts[0].input_ids), peak, flush=True)
    distributed.leave_at_exit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

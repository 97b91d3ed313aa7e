"""Recipes against what is published: papers, launch scripts and their frameworks' defaults."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from opd.config.run import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
VIDEO = {
    "data.fps": 2.0,
    "data.max_frames": 768,
    "data.video_tokens": 8192,
    "data.min_frame_tokens": 4,
    "data.max_frame_tokens": 768,
}
COSINE = {
    "optim.lr": 1e-6,
    "optim.schedule": "cosine",
    "optim.warmup": 0.03,
    "optim.min_lr_ratio": 0.0,
    "optim.weight_decay": 0.1,
}
# One epoch of 2,500 samples in batches of 32: 8 devices, 1 prompt each, 4 micro-batches.
EPOCH = {"steps": 79, "batch_size": 32, "micro_batch_size": 1, "model.trainable": "language"}
RLT = {
    "batch_size": 16,
    "normalize": "token",
    "model.student": "Qwen/Qwen2.5-VL-3B-Instruct",
    "model.trainable": "all",
    "data.video_tokens": 2048,
    "data.patch_seconds": "processor",
    "optim.lr": 1e-6,
    "optim.schedule": "constant",
    "optim.warmup": 0.0,
    "optim.weight_decay": 0.01,
    "curriculum.kind": "variance",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "video_opd_8b": {
        "method": "opd",
        "objective": "sampled",
        "normalize": "sequence",
        "num_rollouts": 1,
        "model.student": "Qwen/Qwen3-VL-8B-Instruct",
        "opd.reward_coef": 0.0,
        "sample.temperature": 0.9,
        "sample.top_k": 50,
        "sample.top_p": 0.9,
        "engine.zero_stage": 3,
        "curriculum.kind": "tvdf",
        "curriculum.select": "topk",
        "data.prompt": "timelens",
    }
    | VIDEO
    | COSINE
    | EPOCH,
    "grpo_8b": {
        "method": "grpo",
        "num_rollouts": 8,
        "model.student": "Qwen/Qwen3-VL-8B-Instruct",
        "reward.tiou": 1.0,
        "reward.format": 0.0,
    }
    | VIDEO
    | COSINE
    | EPOCH,
    "grpo_32b": {"method": "grpo", "num_rollouts": 8, "model.student": "Qwen/Qwen3-VL-32B-Instruct"}
    | VIDEO
    | COSINE
    | EPOCH,
    "rlt_3b": {
        "method": "grpo",
        "num_rollouts": 8,
        "data.prompt": "temporal_r1",
        "data.reading": "strict",
        "sample.temperature": 1.0,
        "sample.max_completion_length": 2048,
        "grpo.kl_coef": 0.01,
        "grpo.entropy_coef": 0.001,
        "reward.tiou": 0.5,
        "reward.choice": 0.5,
        "reward.format": 0.5,
    }
    | RLT,
    "rlt_3b_sft": {"method": "sft"} | RLT,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = load_config([str(CONFIGS / f"{name}.yaml")])
    actual = {key: attrgetter(key)(config) for key in PUBLISHED[name]}
    assert actual == PUBLISHED[name]
    assert config.steps * config.batch_size >= 2500 or name.startswith("rlt")

"""Several queries of one video: all behind one forward of it against one forward each.

In turn, on the same prompts, greedily. `each` forwards every query's prompt, the vision tokens made
once a video; `alone` is the conventional evaluation, which makes them once a query, too.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch

from bench.timing import interleaved, ratio
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch
from opd.data.examples import Example
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.generation.prefix import forward
from opd.generation.sampling import Policy, decode_answers, sample
from opd.generation.shared_video import forward_by_video
from opd.models.load import load_model, load_options, load_processor
from opd.models.video_lm import VideoLM

ROUNDS, QUERIES, LENGTH = 4, 8, 20
COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "cross")


def write_clip(path: Path, seconds: int) -> None:
    """Noise that changes 20 times a second, 64 x 64."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = cast(Any, container.add_stream("libx264", rate=20))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(20 * seconds):
            image = random.integers(0, 256, (8, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def queries_of(examples: list[Example]) -> list[Example]:
    """Eight queries for each example's video."""
    return [
        replace(e, id=f"{e.id}/{k}", query=f"{COLOURS[(i + k) % 5]} {SHAPES[(i + k // 2) % 4]}")
        for i, e in enumerate(examples)
        for k in range(QUERIES)
    ]


def prompts_of(config: Config, examples: list[Example], dtype: torch.dtype) -> Prompts:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = load_options(config.model, device) | {"dtype": dtype}
    lm = load_model(config.model.student, **settings)
    lm.train_only("language")
    return Prompts(examples, config.data, load_processor(config.model.student), lm)


def answers(prompts: Prompts, made: list[PromptBatch], begin: Callable[..., Any]) -> list[str]:
    """Greedy answers to batches."""
    lm: VideoLM = prompts.lm
    policy = Policy.of(lm, prompts.tokenizer, 1.0)
    found: list[str] = []
    for batch in made:
        for prompt in batch.prompts:  # what the round before left
            for model in prompt.features:
                prompt.features[model] = None
        texts = decode_answers(
            sample(lm, begin(lm, batch), policy, LENGTH, None), prompts.tokenizer
        )
        found += [text for (text,) in texts]
    return found


@torch.no_grad()
@pytest.mark.parametrize(("seconds", "fps"), [(12, 20.0), (60, 8.0)], ids=["1500", "3000"])
def test_queries_behind_one_forward(benchmark, tmp_path: Path, seconds: int, fps: float) -> None:
    """Ratios are throughputs: seconds of one forward a query by those of one a video."""
    write_clip(tmp_path / "a.mp4", seconds)
    known = {"video": "a.mp4", "duration": seconds, "timestamp": [1, 2]}
    (tmp_path / "a.json").write_text(json.dumps([known | {"sentence": "x", "qid": 0}]))
    config = load_config(["data.prompt=video_first", f"data.fps={fps}", "data.cache_mb=0"])
    data = replace(config.data, video_root=str(tmp_path))
    examples = queries_of(load_examples(f"timerft:{tmp_path}/a.json", data, None))
    prompts = prompts_of(replace(config, data=data), examples, torch.float32)
    plan = [list(range(QUERIES))]
    shared = list(batches(prompts, plan, models=[prompts.lm]))
    apart = list(batches(prompts, plan))  # every query with its own frames
    calls: dict[str, Callable[[int], object]] = {
        "video": lambda _: answers(prompts, shared, forward_by_video),
        "each": lambda _: answers(prompts, shared, forward),
        "alone": lambda _: answers(prompts, apart, forward),
    }
    times = benchmark.pedantic(interleaved, (calls, ROUNDS), {"warmup": 1}, rounds=1)
    result = {
        name: ratio(times[name], times["video"]) | {"better": "higher"}
        for name in ("each", "alone")
    }
    tokens = shared[0].num_tokens // QUERIES
    benchmark.extra_info.update(result | {"prompt_tokens": tokens, "queries": QUERIES})
    for name, found in result.items():
        print(f"\n{tokens} tokens, one forward a video against {name}: {found}")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_answers_are_the_same(benchmark, dtype: torch.dtype) -> None:
    """On the embedded task's clips and its trained student."""
    config = load_config(["data.prompt=video_first", "data.cache_mb=0"])
    examples = queries_of(load_examples("synthetic:eval", config.data, 16))
    prompts = prompts_of(config, examples, dtype)
    plan = [list(range(start, start + 32)) for start in range(0, len(examples), 32)]
    made = list(batches(prompts, plan, models=[prompts.lm]))
    found = benchmark.pedantic(answers, (prompts, made, forward_by_video), rounds=1)
    expected = answers(prompts, made, forward)
    same = sum(map(str.__eq__, found, expected)) / len(expected)
    benchmark.extra_info.update({"same": same, "queries": len(expected)})
    print(f"\n{dtype}: {same:.2%} of {len(expected)} answers are the same")
    assert same == 1.0 if dtype == torch.float64 else same >= 0.995

"""Several queries of one video behind one forward of it, in evaluation and in training.

Evaluation: in turn, on the same prompts, greedily, after both have given the same answers. `each`
forwards every query's prompt, the vision tokens made once a video; `alone` is the conventional
evaluation, which makes them once a query, too.

Training: steps of eight queries with 1, 4 and 8 of them behind one forward, after all have given
the same loss.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.timing import interleaved, ratio
from opd import train
from opd.config.method import SampleConfig
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch
from opd.data.loader import batches
from opd.data.prompts import Prompts
from opd.data.sources import load_examples
from opd.data.synthetic.clips import COLOURS
from opd.distributed import set_up
from opd.generation.policy import Policy
from opd.generation.prefix import forward
from opd.generation.sampling import decode_answers, sample
from opd.models.load import load_model, load_options, load_processor
from opd.planning.auto import resolve_auto

ROUNDS, QUERIES, LENGTH = 4, 8, 20
SHAPES = ("circle", "square", "triangle", "cross")
TOKENS = {"1500": 16, "3000": 36}  # of a prompt, about, and of each frame pair
METHODS = {
    "opd": (),
    "grpo": ("method=grpo", "num_rollouts=8", "reward.format=0.1"),
    "sft": ("method=sft",),
}
# At most this share of the seconds that one forward for each query takes.
TARGETS = {"opd": {"4": 0.4, "8": 0.3}, "grpo": {"4": 0.55}, "sft": {"4": 0.4, "8": 0.3}}


def settings(tokens: str) -> list[str]:
    """Keys for prompts of a length of `TOKENS` with the video first."""
    frames = ["data.fps=10", "data.video_tokens=4096", f"data.min_frame_tokens={TOKENS[tokens]}"]
    return ["data.prompt=video_first", *frames]


def queries_of(config: Config) -> Prompts:
    """Eight queries about one clip of the embedded task, for its trained student in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = load_options(config.model, device) | {"dtype": torch.float32}
    lm = load_model(config.model.student, **options)
    lm.train_only("language")
    (example,) = load_examples("synthetic:eval", config.data, 1)
    colours = list(COLOURS)
    examples = [
        replace(example, id=f"{k}", query=f"{colours[k % len(colours)]} {SHAPES[k % len(SHAPES)]}")
        for k in range(QUERIES)
    ]
    return Prompts(examples, config.data, load_processor(config.model.student), lm)


def answers(prompts: Prompts, prompt_batches: list[PromptBatch]) -> list[str]:
    """Greedy answers to batches, from pixels on."""
    policy = Policy.of(prompts.lm, prompts.tokenizer, SampleConfig())
    texts: list[str] = []
    for batch in prompt_batches:
        for prompt in batch.prompts:  # what the round before left
            prompt.features.update(dict.fromkeys(prompt.features))
        rollouts = sample(prompts.lm, forward(prompts.lm, batch), policy, LENGTH, None)
        texts += [text for (text,) in decode_answers(rollouts, prompts.tokenizer)]
    return texts


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
def test_queries_behind_one_forward(benchmark: Any, tokens: str) -> None:
    """Ratios are throughputs: seconds of one forward a query by those of one a video."""
    config = load_config([*settings(tokens), "data.cache_mb=0"])
    prompts, plan = queries_of(config), [list(range(QUERIES))]
    shared = list(batches(prompts, plan, models=[prompts.lm]))
    each = list(batches(prompts, plan, models=[prompts.lm], queries_per_video=1))
    apart = list(batches(prompts, plan, queries_per_video=1))  # every query with its own frames
    assert answers(prompts, shared) == answers(prompts, apart)
    calls: dict[str, Callable[[int], object]] = {
        "video": lambda _: answers(prompts, shared),
        "each": lambda _: answers(prompts, each),
        "alone": lambda _: answers(prompts, apart),
    }
    times = interleaved(benchmark, calls, ROUNDS, warmup=1)
    for name in ("each", "alone"):
        speed = ratio(times[name], times["video"]) | {"better": "higher"}
        benchmark.extra_info[name] = speed
        print(f"\n{benchmark.name}, one forward a video against {name}: {speed}")
    num_tokens = each[0].num_tokens // QUERIES
    benchmark.extra_info.update({"prompt_tokens": num_tokens, "queries": QUERIES})


@pytest.mark.parametrize("method", METHODS)
def test_training_behind_one_forward(benchmark: Any, method: str) -> None:
    """Ratios of seconds per query: 4 and 8 queries behind one forward, by one each."""
    keys = [f"batch_size={QUERIES}", "optim.lr=1e-7", "threads=1", *METHODS[method]]
    config = load_config([*settings("1500"), *keys])
    device = set_up(config.cpu_threads, config.seed)
    config = resolve_auto(config, device)
    prompts, plan = queries_of(config), [list(range(QUERIES))]
    trainer = train.make_trainer(config, device)
    models = list(trainer.costs)
    steps = {
        number: list(batches(prompts, plan, device, models, queries_per_video=number))
        for number in (8, 4, 1)
    }
    losses = [trainer.step(step, 0)["loss"] for step in steps.values()]
    assert max(losses) - min(losses) < 1e-3 * max(map(abs, losses)) + 1e-4, losses
    calls = {
        str(number): lambda round_number, step=step: trainer.step(step, 1 + round_number)
        for number, step in steps.items()
    }
    times = interleaved(benchmark, calls, ROUNDS, warmup=1)
    for number in ("8", "4"):
        share = ratio(times[number], times["1"]) | {"better": "lower"}
        if number in TARGETS[method]:
            share["target"] = TARGETS[method][number]
        benchmark.extra_info[number] = share
        print(f"\n{benchmark.name}, {number} queries behind one forward by 1: {share}")
    benchmark.extra_info["prompt_tokens"] = steps[1][0].num_tokens // QUERIES

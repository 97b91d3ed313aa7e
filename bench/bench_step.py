"""One optimizer step on the embedded task, with a teacher of twice the student's size: this
project's single pass against conventional loops and TRL's trainer, its phases, its rollouts and its
recompute modes, and micro-batches sampled together.

Before anything is timed, each side must give the same loss and gradient as the stock model's full
forward and the definition of the loss. Calls are timed in turn; what is quoted is the median of the
paired ratios.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.bench_evaluate import TOKENS, settings
from bench.steps.loops import loop_step, published_style, trl_style
from bench.steps.measure import make_trainer, measure, phases, prove_equal, single_pass_step
from opd.config.run import Config, load_config
from opd.data.batch import collate
from opd.data.schedule import split
from opd.generation.sampling import Rollouts

ROUNDS = 5
PROMPTS, FEW = 16, 5  # against other loops, and of this project's steps against each other


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    root: Path = tmp_path_factory.mktemp("step")
    # A rate near zero: the rollouts of both loops stay those of the shipped student.
    yield load_config([f"data.video_root={root}", "optim.lr=1e-7", f"batch_size={FEW}"])


def keep(benchmark: Any, **info: Any) -> None:
    """Store and print what was measured."""
    benchmark.extra_info.update(info)
    print(f"\n{benchmark.name}", *(f"    {key}: {value}" for key, value in info.items()), sep="\n")


LOOPS = {  # the loop, the objective that it is for, and the ratio of seconds to reach
    "published-style": (published_style, "sampled", 0.7),
    "trl-style": (trl_style, "reverse_kl", 0.9),
}


@pytest.mark.parametrize("name", LOOPS)
def test_single_pass_against(benchmark: Any, config: Config, name: str) -> None:
    loop, objective, target = LOOPS[name]
    trainer, batch = make_trainer(replace(config, objective=objective, batch_size=PROMPTS))
    proof = prove_equal(trainer, batch, loop)
    calls = {
        "ours": partial(single_pass_step, trainer, batch),
        name: partial(loop_step, loop, trainer, batch),
    }
    result = measure(benchmark, calls, ROUNDS).against("ours", name)
    spent = phases(trainer, ROUNDS)
    keep(benchmark, **result, target=target, phases_ms=spent, proof=proof)


STEPS: dict[str, dict[str, Any]] = {
    "opd 1": {},
    "opd 4": {"num_rollouts": 4},
    "opd 8": {"num_rollouts": 8},
    "grpo 8": {"method": "grpo", "num_rollouts": 8},
    "sft": {"method": "sft"},
    "opd 1, recomputed": {"prefix.recompute": "all"},
}
PAIRS = {  # and the ratio of seconds to reach
    ("opd 4", "opd 1"): 1.5,
    ("opd 8", "opd 1"): None,
    ("grpo 8", "sft"): 2.0,
    ("opd 1, recomputed", "opd 1"): None,
}


def test_steps(benchmark: Any, config: Config) -> None:
    """Phases of OPD with 1, 4 and 8 rollouts, of GRPO with 8 (packed behind one prefix), of SFT
    with its reference answer, and of OPD with every layer run again in backward."""

    def changed(keys: dict[str, Any]) -> Config:
        recompute = keys.get("prefix.recompute", config.prefix.recompute)
        others = {name: value for name, value in keys.items() if "." not in name}
        return replace(config, prefix=replace(config.prefix, recompute=recompute), **others)

    sides = {name: make_trainer(changed(keys)) for name, keys in STEPS.items()}
    proof = {name: prove_equal(*side) for name, side in sides.items()}
    calls = {name: partial(single_pass_step, *side) for name, side in sides.items()}
    measured = measure(benchmark, calls, ROUNDS)
    results = {
        f"{first} / {second}": measured.against(first, second) | {"target": target}
        for (first, second), target in PAIRS.items()
    }
    spent = {name: phases(trainer, ROUNDS) for name, (trainer, _) in sides.items()}
    keep(benchmark, **results, phases_ms=spent, proof=proof)


@pytest.mark.parametrize("tokens", ["300", "1500"])
@pytest.mark.parametrize("size", [1, 4])
def test_sampling_together(benchmark: Any, config: Config, tokens: str, size: int) -> None:
    """Four micro-batches of so many prompts of about so many tokens, decoded at once and one after
    the other, from the same prefixes."""
    keys = settings(tokens) if tokens in TOKENS else []
    data = load_config([*keys, f"data.video_root={config.data.video_root}"]).data
    changed = replace(config, data=data, batch_size=4 * size)
    trainer, batch = make_trainer(changed)
    parts = [
        collate(some, trainer.policy.pad_token_id, batch.input_ids.device)
        for some in split(list(batch.prompts), size)
    ]
    with torch.no_grad():
        prefixes = [trainer.prefill(part) for part in parts]

    def together(step: int) -> list[Rollouts]:
        return trainer.sample(parts, prefixes, step)

    def apart(step: int) -> list[Rollouts]:
        pairs = zip(parts, prefixes, strict=True)
        return [trainer.sample([part], [prefix], step)[0] for part, prefix in pairs]

    for one, other in zip(together(0), apart(0), strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids), "not the same rollouts"
    seconds = measure(benchmark, {"together": together, "apart": apart}, 4 * ROUNDS)
    lengths = [len(prompt.input_ids) for prompt in batch.prompts]
    keep(benchmark, seconds=seconds.against("together", "apart") | {"target": 0.5}, lengths=lengths)


def test_against_trl_trainer(benchmark: Any, config: Config, tmp_path: Path) -> None:
    """The same language models, text prompts of the same length and completions of the same length;
    TRL generates with transformers."""
    pytest.importorskip("trl", minversion="1.16")
    from bench.steps import trl_trainer

    model = replace(config.model, dtype="float32")
    changes: dict[str, Any] = {"normalize": "token", "model": model, "batch_size": PROMPTS}
    trainer, batch = make_trainer(replace(config, **changes))
    batch = trl_trainer.text_only(trainer, batch)
    theirs = trl_trainer.peer(trainer, batch, tmp_path)
    proof = trl_trainer.prove_equal(trainer, batch, theirs)
    calls = {
        "ours": partial(single_pass_step, trainer, batch),
        "trl": partial(trl_trainer.step, theirs, batch),
    }
    result = measure(benchmark, calls, ROUNDS).against("ours", "trl")
    keep(benchmark, **result, phases_ms=phases(trainer, ROUNDS), proof=proof)

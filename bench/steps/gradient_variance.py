"""Gradient variance of `sampled` beside `reverse_kl`'s, at the shipped student: python -m
bench.steps.gradient_variance

Both estimate the gradient of the same sequence-level objective from the student's own rollouts.
Over K sets of rollouts of one batch this prints, per objective, the squared norm of the mean
gradient, the trace of the covariance of one set's gradient, and the cosine between the two means.
"""

import json
import sys

import torch

from bench.steps.measure import make_trainer
from opd.config.run import load_config
from opd.data.batch import PromptBatch
from opd.method.trainer import Trainer


def gradient(trainer: Trainer, batch: PromptBatch, step: int) -> torch.Tensor:
    """The flat gradient of one micro-batch with the rollouts of `step`; nothing is updated."""
    trainer.micro_step(batch, step)
    flat = torch.cat([p.grad.flatten() for p in trainer.engine.parameters if p.grad is not None])
    trainer.engine.optimizer.zero_grad()
    return flat.double()


def moments(trainer: Trainer, batch: PromptBatch, sets: int) -> tuple[torch.Tensor, float]:
    """Mean gradient and the trace of its covariance over `sets` independent sets of rollouts."""
    total = squares = None
    for step in range(sets):
        grad = gradient(trainer, batch, step)
        total = grad if total is None else total + grad
        squares = grad.square().sum() if squares is None else squares + grad.square().sum()
    assert total is not None and squares is not None
    mean = total / sets
    return mean, float((squares / sets - mean.square().sum()) * sets / (sets - 1))


def main(arguments: list[str]) -> None:
    sets = 32
    results, means = {}, {}
    for objective in ("reverse_kl", "sampled"):
        trainer, batch = make_trainer(
            load_config([f"objective={objective}", "batch_size=16", *arguments])
        )
        mean, variance = moments(trainer, batch, sets)
        # The sampled mean's squared norm overestimates the true one by variance / sets.
        signal = max(0.0, float(mean.square().sum()) - variance / sets)
        means[objective] = mean
        results[objective] = {
            "signal": signal,
            "variance": variance,
            "noise_to_signal": variance / signal,
        }
    cosine = torch.nn.functional.cosine_similarity(means["reverse_kl"], means["sampled"], dim=0)
    ratio = results["sampled"]["variance"] / results["reverse_kl"]["variance"]
    report = {
        "prompts": len(batch.prompts),
        "sets": sets,
        "variance_ratio": ratio,
        "cosine_of_means": float(cosine),
    }
    print(json.dumps(report | results, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

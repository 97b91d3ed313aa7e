"""The step benchmark compares like with like: the same loss and update, and the FLOPs that
arithmetic says."""

import pytest
import torch

from bench.bench_step import analytic_share, flops, make_trainer, single_pass_step
from bench.conventional import conventional_step
from opd.config import Config, load_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config([f"data.video_root={tmp_path_factory.mktemp('videos')}", "batch_size=3"])


def test_both_loops_make_the_same_update(config: Config) -> None:
    (ours, batch), (theirs, _) = make_trainer(config), make_trainer(config)
    single_pass_step(ours, batch, 0)
    conventional_step(theirs, batch, 0)
    for a, b in zip(ours.engine.parameters, theirs.engine.parameters, strict=True):
        # Adam's first update is the sign of the gradient times the rate: compare its moments.
        x, y = (e.optimizer.state[p]["exp_avg"] for e, p in ((ours.engine, a), (theirs.engine, b)))
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_flops_are_the_analytic_share(config: Config) -> None:
    trainer, batch = make_trainer(config)
    ours = flops(lambda: single_pass_step(trainer, batch, 0))
    theirs = flops(lambda: conventional_step(trainer, batch, 0))
    share = analytic_share(trainer, batch)
    assert 0.8 < share < 0.87, "the shipped teacher has about twice the student's layers"
    assert abs(ours / theirs / share - 1) < 0.05

"""The torch engine: learning rates by hand, fp32 masters and accumulation, scale, clip, decay."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from opd.config.optimisation import OptimConfig
from opd.engine import base
from opd.engine.base import TorchEngine, lr_factor


def engine_of(module: nn.Module, steps: int = 1000, **options) -> TorchEngine:
    """An engine with a constant rate, no warm-up and no clipping, unless options say otherwise."""
    plain = {"schedule": "constant", "warmup": 0.0, "max_grad_norm": 1e9, "lr": 0.1}
    return TorchEngine(module, OptimConfig(**(plain | options)), steps)


def factors(steps: int, **options) -> list[float]:
    factor = lr_factor(OptimConfig(**options), steps)
    return [factor(step) for step in range(steps)]


# Ten steps, two of them warm-up (0.15 x 10, rounded up), down to a tenth.


def test_constant_by_hand():
    rates = factors(10, schedule="constant", warmup=0.15, min_lr_ratio=0.1)
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_linear_by_hand():
    rates = factors(10, schedule="linear", warmup=0.15, min_lr_ratio=0.1)
    by_hand = [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]
    assert rates == pytest.approx(by_hand, abs=1e-12)


def test_cosine_by_hand():
    rates = factors(10, schedule="cosine", warmup=0.15, min_lr_ratio=0.1)
    by_hand = [0.5, 1.0, 1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]
    assert rates == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warmup_the_first_step_has_the_full_rate(schedule):
    assert factors(5, schedule=schedule, warmup=0.0)[0] == 1.0
    assert factors(1, schedule=schedule, warmup=0.5) == [1.0]
    assert all(0 < factor <= 1 for factor in factors(7, schedule=schedule, warmup=0.99))


def torch_rates(steps: int, config: OptimConfig) -> list[float]:
    """The same schedule composed of torch's own."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    warmup = math.ceil(config.warmup * steps)
    after = steps - warmup or 1
    decay = {
        "constant": lambda: ConstantLR(optimizer, 1.0),
        "linear": lambda: LinearLR(optimizer, 1.0, config.min_lr_ratio, after),
        "cosine": lambda: CosineAnnealingLR(optimizer, after, config.lr * config.min_lr_ratio),
    }
    start = ConstantLR(optimizer, 1.0)
    if warmup > 1:
        start = LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    scheduler = SequentialLR(optimizer, [start, decay[config.schedule]()], [warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("steps", [2, 7, 79, 400])
def test_every_rate_is_that_of_torchs_schedulers(schedule: str, warmup: float, steps: int):
    for minimum in (0.0, 0.1):
        config = OptimConfig(lr=1e-6, schedule=schedule, warmup=warmup, min_lr_ratio=minimum)
        factor = lr_factor(config, steps)
        rates = [config.lr * factor(step) for step in range(steps)]
        assert rates == pytest.approx(torch_rates(steps, config), rel=1e-9, abs=1e-19)


@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_loaded_engine_has_the_rates_of_one_that_never_stopped(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(base, "FILE_BYTES", 8)  # weight and bias in files of their own

    def rates(engine: TorchEngine, steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            seen.append(engine.optimizer.param_groups[0]["lr"])
            engine.backward(engine.module(torch.ones(1)).sum())
            engine.step()
        return seen

    def new() -> TorchEngine:
        return engine_of(nn.Linear(1, 1), 9, schedule="cosine", warmup=0.3, lr=1e-6)

    expected, first, second = rates(new(), 9), new(), new()
    assert rates(first, stop) == expected[:stop]
    first.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    second.load(tmp_path)
    assert rates(second, 9 - stop) == expected[stop:]
    rates(first, 9 - stop)
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weights()[name])


def test_the_engine_follows_the_schedule():
    module = nn.Linear(1, 1)
    engine = engine_of(module, 4, schedule="linear", warmup=0.25, min_lr_ratio=0.0, lr=0.4)
    rates = []
    for _ in range(4):
        rates.append(engine.lr)
        engine.backward(module(torch.ones(1)).sum())
        assert engine.optimizer.param_groups[0]["lr"] == engine.lr
        engine.step()
    assert rates == pytest.approx([0.4, 0.4, 0.4 * 2 / 3, 0.4 / 3])


class Weights(nn.Module):
    """Named parameters; the loss is their product with slopes, which are thus the gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32, **values: list) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=dtype)))

    def loss(self, **slopes: list) -> Tensor:
        terms = [
            (getattr(self, name) * torch.tensor(slope, dtype=getattr(self, name).dtype)).sum()
            for name, slope in slopes.items()
        ]
        return torch.stack(terms).sum()


def test_one_adamw_step_by_hand():
    # Bias-corrected, the first step is lr g / (|g| + 1e-8); before it, decay multiplies by 0.95.
    module = Weights(w=[[2.0, -3.0]])
    engine = engine_of(module, weight_decay=0.5)
    engine.backward(module.loss(w=[[0.25, -4.0]]))
    engine.step()
    assert module.w.tolist() == [pytest.approx([2 * 0.95 - 0.1, -3 * 0.95 + 0.1])]


def test_decay_takes_matrices_only():
    module = Weights(matrix=[[1.0]], kernel=[[[1.0]]], gain=[1.0], scalar=1.0)
    engine = engine_of(module, weight_decay=0.5)
    engine.backward(module.loss(matrix=[[0.0]], kernel=[[[0.0]]], gain=[0.0], scalar=0.0))
    engine.step()
    assert module.matrix.item() == module.kernel.item() == pytest.approx(0.95)
    assert module.gain.item() == module.scalar.item() == 1.0


def test_a_loss_receives_a_gradient_of_exactly_one():
    module = Weights(w=[[1.0]])
    engine = engine_of(module)
    assert engine.loss_factor == 1.0
    loss, gradients = module.loss(w=[[2.0]]), []
    loss.register_hook(gradients.append)
    engine.backward(loss)
    assert gradients == [1.0]


def test_frozen_parameters_are_left_alone():
    module = Weights(w=[[1.0]], frozen=[[1.0]])
    module.frozen.requires_grad_(False)
    engine = engine_of(module, weight_decay=0.5)
    engine.backward(module.loss(w=[[1.0]], frozen=[[1.0]]))
    engine.step()
    assert module.frozen.item() == 1.0 and module.w.item() != 1.0
    assert engine.parameters == [module.w]


# bf16 weights, fp32 masters.


def test_tiny_updates_reach_the_master_and_in_the_end_the_weight():
    # Next to 1.0 bf16 has steps of 2^-8 below and 2^-7 above: an update of 1e-6 rounds away.
    module = Weights(torch.bfloat16, w=[[1.0, 1.0]])
    engine = engine_of(module, lr=1e-6, steps=4000)
    (master,) = engine.masters
    assert master.dtype == torch.float32 and master is not module.w
    seen = []
    for step in range(2500):
        engine.backward(module.loss(w=[[1.0, -1.0]]))
        engine.step()
        if step == 99:
            assert master.tolist() == [pytest.approx([1 - 1e-4, 1 + 1e-4], abs=1e-5)]
            assert module.w.tolist() == [[1.0, 1.0]]
        seen.append(module.w[0, 0].item())
    # Half a step of 2^-8 below 1 is crossed after some 1,953 updates, and not before.
    assert seen[1900] == 1.0 and seen[2000] == 1 - 2**-8
    assert master.tolist() == [pytest.approx([1 - 2.5e-3, 1 + 2.5e-3], abs=2e-4)]
    assert torch.equal(module.w, master.bfloat16())


def test_gradients_accumulate_in_fp32():
    # 256 + 1 is 256 in bf16, so accumulating there would lose every micro-batch but the first.
    module = Weights(torch.bfloat16, w=[[1.0]])
    engine = engine_of(module)
    for slope in [256.0] + 15 * [1.0]:
        engine.backward(module.loss(w=[[slope]]))
        assert module.w.grad is None
    (master,) = engine.masters
    assert master.grad is not None and master.grad.dtype == torch.float32
    assert master.grad.item() == 271.0
    assert engine.step() == 271.0
    assert master.grad is None


def test_full_precision_parameters_are_their_own_masters():
    for dtype in (torch.float32, torch.float64):
        module = Weights(dtype, w=[[1.0]])
        engine = engine_of(module)
        assert engine.masters[0] is module.w
        engine.backward(module.loss(w=[[2.0]]))
        engine.backward(module.loss(w=[[3.0]]))
        assert module.w.grad.item() == 5.0
        engine.step()
        assert module.w.item() == pytest.approx(0.9)
        assert module.w.grad is None


def test_a_bf16_step_equals_the_fp32_step_of_its_master():
    slopes = [[[0.5, -2.0]], [[1.0, 0.25]], [[-0.5, 4.0]]]
    low, full = (Weights(dtype, w=[[1.0, -0.5]]) for dtype in (torch.bfloat16, torch.float32))
    engines = [engine_of(module, weight_decay=0.1) for module in (low, full)]
    for slope in slopes:
        for module, engine in zip((low, full), engines, strict=True):
            engine.backward(module.loss(w=slope))
            engine.step()
    assert torch.equal(engines[0].masters[0], full.w.detach())
    assert torch.equal(low.w, full.w.bfloat16())


# Scale, then clip, then step.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_comes_before_the_clip(dtype):
    # Gradient (30, 40) / 100 = (0.3, 0.4): its norm 0.5 is reported and lies below the clip of 1.
    module = Weights(dtype, a=[[1.0]], b=[1.0])
    engine = engine_of(module, max_grad_norm=1.0)
    seen = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(master.grad.item() for master in engine.masters)
    )
    engine.backward(module.loss(a=[[30.0]], b=[40.0]))
    assert engine.step(1 / 100) == pytest.approx(0.5)
    assert seen == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_clip_bounds_the_norm_of_all_parameters_together(scale):
    module = Weights(a=[[1.0]], b=[1.0])
    engine = engine_of(module, max_grad_norm=0.25)
    seen = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(master.grad.item() for master in engine.masters)
    )
    engine.backward(module.loss(a=[[30.0]], b=[40.0]))
    assert engine.step(scale) == pytest.approx(50.0 * scale)
    assert seen == pytest.approx([0.15, 0.2], rel=1e-5)
    assert math.hypot(*seen) <= 0.25


def test_a_parameter_without_gradient_does_not_stop_a_step():
    module = Weights(used=[[1.0]], unused=[[1.0]])
    engine = engine_of(module)
    engine.backward(module.loss(used=[[2.0]]))
    assert engine.step(0.5) == 1.0
    assert module.used.item() == pytest.approx(0.9) and module.unused.item() == 1.0

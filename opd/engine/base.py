"""The engine: who holds the weights, accumulates gradients and steps. Here plain torch, whole on
every device; `opd.engine.zero` shards."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opd import distributed
from opd.config.optimisation import OptimConfig


def lr_factor(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The rate at a step (from 0) as a share of `optim.lr`: a linear warm-up, then the schedule to
    its floor."""
    warmup = math.ceil(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, steps - warmup)
        left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * left

    return factor


def adamw(
    parameters: Sequence[torch.Tensor],
    config: OptimConfig,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> Any:
    """AdamW, or a class made from it: matrices decay, norms and biases do not."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=True)


class Engine:
    """What every engine has: a schedule, and the four things that a step asks for."""

    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]  # those that are trained
    lockstep = False  # whether all ranks must go through the same passes, as many times

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self.config = config
        self._factor = lr_factor(config, steps)

    def _go_to(self, step: int) -> None:
        self.steps_done = step
        self.lr = self.config.lr * self._factor(step)  # of the next step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    @property
    def loss_factor(self) -> float:
        """What every loss is multiplied by before `backward`, so that the gradients of the ranks
        add up: the number of ranks where the engine takes their mean."""
        return 1.0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's loss, which has `loss_factor` in it. The loss itself
        receives a gradient of exactly 1, or NaN where a sharding engine must refuse the step."""
        raise NotImplementedError

    def step(self, gradient_scale: float = 1.0) -> float:
        """Scale the accumulated gradient (by a denominator known only now), clip, update; returns
        its norm before clipping. A gradient that is not finite updates nothing."""
        raise NotImplementedError

    def skip(self) -> None:
        """Pass over a step that has nothing to learn from: neither weights nor optimizer change."""
        raise NotImplementedError

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Inside, this rank has every weight (unless `engine.gather` is false), and may go its own
        way; no gradients."""
        yield

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict; of a sharded one on the first rank alone, on the CPU."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what a resumed run goes on from."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        raise NotImplementedError


class TorchEngine(Engine):
    """AdamW with fp32 master weights and fp32 gradient accumulation, whatever the model's dtype.

    A rate of 1e-6 vanishes in pure bf16. Where parameters are fp32 (or fp64) already they are their
    own masters. Of several ranks each holds everything; gradients are summed over them.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int) -> None:
        super().__init__(config, steps)
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for p in self.parameters
        ]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(self._accumulate_into(master))
        self.optimizer = adamw(self.masters, config)
        self._go_to(0)

    @staticmethod
    def _accumulate_into(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

        return hook

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, gradient_scale: float = 1.0) -> float:
        if distributed.world_size() > 1:
            for master in self.masters:
                if master.grad is None:  # this rank had nothing to learn from; others had
                    master.grad = torch.zeros_like(master)
                dist.all_reduce(master.grad)
        if gradient_scale != 1.0:
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(gradient_scale)
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self._go_to(self.steps_done + 1)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return norm

    def skip(self) -> None:
        self._go_to(self.steps_done + 1)
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def save(self, folder: Path) -> None:
        if distributed.is_first():  # every rank has the same
            state = {
                "masters": [master.detach() for master in self.masters],
                "optimizer": self.optimizer.state_dict(),
                "step": self.steps_done,
            }
            torch.save(state, folder / "engine.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        for parameter, master, saved in zip(
            self.parameters, self.masters, state["masters"], strict=True
        ):
            master.copy_(saved)
            parameter.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])
        self._go_to(state["step"])

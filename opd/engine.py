"""The engine: who holds the weights, accumulates gradients and steps. Here plain torch on one
device."""

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from opd.config import OptimConfig


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


def reuse_freed_memory(reuse: bool = True) -> None:
    """Keep freed blocks inside the process where the C library is glibc; elsewhere do nothing.

    By default it gives every large block back to the system, and each step pays the page faults for
    the same activations again: a fifth of a CPU step. `reuse` False goes back to that, for whoever
    measures memory.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # names of mallopt(3)
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(mmap_max, 0 if reuse else 2**16)
        library.mallopt(trim_threshold, 2**30 if reuse else 2**17)
        library.mallopt(top_pad, 2**26 if reuse else 0)
        if not reuse:
            library.mallopt(mmap_threshold, 2**17)  # else it grows with what is freed
            library.malloc_trim(0)


def set_up(threads: int | None, seed: int) -> torch.device:
    """Make the process ready for a run, and return its device."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers_logging.disable_progress_bar()
    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on import
    reuse_freed_memory()
    return torch.device("cpu")


class TorchEngine:
    """AdamW with fp32 master weights and fp32 gradient accumulation, whatever the model's dtype.

    A rate of 1e-6 vanishes in pure bf16. Where parameters are fp32 (or fp64) already they are their
    own masters.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int) -> None:
        self.config = config
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for p in self.parameters
        ]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(self._accumulate_into(master))
        decayed = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            foreach=True,
        )
        self._factor = lr_factor(config, steps)
        self._go_to(0)

    def _go_to(self, step: int) -> None:
        self._step = step
        self.lr = self.config.lr * self._factor(step)  # of the next step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    @staticmethod
    def _accumulate_into(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

        return hook

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's loss."""
        loss.backward()

    def step(self, gradient_scale: float = 1.0) -> float:
        """Scale the accumulated gradient (by a denominator known only now), clip, update; returns
        its norm before clipping. A gradient that is not finite updates nothing."""
        if gradient_scale != 1.0:
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(gradient_scale)
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self._go_to(self._step + 1)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return norm

    def skip(self) -> None:
        """Pass over a step that has nothing to learn from: neither weights nor optimizer change."""
        self._go_to(self._step + 1)
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "step": self._step,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for parameter, master, saved in zip(
            self.parameters, self.masters, state["masters"], strict=True
        ):
            master.copy_(saved)
            parameter.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])
        self._go_to(state["step"])

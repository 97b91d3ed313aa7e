"""The engine interface, and the plain torch engine, with all weights on every device.

An engine holds the trained weights, accumulates gradients and updates; `opd.engine.zero` shards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from opd import distributed
from opd.config.optimisation import OptimConfig

FILE_BYTES = 2**30
"""Size above which a file of a checkpoint is closed, since a rank holds it in CPU memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


def lr_factor(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """Learning rate at a step (from 0) as a fraction of `optim.lr`: linear warm-up, then
    `optim.schedule` down to `optim.min_lr_ratio`."""
    warmup = math.ceil(config.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, steps - warmup)
        linear, cosine = 1 - progress, (1 + math.cos(math.pi * progress)) / 2
        decay = linear if config.schedule == "linear" else cosine
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay

    return factor


def adamw(
    parameters: Sequence[torch.Tensor],
    config: OptimConfig,
    optimizer_class: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> Any:
    """AdamW, or a subclass, with weight decay for matrices but not for norms and biases."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optimizer_class(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=True)


class Engine:
    """Interface of an engine: the learning-rate schedule, and the calls of a training step."""

    optimizer: torch.optim.Optimizer
    lockstep = False  # whether every rank must run the same number of forwards and backwards

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int) -> None:
        self.module, self.config = module, config
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self._factor = lr_factor(config, steps)

    def _go_to(self, step: int) -> None:
        """Set the number of steps done, and with it the learning rate."""
        self.steps_done = step
        self.lr = self.config.lr * self._factor(step)  # for the next step
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    @property
    def loss_factor(self) -> float:
        """Factor that every loss must contain before `backward`, so that the ranks' gradients add
        up: the number of ranks if the engine averages gradients, else 1."""
        return 1.0

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a micro-batch's loss, which contains `loss_factor`.

        The loss receives a gradient of exactly 1, or NaN where a sharding engine must refuse the
        step.
        """
        raise NotImplementedError

    def step(self, gradient_scale: float = 1.0) -> float:
        """Scale the accumulated gradient, clip it, update the weights, and return its norm before
        clipping. A gradient that is not finite changes no weight.

        Args:
            gradient_scale: 1 / denominator where that is only known after sampling.
        """
        raise NotImplementedError

    def skip(self) -> None:
        """Count a step without tokens to train on; weights and optimizer do not change."""
        raise NotImplementedError

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Context in which all weights are gathered (unless `engine.gather` is false), so that
        ranks may run different numbers of forwards; without gradients."""
        yield

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the model; of a sharded one on the CPU, and on the first rank only."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write master weights, optimizer state and number of steps to a checkpoint folder.

        The files hold whole parameters, of which each rank writes its share, so that they fit any
        engine and any number of ranks.
        """
        part: dict[str, torch.Tensor] = {}
        for index, name in enumerate(self.names):
            for key, tensor in self.full_state(index):
                if index % distributed.world_size() == distributed.rank():
                    part[f"{name}:{key}"] = tensor.cpu()
            full = sum(tensor.nbytes for tensor in part.values()) > FILE_BYTES
            if part and (full or index == len(self.names) - 1):
                path = folder / f"engine_{distributed.rank()}_{index}.safetensors"
                save_file(part, path, {"steps": str(self.steps_done)})
                part = {}

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, with any engine and any number of ranks."""
        with ExitStack() as stack:
            files: list[Any] = [
                stack.enter_context(safe_open(path, "pt"))
                for path in sorted(folder.glob("engine_*.safetensors"))
            ]
            places = {key: file for file in files for key in file.keys()}  # noqa: SIM118
            for index, name in enumerate(self.names):
                keys = [f"{name}:{key}" for key in ("weight", "step", *MOMENTS)]
                tensors = {key: places[key].get_tensor(key) for key in keys if key in places}
                self.restore(index, {k.rpartition(":")[2]: t for k, t in tensors.items()})
            self._go_to(int(files[0].metadata()["steps"]))

    def full_state(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the whole master weight of a parameter, as `weight`, and from its first update on
        AdamW's state by name; every rank must go through them."""
        raise NotImplementedError

    def restore(self, index: int, state: dict[str, torch.Tensor]) -> None:
        """Set a parameter, its master weight and AdamW's state to what `full_state` yielded."""
        raise NotImplementedError


class TorchEngine(Engine):
    """AdamW with fp32 master weights and fp32 gradient accumulation, whatever the model's dtype.

    In pure bf16 an update at a learning rate of 1e-6 would vanish. Parameters in fp32 or fp64 are
    their own masters. Every rank holds everything; gradients are summed over the ranks.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, steps: int) -> None:
        super().__init__(module, config, steps)
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
        """Hook that adds a parameter's complete gradient to its master's, in fp32."""

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
                if master.grad is None:  # this rank had no tokens to train on; others had
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

    def full_state(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        master = self.masters[index]
        yield "weight", master.detach()
        yield from self.optimizer.state.get(master, {}).items()

    @torch.no_grad()
    def restore(self, index: int, state: dict[str, torch.Tensor]) -> None:
        master = self.masters[index]
        master.copy_(state["weight"])
        self.parameters[index].copy_(master)
        moments = {key: state[key].to(master.device) for key in MOMENTS if key in state}
        if moments:
            self.optimizer.state[master] = {"step": state["step"], **moments}

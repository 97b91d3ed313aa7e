"""DeepSpeed ZeRO as an engine: stages 1, 2 and 3 behind the interface of `opd.engine.base`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd import distributed
from opd.config.optimisation import EngineConfig, OptimConfig
from opd.engine.base import MOMENTS, Engine, adamw
from opd.models.prefetch import LayersAhead
from opd.models.sharded import gathered, import_deepspeed
from opd.models.video_lm import VideoLM

BUCKET = 200_000_000  # elements of a reduction buffer


class _AdamW(torch.optim.AdamW):
    """AdamW that does nothing while `held`, so that DeepSpeed can finish a skipped step and clear
    its gradients."""

    held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.held else super().step(closure)


class ZeroEngine(Engine):
    """A model under DeepSpeed ZeRO, configured from our configuration alone.

    Every rank must take part in every pass (`lockstep`): stages 1 and 2 reduce gradients in
    backward, and stage 3 gathers weights layer by layer.
    """

    lockstep = True

    def __init__(
        self,
        lm: VideoLM,
        config: OptimConfig,
        steps: int,
        settings: EngineConfig,
        micro_batches: int,
    ) -> None:
        super().__init__(lm.model, config, steps)
        self.lm, self.micro_batches, self.settings = lm, micro_batches, settings
        self._backwards = 0
        self.optimizer: _AdamW = adamw(self.parameters, config, _AdamW)
        self.engine: Any
        self.engine, *_ = import_deepspeed().initialize(
            model=lm.model,
            optimizer=self.optimizer,
            config=zero_settings(lm, config, settings, micro_batches),
            dist_init_required=False,
        )
        lm.model.is_sharded = settings.zero_stage == 3
        self.ahead: LayersAhead | None = None
        if settings.zero_stage == 3:
            self.ahead = LayersAhead(lm, self.engine.optimizer.parameter_offload)
        self._go_to(0)

    def _settle(self) -> None:
        """Release every gathered layer, after waiting for those in flight."""
        if self.ahead is not None:
            self.ahead.settle()

    @property
    def loss_factor(self) -> float:
        return float(distributed.world_size())  # DeepSpeed averages gradients over the ranks

    def backward(self, loss: torch.Tensor) -> None:
        self._backwards += 1
        self.engine.set_gradient_accumulation_boundary(self._backwards == self.micro_batches)
        # DeepSpeed checks only gradients before it updates; a loss that is not finite must turn
        # them into NaN.
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.engine.optimizer.override_loss_scale(1.0)
        # DeepSpeed's forward would do this; ours calls the layers directly.
        self.engine.optimizer.clear_backward_seen_flag()
        if self.ahead is not None:
            self.ahead.start_backward()
        self.engine.backward(loss * finite, scale_wrt_gas=False)
        self._settle()

    def step(self, gradient_scale: float = 1.0) -> float:
        assert self._backwards == self.micro_batches
        self._backwards = 0
        self._settle()
        # DeepSpeed divides gradients by the loss scale in fp32, before it computes their norm.
        self.engine.optimizer.override_loss_scale(1 / gradient_scale)
        self.engine.step()
        self._go_to(self.steps_done + 1)
        return float(self.engine.get_global_grad_norm())

    def skip(self) -> None:
        self.optimizer.held = True
        try:
            self.step()
        finally:
            self.optimizer.held = False

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        if not (self.lm.sharded and self.settings.gather):
            yield
            return
        self._settle()
        offload = self.engine.optimizer.parameter_offload
        parameters = list(self.lm.model.parameters())
        with gathered(parameters):
            # With DeepSpeed's hooks, every layer would release its weights after use.
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            self.lm.model.is_sharded = False
            try:
                yield
            finally:
                self.lm.model.is_sharded = True
                offload._register_deepspeed_module(offload.module)

    def weights(self) -> dict[str, torch.Tensor]:
        if not self.lm.sharded:
            return self.lm.model.state_dict()
        self._settle()
        weights = {}
        for name, parameter in self.lm.model.named_parameters(remove_duplicate=False):
            with gathered([parameter]):
                if distributed.is_first():
                    weights[name] = parameter.detach().cpu().clone()
        return weights

    def save(self, folder: Path) -> None:
        self._settle()
        super().save(folder)

    def load(self, folder: Path) -> None:
        self._settle()
        super().load(folder)

    def full_state(self, index: int) -> Iterator[tuple[str, Any]]:
        from deepspeed import utils

        parameter = self.parameters[index]
        yield "weight", utils.safe_get_full_fp32_param(parameter)
        steps = [of_shard["step"] for of_shard in self.optimizer.state.values() if of_shard]
        if steps:
            yield "step", steps[0].clone()
            self._link_moments()
            for key in MOMENTS:
                yield key, utils.safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def restore(self, index: int, state: dict[str, torch.Tensor]) -> None:
        from deepspeed import utils

        parameter: Any = self.parameters[index]
        if "step" in state:
            for shard in self._shards():
                of_shard = self.optimizer.state[shard]
                if not of_shard:
                    of_shard |= {key: torch.zeros_like(shard) for key in MOMENTS}
                of_shard["step"] = state["step"].clone()
            self._link_moments()
        moments = {key: state[key] for key in MOMENTS if key in state}
        if self.settings.zero_stage < 3:
            utils.safe_set_full_fp32_param(parameter, state["weight"])
            for key, moment in moments.items():
                utils.safe_set_full_optimizer_state(parameter, moment, key)
            parameter.copy_(state["weight"])
            return
        size = parameter.ds_tensor.ds_numel  # of every rank's share, the last of which are padded

        def share(whole: torch.Tensor) -> torch.Tensor:
            padded = nn.functional.pad(
                whole.flatten(), (0, size * distributed.world_size() - whole.numel())
            )
            return padded.narrow(0, size * distributed.rank(), size)

        utils.safe_set_local_fp32_param(parameter, share(state["weight"]))
        for key, moment in moments.items():
            utils.safe_set_local_optimizer_state(parameter, share(moment), key)
        parameter.ds_tensor.copy_(share(state["weight"]))
        if parameter.numel() == parameter.ds_numel:  # also kept whole on every rank
            parameter.copy_(state["weight"])

    def _shards(self) -> list[torch.Tensor]:
        """This rank's shards of the master weights, by which the optimizer keeps its state."""
        optimizer = self.engine.optimizer
        if self.settings.zero_stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups

    def _link_moments(self) -> None:
        """Let stages 1 and 2 find each parameter's part of the optimizer state, which DeepSpeed
        looks up once, after the first step, even where that was skipped."""
        if self.settings.zero_stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def zero_settings(
    lm: VideoLM, optim: OptimConfig, settings: EngineConfig, micro_batches: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, with every setting that affects a result made explicit."""
    stage: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": BUCKET}
    if settings.offload:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": lm.device.type == "cuda"}
    if settings.zero_stage == 3:
        stage["stage3_param_persistence_threshold"] = settings.persistence_threshold
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {
            "enabled": lm.head.weight.dtype == torch.bfloat16,
            "check_grad_overflow": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31 - 1,
    }

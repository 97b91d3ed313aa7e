"""Prefetching for ZeRO-3: while a layer computes, the weights of the next one are gathered.

DeepSpeed prefetches along a trace of the modules, which only a forward of the top module completes.
A step here calls the layers itself, and how often depends on the answers, so the trace is never
complete and every gather would block. The order of layers needs no trace: upwards in a forward,
downwards in a backward, recomputation included. Gathering, waiting and releasing use DeepSpeed's
own functions, so that its bookkeeping stays right.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from opd.models.video_lm import VideoLM

HELD = "layer in use"  # an active submodule of a weight; DeepSpeed keeps weights that have one


class LayersAhead:
    """Gathers each layer of a sharded model one layer ahead, in language model and vision tower.

    At most two layers of a stack are gathered or in flight at a time. On a GPU the memory of a
    third is still in use while its kernels run.

    Args:
        offload: DeepSpeed's `DeepSpeedZeRoOffload` of the model.
    """

    def __init__(self, lm: VideoLM, offload: Any) -> None:
        language_model, visual = lm.language_model, lm.visual
        self.language = _Stack(lm, offload, language_model.layers, language_model.embed_tokens)
        self.vision = _Stack(lm, offload, visual.blocks, visual.patch_embed)

    def start_backward(self) -> None:
        """Start gathering the last layer, which a backward reaches first after the head."""
        self.language.start(len(self.language.layers) - 1)

    def settle(self) -> None:
        """Wait for gathers in flight and release every layer.

        Called after a backward, and before weights are changed or gathered as a whole; an exception
        may have left layers gathered.
        """
        self.language.settle()
        self.vision.settle()


class _Stack:
    """Layers that run in order, after the module `entry`."""

    def __init__(
        self, lm: VideoLM, offload: Any, layers: Sequence[nn.Module], entry: nn.Module
    ) -> None:
        from deepspeed.accelerator import get_accelerator

        self.lm = lm
        self.accelerator: Any = get_accelerator()
        self.layers: list[list[Any]] = [list(layer.parameters()) for layer in layers]
        coordinator = offload.get_param_coordinator()
        self._gather = coordinator._PartitionedParameterCoordinator__all_gather_params
        self._release = coordinator._PartitionedParameterCoordinator__release_param
        self._stream = offload._DeepSpeedZeRoOffload__allgather_stream
        self._in_flight = lm.model.ds_inflight_param_registry
        self._held: set[int] = set()
        self._left: deque[Any] = deque()  # on a GPU: an event at the end of each layer left
        # Copies from CPU memory run on a stream that every submodule waits for. They are started
        # after the current layer's kernels, which would otherwise wait for them.
        self.starts_late = _copied_from_cpu(self.layers, lm.device)
        entry.register_forward_pre_hook(lambda *_: self.start(0))
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._before(i))
            layer.register_forward_hook(lambda _m, _i, output, i=index: self._after(i, output))

    def _before(self, index: int) -> None:
        if _in_backward():  # recomputation
            self._enter(index, index - 1)
        else:
            self._enter(index, None if self.starts_late else index + 1)

    def _after(self, index: int, output: Any) -> None:
        if _in_backward() or not self.lm.sharded:
            return
        self._leave(index)
        if self.starts_late:
            self.start(index + 1)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter(index, index - 1))

    def _enter(self, index: int, following: int | None) -> None:
        """Gather a layer, keep it until it is left, and start gathering the `following` one."""
        if not self.lm.sharded:
            return
        # In backward a layer is left when the next is entered: DeepSpeed counts a module's inputs
        # anew in each forward, so with several forwards before a backward it would release once.
        for other in self._held - {index}:
            self._leave(other)
        self.start(index)
        self._wait(index)
        self._held.add(index)
        for parameter in self.layers[index]:
            parameter.ds_active_sub_modules.add(HELD)
        if following is not None:
            self.start(following)

    @torch.no_grad()
    def start(self, index: int) -> None:
        """Start gathering a layer, if the index is valid and the layer is not gathered yet."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if not (self.lm.sharded and 0 <= index < len(self.layers)):
            return
        missing = [p for p in self.layers[index] if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            while len(self._left) > 1:  # else the host would allocate many layers ahead of the GPU
                self._left.popleft().synchronize()
            self._gather(missing, not _in_backward())

    @torch.no_grad()
    def _wait(self, index: int) -> None:
        in_flight = [p for p in self.layers[index] if p in self._in_flight]
        with self.accelerator.stream(self._stream):
            for parameter in in_flight:
                self._in_flight.pop(parameter).wait()
        if in_flight and not self.accelerator.resolves_data_dependency():
            self.accelerator.current_stream().wait_stream(self._stream)

    @torch.no_grad()
    def _leave(self, index: int) -> None:
        for parameter in self.layers[index]:
            parameter.ds_active_sub_modules.clear()
            if not parameter.ds_persist:
                self._release(parameter)
        if index in self._held and self.lm.device.type == "cuda":
            self._left.append(torch.cuda.Event())
            self._left[-1].record()
        self._held.discard(index)

    def settle(self) -> None:
        """Wait for gathers in flight and release every layer."""
        if self.lm.sharded:
            for index in range(len(self.layers)):
                self._wait(index)
                self._leave(index)
            self._left.clear()


def _copied_from_cpu(layers: Sequence[Sequence[Any]], device: torch.device) -> bool:
    """Whether shards are in CPU memory while the model computes on a GPU."""
    device_types = {parameter.ds_tensor.device.type for layer in layers for parameter in layer}
    return device.type != "cpu" and "cpu" in device_types


def _in_backward() -> bool:
    """Whether autograd's engine is running on this thread."""
    return torch._C._current_graph_task_id() != -1

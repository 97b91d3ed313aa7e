"""A memory plan, and the capacity that it must fit.

A plan has what is held throughout a step, and what is alive besides in each moment of the step. The
moment that needs most decides; the needs of the others never coincide with it and are not added.
"""

import os
from dataclasses import dataclass, field

import torch

from opd import distributed
from opd.errors import ConfigError
from opd.planning.shapes import Size

UNKNOWN = 1.05  # factor for the allocator's rounding and the libraries' own buffers
USABLE = 0.9  # share of a device to plan for; the rest covers the plan's error and the driver


@dataclass(frozen=True)
class Plan:
    """Bytes on each device by purpose, for one choice of recomputation and teacher placement.

    `held` is needed throughout a step; `moments` has what is alive besides in each moment.
    """

    held: dict[str, int]
    moments: dict[str, dict[str, int]]
    recompute: str
    placement: str
    together: int = 1  # micro-batches that are sampled together
    cpu: int = 0  # bytes of CPU memory per device
    sizes: dict[str, Size] = field(default_factory=dict)

    def total_at(self, moment: str) -> int:
        """Bytes on a device in this moment, with a margin for what cannot be planned."""
        planned = sum(self.held.values()) + sum(self.moments[moment].values())
        return int(UNKNOWN * planned)

    @property
    def peak(self) -> str:
        """Moment that needs most."""
        return max(self.moments, key=self.total_at)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose at the peak."""
        return self.held | self.moments[self.peak]

    @property
    def total(self) -> int:
        """Bytes on a device at the peak."""
        return self.total_at(self.peak)


def capacity_of(device: torch.device) -> int:
    """Memory of a rank in bytes: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // distributed.world_size()


def too_little(plan: Plan, capacity: int) -> ConfigError:
    """Error for a plan that does not fit."""
    need, room = plan.total / 2**30, capacity / 2**30
    remedies = "prefix.recompute=auto, more ranks, a higher engine.zero_stage, engine.offload=true"
    return ConfigError(f"{need:.1f} GiB needed, {room:.1f} on each device: try {remedies}")

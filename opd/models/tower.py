"""Arguments of a vision tower that depend only on the sizes of its videos, computed on the host.

The stock towers derive positions, interpolation weights and segment boundaries from `grid_thw`, and
on a GPU wait for the device a dozen times to do so. They accept all of these as arguments, too.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import vision_utils

from opd.device import fetch, send


def tower_arguments(tower: Any, grid_thw: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a Qwen-VL vision tower.

    Args:
        grid_thw: int64 `[B, 3]`, the videos' sizes in patches; on the host, or it is fetched.

    Returns: `grid_thw` on the host, and on `device` everything that the tower derives from it.
    """
    grid, config = fetch(grid_thw), tower.config
    merge = config.spatial_merge_size
    frames = Segments.of(vision_utils.get_vision_cu_seqlens(grid), device)
    arguments: dict[str, Any] = {
        "grid_thw": grid,
        "position_ids": send(vision_utils.get_vision_position_ids(grid, merge), device),
        "cu_seqlens": frames.edges,
        "max_seqlen": max(frames.lengths),
        "segments": [frames],
    }
    if hasattr(tower, "window_size"):  # Qwen2.5-VL
        order, edges = vision_utils.get_vision_window_index(
            grid, merge, tower.window_size, tower.patch_size
        )
        windows = Segments.of(edges, device)
        arguments |= {
            "window_index": send(order, device),
            "cu_window_seqlens": windows.edges,
            "max_window_seqlen": max(windows.lengths),
            "segments": [frames, windows],
        }
    else:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        arguments |= {
            "interp_indices": send(indices, device),
            "interp_weights": send(weights, device),
        }
    return arguments


@dataclass(frozen=True)
class Segments:
    """Boundaries of packed vision segments: `edges` int32 `[segments + 1]` on the device, and
    `lengths` on the host, where reading them does not wait for the device."""

    edges: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, edges: torch.Tensor, device: torch.device | None = None) -> "Segments":
        """Segments of boundaries on the host, which are sent to `device`, or of boundaries on the
        device (`device` None), from which the lengths are fetched."""
        lengths = fetch(edges).diff().tolist()
        return cls(edges.int() if device is None else send(edges.int(), device), tuple(lengths))

    @cached_property
    def rows_by_length(self) -> dict[int, torch.Tensor | None]:
        """For each distinct length, the row indices of all segments of that length; None, for all
        rows, where there is only one length."""
        distinct = sorted(set(self.lengths))
        if len(distinct) == 1:
            return {distinct[0]: None}
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        rows = {n: (starts[lengths == n][:, None] + torch.arange(n)).flatten() for n in distinct}
        return {length: send(index, self.edges.device) for length, index in rows.items()}

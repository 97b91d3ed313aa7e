"""Position ids of a prompt, three rows of multimodal rotary embedding (mrope): one rule per family.

Each is a pure function of the prompt's token ids and the video's grid. The models' own
`rope_deltas` are left over from their last call and are never used. For Qwen2.5-VL the stock rule
is wrong in transformers 5: the position of text after a video ignores the video's length in time,
so that prompt and continuation would disagree.
"""

from collections.abc import Callable
from typing import Any

import torch

Grid = tuple[int, int, int]  # frame pairs, rows, columns of vision tokens (after merging)
# (input_ids [P], model config, grid, seconds per frame pair; None where every pair is a segment of
# its own) -> position ids [3, P] and the position of the first completion token.
Rule = Callable[[torch.Tensor, Any, Grid, float | None], tuple[torch.Tensor, int]]


def separate_positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid
) -> tuple[torch.Tensor, int]:
    """Positions where every frame pair is a vision segment of its own, between text timestamps, as
    in Qwen3-VL and with `data.timestamps=text` in Qwen2.5-VL.

    A segment starting at s puts its token in row h, column w at (s, s + h, s + w); text resumes at
    s + max(rows, columns).

    Args:
        input_ids: int64 `[P]`, one unpadded prompt.

    Returns: int64 `[3, P]` and the position of the first completion token.
    """
    return _positions(input_ids, video_token_id, (1, grid[1], grid[2]), 0.0)


def qwen2_5_vl_positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid, positions_per_pair: float
) -> tuple[torch.Tensor, int]:
    """Positions where the whole video is one segment with absolute time.

    A segment starting at s puts frame pair t at s + floor(t * positions_per_pair), and rows and
    columns as `separate_positions` does; text resumes one past the largest position in any of the
    three rows.

    Args:
        input_ids: int64 `[P]`, one unpadded prompt.
        positions_per_pair: the model's `tokens_per_second` times the seconds that a frame pair
            covers, not rounded.

    Returns: int64 `[3, P]` and the position of the first completion token.
    """
    return _positions(input_ids, video_token_id, grid, positions_per_pair)


def _qwen3_vl(
    input_ids: torch.Tensor, config: Any, grid: Grid, _: float | None
) -> tuple[torch.Tensor, int]:
    return separate_positions(input_ids, config.video_token_id, grid)


def _qwen2_5_vl(
    input_ids: torch.Tensor, config: Any, grid: Grid, seconds_per_pair: float | None
) -> tuple[torch.Tensor, int]:
    if seconds_per_pair is None:
        return separate_positions(input_ids, config.video_token_id, grid)
    positions_per_pair = config.vision_config.tokens_per_second * seconds_per_pair
    return qwen2_5_vl_positions(input_ids, config.video_token_id, grid, positions_per_pair)


POSITIONS: dict[str, Rule] = {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl}


def _positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid, time_step: float
) -> tuple[torch.Tensor, int]:
    """Count text up by one in all rows; lay segments of `grid` over the runs of video tokens."""
    frames, rows, columns = grid
    t, h, w = (
        axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    )
    segment = torch.stack([(t * time_step).floor().long(), h, w])
    size, advance = frames * rows * columns, int(segment.max()) + 1
    is_video = (input_ids == video_token_id).tolist()
    parts, position, index = [], 0, 0
    while index < len(is_video):
        if is_video[index]:
            if not all(is_video[index : index + size]):
                raise ValueError(f"a run of video tokens is shorter than the grid {grid}")
            parts.append(segment + position)
            index, position = index + size, position + advance
        else:
            end = index
            while end < len(is_video) and not is_video[end]:
                end += 1
            parts.append(torch.arange(position, position + end - index).expand(3, -1))
            position, index = position + end - index, end
    return torch.cat(parts, dim=1), position

"""Position ids of a prompt, three mrope rows, per model family: a pure function of token ids and
the video grid.

The models' own `rope_deltas` are left over from their last call and are never used. For Qwen2.5-VL
the stock rule is wrong in transformers 5 (text after a video forgets how long the video is), so
prompt and continuation would disagree.
"""

import torch

Grid = tuple[int, int, int]  # frames pairs, rows, columns of vision tokens (after merging)


def qwen3_vl_positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid
) -> tuple[torch.Tensor, int]:
    """Every frame pair is its own vision segment between text timestamps.

    A segment starting at s puts its token in row h, column w at (s, s + h, s + w); text resumes at
    s + max(rows, columns).

    Args:
        input_ids: `[P]` of one unpadded prompt.

    Returns:
        int64 `[3, P]` and the position of the first completion token.
    """
    return _positions(input_ids, video_token_id, (1, grid[1], grid[2]), 0.0)


def qwen2_5_vl_positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid, seconds_per_position: float
) -> tuple[torch.Tensor, int]:
    """The video is one segment with absolute time: frame pair t sits at s + floor(t *
    seconds_per_position).

    `seconds_per_position` is `tokens_per_second` (model) times the seconds that a frame pair
    covers, fractions kept. Text resumes one past the largest position used in any row.
    """
    return _positions(input_ids, video_token_id, grid, seconds_per_position)


def _positions(
    input_ids: torch.Tensor, video_token_id: int, grid: Grid, time_step: float
) -> tuple[torch.Tensor, int]:
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

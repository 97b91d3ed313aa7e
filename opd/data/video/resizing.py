"""The resizing of the Qwen-VL video processors, for whoever does it before them."""

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode, functional


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image `[3, H, W]` uint8 at `size`, (height, width): antialiased bicubic, rounded to uint8,
    by the torchvision function that the processors of transformers call."""
    source = torch.from_numpy(np.ascontiguousarray(image))
    return functional.resize(
        source, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    ).numpy()

"""The resizing of the Qwen-VL video processors, for frames that are resized before they see them.

A module of its own, because it imports torch, which a worker does without until it has to resize.
"""

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode, functional


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image `[3, H, W]` uint8 to `size` (height, width).

    Antialiased bicubic, rounded to uint8, by the torchvision function that the processors of
    transformers call.
    """
    source = torch.from_numpy(np.ascontiguousarray(image))
    return functional.resize(
        source, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    ).numpy()

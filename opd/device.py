"""Copies between host and device: `send` never waits for the device, `fetch` always does.

A GPU works through a queue while the host prepares what comes next, and an operation that waits for
the device empties that queue. Every place of a step that has to wait calls `fetch`, so that these
places can be counted; a test traces the step and rejects any other.
"""

import torch


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in page-locked host memory, from which a GPU copies without the host waiting."""
    return tensor.pin_memory()


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device`; from host to GPU through pinned memory, without waiting."""
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return pin(tensor).to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, detached; waits until the device has computed it."""
    return tensor.detach().cpu()

"""Copies between host and device: `send` never waits for the device, `fetch` always does.

A GPU works through a queue while the host prepares what comes next, and an operation that waits for
the device empties that queue. Every place in a step that has to wait calls `fetch`, so that waits
can be counted; a test traces the step and fails on any other.
"""

import torch


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to page-locked host memory, from which a GPU copies while the host goes on."""
    return tensor.pin_memory()


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to `device`; from host to GPU through pinned memory, without waiting."""
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return pin(tensor).to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a detached tensor to the host, after waiting until the device has computed it."""
    return tensor.detach().cpu()

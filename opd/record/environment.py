"""The environment of a run or an evaluation, as it is stored beside its results."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from opd import distributed

LIBRARIES = (
    *("torch", "triton", "transformers", "deepspeed", "flash-attn", "numpy"),
    *("decord", "av", "torchcodec"),
)


def environment() -> dict[str, Any]:
    """Versions, hardware, command line, and the commit if the sources are a git checkout."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with the build, such as +cu128
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, **options).stdout
    except (OSError, subprocess.SubprocessError):
        commit = ""
    gpu = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "commit": commit.strip() or None,
        "versions": versions,
        "cuda": torch.version.cuda if gpu else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
    }

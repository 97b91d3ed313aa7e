"""The libraries that decode video, and whether they can be used here."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from opd.errors import ConfigError, raised

Backend = Literal["auto", "decord", "pyav", "torchcodec"]
MODULES = {"auto": "av", "decord": "decord", "pyav": "av", "torchcodec": "torchcodec.decoders"}


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend, ConfigError where its library cannot be imported."""
    if backend not in MODULES:
        raise ValueError(f"unknown video backend {backend!r}; known: {', '.join(MODULES)}")
    try:
        module = import_module(MODULES[backend])
        if backend == "torchcodec":
            _load(module)
    except (ImportError, OSError, RuntimeError) as error:
        needed = "torchcodec and FFmpeg's shared libraries" if backend == "torchcodec" else backend
        raise ConfigError(
            f"data.backend={backend}: it cannot be imported ({raised(error)}); install {needed}, "
            "or use data.backend=auto"
        ) from error


def _load(module: Any) -> None:
    """Make torchcodec load its library and FFmpeg's, which from 0.17 on it does when it is first
    used. Raises RuntimeError where it cannot."""
    try:
        module.VideoDecoder(b"")
    except Exception as error:  # an empty video is one in any case
        if "libtorchcodec" in str(error):
            raise

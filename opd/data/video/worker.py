"""The decoding process of `opd.data.video.pool`: `python -m opd.data.video.worker`.

It reads requests from stdin, one line of JSON each, and answers with messages on its original
stdout: a header, then a payload of the length in the header.

    READY    no payload: ready for a request, or torch is imported
    LOADING  no payload: importing torch, which takes seconds that do not count as decoding; only
             where a size changes, and for torchcodec
    PLAN     JSON: path and plan; the answer where nothing is to be decoded
    HEAD     JSON: path, plan, decoder, shape and how often each image is repeated
    IMAGE    one image `[3, H, W]` uint8; follows HEAD, once per entry of the repeats
    REFUSED  JSON: path and the reason why the file cannot be decoded, in one line
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from opd.data.video.budget import Budget, Recipe, resize_target
from opd.data.video.decoding import Plan, plan_frames, planned_images
from opd.errors import DataError

HEADER = struct.Struct("<cQQ")
"""Kind of message, number of the request, length of the payload in bytes."""
READY, LOADING, PLAN, HEAD, IMAGE, REFUSED = b"R", b"L", b"P", b"H", b"I", b"E"

Send = Callable[..., None]
"""`send(kind)` or `send(kind, data)`, where data is bytes, an array or a JSON value."""


def main() -> None:
    """Answer requests until stdin ends."""
    import av.logging

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the parent is gone
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what libraries print must not mix with replies
    av.logging.set_level(av.logging.FATAL)
    send = sender(replies, 0)
    send(READY)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # A decoder may hang outside Python when the parent is already gone; SIGALRM ends it then.
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"])
        answer(request, sender(replies, request["number"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


def sender(replies: Any, number: int) -> Send:
    """Return a function that writes messages about one request."""

    def send(kind: bytes, data: Any = b"") -> None:
        if isinstance(data, np.ndarray):
            payload = np.ascontiguousarray(data).data.cast("B")
        else:
            payload = data if isinstance(data, bytes) else json.dumps(data).encode()
        replies.write(HEADER.pack(kind, number, len(payload)))
        sent = 0
        while sent < len(payload):
            sent += replies.write(payload[sent:])

    return send


def answer(request: dict[str, Any], send: Send) -> None:
    """Answer a request; a file that cannot be decoded is answered with REFUSED."""
    path, cached, decode = Path(request["path"]), request["plan"], request["decode"]
    try:
        plan = plan_frames(path, **request["grid"]) if cached is None else Plan(**cached)
        if decode is None:
            send(PLAN, {"path": str(path), "plan": asdict(plan)})
        else:
            send_frames(path, plan, send, **decode)
    except DataError as error:
        send(REFUSED, {"path": str(path), "reason": str(error)})


def send_frames(
    path: Path, plan: Plan, send: Send, *, backend: Any, budget: dict[str, Any] | None
) -> None:
    """Decode and send frame by frame, so that the parent reads while this process decodes."""
    size: tuple[int, int] | None = None
    resize = None
    if backend == "torchcodec":
        _import("torchcodec.decoders", send)
    for row, _, image, decoder in planned_images(path, plan, backend):
        image = image.transpose(2, 0, 1)
        if row == 0:
            count, repeats = len(plan.indices), np.unique(plan.positions, return_counts=True)[1]
            size = _size(path, count, image, budget)
            if size != image.shape[1:]:
                resize = _import("opd.data.video.resizing", send).resize_image
            head = {"shape": [count, 3, *size], "repeats": repeats.tolist(), "decoder": decoder}
            send(HEAD, head | {"path": str(path), "plan": asdict(plan)})
        send(IMAGE, image if resize is None else resize(image, size))


def _size(
    path: Path, frames: int, image: np.ndarray, budget: dict[str, Any] | None
) -> tuple[int, int]:
    """Return the `(height, width)` in which to send the frames of a video."""
    height, width = image.shape[1:]
    if budget is None:
        return height, width
    try:
        from_recipe = Recipe(**budget["recipe"]).budget(frames) if "recipe" in budget else None
        return resize_target(frames, height, width, from_recipe or Budget(**budget["budget"]))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _import(name: str, send: Send) -> Any:
    """Import and return a module that needs torch; tell the parent if that is not imported yet."""
    if "torch" in sys.modules:
        return import_module(name)
    send(LOADING)
    module = import_module(name)
    send(READY)
    return module


if __name__ == "__main__":
    main()

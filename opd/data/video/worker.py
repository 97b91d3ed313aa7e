"""The process that decodes for another one: `python -m opd.data.decode_worker`.

It reads requests from stdin, one line of JSON each, and answers each with messages on what stdout
was: a header, then that many bytes.

    READY    nothing: waits for a request, or goes on with one after LOADING
    LOADING  nothing: imports torch, which takes seconds and is no fault of the file
    PLAN     path and plan, as JSON, where nothing is to be decoded
    HEAD     path, plan, shape and how often each image is shown, as JSON
    IMAGE    one picture, `[3, H, W]` uint8; as many as HEAD says
    REFUSED  path and one line that says why, as JSON
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from opd.data.video.budget import Budget, Recipe, resize_target
from opd.data.video.decoding import Plan, plan_frames, planned_images
from opd.errors import DataError

HEADER = struct.Struct("<cQQ")
"""Kind of message, number of the request, bytes that follow."""
READY, LOADING, PLAN, HEAD, IMAGE, REFUSED = b"R", b"L", b"P", b"H", b"I", b"E"

Send = Callable[..., None]
"""`send(kind)` or `send(kind, data)`, data being bytes, an array, or what JSON holds."""


def main() -> None:
    """Answer requests until stdin ends."""
    import av.logging

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody is left to read: end, quietly
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever a library prints is no part of a reply
    av.logging.set_level(av.logging.FATAL)
    send = sender(replies, 0)
    send(READY)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # A decoder may hang beyond Python's reach, and the parent may be gone: the kernel ends it.
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"])
        answer(request, sender(replies, request["number"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


def sender(replies: Any, number: int) -> Send:
    """What writes the messages of one request."""

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
    """Decode what a request asks for; what is wrong with the file is the answer then."""
    path, known, decode = Path(request["path"]), request["plan"], request["decode"]
    try:
        plan = plan_frames(path, **request["grid"]) if known is None else Plan(**known)
        if decode is None:
            send(PLAN, {"path": str(path), "plan": asdict(plan)})
        else:
            send_frames(path, plan, send, **decode)
    except DataError as error:
        send(REFUSED, {"path": str(path), "reason": str(error)})


def send_frames(
    path: Path, plan: Plan, send: Send, *, backend: Any, budget: dict[str, Any] | None
) -> None:
    """Decode and send picture by picture, so that the parent reads while this decodes."""
    size: tuple[int, int] | None = None
    resize = None
    for row, _, image in planned_images(path, plan, backend):
        image = image.transpose(2, 0, 1)
        if row == 0:
            count, shown = len(plan.indices), np.unique(plan.positions, return_counts=True)[1]
            size = _size(path, count, image, budget)
            resize = _load_resize(send) if size != image.shape[1:] else None
            head = {"shape": [count, 3, *size], "repeats": shown.tolist()}
            send(HEAD, head | {"path": str(path), "plan": asdict(plan)})
        send(IMAGE, image if resize is None else resize(image, size))


def _size(
    path: Path, frames: int, image: np.ndarray, budget: dict[str, Any] | None
) -> tuple[int, int]:
    """`(height, width)` to send the frames of a video in."""
    height, width = image.shape[1:]
    if budget is None:
        return height, width
    try:
        made = Recipe(**budget["recipe"]).budget(frames) if "recipe" in budget else None
        return resize_target(frames, height, width, made or Budget(**budget["budget"]))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _load_resize(send: Send) -> Callable[[np.ndarray, Any], np.ndarray]:
    """The video processors' own resizing of an image `[3, H, W]`, bit for bit."""
    if "torch" in sys.modules:
        from opd.data.video.resizing import resized
    else:
        send(LOADING)
        from opd.data.video.resizing import resized

        send(READY)
    return resized


if __name__ == "__main__":
    main()

"""Examples written as an annotation file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd.data.examples import Example


def write_timerft(
    path: str | Path, examples: Iterable[Example], video_root: str | Path | None = None
) -> None:
    """Write examples as TimeRFT JSON, one record a line, as `read_examples` reads it back.

    An example with an `answer` in words has that and its `options` beside the time or in place of
    it (an addition to the format).

    Args:
        path: file to write.
        examples: each with one span, an answer or both, a duration and a video under
            `video_root`.
        video_root: what `video` is stored relative to; default the folder of `path`.

    Raises:
        ValueError: for an example that the format cannot hold.
    """
    path = Path(path)
    root = path.parent if video_root is None else Path(video_root)
    lines = []
    for example in examples:
        spans = len(example.spans)
        if spans > 1 or not (spans or example.answer) or example.duration_s is None:
            raise ValueError(f"example {example.id!r} needs one span and a duration for timerft")
        known: dict[str, Any] = {"timestamp": list(example.spans[0])} if spans else {}
        if example.answer is not None:
            known["answer"] = example.answer
        if example.options is not None:
            known["options"] = list(example.options)
        if example.category is not None:
            known["category"] = example.category
        record = {
            "video": example.video.relative_to(root).as_posix(),
            "duration": example.duration_s,
            **known,
            "sentence": example.query,
            "qid": example.id,
            "difficulty": example.difficulty,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")

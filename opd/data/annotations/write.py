"""Writing examples to an annotation file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd.data.examples import Example


def write_timerft(
    path: str | Path, examples: Iterable[Example], video_root: str | Path | None = None
) -> None:
    """Write examples as TimeRFT JSON, one record per line; `read_examples` reads them back.

    Our addition to the format: `answer` and `options` beside the time or in place of it.

    Args:
        path: the file to write.
        examples: each with a duration, a video below `video_root`, and one span, an answer or
            both.
        video_root: the folder that videos are named relative to; by default that of `path`.

    Raises:
        ValueError: an example does not fit the format.
    """
    path = Path(path)
    root = path.parent if video_root is None else Path(video_root)
    lines = []
    for example in examples:
        num_spans = len(example.spans)
        if num_spans > 1 or not (num_spans or example.answer) or example.duration_s is None:
            raise ValueError(
                f"example {example.id!r} does not fit timerft: it must have a duration, at most "
                "one span, and an answer where it has no span"
            )
        optional: dict[str, Any] = {"timestamp": list(example.spans[0])} if num_spans else {}
        if example.answer is not None:
            optional["answer"] = example.answer
        if example.options is not None:
            optional["options"] = list(example.options)
        if example.category is not None:
            optional["category"] = example.category
        if example.clip is not None:
            optional["video_start"], optional["video_end"] = example.clip
        record = {
            "video": example.video.relative_to(root).as_posix(),
            "duration": example.duration_s,
            **optional,
            "sentence": example.query,
            "qid": example.id,
            "difficulty": example.difficulty,
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")

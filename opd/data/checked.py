"""The file that `opd.check` leaves beside annotations, and that training honours."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd.errors import DataError


def checked_path(annotations: str | Path) -> Path:
    """Where it is."""
    return Path(f"{annotations}.checked.jsonl")


def read_checked(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Rows by video. `reason` says why a video is not to be used, or is None."""
    rows: dict[Path, dict[str, Any]] = {}
    for path in paths:
        number = 0
        try:
            lines = path.read_text().splitlines() if path.is_file() else []
            for line in lines:
                number += 1
                row = json.loads(line)
                rows[Path(row["video"])] = row
                if not row["reason"]:
                    float(row["duration_s"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a row of opd.check: {error}") from error
    return rows


def is_of(row: dict[str, Any], video: Path) -> bool:
    """Whether a row is about the file as it is now; one without a size, written by hand, is about
    any."""
    if "size" not in row:
        return bool(row["reason"])
    try:
        found = video.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (row["size"], row["mtime_ns"])

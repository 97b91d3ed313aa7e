"""The report that `opd.check` leaves beside an annotation file, one JSON line per video.

Loading examples reads it, to leave out unusable videos and to know durations without opening files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd.errors import DataError


def checked_path(annotations: str | Path) -> Path:
    """Return the path of the report on an annotation file."""
    return Path(f"{annotations}.checked.jsonl")


def read_checked(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Return the rows of reports by video path; a report that does not exist has none.

    A row's `reason` says why its video is not to be used, or is None; then `duration_s` is there.

    Raises DataError for a malformed row.
    """
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
            raise DataError(
                f"{path}:{number}: not a row of opd.check: {error}; run it again or remove the file"
            ) from error
    return rows


def is_current(row: dict[str, Any], video: Path) -> bool:
    """Return whether a row describes the video file as it is now.

    A row with a reason but no size, as a user may write it, holds for any version of the file.
    """
    if "size" not in row:
        return bool(row["reason"])
    try:
        status = video.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (row["size"], row["mtime_ns"])

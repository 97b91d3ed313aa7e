"""JSON lines, atomic writes and checksums of files."""

import hashlib
import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file, up to the first line that is not JSON: an interrupted
    write leaves its last line incomplete. Returns an empty list if the file does not exist."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically: an interrupted write leaves the old file unchanged."""
    part = path.with_suffix(f"{path.suffix}.new")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def checksum(path: Path) -> str:
    """BLAKE2b digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()

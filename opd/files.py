"""JSON lines, atomic writes and checksums of files."""

import hashlib
import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none where there is no file. A last line cut short is left
    out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines; an interruption leaves what was there before."""
    part = path.with_suffix(f"{path.suffix}.new")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)


def checksum(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()

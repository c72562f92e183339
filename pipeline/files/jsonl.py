"""JSON-lines files that a run appends to."""

import json
from collections.abc import Iterator
from pathlib import Path


def append_line(path: Path, record: dict) -> None:
    """Append a record to a JSON-lines file; create the file and its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> Iterator[dict]:
    """Yield the records of a JSON-lines file.

    A line that is incomplete because the writer was killed is skipped; a missing file is empty.
    """
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue

"""Files of one JSON record a line that a run appends to."""

import json
from collections.abc import Iterator
from pathlib import Path


def append_line(path: Path, record: dict) -> None:
    """Add one line to a file of one record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> Iterator[dict]:
    """The records of a file; a line that a kill cut short is left out."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue

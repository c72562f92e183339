"""JSON-lines files that a run appends to."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import parse_json


def append_line(path: Path, record: dict) -> None:
    """Append a record to a JSON-lines file; create the file and its folder if missing.

    A half last line, which a killed writer left, is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        _end_last_line(file)
        file.write(json.dumps(record).encode() + b"\n")


def read_lines(path: Path, kind: Any) -> Iterator[Any]:
    """Yield the records of a JSON-lines file without a half last line; a missing file is empty.

    Args:
        path: The file.
        kind: The type of a record, which pydantic checks.

    Raises:
        UserError: Another line is damaged; the message names it.
    """
    for number, record in _records(path, kind):
        if isinstance(record, ValueError):
            raise UserError(
                f"{path}, line {number} is damaged ({record}): restore the file from a copy, "
                "or remove that line"
            )
        yield record


def sound_lines(path: Path, kind: Any) -> Iterator[Any]:
    """Yield what `read_lines` does, without damaged lines, whose number is printed on stderr.

    Args:
        path: The file.
        kind: The type of a record, which pydantic checks.
    """
    damaged = 0
    for _, record in _records(path, kind):
        if isinstance(record, ValueError):
            damaged += 1
        else:
            yield record
    if damaged:
        print(f"warning: {path}: {damaged} damaged lines are left out", file=sys.stderr, flush=True)


def _records(path: Path, kind: Any) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line and its record, or a ValueError with what is wrong with it."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line, kind)
            except ValueError as error:
                if line.endswith(b"\n"):
                    yield number, error


def _end_last_line(file: BinaryIO) -> None:
    """Go to the end of a file, after removing a half last line or ending a whole one."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    *whole, last = file.read().split(b"\n")
    try:
        parse_json(last, Any)
        file.write(b"\n")
    except ValueError:
        file.truncate(sum(len(line) + 1 for line in whole))

"""JSON-lines files, plain or compressed as .zst; errors name the line that is wrong."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

from retemper.pipeline.errors import UserError
from retemper.pipeline.files.json_file import parse_json


def compress_records(records: Iterable[dict]) -> bytes:
    """Return the content of a jsonl.zst file with these records."""
    return zstandard.compress("".join(json.dumps(record) + "\n" for record in records).encode())


def read_records(path: Path, keys: Mapping[str, type | tuple[type, ...]]) -> Iterator[dict]:
    """Yield the records of a jsonl or jsonl.zst file.

    Args:
        path: The file.
        keys: The keys that every record must have, with their types.

    Raises:
        UserError: The file is missing or damaged, or a record lacks a key or has one of another
            type; the message names the file and the line.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _record(line, keys, f"{path}, line {number}")


def _record(line: str, keys: Mapping[str, type | tuple[type, ...]], location: str) -> dict:
    try:
        record = parse_json(line.encode(), dict[str, Any])
    except ValueError as error:
        raise UserError(
            f"{location} is not a JSON object ({error}): was the file truncated? Generate it again"
        ) from None
    for key, kind in keys.items():
        # In Python a bool is an int, but it is not valid where a record must have a number.
        if not isinstance(record.get(key), kind) or (
            isinstance(record[key], bool) and kind is not bool
        ):
            names = " or ".join(
                each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))
            )
            raise UserError(
                f"{location}: {key} must be {names}, found {json.dumps(record.get(key))[:60]}"
            )
    return record


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} does not exist: correct the path")
    content = path.read_bytes()
    try:
        return (_decompress(content) if path.suffix == ".zst" else content).decode("utf-8-sig")
    except (zstandard.ZstdError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): generate it again") from None


def _decompress(content: bytes) -> bytes:
    """Return the content of all frames.

    zstandard's own reader does not notice that a file is truncated.
    """
    text = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        text.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError("it is truncated")
        content = frame.unused_data
    return b"".join(text)

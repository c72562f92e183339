"""Files of one JSON record a line, plain or as .zst, read with a word on what is wrong in which line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from retemper.pipeline.errors import UserError


def compress_records(records: Iterable[dict]) -> bytes:
    """The content of a jsonl.zst file."""
    return zstandard.compress("".join(json.dumps(record) + "\n" for record in records).encode())


def read_records(path: Path, keys: dict[str, type | tuple[type, ...]]) -> Iterator[dict]:
    """The records of a jsonl or jsonl.zst file, each with `keys` of these types. Raises UserError that names file and line."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield _record(line, keys, f"{path}, line {number}")


def _record(line: str, keys: dict, place: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON ({error}): was the file cut off? Generate it anew"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: one JSON object a line is expected, found {line[:60]}")
    for key, kind in keys.items():
        # True is an int to Python, but no number of a sample.
        if not isinstance(record.get(key), kind) or (
            isinstance(record[key], bool) and kind is not bool
        ):
            names = " or ".join(
                each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))
            )
            raise UserError(
                f"{place}: {key} must be {names}, found {json.dumps(record.get(key))[:60]}"
            )
    return record


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is not here: correct the path")
    content = path.read_bytes()
    try:
        return (_decompress(content) if path.suffix == ".zst" else content).decode()
    except (zstandard.ZstdError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): make it anew") from None


def _decompress(content: bytes) -> bytes:
    """Of all frames. zstandard's reader takes a file that was cut off for one that ends."""
    text = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        text.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError("it was cut off")
        content = frame.unused_data
    return b"".join(text)

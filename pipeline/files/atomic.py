"""Atomic file writes: a file appears with its full content or not at all."""

import os
import secrets
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a text file atomically and replace an existing one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically and replace an existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file atomically unless it exists; return whether this call created it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, it fails if the file exists
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True

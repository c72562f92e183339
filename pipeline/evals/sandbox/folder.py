"""A candidate's private folder: measured while it lives, and gone after it, whatever was made of it."""

import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_ENTRIES = 1000


@contextmanager
def private_folder() -> Iterator[str]:
    """An empty folder in the system's temporary one, removed at the end."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="retemper-sandbox-"))
    try:
        yield folder
    finally:
        remove(folder)


def overflows(folder: str, most_bytes: int) -> bool:
    """Whether it holds more than so many bytes or 1,000 entries: a limit on the size of a file is none on their number."""
    entries = used = 0
    for here, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        used += sum(_size(os.path.join(here, name)) for name in files)
        if entries > _MOST_ENTRIES or used > most_bytes:
            return True
    return False


def _size(path: str) -> int:
    """Bytes on the disk; 0 for what has gone since it was listed."""
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def remove(folder: str) -> None:
    """Remove a folder that no process works in any more. No link is followed, no mode and no depth stops it.

    What lies in a subfolder is lifted to the top instead of walked down to: shutil.rmtree descends by recursion, with an open
    file for every level.
    """
    os.chmod(folder, 0o700)
    top = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while names := os.listdir(top):
            for name in names:
                if _is_folder(name, top):
                    _lift_children(name, top)
                    os.rmdir(name, dir_fd=top)
                else:
                    os.unlink(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(folder)


def _lift_children(name: str, top: int) -> None:
    os.chmod(name, 0o700, dir_fd=top)
    below = os.open(name, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for child in os.listdir(below):
            if _is_folder(child, below):
                os.chmod(child, 0o700, dir_fd=below)  # to be moved, it must be writable itself
            os.rename(child, uuid.uuid4().hex, src_dir_fd=below, dst_dir_fd=top)
    finally:
        os.close(below)


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode)

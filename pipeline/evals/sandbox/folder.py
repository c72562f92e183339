"""The private folder of a candidate: created empty, removed afterwards whatever is in it."""

import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def private_folder() -> Iterator[str]:
    """Create an empty folder in the system's temporary folder, and remove it on exit."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="retemper-sandbox-"))
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: str) -> None:
    """Remove a folder that no process uses any more, whatever its links, modes and depth.

    Links are not followed. The content of a subfolder is moved to the top level instead of being
    visited by recursion, as shutil.rmtree does, which keeps one open file per level.
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
                os.chmod(child, 0o700, dir_fd=below)  # a folder must be writable to be moved
            os.rename(child, uuid.uuid4().hex, src_dir_fd=below, dst_dir_fd=top)
    finally:
        os.close(below)


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode)

"""Measure what a candidate stores on disk: its folder, and deleted files that it still holds.

A limit for each file (RLIMIT_FSIZE) does not limit their number, and quotas and file systems of a
fixed size need privileges that a worker may not have. So the worker measures from outside.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_MOST_ENTRIES = 1000


def overflows(folder: str, pid: int, most_bytes: int, file_bytes: int) -> bool:
    """Return whether a candidate stores more than `most_bytes` or 1,000 entries.

    A part of the folder that cannot be read counts as an overflow, since it may hide anything:
    folders without read permission, or below a longer path than the system takes.

    Args:
        folder: The candidate's folder.
        pid: The process that was started; the candidate is this one or descends from it.
        most_bytes: The limit on all files.
        file_bytes: The limit of one file, as which a file of unknown size counts.
    """
    try:
        entries, used = _in_folder(folder)
    except OSError:
        return True
    for process in _family(pid):
        used += _deleted(process, os.path.basename(folder), file_bytes)
    return entries > _MOST_ENTRIES or used > most_bytes


def _in_folder(folder: str) -> tuple[int, int]:
    """Return the number of entries and their bytes; stop counting at 1,000 entries.

    Raises OSError where a subfolder cannot be read.
    """
    entries = used = 0
    for root, folders, files in os.walk(folder, onerror=_raise_unless_removed):
        entries += len(folders) + len(files)
        used += sum(_size(os.path.join(root, name)) for name in files)
        if entries > _MOST_ENTRIES:
            break
    return entries, used


def _raise_unless_removed(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _size(path: str) -> int:
    """Return a file's size on disk in bytes; 0 if it was removed in the meantime."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def _family(pid: int) -> Iterator[Path]:
    """Yield the /proc entries of a process and, as bubblewrap has two, of its descendants."""
    process = Path(f"/proc/{pid}")
    yield process
    for children in process.glob("task/*/children"):
        try:
            family = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in family:
            yield from _family(int(child))


def _deleted(process: Path, folder_name: str, file_bytes: int) -> int:
    """Return the bytes of the deleted files that a process keeps open or mapped.

    All its threads have the same ones (seccomp.py), except those that have ended, as the first may
    have. The size of a file that is only mapped cannot be read without privileges.
    """
    for thread in process.glob("task/*"):
        try:
            opened = _opened(thread)
            maps = (thread / "maps").read_text(errors="replace").splitlines()
        except OSError:  # it has ended
            continue
        if maps:
            mapped = _mapped(maps, folder_name) - opened.keys()
            return sum(opened.values()) + file_bytes * len(mapped)
    return 0


def _opened(thread: Path) -> dict[int, int]:
    """Return inode -> bytes for the deleted files that a thread has open. Raises OSError."""
    sizes = {}
    for descriptor in os.listdir(thread / "fd"):
        status = _status(thread / "fd" / descriptor)
        if status and stat.S_ISREG(status.st_mode) and not status.st_nlink:
            sizes[status.st_ino] = status.st_blocks * 512
    return sizes


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # closed in the meantime
        return None


def _mapped(maps: list[str], folder_name: str) -> set[int]:
    """Return the inodes of the folder's deleted files in a thread's maps."""
    return {
        int(line.split()[4])
        for line in maps
        if f"/{folder_name}/" in line and line.endswith(" (deleted)")
    }

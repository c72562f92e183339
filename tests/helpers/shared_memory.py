"""What ended processes have left in shared memory, whatever other processes do meanwhile."""

import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def abandoned() -> set[str]:
    """Return the names in /dev/shm that are this user's and that no process maps or has open."""
    names = {path.name for path in SHARED_MEMORY.iterdir() if _is_ours(path)}
    for process in Path("/proc").glob("[0-9]*"):
        names -= _used_by(process)
    return names


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:  # removed meanwhile
        return False


def _used_by(process: Path) -> set[str]:
    try:
        mapped = [
            line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()
        ]
        opened = [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:  # it ended meanwhile, or is another user's
        return set()
    prefix = f"{SHARED_MEMORY}/"
    return {path.removeprefix(prefix) for path in [*mapped, *opened] if path.startswith(prefix)}

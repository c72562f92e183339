"""Lock files, for what only one process may do at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from retemper.pipeline.errors import UserError


@contextlib.contextmanager
def only_one(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file within the context, and remove it at the end.

    The lock of a killed process is released. On a file system without locks nothing is locked.

    Args:
        path: The lock file; its folder is created.
        refusal: The error, with {process} for the one that holds the lock.

    Raises:
        UserError: Another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            process = lock.read() or "another process"
            raise UserError(refusal.replace("{process}", process)) from None
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

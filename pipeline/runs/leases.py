"""Leases that expire, for processes that share only a folder.

A lease is a file NAME.lease.N. The first process to create it holds the lease, and touches the file
for as long as it lives; the valid lease is the one with the highest N. No process removes the lease
of another, so that only one of two processes that find it expired can create the next. A holder
that was suspended for longer than its lease may resume and work beside its successor: it is
`write_once` that makes a result count only once.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lease(folder: Path, name: str, seconds: float, *, take_over: bool = False) -> Iterator[bool]:
    """Try to acquire a lease; a thread renews it inside the context, and it is released at the end.

    Args:
        folder: that the processes share; created if missing.
        name: of the lease.
        seconds: after which a lease that was not renewed expires.
        take_over: acquire the lease even if another one has not expired.

    Yields:
        Whether the lease was acquired.
    """
    path = _take(folder, name, seconds, take_over)
    if path is None:
        yield False
        return
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, seconds / 4, done), daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        done.set()
        renewing.join()
        path.unlink(missing_ok=True)


def is_held(folder: Path, name: str, seconds: float) -> bool:
    """Return whether a lease exists and has been renewed within the last `seconds`."""
    newest = _newest(folder, name)
    return newest is not None and not _expired(newest, seconds)


def _newest(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"{name}.lease.*"), key=_number, default=None)


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _take(folder: Path, name: str, seconds: float, take_over: bool) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(folder, name)
    if newest and not take_over and not _expired(newest, seconds):
        return None
    path = folder / f"{name}.lease.{_number(newest) + 1 if newest else 1}"
    try:
        with open(path, "x") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    except FileExistsError:
        return None
    return path


def _expired(path: Path, seconds: float) -> bool:
    """Return whether a lease has expired, by the file system's clock, which all hosts share."""
    probe = path.with_name(f".now-{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > seconds
    except FileNotFoundError:  # released meanwhile: available at the next attempt
        return False
    finally:
        probe.unlink(missing_ok=True)


def _renew(path: Path, every: float, done: threading.Event) -> None:
    while not done.wait(every):
        # A restart of the run may have removed the folder together with later scores.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)

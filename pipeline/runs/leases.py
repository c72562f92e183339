"""Who does what, among processes that share nothing but a folder: leases that expire, and files that are written once.

A lease is a file NAME.lease.N, made by whoever is first and touched while its holder lives; the holder is that of the highest N. Nobody
removes another's, so that of two who find it expired only one makes the next. A holder that was stopped for longer than its lease
and goes on may work beside its successor: what makes a result count once is `write_once`.
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
    """Whether the lease was taken; within it is renewed, by a thread, and after it given back.

    seconds: how long after its holder's last sign of life it expires. take_over: do not wait for that.
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
    """Whether a lease has a holder who lives."""
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
    """By the clock of the file system, which all hosts share."""
    probe = path.with_name(f".now-{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > seconds
    except FileNotFoundError:  # given back meanwhile: free at the next look
        return False
    finally:
        probe.unlink(missing_ok=True)


def _renew(path: Path, every: float, done: threading.Event) -> None:
    while not done.wait(every):
        with contextlib.suppress(
            FileNotFoundError
        ):  # a restart of the run took its later scores back
            os.utime(path)

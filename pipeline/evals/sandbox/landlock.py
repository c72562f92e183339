"""Landlock: restrict the paths that a process can read and write, irrevocably, without privileges.

https://docs.kernel.org/userspace-api/landlock.html. Restrictions that an older kernel (a lower ABI)
does not support are left out.
"""

import ctypes
import os
import struct

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all architectures
_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (
    1 << bit for bit in range(6)
)
_MAKE_DIR = 1 << 7
_MAKE_REG = 1 << 8
_MAKE_SYM = 1 << 12
_REFER = 1 << 13  # move files between folders
_TRUNCATE = 1 << 14
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI -> the number of its file-system rights
_TCP, _SCOPES = 0b11, 0b11  # bind and connect (ABI 4); abstract sockets and signals (ABI 6)


def abi() -> int:
    """Return the kernel's Landlock ABI version; 0 if Landlock is missing or disabled."""
    return max(0, ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))


def restrict(version: int, readable: list[str], folder: str) -> None:
    """Restrict this process to reading some paths and reading and writing one folder.

    Nothing may be executed, and TCP is refused.

    Args:
        version: The ABI, as abi() returns it.
        readable: The files and folders that stay readable; those that do not exist are ignored.
        folder: The folder that stays readable and writable.

    Raises:
        OSError: The kernel refuses the ruleset.
    """
    handled = (1 << _RIGHTS[min(version, 5)]) - 1
    network = _TCP * (version >= 4)
    scopes = _SCOPES * (version >= 6)
    ruleset = _call(
        _CREATE_RULESET, struct.pack("QQQ", handled, network, scopes), ctypes.c_size_t(24), 0
    )
    try:
        for path in filter(os.path.exists, readable):
            _allow(ruleset, path, _READ_FILE | _READ_DIR * os.path.isdir(path))
        _allow(ruleset, os.devnull, _READ_FILE | _WRITE_FILE)
        removing = _REMOVE_DIR | _REMOVE_FILE | _REFER
        making = _MAKE_DIR | _MAKE_REG | _MAKE_SYM
        writing = _WRITE_FILE | _TRUNCATE | removing | making
        _allow(ruleset, folder, (_READ_FILE | _READ_DIR | writing) & handled)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, beneath), 0)
    finally:
        os.close(beneath)


def _call(number: int, *arguments) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result

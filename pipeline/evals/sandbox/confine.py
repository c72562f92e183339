"""What a process can be bounded by without asking which files it reads: limits, privileges, and its parent's life."""

import ctypes
import os
import resource

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9  # not by the signal module, which takes a third of a start to import
_CAPABILITY_VERSION = 0x20080522  # of struct __user_cap_header_struct


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Of this process, for good.

    There is none on processes: RLIMIT_NPROC counts all that a user runs anywhere, so that a verdict would hang on what else runs;
    seccomp refuses processes, and memory bounds threads. The soft limit's SIGXCPU says in the exit status what happened,
    and who ignores it is killed a second later.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, open_files, open_files),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def die_with(parent: int) -> None:
    """Be killed when the process `parent` ends, which may have happened already. Raises OSError."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def drop_privileges() -> None:
    """No capability that root has by birth, and none by a program. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset: the capabilities cannot be dropped")


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) is refused")

"""Confine a process irrespective of files: resource limits, privileges, its parent's lifetime."""

import ctypes
import os
import resource

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9  # importing the signal module would take a third of the start-up time
_CAPABILITY_VERSION = 0x20080522  # the version field of struct __user_cap_header_struct


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Set this process's resource limits irrevocably.

    The number of processes has no limit here: RLIMIT_NPROC counts all processes of the user, so a
    verdict would depend on what else runs. seccomp refuses new processes, and the memory limit
    bounds the threads.

    Args:
        cpu_seconds: At this limit SIGXCPU ends the process, which shows in its exit status. A
            process that ignores the signal is killed one second later.
        memory_bytes: The limit on the address space.
        file_bytes: The limit on the size of each file.
        open_files: The limit on open file descriptors.

    Raises:
        OSError: The kernel refuses a limit.
        ValueError: A limit is higher than the one already in force.
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
    """Have this process killed when its parent, the process `parent`, ends.

    Exits at once where the parent has already ended. Raises OSError.
    """
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def drop_privileges() -> None:
    """Drop all capabilities and set no_new_privs. Raises OSError."""
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

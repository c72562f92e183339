"""A seccomp filter that allows the system calls of a computing Python, and refuses all others.

It is an allow list, so that the calls of later kernels are refused as well. Refused calls fail with
ENOSYS, as on a kernel that lacks them, for which libc has fallbacks. The filter is written directly
in classic BPF, about 250 instructions: it needs no library, and an interpreter without
site-packages can install it.

Refused on purpose although ordinary programs use it: new processes. Nothing that needs no
privileges could limit their number (RLIMIT_NPROC counts all processes of the user) or the sum of
their CPU time.
"""

import ctypes
import errno
import fcntl
import os
import struct

# Name -> its number on x86_64 and on aarch64, which lacks some older calls.
CALLS: dict[str, tuple[int, int | None]] = {
    # files; Landlock and bubblewrap restrict the paths
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "flock": (73, 32),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "close_range": (436, 436),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None), "readlinkat": (267, 78),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233),
    # threads, and waiting
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124),
    "gettid": (186, 178), "sched_getaffinity": (204, 123), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "pause": (34, None), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72),
    # signal handlers and timers of the process itself
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
    # queries, and exit
    "getpid": (39, 172), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getrandom": (318, 278),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179),
    "uname": (63, 160), "exit": (60, 93), "exit_group": (231, 94),
    # a connected pair of sockets, see _checks; sendmsg, which passes open files on, is refused
    "recvfrom": (45, 207),
}  # fmt: skip
# Allowed only with certain arguments, see _checks. Numbers as above.
CHECKED_CALLS: dict[str, tuple[int, int]] = {
    "openat": (257, 56),
    "fcntl": (72, 25),
    "clone": (56, 220),
    "ioctl": (16, 29),
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "prlimit64": (302, 261),
    "kill": (62, 129),
    "tgkill": (234, 131),
}
# Answered without being carried out: name -> errno, and its numbers as above. Neither Landlock nor
# a filter can restrict these calls to the private folder, and shutil.copy and its relatives fail
# where they fail. So modes and times cannot be set, but to try is no error (errno 0), as on a FAT
# file system mounted with `quiet`; and no file has extended attributes.
ANSWERED_CALLS: dict[int, dict[str, tuple[int, int | None]]] = {
    0: {
        "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
        "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88),
    },
    errno.ENOTSUP: {
        "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    },
}  # fmt: skip
_FCNTL_COMMANDS = (
    *(
        fcntl.F_DUPFD,
        fcntl.F_DUPFD_CLOEXEC,
        fcntl.F_GETFD,
        fcntl.F_SETFD,
        fcntl.F_GETFL,
        fcntl.F_SETFL,
    ),
    *(fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW),
)
# Close on exec or not (what tempfile and open use), and non-blocking or not: flags of a descriptor,
# which fcntl may set as well. No request that a device or terminal would understand.
_IOCTL_REQUESTS = (0x5450, 0x5451, 0x5421)  # FIONCLEX, FIOCLEX, FIONBIO
_MACHINES = ("x86_64", "aarch64")
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ANSWER = 0x00050000  # plus an errno
_REFUSE = _ANSWER | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_WHOLE = 0xFFFFFFFF
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_AF_UNIX, _SOCK_STREAM = 1, 1
_SOCKET_TYPES = 0xF  # the other bits of a socket's type are flags


def available() -> bool:
    """Return whether this kernel supports filters, on an architecture with known call numbers.

    Tries to install a filter at a null address: a kernel that supports filters fails with EFAULT.
    """
    if os.uname().machine not in _MACHINES:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, None, 0, 0) == -1
        and ctypes.get_errno() == errno.EFAULT
    )


def install() -> None:
    """Filter this process's system calls irrevocably. Raises OSError."""
    instructions = program(os.uname().machine, os.getpid())
    buffer = ctypes.create_string_buffer(instructions)
    # struct sock_fprog: the number of instructions and their address.
    filter_ = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp: the filter was refused")


def program(machine: str, pid: int) -> bytes:
    """Return the filter for process `pid` as BPF."""
    column = _MACHINES.index(machine)
    lines = [
        _load(_ARCHITECTURE),
        _skip_if(_AUDIT_ARCHITECTURE[machine], 1),
        _return(_KILL),
        _load(_NUMBER),
    ]
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            lines += [_skip_if(number, 0, 1), _return(_ALLOW)]
    for code, calls in ANSWERED_CALLS.items():
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                lines += [_skip_if(number, 0, 1), _return(_ANSWER | code)]
    for name, checks in _checks(pid).items():
        body = [line for check in checks for line in _check(*check)] + [_return(_ALLOW)]
        lines += [_skip_if(CHECKED_CALLS[name][column], 0, len(body)), *body]
    return b"".join([*lines, _return(_REFUSE)])


def _checks(pid: int) -> dict[str, list[tuple[int, int, tuple[int, ...]]]]:
    """Return call -> its checks, each an argument half, a mask and the values allowed under it.

    Argument n, of 64 bits, has the halves 2n (low) and 2n + 1 (high).
    """
    truncate = os.O_TRUNC
    thread = 0x00010000 | 0x00000400  # CLONE_THREAD | CLONE_FILES
    namespaces = 0x7E020000  # every CLONE_NEW…
    return {
        # Without O_RDONLY | O_TRUNC, which Landlock before ABI 3 treats as reading only.
        "openat": [
            (
                4,
                os.O_ACCMODE | truncate,
                (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | truncate, os.O_RDWR | truncate),
            )
        ],
        # Without F_SETOWN and F_SETSIG, which let a pipe send any signal to any process.
        "fcntl": [(2, _WHOLE, _FCNTL_COMMANDS)],
        "ioctl": [(2, _WHOLE, _IOCTL_REQUESTS)],
        # Threads, but no processes, and no thread with open files of its own, which disk.py would
        # not see. clone3 is refused, because a filter cannot see its flags; libc then falls back to
        # clone.
        "clone": [(0, thread | namespaces, (thread,))],
        # asyncio's event loop needs a connected pair of Unix stream sockets. It is a pipe in two
        # directions: it has no address, cannot be connected to anything else (socket, bind and
        # connect are refused), and a stream takes no other destination. Datagrams would, so these
        # are refused, and so is an address in sendto.
        "socketpair": [(0, _WHOLE, (_AF_UNIX,)), (2, _SOCKET_TYPES, (_SOCK_STREAM,))],
        "sendto": [(8, _WHOLE, (0,)), (9, _WHOLE, (0,))],
        # Only the limits of this process (0). It cannot raise them without CAP_SYS_RESOURCE, and
        # programs that recurse deeply set the size of their stack.
        "prlimit64": [(0, _WHOLE, (0,))],
        # abort() and raise() need these for the process itself.
        "kill": [(0, _WHOLE, (pid,))],
        "tgkill": [(0, _WHOLE, (pid,))],
    }


def _check(half: int, mask: int, values: tuple[int, ...]) -> list[bytes]:
    """Return lines that refuse the call unless the argument half has one of the masked values."""
    choices = [_skip_if(value, len(values) - index) for index, value in enumerate(values)]
    return [_load(_ARGUMENTS + 4 * half), _line(_AND, mask), *choices, _return(_REFUSE)]


def _load(offset: int) -> bytes:
    return _line(_LOAD, offset)


def _skip_if(value: int, lines: int, otherwise: int = 0) -> bytes:
    """Skip `lines` lines if the loaded word is `value`, else `otherwise` lines."""
    return _line(_JUMP_IF_EQUAL, value, lines, otherwise)


def _return(action: int) -> bytes:
    return _line(_RETURN, action)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)

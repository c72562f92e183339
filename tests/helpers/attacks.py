"""Define hostile programs, each of which reaches its end, and so passes, only if its attack works.

The names of the targets are defined before each program: SECRET (a file in the home folder),
OUTSIDE (a file), VICTIM and PARENT (processes), PORT (a server on loopback), ABSTRACT (the name of
a unix socket).
"""

# tests/unit/test_sandbox.py also runs these without the sandbox, and so shows what they do there.
HARMLESS_WITHOUT_WALLS = {
    # reading
    "read a system file": "open('/etc/passwd').read()",
    "read the home": "open(SECRET).read()",
    "list the home": "import os; os.listdir(os.path.dirname(SECRET))",
    "read its own environment": "open('/proc/self/environ').read()",
    "read the disks' names": "open('/proc/mounts').read()",
    "read through a link": "import os; os.symlink(SECRET, 'link'); open('link').read()",
    # writing
    "write outside": "open(OUTSIDE, 'w').write('harm')",
    "write by posix.open": (
        "import posix; posix.write(posix.open(OUTSIDE, posix.O_WRONLY), b'harm')"
    ),
    "write by libc": (
        "import ctypes; libc = ctypes.CDLL(None); "
        "assert libc.write(libc.open(OUTSIDE.encode(), 1), b'harm', 4) == 4"
    ),
    "write through a link": (
        "import os; os.symlink(OUTSIDE, 'link'); open('link', 'w').write('harm')"
    ),
    "write beside the folder": "open('../beside', 'w').write('harm')",
    "write shared memory": (
        "import os; open(f'/dev/shm/retemper-{PARENT}', 'w'); "
        "os.unlink(f'/dev/shm/retemper-{PARENT}')"
    ),
    "cut off a file": "import os; os.truncate(OUTSIDE, 0)",
    "cut off while reading": "import os; os.open(OUTSIDE, os.O_RDONLY | os.O_TRUNC)",
    "remove a file": "import os; os.remove(OUTSIDE)",
    "rename a file": "import os; os.rename(OUTSIDE, OUTSIDE + '.gone')",
    "link a file": "import os; os.link(OUTSIDE, 'mine')",
    "change a mode": "import os; os.chmod(OUTSIDE, 0o777); assert os.stat(OUTSIDE).st_mode & 2",
    "change times": "import os; os.utime(OUTSIDE, (1, 1)); assert os.stat(OUTSIDE).st_mtime == 1",
    "change a mode by libc": (
        "import ctypes, os; assert ctypes.CDLL(None).chmod(OUTSIDE.encode(), 0o777) == 0; "
        "assert os.stat(OUTSIDE).st_mode & 2"
    ),
    "change the mode of an open file": (
        "import os; f = os.open(OUTSIDE, os.O_RDONLY); os.fchmod(f, 0o777); "
        "assert os.stat(OUTSIDE).st_mode & 2"
    ),
    "move a file in": "import os; os.replace(OUTSIDE, 'mine')",
    "move a file out": "import os; open('a', 'w'); os.replace('a', OUTSIDE)",
    "move a folder out": "import os; os.mkdir('a'); os.rename('a', OUTSIDE + '.folder')",
    "exchange two files": (
        "import ctypes; open('a', 'w'); "
        "assert ctypes.CDLL(None).renameat2(-100, OUTSIDE.encode(), -100, b'a', 2) == 0"
    ),
    "make a folder": "import os; os.mkdir(OUTSIDE + '.folder')",
    "make a link": "import os; os.symlink('here', OUTSIDE + '.link')",
    "copy a mode": (
        "import os, shutil; open('a', 'w'); shutil.copymode('a', OUTSIDE); "
        "shutil.copy('a', OUTSIDE)"
    ),
    "become set-user-id": (
        "import os; open('a', 'w'); os.chmod('a', 0o4755); assert os.stat('a').st_mode & 0o4000"
    ),
    "move the folder": (
        "import os; os.rename(os.getcwd(), '../moved'); os.rename('../moved', os.environ['HOME'])"
    ),
    "make a fifo": "import os; os.mkfifo('fifo')",
    # processes
    "fork": "import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)",
    "leave a daemon": (
        "import os, time\nif not os.fork():\n    os.setsid()\n"
        "    if not os.fork(): os.closerange(0, 64); time.sleep(60)\n    os._exit(0)"
    ),
    "start a program": "import os; os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "start a shell": "import os; assert os.system('true') == 0",
    "start an interpreter": (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    ),
    "run a file of memory": "import os; os.write(os.memfd_create('program'), b'#!/bin/sh')",
    "become another program": (
        "import fcntl, os\nfor fd in range(64):\n    try: fcntl.fcntl(fd, fcntl.F_SETFD, 0)\n"
        "    except OSError: pass\n"
        "os.execv('/bin/sh', ['sh', '-c', f'echo harm > {OUTSIDE}'])"
    ),
    "kill a process": "import os; os.kill(VICTIM, 9)",
    "kill by a pipe's owner": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)\n"
        "fcntl.fcntl(r, 10, 9)  # F_SETSIG\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')"
    ),
    "see the parent": "import os; os.kill(PARENT, 0)",
    "hold a process": "import os; os.pidfd_open(VICTIM)",
    "limit a process": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1))",
    "read a process's limits": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU)",
    "hold itself": "import os; os.pidfd_open(os.getpid())",
    "outlive the parent": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    # network
    "connect": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "send a datagram": (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(b'harm', ('127.0.0.1', PORT))"
    ),
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "connect to an abstract socket": (
        "import socket; socket.socket(socket.AF_UNIX).connect(ABSTRACT)"
    ),
    "send a datagram from a pair": (
        "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); "
        "a.sendto(b'harm', DATAGRAMS)"
    ),
    "a pair of packets": (
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)"
    ),
    "send an open file": (
        "import os, socket; a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [os.pipe()[0]])"
    ),
    "connect one of a pair": (
        "import ctypes, errno, socket; a, b = socket.socketpair()\n"
        "try: a.connect(ABSTRACT)\n"
        "except OSError as error: assert error.errno == errno.EISCONN  # the kernel was asked"
    ),
    "signals from a socket": (
        "import fcntl, socket, struct; a, b = socket.socketpair(); "
        "fcntl.ioctl(a, 0x8902, struct.pack('i', VICTIM))  # SIOCSPGRP"
    ),
    "signals from a pipe": (
        "import fcntl, os; fcntl.ioctl(os.pipe()[0], 0x5452, b'\\1\\0\\0\\0')  # FIOASYNC"
    ),
    "bytes in a pipe": (
        "import fcntl, os; fcntl.ioctl(os.pipe()[0], 0x541B, bytes(4))  # FIONREAD"
    ),
    "socket by libc": "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "keep shared memory": (
        "import ctypes; libc = ctypes.CDLL(None); shared = libc.shmget(0, 4096, 0o1600); "
        "assert shared >= 0; libc.shmctl(shared, 0, None)"
    ),
}

# As above, if the kernel, the container and the dropped privileges allow it without the sandbox.
WHERE_ALLOWED = {
    "read the parent's environment": "assert open(f'/proc/{PARENT}/environ', 'rb').read()",
    "slow a process": "import os; os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "move a process": "import os; os.sched_setaffinity(VICTIM, {min(os.sched_getaffinity(0))})",
    "trace a process": "import ctypes; assert ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0",
    "a namespace of its own": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "io_uring": (
        "import ctypes; "
        "assert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) >= 0"
    ),
    "userfaultfd": (
        "import ctypes, os; "
        "assert ctypes.CDLL(None).syscall({'x86_64': 323}.get(os.uname().machine, 282), 1) >= 0"
    ),
    "the keyring": (
        "import ctypes, os; assert ctypes.CDLL(None)"
        ".syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 1) >= 0"
    ),
    "an extended attribute": "import os; os.setxattr(OUTSIDE, 'user.a', b'harm')",
    "an owner": "import os; os.chown(OUTSIDE, 12345, 12345)",
    "watch files": "import ctypes; assert ctypes.CDLL(None).inotify_init() >= 0",
    "a queue of messages": (
        "import ctypes; libc = ctypes.CDLL(None); queue = libc.msgget(0, 0o1600); "
        "assert queue >= 0; libc.msgctl(queue, 0, None)"
    ),
    "semaphores": (
        "import ctypes; libc = ctypes.CDLL(None); found = libc.semget(0, 1, 0o1600); "
        "assert found >= 0; libc.semctl(found, 0, 0)"
    ),
    "memory of the parent": (
        "import ctypes; assert ctypes.CDLL(None).process_vm_readv(PARENT, None, 0, None, 0, 0) == 0"
    ),
    "another personality": "import ctypes; assert ctypes.CDLL(None).personality(0x40000) >= 0",
    "timers of the kernel": "import ctypes; assert ctypes.CDLL(None).timerfd_create(0, 0) >= 0",
}

# Never run without the sandbox: these exhaust a resource of the machine.
EXHAUSTING = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "memory bomb": "x = bytearray(10**11)",
    "memory bomb by mmap": "import mmap; mmap.mmap(-1, 10**11)",
    "memory bomb in steps": "x = []\nwhile True: x.append(bytearray(2**20))",
    "a file of 100 GB": "f = open('f', 'wb'); f.seek(10**11); f.write(b'x'); f.flush()",
    "files without number": (
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(2**24))"
    ),
    "deleted files that stay open": (
        "import os, time\nopened = []\nfor n in range(50):\n"
        "    opened.append(open('f', 'wb', 0)); opened[-1].write(bytes(2**24)); os.unlink('f')\n"
        "time.sleep(1000)"
    ),
    "files that never had a name": (
        "import os, time\nfor n in range(50):\n"
        "    os.write(os.open('.', os.O_TMPFILE | os.O_RDWR), bytes(2**24))\ntime.sleep(1000)"
    ),
    "deleted files that stay mapped": (
        "import ctypes, os, time\nfor n in range(50):\n    with open('f', 'wb+', 0) as f:\n"
        "        f.write(bytes(2**24)); ctypes.CDLL(None).mmap(None, 4096, 1, 1, f.fileno(), 0)\n"
        "    os.unlink('f')\ntime.sleep(1000)"
    ),
    "deleted files of another thread": (
        "import ctypes, os, threading, time\nopened = []\ndef fill():\n"
        "    for n in range(50):\n        opened.append(open('f', 'wb', 0))\n"
        "        opened[-1].write(bytes(2**24)); os.unlink('f')\n    time.sleep(1000)\n"
        "threading.Thread(target=fill).start()\n"
        "ctypes.CDLL(None).syscall({'x86_64': 60}.get(os.uname().machine, 93), 0)"
    ),
    "files below a path of 5,000 letters": (
        "import os, time\nfor n in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
        "for n in range(50): open(str(n), 'wb').write(bytes(2**24))\ntime.sleep(1000)"
    ),
    "files in a folder that cannot be read": (
        "import os, time; os.mkdir('d', 0o300)\n"
        "for n in range(50): open(f'd/{n}', 'wb').write(bytes(2**24))\ntime.sleep(1000)"
    ),
    "folders without number": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "endless loop": "while True: pass",
    "endless loop that ignores signals": (
        "import signal\n"
        "for s in signal.valid_signals() - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass"
    ),
    "endless loop in a thread": (
        "import threading\ndef f():\n    while True: pass\n"
        "t = threading.Thread(target=f); t.start(); t.join()"
    ),
    "huge output": "while True: print('x' * 10**6)",
    "words to every pipe": (
        "import os\nfor fd in range(64):\n"
        "    try: os.write(fd, b'x' * 10**5)\n    except OSError: pass"
    ),
}  # fmt: skip

IDLE = {
    "sleep": "import time; time.sleep(1000)",
    "deadlock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
}

# Never run without the sandbox either, or refused without it as well for lack of privileges.
HARMFUL = {
    "kill the parent": "import os; os.kill(PARENT, 9)",
    "kill everybody": "import os; os.kill(-1, 9)",
    "kill the group": "import os; os.killpg(0, 9)",
    "kill the parent by libc": "import ctypes; assert ctypes.CDLL(None).kill(PARENT, 9) == 0",
    "find a secret in the environment": "import os; assert 'RETEMPER_SECRET' in os.environ",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/', b'tmpfs', 0, None) == 0",
    "chroot": "import os; os.chroot('.')",
    "become somebody": "import os; os.setuid(12345)",
    "regain privileges": (
        "import ctypes; assert ctypes.CDLL(None).capset("
        "(ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)) == 0"
    ),
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "load a program into the kernel": (
        "import ctypes, os; assert ctypes.CDLL(None)"
        ".syscall({'x86_64': 321}.get(os.uname().machine, 280), 0, "
        "ctypes.create_string_buffer(120), 120) >= 0"
    ),
    "write its own memory": "open('/proc/self/mem', 'r+b')",
    "a file system": "import ctypes; assert ctypes.CDLL(None).syscall(430, b'tmpfs', 0) >= 0",
    "a device": "import os, stat; os.mknod('null', 0o600 | stat.S_IFCHR, os.makedev(1, 3))",
    "a thread with open files of its own": (
        "import ctypes, os; flags = 0x00010900  # CLONE_THREAD | CLONE_SIGHAND | CLONE_VM\n"
        "if os.uname().machine == 'x86_64':\n"
        "    assert ctypes.CDLL(None).syscall(56, flags, 0, 0, 0, 0) >= 0\n"
        "else: os.abort()"
    ),
    # 0 is no command: refused even to root
    "reboot": "import ctypes; assert ctypes.CDLL(None).reboot(0) == 0",
}  # fmt: skip

# Ways to end without a verdict, and to claim one.
ENDINGS = {
    "leave with 0": "import os; os._exit(0)",
    "leave by libc": "import ctypes; ctypes.CDLL(None)._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "leave in atexit": "import atexit, os, sys; atexit.register(os._exit, 0); sys.exit(0)",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "deep recursion": "def f(): return f()\nf()",
    "deep recursion without limit": (
        "import sys; sys.setrecursionlimit(2**30)\ndef f(): return f()\nf()"
    ),
    "deep recursion in C": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "deep source": "eval('(' * 10**6)",
    "no source": "\0",
    "half a character": "'\ud800",
    "unprintable error": "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "endless error": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"
    ),
    "print the verdict": "print('passed'); import os; os.write(2, b'passed'); os._exit(0)",
    "say what is said": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'sandbox ready\\n' + b'0' * 32)\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "look for the nonce in gc": (
        "import gc, os\nfor x in gc.get_objects():\n"
        "    for y in (list(x.values()) if type(x) is dict else ()):\n"
        "        if type(y) is bytes and len(y) == 32:\n            for fd in range(64):\n"
        "                try: os.write(fd, y)\n                except OSError: pass\nos._exit(0)"
    ),
    "say passed for failed": (
        "import os; write = os.write; os.write = lambda fd, data: write(fd, b'passed'); "
        "raise ValueError"
    ),
}  # fmt: skip

# Candidates that make `assert f(1) == 2` pass. Without the control they do.
FORGED = {
    "frames": (
        "import os, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        nonce, pipe = frame.f_locals.get('nonce'), frame.f_locals.get('pipe')\n"
        "        if nonce: os.write(pipe, nonce); os._exit(0)\n        frame = frame.f_back"
    ),
    "frames of an exception": (
        "import os\ndef f(x):\n    try: raise ValueError\n"
        "    except ValueError as error: frame = error.__traceback__.tb_frame\n"
        "    while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
        "    os.write(frame.f_locals['pipe'], frame.f_locals['nonce']); os._exit(0)"
    ),
    "frames before the tests": (
        "import os, sys\nframe = sys._getframe()\n"
        "while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
        "os.write(frame.f_locals['pipe'], frame.f_locals['nonce']); os._exit(0)"
    ),
    "equal to everything": (
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()"
    ),
    "equal to every number": (
        "class E(int):\n    def __eq__(self, other): return type(other) is int\n"
        "def f(x): return E()"
    ),
    "a tracer that leaves": (
        "import os, sys\ndef f(x):\n    frame = sys._getframe()\n"
        "    while 'nonce' not in frame.f_locals: frame = frame.f_back\n    here = frame.f_locals\n"
        "    sys.setprofile(lambda *_: (os.write(here['pipe'], here['nonce']), os._exit(0)))"
    ),
    "replaces builtins until it is compared": (
        "import builtins, operator\nreal = any, map, zip, operator.sub\nclass E:\n"
        "    def __eq__(self, other):\n"
        "        builtins.any, builtins.map, builtins.zip, operator.sub = real; return True\n"
        "def f(x):\n    builtins.any = builtins.map = builtins.zip = operator.sub = lambda *_: []\n"
        "    return E()"
    ),
    "looks for a name of the control": (
        "import builtins, sys\nclass E:\n    def __eq__(self, other): return True\n"
        "def f(x):\n    places = [*globals(), *vars(builtins), *vars(sys.modules['__main__'])]\n"
        "    frame = sys._getframe(1)\n    places += [*frame.f_globals, *frame.f_locals]\n"
        "    found = [name for name in places if 'other' in name or 'control' in name]\n"
        "    return None if found else E()"
    ),
    "looks for the sandbox's modules": (
        "import sys\nclass E:\n    def __eq__(self, other): return True\ndef f(x):\n"
        "    mine = [m for m in sys.modules if 'comparisons' in m or 'sandbox' in m]\n"
        "    main = getattr(sys.modules['__main__'], 'main', None)\n"
        "    return None if mine or main else E()"
    ),
    "equal at the first look": (
        "class E:\n    seen = 0\n    def __eq__(self, other):\n"
        "        E.seen += 1\n        return E.seen == 1\ndef f(x): return E()"
    ),
    "equal, then gone": (
        "import os\nclass E:\n    seen = 0\n    def __eq__(self, other):\n        E.seen += 1\n"
        "        return True if E.seen == 1 else os._exit(0)\ndef f(x): return E()"
    ),
}  # fmt: skip

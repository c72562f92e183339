"""Test that hostile programs achieve nothing in the sandbox, and that they would without it.

Each is a scored failure, and nothing of it remains.
"""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import attacks
import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox import layers as layers_module
from retemper.pipeline.evals.sandbox import seccomp
from retemper.pipeline.evals.sandbox.control import unpassable
from retemper.pipeline.evals.sandbox.execute import Limits, Program, Verdict, run_programs
from retemper.pipeline.evals.sandbox.folder import private_folder
from retemper.pipeline.evals.sandbox.layers import Layers, find_layers

LIMITS = Limits(cpu_seconds=1, wall_seconds=30, memory_bytes=2**29)
UNLEASHED = attacks.HARMLESS_WITHOUT_WALLS | attacks.WHERE_ALLOWED
SECRET = "a secret of 30 letters or more"


class World:
    """The targets of hostile programs, and their state."""

    def __init__(self, folder: Path):
        self.folder, self.home, self.temporary = folder, folder / "home", folder / "tmp"
        self.home.mkdir()
        self.temporary.mkdir()
        self.secret, self.outside = self.home / "token", folder / "outside"
        self.secret.write_text(SECRET)
        self.outside.write_text("whole")
        os.utime(self.outside, (10**9, 10**9))
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0retemper-{folder}")
        self.abstract.listen()
        self.abstract.setblocking(False)
        self.victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]
        )
        self.untouched = self.state()

    def prelude(self) -> str:
        port = self.server.getsockname()[1]
        return (
            f"SECRET, OUTSIDE, ABSTRACT = {str(self.secret)!r}, {str(self.outside)!r}, "
            f"{self.abstract.getsockname()!r}\n"
            f"VICTIM, PARENT, PORT = {self.victim.pid}, {os.getpid()}, {port}\n"
        )

    def state(self) -> dict:
        """Return everything that a program could change."""
        stat = self.outside.stat() if self.outside.exists() else None
        victim = Path(f"/proc/{self.victim.pid}")
        return {
            "outside": stat
            and (self.outside.read_text(), stat.st_mode, stat.st_mtime, stat.st_nlink),
            "files": sorted(str(path) for path in self.folder.rglob("*")),
            "callers": [self._called(self.server), self._called(self.abstract)],
            "victim": self.victim.poll(),
            "limits": (victim / "limits").read_text() if victim.exists() else "",
            "place": (
                os.getpriority(os.PRIO_PROCESS, self.victim.pid),
                os.sched_getaffinity(self.victim.pid),
            )
            if victim.exists()
            else None,
            "left over": self.left_over(),
        }

    def left_over(self) -> list[int]:
        """Return the ids of processes whose environment names our temporary folder.

        They are the programs and the processes that they have started.
        """
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(self.temporary).encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)
        self.victim.kill()
        self.victim.wait()
        self.server.close()
        self.abstract.close()

    @staticmethod
    def _called(server: socket.socket) -> bool:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("RETEMPER_SECRET", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    world = World(tmp_path)
    yield world
    world.close()


def all_layers() -> Layers:
    layers = find_layers(unsafe_code=True)
    if not layers.seccomp:
        pytest.skip("this kernel takes no seccomp filter")
    return layers


def with_or_without(bubblewrap: bool) -> Layers:
    there = all_layers()
    if bubblewrap and not there.bubblewrap:
        pytest.skip("bubblewrap does not work here: apt-get install bubblewrap")
    return there if bubblewrap else replace(there, bubblewrap=None)


@pytest.fixture(params=["landlock", "landlock of Linux 5.13", "bubblewrap", "everything"])
def layers(request) -> Layers:
    """Return every combination of layers that programs may run behind."""
    there = with_or_without(request.param in ("bubblewrap", "everything"))
    if request.param == "bubblewrap":
        return replace(there, landlock=0)
    if not there.landlock:
        pytest.skip("this kernel has no Landlock")
    return replace(there, landlock=1) if request.param == "landlock of Linux 5.13" else there


def programs(world: World, sources: dict[str, str]) -> list[Program]:
    # A test that passes honestly, so that only what the program does before it is judged.
    return [Program(world.prelude() + source, "assert PORT == PORT") for source in sources.values()]


def judge(
    world: World, sources: dict[str, str], layers: Layers, limits: Limits = LIMITS
) -> dict[str, str]:
    """Run hostile programs, of which none may pass, print the secret or leave a trace.

    Returns:
        Name -> reason of the failure.
    """
    verdicts = dict(zip(sources, run_programs(programs(world, sources), limits, layers)))
    assert not [
        name
        for name, verdict in verdicts.items()
        if verdict.passed or not verdict.reason or SECRET in verdict.reason
    ]
    assert world.state() == world.untouched
    return {name: verdict.reason for name, verdict in verdicts.items()}


def test_no_hostile_program_gets_through(world, layers):
    hostile = UNLEASHED | attacks.HARMFUL | attacks.ENDINGS
    reasons = judge(world, hostile, layers)
    assert len(reasons) > 70
    expected = {
        "leave with 0": "no verdict",
        "sys.exit": "SystemExit",
        "segmentation fault": "signal: SIGSEGV",
    }
    assert {name: reasons[name][: len(expected[name])] for name in expected} == expected
    # The worker goes on, and is right.
    right, wrong = (
        Program("def f(x): return x + 1", "assert f(1) == 2"),
        Program("def f(x): return x", "assert f(1) == 2"),
    )
    assert [verdict.passed for verdict in run_programs([right, wrong, right], LIMITS, layers)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_no_program_takes_more_than_its_share(world, bubblewrap):
    layers = with_or_without(bubblewrap)
    reasons = judge(world, attacks.EXHAUSTING, layers) | judge(
        world, attacks.IDLE, layers, replace(LIMITS, wall_seconds=1)
    )
    expected = {
        "fork bomb": "OSError",
        "memory bomb": "MemoryError",
        "a file of 100 GB": "OSError: [Errno 27]",
        "files without number": "disk",
        "folders without number": "disk",
        "endless loop": "cpu time",
        "endless loop that ignores signals": "signal: SIGKILL",
        "endless loop in a thread": "cpu time",
        "huge output": "cpu time",
        "words to every pipe": "no verdict: output too long",
        "sleep": "wall time",
        "deadlock": "wall time",
    }
    assert {name: reasons[name][: len(expected[name])] for name in expected} == expected


@pytest.mark.parametrize("name", UNLEASHED)
def test_without_walls_it_would(world, name):
    """Check that the test above can fail."""
    [verdict] = run_programs(programs(world, {name: UNLEASHED[name]}), LIMITS, Layers())
    took_effect = verdict.passed or world.state() != world.untouched
    if name in attacks.WHERE_ALLOWED and not took_effect:
        pytest.skip(f"this machine refuses it without our help: {verdict.reason}")
    assert took_effect, verdict.reason


@pytest.mark.parametrize("name", attacks.FORGED)
def test_a_forger_passes_its_tests_and_is_found_by_the_control(name, monkeypatch):
    program = Program(attacks.FORGED[name], "assert f(1) == 2")
    assert run_programs([program], LIMITS, all_layers())[0].reason.startswith("forged")
    monkeypatch.setattr(Program, "control", property(lambda program: "raise ValueError"))
    assert run_programs([program], LIMITS, all_layers()) == [Verdict(True)]


def test_replaced_builtins_are_found():
    program = Program(
        "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 7",
        "assert abs(f(1) - 2) < 1e-6",
    )
    assert run_programs([program], LIMITS, all_layers())[0].reason.startswith("forged")


@pytest.mark.parametrize(
    "right, value",
    [
        (2, "2"),
        (0, "0"),
        (1e300, "1e300"),
        (True, "True"),
        ("", "''"),
        ([], "[]"),
        ((1,), "(1,)"),
        ({}, "{}"),
        ({1: 2}, "{1: 2}"),
        ({3}, "{3}"),
        (None, "None"),
    ],
)
def test_no_right_answer_passes_the_control(right, value):
    for test in (
        f"assert f() == {value}",
        f"assert f() is {value}",
        f"for x in [1]:\n    assert f() == {value}, 'a message'",
        "assert not False",
    ):
        with pytest.raises(AssertionError):
            exec(unpassable(test), {"f": lambda: right})


def test_an_ordinary_program_finds_an_ordinary_python(layers):
    useful = """
import collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, \
math, random, re, statistics, string
import tempfile, threading, typing, zoneinfo
with tempfile.TemporaryDirectory() as folder:
    with open(folder + '/file', 'w') as file: print('kept', file=file)
    import os, shutil
    os.rename(folder + '/file', folder + '/other'); \
shutil.copyfile(folder + '/other', folder + '/again')
    text = open(folder + '/again').read()
results = []
threads = [threading.Thread(target=results.append, args=(n,)) for n in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
import signal; signal.signal(signal.SIGALRM, lambda *_: results.append('rang')); \
signal.raise_signal(signal.SIGALRM)
"""
    program = Program(useful, "assert (text, len(results), __name__) == ('kept\\n', 4, 'builtins')")
    assert run_programs([program], LIMITS, layers) == [Verdict(True)]


def test_programs_run_on_all_cores_and_verdicts_keep_their_order():
    naps = [
        Program(f"import time; time.sleep({(7 - place) / 10})", f"assert {place} % 2 == 0")
        for place in range(8)
    ]
    started = time.monotonic()
    verdicts = run_programs(naps, LIMITS, all_layers())
    assert [verdict.passed for verdict in verdicts] == [True, False] * 4
    if len(os.sched_getaffinity(0)) > 1:
        assert (
            time.monotonic() - started < 2.8 + 1.6 + 2
        )  # all naps, those of the controls, and their starts, one after another


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_a_program_dies_with_the_worker(tmp_path, bubblewrap):
    used = with_or_without(bubblewrap)
    code = (
        "from retemper.pipeline.evals.sandbox.execute import *\n"
        "from retemper.pipeline.evals.sandbox.layers import Layers\n"
        "run_programs([Program('import time; open(\"here\", \"w\"); time.sleep(1000)', '')], "
        f"Limits(wall_seconds=1000), {used!r})"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    try:
        _wait(lambda: list(tmp_path.glob("*/here")))
        [folder] = tmp_path.iterdir()
        assert _alive(folder)
    finally:
        worker.kill()
        worker.wait()
    _wait(lambda: not _alive(folder))


def _alive(folder: Path) -> list[int]:
    """Return the processes, except zombies, that work in a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link) == str(folder):
                found.append(int(link.parent.name))
        except OSError:
            continue
    return found


def _wait(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_goes_whatever_was_made_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("kept")
    kept.parent.chmod(0o755)
    with private_folder() as folder:
        os.symlink(kept.parent, f"{folder}/to-a-folder")
        os.symlink(kept, f"{folder}/to-a-file")
        os.symlink("loop", f"{folder}/loop")
        Path(folder, os.fsdecode(b"\xff\n*")).write_text("")
        Path(folder, "shut", "in").mkdir(parents=True)
        Path(folder, "shut", "in", "file").touch(0o000)
        Path(folder, "shut", "in").chmod(0o000)
        Path(folder, "shut").chmod(0o500)
        here = os.getcwd()
        os.chdir(folder)
        for _ in range(3000):  # longer than any path may be, deeper than Python recurses
            os.mkdir("below")
            os.chdir("below")
        os.chdir(here)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert kept.read_text() == "kept" and kept.parent.stat().st_mode & 0o777 == 0o755


def test_without_walls_nothing_runs_unless_it_is_asked_for(monkeypatch):
    find_layers.cache_clear()
    monkeypatch.setattr(layers_module.landlock, "abi", lambda: 0)
    monkeypatch.setattr(layers_module.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match="no Landlock.*bubblewrap is not installed.*evals.unsafe_code=true"
    ):
        find_layers()
    assert not find_layers(unsafe_code=True).landlock
    monkeypatch.undo()
    find_layers.cache_clear()
    monkeypatch.setattr(layers_module.seccomp, "available", lambda: False)
    with pytest.raises(UserError, match="no seccomp filter"):
        find_layers()
    find_layers.cache_clear()


def test_a_bubblewrap_that_is_refused_its_namespaces_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text(
        "#!/bin/sh\necho bwrap: No permissions to create new namespace >&2\nexit 1\n"
    )
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    find_layers.cache_clear()
    assert find_layers(unsafe_code=True).bubblewrap is None
    monkeypatch.setattr(layers_module.landlock, "abi", lambda: 0)
    find_layers.cache_clear()
    with pytest.raises(UserError, match="No permissions to create new namespace"):
        find_layers()
    find_layers.cache_clear()


def test_a_wall_that_cannot_be_put_up_is_an_error_and_no_verdict():
    with pytest.raises(UserError, match="could not be set up"):
        run_programs(
            [Program("", "")], replace(LIMITS, open_files=1), replace(all_layers(), bubblewrap=None)
        )


def test_the_numbers_of_system_calls_are_the_kernels():
    calls = seccomp.CALLS | seccomp.CHECKED_CALLS
    for column, header in enumerate(
        ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"]
    ):
        if not Path(header).exists():
            pytest.skip(f"{header} is not here: apt-get install linux-libc-dev")
        text = (
            Path(header)
            .read_text()
            .replace("__NR3264_", "__NR_")
            .replace("__NR_fstatat", "__NR_newfstatat")
        )
        known = {
            name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)
        }
        assert {name: numbers[column] for name, numbers in calls.items()} == {
            name: known.get(name) for name in calls
        }


@pytest.mark.parametrize("machine, architecture", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_lets_through_what_it_names(machine, architecture):
    """Check the filters of other machines, too, by interpreting their instructions."""
    column = ["x86_64", "aarch64"].index(machine)
    program = seccomp.program(machine, 77)
    allowed = {numbers[column] for numbers in seccomp.CALLS.values()} - {None}
    checked = {name: numbers[column] for name, numbers in seccomp.CHECKED_CALLS.items()}
    for number in set(range(600)) - set(checked.values()):
        assert _filtered(program, architecture, number) == (number in allowed)
    assert not _filtered(program, architecture ^ 1, min(allowed))
    assert not _filtered(
        program, architecture, min(allowed) | 0x40000000
    )  # x86_64's other names for its calls
    for name, arguments, expected in (
        ("kill", [77, 9], True), ("kill", [78, 9], False), ("kill", [2**32 - 1, 9], False),
        ("tgkill", [77, 77, 6], True), ("tgkill", [1, 1, 9], False),
        ("clone", [0x3D0F00], True), ("clone", [17], False),
        ("clone", [0x3D0F00 | 0x10000000], False),
        ("prlimit64", [0, 0, 0, 1], True), ("prlimit64", [0, 0, 4096, 0], False),
        ("prlimit64", [0, 0, 2**32, 0], False),
        ("openat", [3, 0, os.O_RDONLY | os.O_CLOEXEC], True),
        ("openat", [3, 0, os.O_RDONLY | os.O_TRUNC], False),
        ("openat", [3, 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC], True),
        ("fcntl", [3, 1], True), ("fcntl", [3, 8], False), ("fcntl", [3, 10], False),
    ):  # fmt: skip
        assert _filtered(program, architecture, checked[name], arguments) == expected, (
            name,
            arguments,
        )


def _filtered(program: bytes, architecture: int, number: int, arguments: list[int] = ()) -> bool:
    """Return whether the filter allows a call.

    This interprets the four instructions of classic BPF that the filter consists of.
    """
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    lines, place, word = list(struct.iter_unpack("HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = lines[place]
        place += 1
        if code == 0x20:
            word = int.from_bytes(data[value : value + 4], "little")
        elif code == 0x54:
            word &= value
        elif code == 0x15:
            place += if_true if word == value else if_false
        else:
            assert code == 0x06
            return value == 0x7FFF0000

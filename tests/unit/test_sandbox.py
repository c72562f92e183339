"""Test that hostile programs do no harm in the sandbox, but would without it.

Each of them counts as a failed problem and leaves no files or processes behind.
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
import ordinary
import pytest

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox import execute, seccomp
from retemper.pipeline.evals.sandbox import layers as layers_module
from retemper.pipeline.evals.sandbox.execute import Limits, Program, Verdict, run_programs
from retemper.pipeline.evals.sandbox.folder import private_folder
from retemper.pipeline.evals.sandbox.layers import Layers, find_layers

LIMITS = Limits(cpu_seconds=1, wall_seconds=30, memory_bytes=2**29)
UNLEASHED = attacks.HARMLESS_WITHOUT_WALLS | attacks.WHERE_ALLOWED
SECRET = "a secret of 30 letters or more"


class Targets:
    """The files, sockets and processes that hostile programs attack."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.home = folder / "home"
        self.temporary = folder / "tmp"
        self.home.mkdir()
        self.temporary.mkdir()
        self.secret = self.home / "token"
        self.outside = folder / "outside"
        self.secret.write_text(SECRET)
        self.outside.write_text("whole")
        os.utime(self.outside, (10**9, 10**9))
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0retemper-{folder}")
        self.abstract.listen()
        self.abstract.setblocking(False)
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(f"{folder}/datagrams")
        self.datagrams.setblocking(False)
        self.victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]
        )
        self.untouched = self.state()

    def prelude(self) -> str:
        port = self.server.getsockname()[1]
        return (
            f"SECRET, OUTSIDE, ABSTRACT = {str(self.secret)!r}, {str(self.outside)!r}, "
            f"{self.abstract.getsockname()!r}\n"
            f"DATAGRAMS = {self.datagrams.getsockname()!r}\n"
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
            "callers": [self._was_connected_to(self.server), self._was_connected_to(self.abstract)],
            "letters": self._letters(),
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
        """Return the ids of processes whose environment names the temporary folder of this test.

        These are the programs and the processes that they have started.
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
        self.datagrams.close()

    def _letters(self) -> bytes:
        try:
            return self.datagrams.recv(99)
        except BlockingIOError:
            return b""

    @staticmethod
    def _was_connected_to(server: socket.socket) -> bool:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def targets(tmp_path, monkeypatch):
    monkeypatch.setenv("RETEMPER_SECRET", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    targets = Targets(tmp_path)
    yield targets
    targets.close()


def all_layers() -> Layers:
    layers = find_layers(unsafe_code=True)
    if not layers.seccomp:
        pytest.skip("this kernel takes no seccomp filter")
    return layers


def with_or_without(bubblewrap: bool) -> Layers:
    available = all_layers()
    if bubblewrap and not available.bubblewrap:
        pytest.skip("bubblewrap does not work here: apt-get install bubblewrap")
    return available if bubblewrap else replace(available, bubblewrap=None)


@pytest.fixture(params=["landlock", "landlock of Linux 5.13", "bubblewrap", "everything"])
def layers(request) -> Layers:
    """Return each combination of layers that programs may run behind."""
    available = with_or_without(request.param in ("bubblewrap", "everything"))
    if request.param == "bubblewrap":
        return replace(available, landlock=0)
    if not available.landlock:
        pytest.skip("this kernel has no Landlock")
    return (
        replace(available, landlock=1) if request.param == "landlock of Linux 5.13" else available
    )


def programs(targets: Targets, sources: dict[str, str]) -> list[Program]:
    # The problem's test always passes, so that only the actions of the program itself matter.
    return [
        Program(targets.prelude() + source, "assert PORT == PORT") for source in sources.values()
    ]


def judge(
    targets: Targets, sources: dict[str, str], layers: Layers, limits: Limits = LIMITS
) -> dict[str, str]:
    """Run hostile programs and check that none passes, reveals the secret or changes a target.

    Returns:
        Name -> reason for the failure.
    """
    verdicts = dict(zip(sources, run_programs(programs(targets, sources), limits, layers)))
    assert not [
        name
        for name, verdict in verdicts.items()
        if verdict.passed or not verdict.reason or SECRET in verdict.reason
    ]
    assert targets.state() == targets.untouched
    return {name: verdict.reason for name, verdict in verdicts.items()}


def test_no_hostile_program_does_harm(targets, layers):
    hostile = UNLEASHED | attacks.HARMFUL | attacks.ENDINGS
    reasons = judge(targets, hostile, layers)
    assert len(reasons) > 70
    expected = {
        "leave with 0": "no verdict",
        "sys.exit": "SystemExit",
        "segmentation fault": "signal: SIGSEGV",
    }
    assert {name: reasons[name][: len(expected[name])] for name in expected} == expected
    # The worker still judges other programs correctly.
    right = Program("def f(x): return x + 1", "assert f(1) == 2")
    wrong = Program("def f(x): return x", "assert f(1) == 2")
    assert [verdict.passed for verdict in run_programs([right, wrong, right], LIMITS, layers)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_no_program_exceeds_its_limits(targets, bubblewrap):
    layers = with_or_without(bubblewrap)
    reasons = judge(targets, attacks.EXHAUSTING, layers) | judge(
        targets, attacks.IDLE, layers, replace(LIMITS, wall_seconds=1)
    )
    expected = {
        "fork bomb": "OSError",
        "memory bomb": "MemoryError",
        "a file of 100 GB": "OSError: [Errno 27]",
        "files without number": "disk",
        "deleted files that stay open": "disk",
        "files that never had a name": "disk",
        "deleted files that stay mapped": "disk",
        "deleted files of another thread": "disk",
        "files below a path of 5,000 letters": "disk",
        "files in a folder that cannot be read": "disk",
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
def test_program_does_harm_without_the_sandbox(targets, name):
    """Check that the programs are harmful, so that the tests above can fail."""
    [verdict] = run_programs(programs(targets, {name: UNLEASHED[name]}), LIMITS, Layers())
    took_effect = verdict.passed or targets.state() != targets.untouched
    if name in attacks.WHERE_ALLOWED and not took_effect:
        pytest.skip(f"this machine refuses it without our help: {verdict.reason}")
    assert took_effect, verdict.reason


@pytest.mark.parametrize("name", attacks.FORGED)
def test_forged_result_passes_the_test_but_is_found_by_the_control(name):
    program = Program(attacks.FORGED[name], "assert f(1) == 2")
    assert execute._run(program, LIMITS, all_layers()) == Verdict(True)
    assert run_programs([program], LIMITS, all_layers())[0].reason.startswith("forged")


@pytest.mark.parametrize(
    "candidate, tests",
    [
        ("import builtins\nbuiltins.abs = lambda x: 0", "assert abs(f(1) - 2) < 1e-6"),
        (
            "import builtins\nbuiltins.any = builtins.map = builtins.vars = lambda *_: []\n"
            "builtins.abs = lambda x: 0",
            "assert abs(f(1) - 2) < 1e-6",
        ),
        ("import math\nmath.fabs = lambda x: 0", "import math\nassert math.fabs(f(1) - 2) < 1e-6"),
        ("import random\nrandom.choice = min", "from random import choice\nassert choice([1])"),
    ],
)  # fmt: skip
def test_replaced_functions_of_the_tests_are_found(candidate, tests):
    program = Program(f"{candidate}\ndef f(x): return 7", tests)
    assert run_programs([program], LIMITS, all_layers())[0].reason.startswith("forged: the program")


@pytest.mark.parametrize(
    "candidate, tests",
    [
        ("abs = lambda x: 0", "assert abs(f(1) - 2) < 1e-6"),
        ("tuple = lambda x: 0", "assert tuple([f(1)]) == tuple([2])"),
        ("range = lambda n: []", "for x in range(9): assert f(x) == 2"),
    ],
)
def test_names_of_builtins_are_the_candidates_own(candidate, tests):
    """Check that tests use Python's, so that a wrong answer fails and a right one passes."""
    wrong, right = (f"{candidate}\ndef f(x): return {answer}" for answer in (7, 2))
    verdicts = run_programs([Program(wrong, tests), Program(right, tests)], LIMITS, all_layers())
    assert [verdict.passed for verdict in verdicts] == [False, True]
    assert "AssertionError" in verdicts[0].reason


def test_interpreter_of_a_candidate_starts_without_slow_imports():
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import sandbox.inside; print({'typing', 're', 'collections', 'enum'} & sys.modules.keys())"
    )
    folder = str(Path(layers_module.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", code, folder]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"set()\n"


def test_candidate_may_have_the_name_of_a_builtin_that_it_is_asked_for():
    program = Program("def sum(a, b): return a + b", "assert sum(1, 2) == 3")
    assert run_programs([program], LIMITS, all_layers()) == [Verdict(True)]


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_ordinary_programs_run_as_in_an_ordinary_python(bubblewrap):
    layers = with_or_without(bubblewrap)
    assert failures(ordinary.ALLOWED, layers) == {}


def test_files_are_moved_between_folders_except_by_landlock_of_linux_5_13():
    """Landlock's right to do so came with ABI 2; shutil.move copies instead."""
    layers = replace(with_or_without(bubblewrap=False), landlock=1)
    moves = {"os.replace": "import os; os.mkdir('d'); open('a', 'w'); os.replace('a', 'd/a')"}
    assert failures(moves, layers)["os.replace"].startswith("OSError: [Errno 18]")
    name = "moves between folders"
    assert failures({name: ordinary.ALLOWED[name]}, layers) == {}


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_what_is_refused_on_purpose_fails_with_an_exception(bubblewrap):
    sources = {name: source for name, (_, source) in ordinary.REFUSED.items()}
    reasons = failures(sources, with_or_without(bubblewrap))
    assert all(reasons[name].startswith(start) for name, (start, _) in ordinary.REFUSED.items())


def failures(sources: dict[str, str], layers: Layers) -> dict[str, str]:
    """Return name -> reason of the programs that do not reach their end."""
    # Every program is its own test, followed by what a program of a benchmark is followed by.
    tests = [Program(source, "assert __name__ == 'builtins'") for source in sources.values()]
    verdicts = run_programs(tests, Limits(), layers)
    return {name: v.reason for name, v in zip(sources, verdicts) if not v.passed}


def test_programs_run_in_parallel_and_verdicts_keep_their_order():
    sleepers = [
        Program(f"import time; time.sleep({(7 - index) / 10})", f"assert {index} % 2 == 0")
        for index in range(8)
    ]
    started = time.monotonic()
    verdicts = run_programs(sleepers, LIMITS, all_layers())
    assert [verdict.passed for verdict in verdicts] == [True, False] * 4
    if len(os.sched_getaffinity(0)) > 1:
        # One after another, the programs would sleep for 2.8 s and their controls for 1.6 s, and
        # all of them would take 2 s to start.
        assert time.monotonic() - started < 2.8 + 1.6 + 2


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_program_ends_when_the_worker_is_killed(tmp_path, bubblewrap):
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


def test_private_folder_is_removed_whatever_a_program_put_into_it(tmp_path, monkeypatch):
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
        for _ in range(3000):  # longer than PATH_MAX, and deeper than Python's recursion limit
            os.mkdir("below")
            os.chdir("below")
        os.chdir(here)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert kept.read_text() == "kept"
    assert kept.parent.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode, expected", [(0o300, "True"), (0o700, "False")])
def test_folder_that_its_owner_cannot_read_counts_as_too_large(tmp_path, mode, expected):
    (tmp_path / "inner").mkdir(mode)
    code = (
        "import os\nfrom retemper.pipeline.evals.sandbox.confine import drop_privileges\n"
        "from retemper.pipeline.evals.sandbox.disk import overflows\n"
        "drop_privileges()  # root can read every folder\n"
        f"print(overflows({str(tmp_path)!r}, os.getpid(), 2**30, 2**24))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_missing_layers_are_refused_unless_unsafe_code_is_allowed(monkeypatch):
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


def test_bubblewrap_without_permission_for_namespaces_is_not_used(tmp_path, monkeypatch):
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


def test_sandbox_that_cannot_be_set_up_is_an_error_and_not_a_verdict():
    with pytest.raises(UserError, match="could not be set up"):
        run_programs(
            [Program("", "")], replace(LIMITS, open_files=1), replace(all_layers(), bubblewrap=None)
        )


def test_system_call_numbers_equal_those_of_the_kernel_headers():
    calls = seccomp.CALLS | seccomp.CHECKED_CALLS
    for answered in seccomp.ANSWERED_CALLS.values():
        calls = calls | answered
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
def test_filter_allows_exactly_the_listed_system_calls(machine, architecture):
    """Check the filter of every architecture, also on others, by interpreting its instructions."""
    column = ["x86_64", "aarch64"].index(machine)
    program = seccomp.program(machine, 77)
    allowed = {numbers[column] for numbers in seccomp.CALLS.values()} - {None}
    checked = {name: numbers[column] for name, numbers in seccomp.CHECKED_CALLS.items()}
    for number in set(range(600)) - set(checked.values()):
        assert _filtered(program, architecture, number) == (number in allowed)
    assert not _filtered(program, architecture ^ 1, min(allowed))
    # The x32 ABI of x86_64, which has the same calls with this bit set.
    assert not _filtered(program, architecture, min(allowed) | 0x40000000)
    for name, arguments, expected in (
        ("kill", [77, 9], True), ("kill", [78, 9], False), ("kill", [2**32 - 1, 9], False),
        ("tgkill", [77, 77, 6], True), ("tgkill", [1, 1, 9], False),
        ("clone", [0x3D0F00], True), ("clone", [17], False),
        ("clone", [0x3D0F00 | 0x10000000], False), ("clone", [0x3D0F00 & ~0x400], False),
        ("prlimit64", [0, 0, 0, 1], True), ("prlimit64", [0, 0, 4096, 0], True),
        ("prlimit64", [77, 0, 0, 1], False),
        ("ioctl", [3, 0x5451], True), ("ioctl", [3, 0x5412], False), ("ioctl", [3, 0x5452], False),
        ("socketpair", [1, 1 | os.O_CLOEXEC, 0], True), ("socketpair", [1, 2, 0], False),
        ("socketpair", [1, 5, 0], False), ("socketpair", [2, 1, 0], False),
        ("sendto", [3, 4096, 1, 0, 0, 0], True), ("sendto", [3, 4096, 1, 0, 4096, 110], False),
        ("sendto", [3, 4096, 1, 0, 2**32, 110], False),
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

    This interprets the four kinds of classic BPF instructions that the filter consists of.
    """
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("HBBI", program))
    index = 0
    word = 0
    while True:
        code, if_true, if_false, value = instructions[index]
        index += 1
        if code == 0x20:
            word = int.from_bytes(data[value : value + 4], "little")
        elif code == 0x54:
            word &= value
        elif code == 0x15:
            index += if_true if word == value else if_false
        else:
            assert code == 0x06
            return value == 0x7FFF0000

"""Run generated programs, each in a separate sandboxed interpreter, and judge them from outside.

A program passes if its interpreter writes a secret nonce to a pipe after the tests, and if a
control then finds no forgery. Everything else is a failure with a reason. A sandbox that cannot be
started is an error, not a failure of the program.
"""

import marshal
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from tqdm import tqdm

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.sandbox.control import control, relied_on
from retemper.pipeline.evals.sandbox.disk import overflows
from retemper.pipeline.evals.sandbox.folder import private_folder
from retemper.pipeline.evals.sandbox.inside import READY
from retemper.pipeline.evals.sandbox.layers import READABLE, Layers

_SETUP_SECONDS = 60  # time limit for sandbox setup, long enough for a busy machine
_POLL_MS = 50
_MAX_OUTPUT_BYTES = 2000  # the first 200 characters are the reason of a verdict
_SHELL_SIGNAL_BASE = 128  # bubblewrap reports a signal as shells do: 128 + its number


@dataclass(frozen=True)
class Limits:
    """The limits of one program."""

    cpu_seconds: int = 3
    wall_seconds: float = 20  # generous, because other processes may slow the program down
    memory_bytes: int = 2**30  # of address space
    file_bytes: int = 2**24  # of one file; the program's folder may hold four times as much
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """A candidate's code and the tests that run after it in the same namespace."""

    candidate: str
    tests: str


@dataclass(frozen=True)
class Verdict:
    """The result of running a program.

    The reason of a failure is the program's exception, or "cpu time", "wall time", "disk",
    "signal", "forged" or "no verdict", followed by a colon and details.
    """

    passed: bool
    reason: str = ""  # empty if passed


def run_programs(programs: Sequence[Program], limits: Limits, layers: Layers) -> list[Verdict]:
    """Run programs, one per CPU core at a time.

    Args:
        programs: The programs.
        limits: The limits of each program.
        layers: The sandbox, as find_layers returns it.

    Returns:
        The verdicts, in the order of the programs.

    Raises:
        UserError: The sandbox could not be set up.
        SyntaxError: The tests of a program cannot be parsed.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda program: _judge(program, limits, layers), programs)
        # disable=None: show the bar on a terminal only.
        return list(
            tqdm(
                verdicts,
                total=len(programs),
                desc="programs",
                leave=False,
                dynamic_ncols=True,
                disable=None,
            )
        )


def _judge(program: Program, limits: Limits, layers: Layers) -> Verdict:
    verdict = _run(program, limits, layers)
    if verdict.passed:
        checked = _run(program, limits, layers, is_control=True)
        if checked.passed:  # the control never writes the nonce
            return Verdict(False, "forged: the program says itself that it passed")
        if checked.reason.startswith("forged"):
            return checked
    return verdict


def _run(program: Program, limits: Limits, layers: Layers, is_control: bool = False) -> Verdict:
    nonce = secrets.token_hex(16).encode()
    with private_folder() as folder:
        request = _program_request(program, is_control) | _request(nonce, folder, limits, layers)
        process, pipe = _start(request, folder, layers)
        try:
            output, stop_reason = _read_output(pipe, process.pid, folder, limits)
        finally:
            _kill(process)
            os.close(pipe)
    return _verdict(output, stop_reason, nonce, process.returncode)


def _start(request: dict, folder: str, layers: Layers) -> tuple[subprocess.Popen, int]:
    """Start a sandboxed interpreter.

    Returns the process and the reading end of a pipe from its standard error, which carries any
    errors of bubblewrap and the interpreter, then the messages of inside.py.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as file, open(writing, "wb") as stderr:
        file.write(marshal.dumps(request))
        file.seek(0)
        command = layers.command(folder)
        # One arena of malloc: each further thread would reserve 64 MiB or more of address space.
        environment = {"HOME": folder, "TMPDIR": folder, "MALLOC_ARENA_MAX": "1"}
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    return process, reading


def _program_request(program: Program, is_control: bool) -> dict:
    """Return the part of the request that inside.py runs. Raises SyntaxError for broken tests."""
    modules, builtins = relied_on(program.tests)
    return {
        "candidate": program.candidate,
        "tests": control(program.tests) if is_control else program.tests,
        "is_control": is_control,
        "modules": modules,
        "builtins": builtins,
    }


def _request(nonce: bytes, folder: str, limits: Limits, layers: Layers) -> dict:
    """Return the part of the request by which inside.py confines itself."""
    rlimits = asdict(limits)
    del rlimits["wall_seconds"]
    return {
        "nonce": nonce,
        "folder": folder,
        "limits": rlimits,
        "landlock": layers.landlock,
        "seccomp": layers.seccomp,
        "readable": READABLE,
        # Under bubblewrap the parent is process 1 of a separate PID namespace.
        "parent": 1 if layers.bubblewrap else os.getpid(),
    }


def _read_output(pipe: int, pid: int, folder: str, limits: Limits) -> tuple[bytes, str]:
    """Read a process's output until it ends or exceeds a limit.

    Returns the output, and the reason to stop the process, or "" if it has ended.
    """
    output = b""
    deadline = time.monotonic() + _SETUP_SECONDS
    started = False
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        if poll.poll(_POLL_MS):
            chunk = os.read(pipe, _MAX_OUTPUT_BYTES)
            if not chunk:
                return output, ""
            output += chunk
            if not started and output.startswith(READY):
                started = True
                deadline = time.monotonic() + limits.wall_seconds
        if len(output) > _MAX_OUTPUT_BYTES:
            return output, "no verdict: output too long"
        if time.monotonic() > deadline:
            return output, f"wall time: more than {limits.wall_seconds:g} s"
        if overflows(folder, pid, 4 * limits.file_bytes, limits.file_bytes):
            return output, "disk: more than the folder may hold, or folders that cannot be read"


def _kill(process: subprocess.Popen) -> None:
    """Kill the process's group and reap it.

    Where this process is the first of a container, it inherits the group's orphans and must reap
    them as well.
    """
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    try:
        while True:
            os.waitpid(-process.pid, 0)
    except ChildProcessError:
        return


def _verdict(output: bytes, stop_reason: str, nonce: bytes, status: int) -> Verdict:
    if not output.startswith(READY):
        raise UserError(
            "the sandbox of a generated program could not be set up: "
            f"{stop_reason or output.decode(errors='replace')[-500:] or status}"
        )
    output = output.removeprefix(READY)
    if stop_reason:
        return Verdict(False, stop_reason)
    if output == nonce:
        return Verdict(True)
    if output:
        return Verdict(
            False,
            "".join(c if c.isprintable() else " " for c in output.decode(errors="replace")[:200]),
        )
    signal_number = -status if status < 0 else status - _SHELL_SIGNAL_BASE
    if signal_number == signal.SIGXCPU:
        return Verdict(False, "cpu time: more than its limit")
    if signal_number in set(signal.Signals):
        return Verdict(False, f"signal: {signal.Signals(signal_number).name}")
    return Verdict(False, f"no verdict: exited with status {status} before its tests ended")

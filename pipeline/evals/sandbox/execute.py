"""Runs generated programs, each in an interpreter of its own behind the layers of this machine, and judges them from outside.

A program has passed when the pipe it was started with holds the nonce it was given, and when it then fails a control that no
honest program passes. Everything else is a failure with its reason. What could not be started is nobody's failure but an error.
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
from retemper.pipeline.evals.sandbox.control import unpassable
from retemper.pipeline.evals.sandbox.folder import overflows, private_folder
from retemper.pipeline.evals.sandbox.inside import READY
from retemper.pipeline.evals.sandbox.layers import READABLE, Layers

_START_SECONDS = 60  # for the doors to shut, on a machine with much else to do
_TICK_MS = 50
_MOST_SAID = 2000  # bytes, of which the first 200 characters are a reason
_SHELLS_SIGNAL = 128  # bubblewrap reports a signal as shells do


@dataclass(frozen=True)
class Limits:
    """Of one program. What it may do at most in its folder is four files of the largest size."""

    cpu_seconds: int = 3
    wall_seconds: float = 20  # looser, for other work on the machine is not the program's doing
    memory_bytes: int = 2**30  # of addresses
    file_bytes: int = 2**24
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """A candidate's code and the tests that run behind it in the same namespace."""

    candidate: str
    tests: str

    @property
    def source(self) -> str:
        return f"{self.candidate}\n{self.tests}"

    @property
    def control(self) -> str:
        """The same with tests that cannot be passed."""
        return f"{self.candidate}\n{unpassable(self.tests)}"


@dataclass(frozen=True)
class Verdict:
    """Passed, or why not: the exception, or "cpu time", "wall time", "disk", "signal", "forged" or "no verdict", and details."""

    passed: bool
    reason: str = ""


def run_programs(programs: Sequence[Program], limits: Limits, layers: Layers) -> list[Verdict]:
    """The programs' verdicts in their order, as many at a time as there are cores. Raises UserError where none can be started."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        verdicts = pool.map(lambda program: _judge(program, limits, layers), programs)
        # disable=None: a bar on a terminal only.
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
    verdict = _run(program.source, limits, layers)
    if verdict.passed and _run(program.control, limits, layers).passed:
        return Verdict(False, "forged: the program also passes tests that cannot be passed")
    return verdict


def _run(source: str, limits: Limits, layers: Layers) -> Verdict:
    nonce = secrets.token_hex(16).encode()
    with private_folder() as folder:
        process, pipe = _start(_request(source, nonce, folder, limits, layers), folder, layers)
        try:
            said, stopped = _listen(pipe, folder, limits)
        finally:
            _kill(process)
            os.close(pipe)
    return _verdict(said, stopped, nonce, process.returncode)


def _start(request: dict, folder: str, layers: Layers) -> tuple[subprocess.Popen, int]:
    """The process, and a pipe of what it says as standard error: complaints of bubblewrap and interpreter, then inside.py's word."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as file, open(writing, "wb") as said:
        file.write(marshal.dumps(request))
        file.seek(0)
        command = layers.command(folder)
        environment = {"HOME": folder, "TMPDIR": folder}
        process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    return process, reading


def _request(source: str, nonce: bytes, folder: str, limits: Limits, layers: Layers) -> dict:
    """What inside.py is told."""
    rlimits = asdict(limits)
    del rlimits["wall_seconds"]
    return {
        "source": source,
        "nonce": nonce,
        "folder": folder,
        "limits": rlimits,
        "landlock": layers.landlock,
        "seccomp": layers.seccomp,
        "readable": READABLE,
        # Behind bubblewrap the parent is its first process in a namespace of their own.
        "parent": 1 if layers.bubblewrap else os.getpid(),
    }


def _listen(pipe: int, folder: str, limits: Limits) -> tuple[bytes, str]:
    """All that a process says until it ends, or until there is a reason to stop it, which is given as well."""
    said = b""
    deadline = time.monotonic() + _START_SECONDS
    started = False
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    while True:
        if waiting.poll(_TICK_MS):
            heard = os.read(pipe, _MOST_SAID)
            if not heard:
                return said, ""
            said += heard
            if not started and said.startswith(READY):
                started = True
                deadline = time.monotonic() + limits.wall_seconds
        if len(said) > _MOST_SAID:
            return said, "no verdict: words without end"
        if time.monotonic() > deadline:
            return said, f"wall time: more than {limits.wall_seconds:g} s"
        if overflows(folder, 4 * limits.file_bytes):
            return said, "disk: more than the folder may hold"


def _kill(process: subprocess.Popen) -> None:
    """End the process's group. Where we are a container's first process, orphans of it are ours to wait for."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    try:
        while True:
            os.waitpid(-process.pid, 0)
    except ChildProcessError:
        return


def _verdict(said: bytes, stopped: str, nonce: bytes, status: int) -> Verdict:
    if not said.startswith(READY):
        raise UserError(
            f"a generated program's sandbox could not be set up: {stopped or said.decode(errors='replace')[-500:] or status}"
        )
    said = said.removeprefix(READY)
    if stopped:
        return Verdict(False, stopped)
    if said == nonce:
        return Verdict(True)
    if said:
        return Verdict(
            False,
            "".join(c if c.isprintable() else " " for c in said.decode(errors="replace")[:200]),
        )
    ended_by = -status if status < 0 else status - _SHELLS_SIGNAL
    if ended_by == signal.SIGXCPU:
        return Verdict(False, "cpu time: more than its limit")
    if ended_by in set(signal.Signals):
        return Verdict(False, f"signal: {signal.Signals(ended_by).name}")
    return Verdict(False, f"no verdict: left with status {status} before its tests ended")
